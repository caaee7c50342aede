"""Resources as data."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distilldsm.cli.main import main
from distilldsm.core.errors import ConfigError
from distilldsm.pipeline.cluster import Profile, Storage, load_cluster, quantity

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"profiles": {"p": {}}, "stages": {"default": "p"}}


def written(path: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), ("4", 4.0), ("1.5", 1.5), ("2Gi", 2 * 1024**3), ("3M", 3e6), ("1Ti", 1024**4)]
)
def test_quantities(text, value):
    assert quantity(text, "x") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "4 Gi", "Gi", "-1", "4GB", "1e3"])
def test_what_is_no_quantity(text):
    with pytest.raises(ConfigError, match="quantity"):
        quantity(text, "x")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"profiles": {"p": {"cpu": "65"}}}, r"profiles.p.cpu.*exceeds the limit"),
        ({"profiles": {"p": {"memory": "513Gi"}}}, r"memory.*exceeds the limit"),
        ({"profiles": {"p": {"accelerator": "nvidia.com/gpu", "accelerators": 9}}}, "exceeds the limit"),
        ({"profiles": {"p": {"accelerators": 1}}}, "belong together"),
        ({"profiles": {"p": {"shared_memory": "8Gi", "memory": "4Gi"}}}, "exceeds"),
        ({"profiles": {"p": {"cpu": "4", "cpu_limit": "2"}}}, "below"),
        ({"profiles": {"p": {"env": {"AWS_SECRET_ACCESS_KEY": "x"}}}}, "looks like a secret"),
        ({"profiles": {"p": {"volumes": [{"claim": "c", "path": "work"}]}}}, "not absolute"),
        ({"profiles": {"p": {"tolerations": [{"key": "k", "operator": "Equal"}]}}}, "'value'"),
        ({"profiles": {"p": {"memroy": "4Gi"}}}, "did you mean 'memory'"),
        ({"profiles": {"p": {"retries": -1}}}, r"profiles\.p\.retries(.|\n)*at least 0"),
        ({"stages": {"default": "q"}}, "is not a known profile"),
        ({"stages": {"default": "p", "training": "p"}}, "is not a step"),
        ({"stages": {}}, "default"),
        ({"storage": {"bucket": "team"}}, "not the address of a bucket"),
        ({"storage": {"mlflow_tracking_uri": "http://u:p@mlflow"}}, "user or password"),
    ],
)
def test_impossible_clusters(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        load_cluster(written(tmp_path / "c.yaml", **changes))


def test_limits_may_be_raised(tmp_path):
    path = written(tmp_path / "c.yaml", profiles={"p": {"cpu": "65"}}, limits={"cpu": "128"})
    assert load_cluster(path).profile("train") == Profile(cpu="65")


def test_one_bucket_for_three_services():
    storage = Storage(bucket="s3://team/x/")
    assert [storage.address(s) for s in ("kfp", "dvc", "mlflow")] == [
        "s3://team/x/kfp",
        "s3://team/x/dvc",
        "s3://team/x/mlflow",
    ]
    assert Storage().address("kfp") is None


def test_the_bucket_becomes_dvcs_remote_and_kfps_root(tmp_path, monkeypatch, capsys):
    import subprocess

    path = written(
        tmp_path / "c.yaml",
        storage={"bucket": "s3://team/x", "endpoint_url": "http://minio:9000", "mlflow_tracking_uri": "http://ml:5000"},
    )
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    subprocess.run(["dvc", "init", "--no-scm", "-q"], check=True)
    assert main(["pipeline", "storage", "--cluster", str(path), "--apply"]) == 0
    assert "s3://team/x/mlflow" in capsys.readouterr().out
    config = (tmp_path / ".dvc" / "config").read_text()
    assert "url = s3://team/x/dvc" in config
    assert "endpointurl = http://minio:9000" in config

    assert main(["pipeline", "compile", "--cluster", str(path), "-o", str(tmp_path / "p.yaml")]) == 0
    spec = next(yaml.safe_load_all((tmp_path / "p.yaml").read_text()))
    assert spec["defaultPipelineRoot"] == "s3://team/x/kfp"
    env = {e["name"]: e["value"] for e in spec["deploymentSpec"]["executors"]["exec-train"]["container"]["env"]}
    assert env["MLFLOW_TRACKING_URI"] == "http://ml:5000"
    assert env["MLFLOW_S3_ENDPOINT_URL"] == env["AWS_ENDPOINT_URL"] == "http://minio:9000"


def test_storage_without_a_bucket(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["pipeline", "storage"]) == 2
    assert "storage.bucket" in capsys.readouterr().err
