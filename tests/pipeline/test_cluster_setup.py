"""The real Kubernetes client, against a server that keeps a ConfigMap and a Deployment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from distilldsm.cli import doctor
from distilldsm.cli.main import main
from distilldsm.pipeline.cluster import load_cluster
from distilldsm.pipeline.cluster_setup import RETRY_PATCH, launcher_config
from tests.http_answers import answering

ROOT = Path(__file__).resolve().parents[2]
S3 = {"bucket": "s3://team/x", "endpoint_url": "http://minio.store:9000", "region": "eu-1"}


class Kubernetes:
    """One namespace `ns` with config maps by name, and KFP's deployment in `kubeflow`."""

    def __init__(self) -> None:
        self.maps: dict[str, dict] = {}
        self.patch = json.dumps({"templateDefaults": {}})
        self.groups: list[str] = []
        self.denied: set[tuple[str, str]] = set()
        self.asked: list[dict] = []
        self.may_ask = True

    def __call__(self, method, target, headers, body):
        path = target.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith("/api/v1/namespaces/ns/configmaps"):
            if method == "POST":
                self.maps[json.loads(body)["metadata"]["name"]] = json.loads(body)
            elif method == "PATCH" and name in self.maps:
                self.maps[name]["data"] |= json.loads(body)["data"]
            found = self.maps.get(name, json.loads(body) if body else None)
            if found is not None:
                return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
        if path == "/apis/apps/v1/namespaces/kubeflow/deployments/ml-pipeline":
            env = [{"name": "COMPILED_PIPELINE_SPEC_PATCH", "value": self.patch}]
            pod = {"spec": {"containers": [{"name": "ml-pipeline-api-server", "env": env}]}}
            spec = {"selector": {}, "template": pod}
            found = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {}, "spec": spec}
            return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
        if path == "/apis/":
            versions = [{"groupVersion": "v1", "version": "v1"}]
            groups = [{"name": one, "versions": versions} for one in self.groups]
            return 200, {"Content-Type": "application/json"}, json.dumps({"groups": groups}).encode()
        if path == "/apis/authorization.k8s.io/v1/subjectaccessreviews":
            if not self.may_ask:
                return 403, {"Content-Type": "application/json"}, b'{"reason": "Forbidden"}'
            spec = json.loads(body)["spec"]
            self.asked.append(spec)
            what = spec["resourceAttributes"]
            allowed = (what["verb"], what["resource"]) not in self.denied
            answer = {"spec": spec, "status": {"allowed": allowed}}
            return 201, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        return 404, {"Content-Type": "application/json"}, b'{"reason": "NotFound"}'


@pytest.fixture
def kubernetes(tmp_path, monkeypatch):
    found = Kubernetes()
    with answering(found) as url:
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "k", "cluster": {"server": url}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        }  # fmt: skip
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setenv("KF_PIPELINES_NAMESPACE", "ns")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "conf").mkdir()
        values = yaml.safe_load((ROOT / "conf" / "cluster.yaml").read_text())
        (tmp_path / "conf" / "cluster.yaml").write_text(yaml.safe_dump({**values, "storage": S3}))
        yield found


def test_kfp_reaches_a_bucket_that_is_not_on_aws(kubernetes):
    manifest = launcher_config(load_cluster("conf/cluster.yaml"), "our-s3")
    assert manifest is not None
    assert manifest["data"]["defaultPipelineRoot"] == "s3://team/x/kfp"
    assert yaml.safe_load(manifest["data"]["providers"])["s3"]["default"] == {
        "endpoint": "minio.store:9000", "region": "eu-1", "disableSSL": True, "forcePathStyle": True,
        "credentials": {
            "fromEnv": False,
            "secretRef": {"secretName": "our-s3", "accessKeyKey": "accesskey", "secretKeyKey": "secretkey"},
        },
    }  # fmt: skip
    assert launcher_config(load_cluster(ROOT / "conf" / "cluster.yaml")) is None


def test_doctor_names_what_the_cluster_lacks_and_the_command_that_adds_it(kubernetes, monkeypatch, capsys):
    bucket, retries = doctor.check_cluster(5)
    assert "no ConfigMap kfp-launcher" in bucket.seen
    assert bucket.hint == "distilldsm pipeline storage --apply --namespace ns"
    assert "have no effect" in retries.seen
    assert json.loads(str(retries.hint).partition("'")[2].rstrip("'")) == RETRY_PATCH
    monkeypatch.setattr("distilldsm.pipeline.dvc_file.run_dvc", lambda *_: None)
    (kubernetes.patch, words) = (json.dumps(RETRY_PATCH), str(bucket.hint).split()[1:])
    kubernetes.maps["kfp-launcher"] = {"data": {"other": "stays", "providers": ""}, "metadata": {}}
    for done in ("changed", "unchanged"):
        assert main([*words, "--params", str(ROOT / "params.yaml")]) == 0
        assert f"namespace ns: {done}" in capsys.readouterr().out
    assert kubernetes.maps["kfp-launcher"]["data"]["other"] == "stays"
    del kubernetes.maps["kfp-launcher"]
    assert main([*words, "--params", str(ROOT / "params.yaml")]) == 0
    assert "namespace ns: created" in capsys.readouterr().out
    (found,) = doctor.check_cluster(5)
    assert found.status == "ok"


def test_doctor_asks_what_the_pods_may_do_with_trainjobs(kubernetes):
    """Only where Kubeflow Trainer is installed, and for everything that the shipped Role allows."""
    kubernetes.patch, kubernetes.denied = json.dumps(RETRY_PATCH), {("create", "trainjobs"), ("get", "pods")}
    kubernetes.maps["kfp-launcher"] = {"data": {"providers": "s3"}, "metadata": {}}
    shutil.copyfile(ROOT / "conf" / "trainjob-role.yaml", "conf/trainjob-role.yaml")
    assert [found.status for found in doctor.check_cluster(5)] == ["ok"]
    assert kubernetes.asked == [], "without Kubeflow Trainer there are no TrainJobs"
    kubernetes.groups = ["trainer.kubeflow.org"]
    (found,) = doctor.check_cluster(5)
    account = "system:serviceaccount:ns:pipeline-runner"
    assert found.seen == f"{account} may not create trainjobs, get pods, get pods/log"
    assert found.hint == "kubectl apply -n ns -f conf/trainjob-role.yaml"
    assert {spec["user"] for spec in kubernetes.asked} == {account}
    log = {"resource": "pods", "subresource": "log", "verb": "get", "namespace": "ns"}
    runtimes = {"group": "trainer.kubeflow.org", "resource": "clustertrainingruntimes", "verb": "list"}
    asked = [spec["resourceAttributes"] for spec in kubernetes.asked]
    assert log in asked
    assert runtimes in asked, "of no namespace"
    kubernetes.denied = set()
    assert [found.status for found in doctor.check_cluster(5)] == ["ok"]
    kubernetes.may_ask = False
    (found,) = doctor.check_cluster(5)
    assert found.seen.startswith("you may not ask")


def test_kubernetes_that_is_away_is_an_error_line(kubernetes, monkeypatch, capsys):
    text = Path("kubeconfig").read_text()
    Path("kubeconfig").write_text(
        text.replace(yaml.safe_load(text)["clusters"][0]["cluster"]["server"], "http://127.0.0.1:9")
    )
    monkeypatch.setattr("distilldsm.pipeline.dvc_file.run_dvc", lambda *_: None)
    words = ["pipeline", "storage", "--apply", "--namespace", "ns", "--params", str(ROOT / "params.yaml")]
    assert main(words) == 1
    assert "Kubernetes does not answer" in capsys.readouterr().err


def test_the_list_of_images(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["pipeline", "images", "--image-train", "r/t:1"]) == 0
    assert "r/t:1" in capsys.readouterr().out.splitlines()
