"""YAML, archives, headers and journals that mean harm."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from distilldsm.cli.main import main
from distilldsm.components import download
from distilldsm.config import DownloadConfig
from distilldsm.core.errors import DataError, UserError
from distilldsm.core.files import read_json, write_json
from distilldsm.data.dataset import INDEX, DatasetIndex
from distilldsm.io import read_scan
from distilldsm.pipeline.compilation import check_pipeline
from distilldsm.pipeline.lineage import _dvc_lock
from distilldsm.tracking import run_key_of
from distilldsm.tracking.publish import publish
from tests.data.test_archive import member, tar_of
from tests.data.volumes import write_case, write_dataset
from tests.export.fake import CHANNELS
from tests.faults.payloads import told

ROOT = Path(__file__).resolve().parents[2]


def test_the_yaml_payload_is_real(tmp_path, canary):
    yaml.unsafe_load(canary.yaml())
    assert canary.sings
    canary.path.rmdir()


@pytest.mark.parametrize(
    "front", ["download", "stage", "set", "suite", "sweep", "trainjob", "cluster", "preset", "keep"]
)
def test_tags_in_yaml_are_not_carried_out(tmp_path, canary, capsys, monkeypatch, front):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"train:\n  epochs: {canary.yaml()}\n")
    if front == "suite":
        write_dataset(tmp_path / "data/raw", cases=2)
        (tmp_path / "params.yaml").write_text("validate: {suite: evil.yaml, workers: 1}\n")
    if front in ("preset", "keep"):
        shutil.copyfile(evil, tmp_path / "conf/dataset/evil.yaml")
    katib = ["sweep", "--sweep", "conf/sweep.yaml"]
    code = {
        "download": lambda: main(["download", "--params", "evil.yaml"]),
        "stage": lambda: main(["train", "--params", "evil.yaml"]),
        "set": lambda: main(["train", "--set", f"train.epochs={canary.yaml()}"]),
        "suite": lambda: main(["validate"]),
        "sweep": lambda: main(["pipeline", "sweep", "--sweep", "evil.yaml", "local", "--dry-run"]),
        "trainjob": lambda: main(["pipeline", *katib, "katib", "--job", "evil.yaml", "-o", "out.yaml"]),
        "cluster": lambda: main(["pipeline", "compile", "--cluster", "evil.yaml", "-o", "out.yaml"]),
        "preset": lambda: main(["compose", "dataset=evil", "-o", "out.yaml"]),
        "keep": lambda: main(["compose", "--keep", "dataset=evil"]),
    }[front]()
    assert code == 2
    told(capsys.readouterr().err, "conf" if front == "preset" else "--set" if front == "set" else "evil", "seen: ")
    assert not (tmp_path / "out.yaml").exists()


@pytest.mark.parametrize(
    "text", ["a: 2001-99-99", "a: " + "[" * 20_000, "{a: &a [*a]}", "a: !!python/name:os.system ''"]
)
def test_other_yaml_that_breaks_readers(tmp_path, capsys, text):
    (tmp_path / "p.yaml").write_text(text)
    assert main(["download", "--params", str(tmp_path / "p.yaml"), "--output", str(tmp_path / "raw")]) == 2
    told(capsys.readouterr().err, "p.yaml")


def test_a_pipeline_file_and_a_lock_file(tmp_path, canary):
    (tmp_path / "p.yaml").write_text(f"components: {canary.yaml()}\n")
    with pytest.raises(UserError, match=r"p\.yaml"):
        check_pipeline(tmp_path / "p.yaml")
    (tmp_path / "dvc.lock").write_text(f"stages: {canary.yaml()}\n")
    with pytest.raises(UserError, match=r"dvc\.lock(.|\n)*hint"):
        _dvc_lock(tmp_path)


def test_a_preset_cannot_bring_the_environment_into_the_parameters(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-word")
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "conf/dataset/evil.yaml").write_text("tracking:\n  run_name: ${oc.env:MLFLOW_TRACKING_PASSWORD}\n")
    target = tmp_path / "params.yaml"
    assert main(["compose", "dataset=evil", "--conf", str(tmp_path / "conf"), "-o", str(target)]) == 2
    told(capsys.readouterr().err, "refers to another one, or to the environment", "hint: ")
    assert not target.exists()


@pytest.mark.parametrize(
    "evil",
    [member("../outside.txt"), member("link", tarfile.SYMTYPE, "/etc/passwd")],
    ids=lambda info: info.name,
)
def test_a_harmful_archive_ends_the_download(tmp_path, monkeypatch, capsys, evil):
    monkeypatch.chdir(tmp_path)
    tar_of(tmp_path / "x.tar", [(member("good.txt"), b"good"), (evil, b"")])
    (tmp_path / "params.yaml").write_text("download: {source: x.tar}\n")
    assert main(["download"]) == 1
    told(capsys.readouterr().err, "x.tar", evil.name, "rule: ")
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} <= {"x.tar", "params.yaml", "data"}
    assert not (tmp_path / "data/raw").exists()


@pytest.mark.parametrize("name", ["../../secret.nii.gz", "/etc/passwd", "imagesTr/../../secret.nii.gz"])
def test_a_data_set_that_names_files_elsewhere(tmp_path, name):
    write_case(tmp_path / "set", "c0")
    secret = tmp_path / "secret.nii.gz"
    shutil.copyfile(tmp_path / "set/imagesTr/c0_0000.nii.gz", secret)
    case = {"image": name, "label": "labelsTr/c0.nii.gz"}
    labels = {"0": "background", "1": "shell", "2": "core"}
    write_json(tmp_path / "set/dataset.json", {"modality": {"0": "MRI"}, "labels": labels, "training": [case]})
    with pytest.raises(DataError, match="names a file outside the data set"):
        download.run(DownloadConfig(source=str(tmp_path / "set")), {}, {"dataset": tmp_path / "raw"})
    assert secret.is_file()


@pytest.mark.parametrize("changes", [{"id": "../../x"}, {"id": "a/b"}, {"label": "../x"}, {"images": ["/etc/passwd"]}])
def test_an_index_that_names_files_elsewhere(tmp_path, changes):
    write_dataset(tmp_path, cases=2)
    index = read_json(tmp_path / INDEX)
    index["cases"][0] |= changes
    write_json(tmp_path / INDEX, index)
    with pytest.raises(DataError, match=rf"{INDEX}(.|\n)*seen(.|\n)*rule(.|\n)*hint"):
        DatasetIndex.load(tmp_path)


def test_what_a_nifti_header_carries_is_not_looked_at(made, tmp_path, canary):
    case = write_case(tmp_path / "scan", "one", channels=CHANNELS)
    paths = [tmp_path / "scan" / image for image in case.images]
    before = read_scan(paths, CHANNELS).intensities()
    for path in paths:
        image = nib.load(path)
        # 16 is the code that NIfTI's registry gives to "pypickle".
        for code in (0, 4, 6, 16):
            image.header.extensions.append(nib.nifti1.Nifti1Extension(code, canary.pickled()))
        image.header["descrip"] = b"$__import__('os')"
        image.header["aux_file"] = b"../../etc/passwd"
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), path)
        assert canary.pickled() in gzip.decompress(path.read_bytes())
    assert np.array_equal(before, read_scan(paths, CHANNELS).intensities())
    assert main(["predict", str(made.export), *map(str, paths), "-o", str(tmp_path / "mask.nii.gz")]) == 0


@pytest.mark.parametrize("content", ["pickle", "torch"])
def test_a_pickle_is_no_scan(made, tmp_path, canary, capsys, content):
    for suffix in (".nii.gz", ".nii"):
        names = [tmp_path / f"a_{k}{suffix}" for k in range(CHANNELS)]
        for path in names:
            data = canary.pickled(content)
            path.write_bytes(gzip.compress(data) if suffix == ".nii.gz" else data)
        assert main(["predict", str(made.export), *map(str, names), "-o", str(tmp_path / "mask.nii.gz")]) == 1
        told(capsys.readouterr().err, names[0].name)


def test_a_record_is_json_and_nothing_else(tmp_path, canary):
    """What no other file may be sent by it: tests/tracking/test_publish.py."""
    stream = io.BytesIO()
    pickle.dump(canary.evil(), stream)
    for text in (stream.getvalue(), canary.yaml().encode(), b'{"schema_version": ' + b"[" * 100_000, b"[]"):
        (tmp_path / "tracking.json").write_bytes(text)
        outcome = publish(tmp_path)
        assert (outcome.is_complete, len(outcome.problems)) == (False, 1)
        assert run_key_of(tmp_path) is None
