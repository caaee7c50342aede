"""Unusual and broken data sets, through the stages: docs/data.md says what happens to each."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from distilldsm.components import download, evaluate, preprocess, train, validate
from distilldsm.config import DownloadConfig as Source
from distilldsm.config import EvaluateConfig, ModelConfig, Params, PreprocessConfig, TrainConfig, ValidateConfig
from distilldsm.core.errors import ConfigError, DataError, UserError
from distilldsm.core.files import read_json
from distilldsm.data.dataset import INDEX
from tests.data.published import write_published

SMALL = ModelConfig(name="distill_dsm", options={"width": 0.25})


def stages(
    source: Path,
    root: Path,
    *,
    until: str = "evaluate",
    folds: int = 2,
    on_invalid: str = "fail",
    suite: str | Path = "conf/expectations.yaml",
    fold: int = 0,
):
    """Run the stages; returns their directories."""
    at = SimpleNamespace(**{k: root / k for k in ("raw", "validation", "arrays", "model", "scores")})
    params = Params(
        download=Source(source=str(source)),
        validate=ValidateConfig(on_invalid=on_invalid, suite=str(suite), workers=1),
        preprocess=PreprocessConfig(folds=folds, workers=1),
        train=TrainConfig(model=SMALL, epochs=1, batch_size=2),
        evaluate=EvaluateConfig(workers=1),
    )
    download.run(params.download, {}, {"dataset": at.raw})
    validate.run(params.validate, {"dataset": at.raw}, {"validation": at.validation})
    if until == "validate":
        return at
    preprocess.run(params.preprocess, {"dataset": at.raw, "validation": at.validation}, {"preprocessed": at.arrays})
    if until == "preprocess":
        return at
    train.run(params.train, {"preprocessed": at.arrays}, {"model": at.model}, fold=fold)
    inputs = {"dataset": at.raw, "preprocessed": at.arrays, "model": at.model}
    evaluate.run(params.evaluate, inputs, {"evaluation": at.scores}, fold=fold)
    return at


@pytest.fixture(autouse=True)
def _at_home(monkeypatch, repository):
    monkeypatch.chdir(repository)


@pytest.fixture
def source(tmp_path) -> Path:
    return write_published("hippocampus", tmp_path / "source")


def change(path: Path, function, dtype=None) -> None:
    """Write a label anew with its values changed."""
    image = nib.load(path)
    data = function(np.asarray(image.dataobj))
    nib.save(nib.Nifti1Image(data.astype(dtype or data.dtype), image.affine), path)


def labels(source: Path) -> list[Path]:
    return sorted((source / "labelsTr").glob("*.nii.gz"))


def warned(at: SimpleNamespace, rule: str) -> set[str]:
    findings = read_json(at.validation / "report.json")["findings"]
    return {f["case"] for f in findings if f["rule"] == rule and f["severity"] == "warning"}


def test_a_class_that_some_cases_lack_is_scored_where_it_is(source, tmp_path):
    for path in labels(source)[:3]:
        change(path, lambda a: np.where(a == 2, 1, a))
    at = stages(source, tmp_path)
    assert warned(at, "every_label_present") == {f"hippocampus_0{k}" for k in range(3)}
    summary = read_json(at.scores / "summary.json")["labels"]["Posterior"]
    assert summary["sensitivity"]["defined"] < summary["sensitivity"]["cases"]  # undefined without truth
    assert summary["dice"]["defined"] == summary["dice"]["cases"]


def test_an_empty_mask_is_an_error_or_left_out(source, tmp_path):
    change(labels(source)[0], np.zeros_like)
    with pytest.raises(UserError, match="some_foreground"):
        stages(source, tmp_path / "a", until="validate")
    at = stages(source, tmp_path / "b", until="preprocess", on_invalid="exclude")
    splits = read_json(at.arrays / "splits.json")["folds"]
    assert "hippocampus_00" not in {c for fold in splits for c in fold["held_out"]}


@pytest.mark.parametrize("fold", [0, 1])
def test_a_healthy_case_goes_all_the_way_where_the_rule_is_a_warning(source, tmp_path, fold):
    change(labels(source)[0], np.zeros_like)
    suite = yaml.safe_load(Path("conf/expectations.yaml").read_text())
    next(rule for rule in suite["rules"] if rule["rule"] == "some_foreground")["severity"] = "warning"
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    at = stages(source, tmp_path, suite=tmp_path / "suite.yaml", fold=fold)
    assert warned(at, "some_foreground") == {"hippocampus_00"}
    with open(at.scores / "cases.csv") as stream:
        rows = [row for row in csv.DictReader(stream) if row["case"] == "hippocampus_00"]
    held_out = "hippocampus_00" in read_json(at.arrays / "splits.json")["folds"][fold]["held_out"]
    assert len(rows) == (2 if held_out else 0), "it is scored in one fold, and trained on in the other"
    for row in rows:
        found = float(row["volume_predicted_ml"]) > 0
        assert (float(row["dice"]), row["sensitivity"]) == (0.0 if found else 1.0, "")


def declare(source: Path, **more: str) -> None:
    description = read_json(source / "dataset.json")
    description["labels"] |= more
    (source / "dataset.json").write_text(json.dumps(description))


def test_a_label_that_no_case_has_is_a_finding_of_the_data_set(source, tmp_path):
    declare(source, **{"3": "Ghost", "4": "Rare"})
    change(labels(source)[1], lambda a: np.where((a == 2) & (np.arange(a.shape[0]) % 2 == 0)[:, None, None], 4, a))
    at = stages(source, tmp_path)
    found = [f for f in read_json(at.validation / "report.json")["findings"] if f["rule"] == "every_label_somewhere"]
    assert [(f["case"], f["file"], f["seen"], f["severity"]) for f in found] == [(None, INDEX, "Ghost", "warning")]
    assert "take it out of the labels" in found[0]["hint"]
    summary = read_json(at.scores / "summary.json")
    assert summary["labels"].keys() == {"Anterior", "Posterior", "Ghost", "Rare"}
    with open(at.scores / "cases.csv") as stream:
        absent = not any(float(r["volume_predicted_ml"]) for r in csv.DictReader(stream) if r["label"] == "Ghost")
    assert ("Ghost. By the convention its Dice is 1" in (at.scores / "report.html").read_text()) == absent


def test_a_label_of_which_nothing_was_measured_is_not_told_absent(source, tmp_path):
    for path in labels(source):
        path.write_bytes(b"no volume")
    with pytest.raises(UserError, match="readable"):
        stages(source, tmp_path, until="validate")
    report = read_json(tmp_path / "validation-failed" / "report.json")
    assert not [f for f in report["findings"] if f["rule"] == "every_label_somewhere"]


def test_one_case_only_is_refused(tmp_path):
    source = write_published("hippocampus", tmp_path / "source", cases=1)
    with pytest.raises(
        UserError, match=r"1 patient in all, but a split needs at least 2(.|\n)*two patients at least(.|\n)*add cases"
    ):
        stages(source, tmp_path)


def test_label_values_with_gaps_are_kept(source, tmp_path):
    for path in labels(source):
        change(path, lambda a: np.where(a == 2, 4, a))
    description = read_json(source / "dataset.json")
    description["labels"] = {"0": "background", "1": "Anterior", "4": "Posterior"}
    (source / "dataset.json").write_text(json.dumps(description))
    at = stages(source, tmp_path)
    assert list(read_json(at.scores / "summary.json")["labels"]) == ["Anterior", "Posterior"]
    stored = {value for path in (at.arrays / "labels").glob("*.npy") for value in np.unique(np.load(path))}
    assert stored == {0, 1, 2}
    weights = load_file(at.model / "last.safetensors")
    weights["head.bias"][2] = 1e3  # a network that sees nothing but the last class
    save_file(weights, at.model / "last.safetensors", {"format": "pt"})
    inputs = {"dataset": at.raw, "preprocessed": at.arrays, "model": at.model}
    evaluate.run(EvaluateConfig(workers=1), inputs, {"evaluation": tmp_path / "again"}, fold=0)
    masks = [np.unique(nib.load(p).dataobj).tolist() for p in (tmp_path / "again/predictions").glob("*.nii.gz")]
    assert len(masks) == 2
    assert all(4 in values and set(values) <= {0, 4} for values in masks)


def test_fewer_patients_than_folds(source, tmp_path):
    with pytest.raises(
        ConfigError, match=r"fewer patients than folds(.|\n)*4 patients, 5 folds(.|\n)*preprocess.folds to 4"
    ):
        stages(source, tmp_path, folds=5)


def without_t1ce(source: Path) -> None:
    (source / "BraTS20_Training_002" / "BraTS20_Training_002_t1ce.nii.gz").unlink()


def without_adc(source: Path) -> None:
    path = source / "imagesTr" / "prostate_02.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[..., :1], image.affine), path)


@pytest.mark.parametrize(
    ("name", "damage", "stage", "message"),
    [
        ("brats2020", without_t1ce, "download", r"missing(.|\n)*BraTS20_Training_002_t1ce"),
        ("prostate", without_adc, "validate", r"prostate_02\.nii\.gz: .*\(declared_channels\)\n.*1 channels"),
    ],
)
def test_a_modality_that_one_case_lacks_is_named(tmp_path, name, damage, stage, message):
    source = write_published(name, tmp_path / "source")
    damage(source)
    with pytest.raises(DataError, match=message):
        stages(source, tmp_path, until="validate")
    assert (tmp_path / "raw").exists() == (stage == "validate"), "the download went through"


def test_float_labels_are_read_where_they_are_whole(source, tmp_path):
    plain = stages(source, tmp_path / "plain", until="preprocess")
    change(labels(source)[0], lambda a: a + 0.0, np.float32)
    change(labels(source)[1], lambda a: a + 1e-4 * (a > 0), np.float64)
    at = stages(source, tmp_path / "float", until="preprocess")
    for case in ("hippocampus_00", "hippocampus_01"):
        same = [np.load(x.arrays / "labels" / f"{case}.npy") for x in (plain, at)]
        np.testing.assert_array_equal(*same)
    change(labels(source)[2], lambda a: a * 0.7, np.float32)
    with pytest.raises(UserError, match="whole_number_labels"):
        stages(source, tmp_path / "broken", until="validate")


def test_values_that_are_not_declared_are_an_error(source, tmp_path):
    change(labels(source)[0], lambda a: np.where(a == 2, 7, a))
    with pytest.raises(UserError, match="declared_labels"):
        stages(source, tmp_path, until="validate")


def test_voxels_to_be_ignored_are_an_error_and_the_label_alone_is_none(source, tmp_path):
    description = read_json(source / "dataset.json")
    description["labels"] |= {"9": "ignore"}
    (source / "dataset.json").write_text(json.dumps(description))
    stages(source, tmp_path / "declared", until="preprocess")
    change(labels(source)[0], lambda a: np.where(a == 2, 9, a))
    with pytest.raises(UserError) as caught:
        stages(source, tmp_path / "used", until="validate")
    told = str(caught.value)
    rule = "another label or background"
    for words in ("not supported (nothing_to_ignore)", "voxels of the label 'ignore', 9", rule):
        assert words in told
    assert "declared_labels" not in told
    stages(source, tmp_path / "without", until="preprocess", on_invalid="exclude")


def test_files_that_store_left_to_right_the_other_way_give_the_same_arrays(source, tmp_path):
    plain = stages(source, tmp_path / "plain", until="preprocess")
    for path in [*labels(source)[:2], *sorted((source / "imagesTr").glob("*.nii.gz"))[:2]]:
        image = nib.load(path)
        affine = image.affine.copy()
        affine[0, 3] += affine[0, 0] * (image.shape[0] - 1)
        affine[0, 0] *= -1
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1].copy(), affine), path)
    at = stages(source, tmp_path / "flipped", until="preprocess")
    for kind in ("images", "labels"):
        for case in ("hippocampus_00", "hippocampus_02"):
            same = [np.load(x.arrays / kind / f"{case}.npy") for x in (plain, at)]
            np.testing.assert_allclose(*same, atol=1e-3)
