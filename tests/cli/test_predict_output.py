"""Where `distilldsm predict` writes: a file or a directory, and volumes of regions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.cli.main import main
from distilldsm.core.files import read_json
from distilldsm.data.plan import Plan
from distilldsm.data.targets import Region, Targets
from distilldsm.inference.predict import volumes_ml
from tests.cli.test_predict import files, predict, write_scan
from tests.cli.test_predict_averages import changed
from tests.export.fake import exported


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return exported(tmp_path_factory).export


def test_a_file_name_for_several_scans_is_refused(model, tmp_path, capsys):
    scans = tmp_path / "scans"
    a = write_scan(scans, ("a_0000.nii.gz", "a_0001.nii.gz"))
    b = write_scan(scans, ("b_0000.nii.gz", "b_0001.nii.gz"))
    for given, name in (([scans], "two.nii.gz"), ([*a, *b], "two.nii"), ([a[0], b[1]], "mask.dcm")):
        assert predict(model, given, tmp_path / name) == 2
        told = capsys.readouterr().err
        assert "is a file name, but there are 2 scans\n  seen: a, b\n  hint: give a directory" in told
        assert not (tmp_path / name).exists()


def test_a_folder_of_one_scan_becomes_a_file_or_a_directory_as_named(model, tmp_path):
    folder = write_scan(tmp_path / "scans", ("a_0000.nii.gz", "a_0001.nii.gz"))[0].parent
    assert predict(model, [folder], tmp_path / "one.nii.gz") == 0
    assert nib.load(tmp_path / "one.nii.gz").shape == (23, 31, 9)
    assert predict(model, [folder], tmp_path / "masks") == 0
    assert files(tmp_path / "masks") == {"a.nii.gz"}


def test_a_directory_for_scans_that_all_fail_is_not_left_empty(model, tmp_path):
    a, b = (write_scan(tmp_path, (f"{name}_0000.nii.gz",))[0] for name in "ab")
    assert predict(model, [a, b], tmp_path / "masks") == 1
    assert not (tmp_path / "masks").exists()
    (tmp_path / "mine").mkdir()
    assert predict(model, [a, b], tmp_path / "mine") == 1
    assert (tmp_path / "mine").is_dir()


def test_probabilities_do_not_share_a_name_with_a_mask(model, tmp_path, capsys):
    for name in ("a", "a_probabilities"):
        write_scan(tmp_path / "scans", (f"{name}_0000.nii.gz", f"{name}_0001.nii.gz"))
    assert predict(model, [tmp_path / "scans"], tmp_path / "masks", "--probabilities") == 2
    assert "a_probabilities.nii.gz: is the name of a mask and of probabilities" in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()


def test_regions_are_shown_and_their_volumes_told(model, tmp_path, capsys):
    plain = Plan.load(model / "plan.json")
    assert main(["plan", str(model)]) == 0
    assert "regions" not in capsys.readouterr().out
    assert main(["info", str(model)]) == 0
    assert "regions" not in capsys.readouterr().out
    # A region for each channel of the network; the last is called as a label of other voxels.
    regions = [
        {"name": "whole", "values": [1, 2], "written_as": 1},
        {"name": "inner", "values": [2], "written_as": 2},
        {"name": "shell", "values": [2, 1], "written_as": 1},
    ]
    other = changed(model, tmp_path / "model", plan={"regions": regions}, regions=regions)
    shown = "whole (shell, core); inner (core); shell (core, shell)"
    assert main(["plan", str(other)]) == 0
    assert f"regions             {shown}\n" in capsys.readouterr().out
    assert main(["info", str(other)]) == 0
    assert f"regions     {shown}\n" in capsys.readouterr().out

    scan, out, table = write_scan(tmp_path, ("a.nii", "b.nii")), tmp_path / "mask.nii", tmp_path / "volumes.csv"
    assert predict(other, scan, out, "--json", "--volumes", str(table)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["regions"] == {"whole": [1, 2], "inner": [2], "shell": [2, 1]}
    mask = np.asarray(nib.load(out).dataobj)
    voxel_ml = 0.8 * 0.9 * 3.0 / 1000
    expected = {"shell": [1], "core": [2], "whole": [1, 2], "inner": [2], "shell (region)": [1, 2]}
    volumes = report["scans"][0]["volume_ml"]
    assert list(volumes) == list(expected)
    for name, values in expected.items():
        assert volumes[name] == pytest.approx(np.isin(mask, values).sum() * voxel_ml, abs=1e-3)
    with open(table, newline="") as stream:
        assert [row["label"] for row in csv.DictReader(stream)] == list(expected)
    assert predict(model, scan, out, "--json") == 0
    assert "regions" not in json.loads(capsys.readouterr().out)
    assert read_json(model / "plan.json")["class_names"] == list(plain.class_names)


def test_a_region_of_one_label_with_its_name_is_told_once():
    regions = (Region(name="whole", values=(1, 2), written_as=1), Region(name="core", values=(2,), written_as=2))
    targets = Targets(("background", "label_1", "core"), (0, 1, 2), regions)
    assert volumes_ml(targets, [100, 20, 5], 0.001) == {"label_1": 0.02, "core": 0.005, "whole": 0.025}


def test_volumes_that_cannot_be_written_are_told_before_a_scan_is_read(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    out = tmp_path / "mask.nii.gz"
    scan = write_scan(tmp_path / "scans", ("a_0000.nii.gz", "a_0001.nii.gz"))
    assert predict(model, scan, out, "--volumes", str(tmp_path / "v.csv")) == 1
    assert f"error: {tmp_path}/v.csv: cannot be written\n" in capsys.readouterr().err
    assert not out.exists()
