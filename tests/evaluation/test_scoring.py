"""Scoring the masks of a fold: each case once, with and without its smaller components, and the tables of DVC."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from distilldsm.config import EvaluateConfig
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, write_json
from distilldsm.core.hashes import finish
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.data.targets import Targets, regions_from_labels
from distilldsm.evaluation import scoring

LABELS = {"background": 0, "necrosis": 1, "oedema": 2, "enhancing": 4}


def scored(tmp_path, wanted: dict[str, list[str]]) -> tuple[dict, dict]:
    """Rows as predicted and with the largest components, by name, of a mask with two false components."""
    truth = np.zeros((12, 10, 8), dtype=np.uint8)
    truth[1:7, 1:7, 1:7], truth[2:5, 2:5, 2:5], truth[2:4, 2:4, 2:4] = 2, 1, 4
    mask = truth.copy()
    mask[9:11, 8, 1], mask[9:11, 8, 2] = 2, 4  # one false component of two labels
    for name, array in (("truth", truth), ("mask", mask)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    targets = Targets(tuple(LABELS), tuple(LABELS.values()), regions_from_labels(wanted, LABELS))
    scoring.score_file(tmp_path / "truth.nii.gz", tmp_path / "mask.nii.gz", targets, 1.0, tmp_path / "scores.json")
    found = read_json(tmp_path / "scores.json")
    return tuple({row["label"]: row for row in found[key]} for key in ("rows", "largest"))


def test_what_is_cut_off_the_outermost_region_is_lost_to_all(tmp_path):
    wanted = {"WT": ["oedema", "necrosis", "enhancing"], "TC": ["necrosis", "enhancing"], "ET": ["enhancing"]}
    raw, largest = scored(tmp_path, wanted)
    assert list(raw) == list(largest) == ["WT", "TC", "ET"]
    assert all(row["dice"] < 1 for row in raw.values())
    assert [row["dice"] for row in largest.values()] == [1, 1, 1]


def test_regions_that_share_no_label_are_treated_as_labels_are(tmp_path):
    raw, largest = scored(tmp_path, {name: [name] for name in ("necrosis", "oedema", "enhancing")})
    labels = scored(tmp_path, {})
    for found, expected in zip((raw, largest), labels, strict=True):
        assert {name: found[name] for name in expected} == expected
    assert raw["oedema"] != largest["oedema"]


def test_regions_without_an_outermost_one_stay_as_they_are(tmp_path):
    raw, largest = scored(tmp_path, {"a": ["oedema", "necrosis"], "b": ["oedema"], "c": ["enhancing"]})
    assert raw == largest


def test_labels_are_confused_as_the_masks_are(tmp_path):
    scored(tmp_path, {})
    truth, mask = (np.asarray(nib.load(tmp_path / f"{name}.nii.gz").dataobj) for name in ("truth", "mask"))
    values = tuple(LABELS.values())
    expected = [[int(((truth == a) & (mask == b)).sum()) for b in values] for a in values]
    assert read_json(tmp_path / "scores.json")["confusion"] == expected


CASES = tuple(Case(id=name, patient=f"p-{name}", images=(f"{name}.nii.gz",), label="label.nii.gz") for name in "abc")
INDEX = DatasetIndex(
    name="Cubes",
    channels=(Channel(name="T1", modality="MRI"),),
    labels={"background": 0, "outer": 1, "inner": 4},
    cases=CASES,
)


class Shifted:
    """Predicts the truth, one voxel further; remembers what it was asked for."""

    def __init__(self, truth: np.ndarray) -> None:
        self.truth, self.asked = truth, 0

    def predict(self, _scan) -> SimpleNamespace:
        self.asked += 1
        return SimpleNamespace(mask=np.roll(self.truth, 1, axis=0))


def test_what_is_predicted_or_scored_is_not_done_again(tmp_path, monkeypatch):
    truth = np.zeros((10, 8, 6), dtype=np.uint8)
    truth[2:6, 2:6, 1:5], truth[3:5, 3:5, 2:4] = 1, 4
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    for name, array in {"label": truth, **dict.fromkeys("abc", truth.astype(np.float32))}.items():
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    for folder in ("scores", "timing", "predictions"):
        (tmp_path / folder).mkdir()
    scores, mask, timing = (tmp_path / name for name in ("scores/a.json", "predictions/b.nii.gz", "timing/b.json"))
    write_json(scores, {"kept": True})
    finish(tmp_path, "scores/a", scores)
    nib.save(nib.Nifti1Image(truth, affine), mask)
    write_json(timing, {})
    finish(tmp_path, "predictions/b", mask, timing)
    predictor = Shifted(truth)
    monkeypatch.setattr(scoring, "_predictor", lambda *_: predictor)
    targets = Targets(INDEX.class_names, (0, 1, 4), ())
    config = EvaluateConfig(workers=1)
    arguments = (config, [tmp_path / "model"], tmp_path, tmp_path, CASES, INDEX, targets)
    scoring.score_all(*arguments)
    assert predictor.asked == 1
    assert read_json(tmp_path / "scores" / "a.json") == {"kept": True}
    dice = {
        name: [row["dice"] for row in read_json(tmp_path / "scores" / f"{name}.json")["rows"]] for name in ("b", "c")
    }
    shifted = np.roll(truth, 1, axis=0)
    expected = [2 * ((truth == v) & (shifted == v)).sum() / (2 * (truth == v).sum()) for v in (1, 4)]
    assert dice == {"b": [1.0, 1.0], "c": pytest.approx(expected)}
    (row, _) = read_json(tmp_path / "scores" / "c.json")["rows"]
    assert row["volume_truth_ml"] == pytest.approx((truth == 1).sum() * 2 / 1000), "voxels of 2 mm by 1 mm by 1 mm"
    assert read_json(tmp_path / "timing" / "c.json")["seconds"] >= 0
    scoring.score_all(*arguments)
    assert predictor.asked == 1
    (tmp_path / "timing" / "c.json").unlink()
    (tmp_path / "scores" / "c.json").unlink()
    scoring.score_all(*arguments)
    assert predictor.asked == 2, "a mask without its time is predicted again"


def test_rows_name_case_and_patient():
    scores = {name: {"rows": [{"label": "outer", "dice": k}]} for k, name in enumerate("abc")}
    rows = scoring.with_names(CASES, scores, "rows")
    assert rows[1] == {"case": "b", "patient": "p-b", "label": "outer", "dice": 1}
    assert [row["case"] for row in rows] == ["a", "b", "c"]


def test_the_networks_of_an_ensemble_differ(tmp_path):
    models = [tmp_path / str(k) for k in (1, 2, 3)]
    for model, weights in zip(models, ("x", "y", "x"), strict=True):
        model.mkdir()
        facts = {"name": "unet2d", "options": {}, "parameters": 5, "epochs": 2}
        write_json(model / "model.json", facts)
        (model / "last.safetensors").write_text(weights)
        write_json(model / "manifest.json", {"files": {"last.safetensors": weights}, "config": {"seed": weights}})
    scoring.check_all_differ(models[:2])
    with pytest.raises(DataError, match=rf"3: is in the ensemble twice(.|\n)*the same content as {models[0]}"):
        scoring.check_all_differ(models)
    network = {"name": "unet2d", "options": {}, "parameters": 5}
    assert scoring.recipes(models[:2]) == {
        "1": network | {"train": {"seed": "x"}},
        "2": network | {"train": {"seed": "y"}},
    }


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_dvc_draws_these_tables(tmp_path):
    history = [
        {"epoch": 1, "train_loss": 0.5, "learning_rate": 0.1},
        {"epoch": 2, "train_loss": 0.25, "learning_rate": 0.05, "val_dice": {"outer": 0.5}, "val_dice_mean": 0.375},
    ]
    row = {"case": "a", "label": "outer", "dice": 0.5, "hd95_mm": 2.0, "nsd": 0.75, "volume_truth_ml": 3.0}
    confusion = ([[90, 10, 0], [0, 3, 1], [0, 0, 0]], [[100, 0, 0], [0, 4, 0], [0, 0, 0]])
    scores = {name: {"confusion": one} for name, one in zip("ab", confusion, strict=True)}
    scoring.write_plots(tmp_path, [row], history, scores, INDEX)
    first, second = table(tmp_path / "history.csv")
    assert first == {"epoch": "1", "train_loss": "0.5", "val_dice_mean": "", "learning_rate": "0.1"}
    assert second["val_dice_mean"] == "0.375"
    assert table(tmp_path / "dice_by_epoch.csv") == [{"epoch": "2", "label": "outer", "dice": "0.5"}]
    by_case = {"case": "a", "label": "outer", "dice": "0.5", "hd95_mm": "2", "volume_truth_ml": "3"}
    assert table(tmp_path / "dice_by_case.csv") == [by_case]
    # Of 200 background voxels 10 are outer, of 8 outer ones 1 is inner; there is no inner one.
    pairs = Counter((one["actual"], one["predicted"]) for one in table(tmp_path / "confusion.csv"))
    assert pairs == {
        ("background", "background"): 950,
        ("background", "outer"): 50,
        ("outer", "outer"): 875,
        ("outer", "inner"): 125,
    }
