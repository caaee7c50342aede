"""`distilldsm predict` on other programs' files: one bad scan never hides the others, nothing is left out silently."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.inference.predict import Predictor
from tests.cli.predicting import files, predict, single_channel, write_scan
from tests.export.fake import Exported, exported
from tests.io.dicom_series import write_series

SHAPE = (12, 20, 18)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Exported:
    return exported(tmp_path_factory)


@pytest.fixture(scope="module")
def single(made, tmp_path_factory) -> Path:
    return single_channel(made.export, tmp_path_factory.mktemp("single") / "model")


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 40, SHAPE).astype(np.int16)


def test_one_series_with_malformed_values_leaves_the_others_done(single, tmp_path, capsys):
    pydicom = pytest.importorskip("pydicom", reason="needs the optional group 'dicom'")
    for name in "abc":
        write_series(tmp_path / "study" / name, volume())
    path = next((tmp_path / "study" / "b").iterdir())
    broken = pydicom.dcmread(path)
    tag = pydicom.tag.Tag("NumberOfFrames")
    broken[tag] = pydicom.dataelem.RawDataElement(tag, "IS", 2, b"1A", 0, False, True)
    with pydicom.config.disable_value_validation():
        broken.save_as(path)
    (tmp_path / "study" / "c" / "notes.txt").write_text("a remark")
    out = tmp_path / "out"
    assert predict(single, [tmp_path / "study"], out, "--format", "nifti", "--json") == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert files(out) == {"a.nii.gz", "c.nii.gz"}
    assert [(row["where"], row["problem"]) for row in report["failures"]] == [
        (str(path), "has a malformed NumberOfFrames")
    ]
    assert [row["skipped"] for row in report["scans"]] == [
        [],
        [{"path": str(tmp_path / "study/c/notes.txt"), "reason": "not DICOM"}],
    ]
    assert "c: left out: notes.txt (not DICOM)" in captured.err


def test_an_unexpected_error_of_one_scan_leaves_the_others_done(single, tmp_path, capsys, monkeypatch):
    write_scan(tmp_path / "in", ("a.nii.gz", "b.nii.gz", "c.nii.gz"))
    real = Predictor.predict

    def fails_for_b(self, scan, **options):
        if scan.path.name.startswith("b"):
            raise KeyError("a mistake of the program")
        return real(self, scan, **options)

    monkeypatch.setattr(Predictor, "predict", fails_for_b)
    assert predict(single, [tmp_path / "in"], tmp_path / "out", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert files(tmp_path / "out") == {"a.nii.gz", "c.nii.gz"}
    (failure,) = report["failures"]
    assert failure["scan"] == "b"
    assert failure["seen"] == "KeyError: 'a mistake of the program'"
    assert failure["where"] == str(tmp_path / "in" / "b.nii.gz")


def test_a_series_that_allows_no_seg_is_refused_before_the_network_runs(single, tmp_path, capsys, monkeypatch):
    pytest.importorskip("highdicom", reason="needs the optional group 'dicom'")
    write_series(tmp_path / "series", volume(), SpecificCharacterSet="nonsense")
    monkeypatch.setattr(Predictor, "predict", lambda *args, **options: pytest.fail("the network ran"))
    assert predict(single, [tmp_path / "series"], tmp_path / "mask.dcm") == 1
    assert f"error: {tmp_path / 'series'}: does not allow a DICOM SEG" in capsys.readouterr().err


def test_headers_that_the_pipeline_reads_are_read(single, tmp_path, capsys):
    """Trailing axes, unused bits, slope 0, another name than content, and conflicting geometry with a remark."""
    (path,) = write_scan(tmp_path, ("scan.nii",), shape=SHAPE)
    content = path.read_bytes()
    header = nib.load(path).header

    def changed(*changes: tuple[int, bytes]) -> bytes:
        out = bytearray(content)
        for start, value in changes:
            out[start : start + len(value)] = value
        return bytes(out)

    axes = np.array([5, *SHAPE, 1, 1, 1, 1], np.int16).tobytes()
    slope = np.array([0, np.nan], np.float32).tobytes()
    conflict = np.array([2, 2, 2], np.float32).tobytes()
    for name, made, remark in (
        ("axes.nii", changed((40, axes)), None),
        ("bits.nii", changed((123, bytes([int(header["xyzt_units"]) | 0b11000000]))), None),
        ("slope.nii", changed((112, slope)), None),
        ("plain.nii.gz", content, None),
        ("packed.nii", gzip.compress(content), None),
        ("sizes.nii", changed((80, conflict), (252, np.int16(0).tobytes())), "pixdim and affine"),
    ):
        (tmp_path / name).write_bytes(made)
        assert predict(single, [tmp_path / name], tmp_path / "mask.nii", "--json") == 0
        captured = capsys.readouterr()
        (row,) = json.loads(captured.out)["scans"]
        assert nib.load(tmp_path / "mask.nii").shape == SHAPE
        assert [remark in text for text in row["remarks"]] == ([True] if remark else [])
        assert (f"{name}: {remark}" in captured.err) == bool(remark) if remark else True


def test_names_that_are_not_utf8_work(single, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (path,) = write_scan(tmp_path, ("scan.nii",), shape=SHAPE)
    path.rename(tmp_path / "in" / os.fsdecode(b"caf\xe9.nii"))
    assert predict(single, [tmp_path / "in"], tmp_path / "out", "--volumes", str(tmp_path / "v.csv")) == 0
    assert "caf\\udce9,shell," in (tmp_path / "v.csv").read_text()
    assert files(tmp_path / "out") == {os.fsdecode(b"caf\xe9.nii.gz")}
    assert "caf\\udce9.nii.gz: shell" in capsys.readouterr().out


def test_a_scan_unlike_the_training_data_is_remarked_on_or_refused(single, tmp_path, capsys, monkeypatch):
    (path,) = write_scan(tmp_path, ("scan.nii",), shape=SHAPE)
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.array(image.dataobj), np.diag([4, 4, 4, 1])), path)
    assert predict(single, [path], tmp_path / "mask.nii", "--json") == 0
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)["scans"]
    assert row["unlike_training"]["voxel size along x (mm)"]["value"] == 4
    (line,) = [line for line in captured.err.splitlines() if "unlike the training data" in line]
    assert line.startswith("scan: unlike the training data, check the mask by eye: ")
    monkeypatch.setattr(Predictor, "predict", lambda *args, **options: pytest.fail("the network ran"))
    assert predict(single, [path], tmp_path / "none.nii", "--strict") == 1
    assert f"error: {path}: is unlike the training data" in capsys.readouterr().err
