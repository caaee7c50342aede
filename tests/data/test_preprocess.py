"""Fingerprint, plan, splits, arrays: from volumes on disk to what training reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.cli.main import main
from distilldsm.components.preprocess import run
from distilldsm.config import PreprocessConfig
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.files import read_json, write_json
from distilldsm.core.output_directory import file_hashes
from distilldsm.data.dataset import Channel, DatasetIndex
from distilldsm.data.fingerprint import fingerprint_case
from distilldsm.data.plan import Plan
from distilldsm.data.preprocess import foreground_locations, preprocess_dataset
from tests.data.volumes import affine, write_case, write_dataset


def test_fingerprint_in_ras_order(tmp_path: Path):
    case = write_case(tmp_path, "a", shape=(6, 8, 10), matrix=affine("SLA", (3.0, 1.0, 2.0)))
    index = DatasetIndex(
        name="x",
        channels=(Channel(name="c", modality="MRI"),),
        labels={"background": 0, "shell": 1, "core": 2},
        cases=(case,),
    )
    found = fingerprint_case(tmp_path, case, index)
    assert found.shape == (8, 10, 6)
    assert found.spacing_mm == pytest.approx((1.0, 2.0, 3.0))
    label = np.asarray(nib.load(tmp_path / case.label).dataobj)
    assert found.label_volumes_ml["core"] == pytest.approx((label == 2).sum() * 6 / 1000)


def test_the_median_shape_is_that_of_the_cropped_arrays(tmp_path: Path):
    index = write_dataset(tmp_path, cases=5, shape=(12, 20, 16))
    for written in index.cases:
        image = nib.load(tmp_path / written.images[0])
        data = image.get_fdata(dtype=np.float32)
        data[0] = data[:, -3:] = 0
        nib.save(nib.Nifti1Image(data, image.affine), tmp_path / written.images[0])
    made = preprocess_dataset(tmp_path, index, PreprocessConfig(workers=1), tmp_path / "out")
    arrays = [np.load(p) for p in sorted((tmp_path / "out" / "images").iterdir())]
    assert made.median_shape == tuple(np.median([a.shape[1:] for a in arrays], axis=0))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    output = tmp_path_factory.mktemp("preprocessed")
    index = write_dataset(root, cases=6, channels=2)
    plan = preprocess_dataset(root, index, PreprocessConfig(folds=3, workers=1), output)
    return root, index, output, plan


def test_arrays_for_training(prepared):
    _, index, output, plan = prepared
    assert Plan.load(output / "plan.json") == plan
    assert plan.depth_axis == "x"
    assert not (output / ".fingerprint").exists()
    for case in index.cases:
        image = np.load(output / "images" / f"{case.id}.npy", mmap_mode="r")
        label = np.load(output / "labels" / f"{case.id}.npy", mmap_mode="r")
        assert image.dtype == np.float16
        assert image.shape == (2, *label.shape)
        assert set(np.unique(label)) == {0, 1, 2}
        # Bright structures stay on their labels through every orientation.
        assert image[0][label == 2].mean() > image[0][label == 1].mean() > image[0][label == 0].mean()
        locations = np.load(output / "locations" / f"{case.id}.npy")
        assert all(label[tuple(row[1:])] == row[0] for row in locations)
    assert len(read_json(output / "splits.json")["folds"]) == 3
    assert read_json(output / "fingerprint.json")["cases"] == 6


def test_workers_and_resuming_do_not_change_a_byte(prepared, tmp_path: Path, monkeypatch):
    root, index, output, _ = prepared
    config = PreprocessConfig(folds=3, workers=2)
    target = tmp_path / "again"
    import distilldsm.data.preprocess as module

    original = module._preprocess
    calls = []

    def dies_after_three(*task):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(task)
        original(*task)

    monkeypatch.setattr(module, "_preprocess", dies_after_three)
    with pytest.raises(KeyboardInterrupt):
        preprocess_dataset(root, index, PreprocessConfig(folds=3, workers=1), target)
    monkeypatch.setattr(module, "_preprocess", original)
    assert len(list((target / "cases").glob("*.json"))) == 3
    preprocess_dataset(root, index, config, target)
    assert file_hashes(target) == file_hashes(output)


def test_all_damaged_cases_are_named(tmp_path: Path):
    index = write_dataset(tmp_path, cases=5)
    (tmp_path / index.cases[1].images[0]).write_bytes(b"no nifti")
    label = nib.load(tmp_path / index.cases[3].label)
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj) * 4, label.affine), tmp_path / index.cases[3].label)
    with pytest.raises(DataError) as caught:
        preprocess_dataset(tmp_path, index, PreprocessConfig(workers=1), tmp_path / "out")
    message = str(caught.value)
    assert "2 case(s) failed" in message
    assert "case_01" in message
    assert "case_03" in message
    assert "does not declare" in message


def test_a_plan_of_ones_own_is_used_and_checked(prepared, tmp_path: Path):
    root, index, _, _ = prepared
    mine = read_json(prepared[2] / "plan.json")
    mine["patch_size"] = [4, 32, 32]
    write_json(tmp_path / "mine.json", mine)
    config = PreprocessConfig(folds=3, workers=1, plan=str(tmp_path / "mine.json"))
    assert preprocess_dataset(root, index, config, tmp_path / "out").patch_size == (4, 32, 32)
    other = [
        {"class_values": [0, 1, 7]},
        {"class_names": [mine["class_names"][k] for k in (0, 2, 1)]},
        {"channels": mine["channels"][::-1]},
    ]
    for changes in other:
        write_json(tmp_path / "mine.json", mine | changes)
        with pytest.raises(ConfigError, match="another data set"):
            preprocess_dataset(root, index, config, tmp_path / "out2")
    write_json(tmp_path / "mine.json", mine)
    with pytest.raises(ConfigError, match="other regions"):
        preprocess_dataset(
            root, index, replace(config, regions={"all": ("shell", "core"), "core": ("core",)}), tmp_path / "out2"
        )
    mine["patch"] = 1
    write_json(tmp_path / "mine.json", mine)
    with pytest.raises(ConfigError, match="unknown parameter 'patch'"):
        preprocess_dataset(root, index, config, tmp_path / "out3")


def test_intensities_that_training_cannot_store_are_refused(tmp_path: Path):
    """Prediction would not clip them: the network would see another range than it was trained with."""
    index = write_dataset(tmp_path, cases=5)
    image = nib.load(tmp_path / index.cases[2].images[0])
    nib.save(nib.Nifti1Image(image.get_fdata() * 1e6, image.affine), tmp_path / index.cases[2].images[0])
    with pytest.raises(DataError, match=r"case_02(.|\n)*too large(.|\n)*65000"):
        preprocess_dataset(tmp_path, index, PreprocessConfig(workers=1, normalisation="none"), tmp_path / "out")
    preprocess_dataset(tmp_path, index, PreprocessConfig(workers=1), tmp_path / "out2")


def test_stage_uses_only_accepted_cases_and_leaves_the_input(tmp_path: Path):
    index = write_dataset(tmp_path / "raw", cases=6)
    accepted = [c.id for c in index.cases[:5]]
    write_json(tmp_path / "accepted.json", {"accepted": accepted})
    before = file_hashes(tmp_path / "raw")
    run(
        PreprocessConfig(workers=1),
        {"dataset": tmp_path / "raw", "validation": tmp_path},
        {"preprocessed": tmp_path / "out"},
    )
    assert sorted(p.stem for p in (tmp_path / "out" / "images").iterdir()) == accepted
    assert file_hashes(tmp_path / "raw") == before
    assert read_json(tmp_path / "out" / "manifest.json")["stage"] == "preprocess"


def test_command_line_reports_what_is_missing(tmp_path: Path, capsys):
    (tmp_path / "params.yaml").write_text("preprocess: {folds: 2}")
    code = main(
        [
            "preprocess",
            "--params",
            str(tmp_path / "params.yaml"),
            "--dataset",
            str(tmp_path),
            "--validation",
            str(tmp_path),
        ]
    )
    assert code == 1
    assert "accepted.json: is missing" in capsys.readouterr().err


def test_foreground_locations_are_bounded_and_right():
    label = np.zeros((20, 30, 40), dtype=np.uint8)
    label[2:18] = 1
    label[0, 0, 0] = 2
    rows = foreground_locations(label, 3)
    assert (rows[:, 0] == 1).sum() == 2000
    assert rows[rows[:, 0] == 2].tolist() == [[2, 0, 0, 0]]
    assert all(label[tuple(r[1:])] == r[0] for r in rows)
    assert foreground_locations(np.zeros((2, 2, 2), dtype=np.uint8), 3).shape == (0, 4)
