"""INT8: calibrated on training cases, judged on held-out ones, and only shipped where it is worth it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from distilldsm.cli.main import main
from distilldsm.config import Int8Config
from distilldsm.data.splits import load_fold
from distilldsm.export import int8
from distilldsm.inference.engines import OpenVINOEngine
from distilldsm.inference.loading import load_exported
from distilldsm.inference.windows import predict_logits
from distilldsm.models.package import load_metadata
from distilldsm.training.patches import open_array
from distilldsm.training.validation import structure_dice
from tests.export.fake import FOLD, NETWORK, TARGETS, Exported, exported


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Exported:
    return exported(tmp_path_factory)


def make(made: Exported, target, **config):
    training, held_out = load_fold(made.preprocessed / "splits.json", FOLD)
    return int8.make_int8(
        made.export / "model.xml",
        target,
        made.preprocessed,
        config=Int8Config(**{"min_speedup": 1e-3, "max_dice_loss": 1.0, **config}),
        training_cases=training,
        held_out=held_out,
        network=NETWORK,
        targets=TARGETS,
    )


def test_many_voxels_are_judged_on_a_part_of_the_cases(made, monkeypatch):
    _, held_out = load_fold(made.preprocessed / "splits.json", FOLD)
    assert sorted(int8.scored_cases(made.preprocessed, held_out)) == sorted(held_out)
    monkeypatch.setattr(int8, "SCORED_VOXELS", 1)
    monkeypatch.setattr(int8, "SCORED_CASES", len(held_out) - 1)
    assert len(int8.scored_cases(made.preprocessed, held_out)) == len(held_out) - 1


def test_the_shipped_model_is_quantised_and_its_numbers_are_true(made):
    report = load_metadata(made.export).int8
    training, held_out = load_fold(made.preprocessed / "splits.json", FOLD)
    assert report.shipped
    assert set(report.calibration_cases) <= set(training)
    assert report.cases == len(held_out)
    assert report.speedup is not None
    text = (made.export / "int8" / "model.xml").read_text()
    assert "FakeQuantize" in text
    assert "FakeQuantize" not in (made.export / "model.xml").read_text()

    def dice(engine) -> float:
        scores = []
        for case in held_out:
            image = np.asarray(open_array(made.preprocessed / "images" / f"{case}.npy"), dtype=np.float32)
            truth = np.asarray(open_array(made.preprocessed / "labels" / f"{case}.npy"))
            logits = predict_logits(engine, image)
            scores.append(np.mean(structure_dice(logits.argmax(axis=0), truth, TARGETS)))
        return float(np.mean(scores))

    loss = dice(OpenVINOEngine(made.export / "model.xml", NETWORK)) - dice(
        OpenVINOEngine(made.export / "int8" / "model.xml", NETWORK, precision="auto")
    )
    assert report.dice_loss == pytest.approx(loss, abs=1e-6)


def test_any_size_goes_through(made):
    predictor = load_exported(made.export, precision="int8")
    exact = load_exported(made.export)
    for shape in ((2, 1, 16, 16), (2, 7, 33, 50)):
        image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        expected, found = exact.logits(image), predictor.logits(image)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 0.2 * np.abs(expected).mean()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"min_speedup": 1e6}, "the limits are 1e+06 times"),
        ({"enabled": False}, "not asked for"),
    ],
)
def test_not_shipped_leaves_no_file_and_says_why(made, tmp_path, config, words):
    report = make(made, tmp_path / "model_int8.xml", **config)
    assert not report.shipped
    assert words in report.reason
    assert list(tmp_path.iterdir()) == []


def test_a_loss_of_dice_is_not_shipped(made, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "_dice_loss", lambda *_: 0.0021)
    report = make(made, tmp_path / "model_int8.xml", max_dice_loss=0.002)
    assert not report.shipped
    assert "0.0021 less mean Dice" in report.reason
    assert list(tmp_path.iterdir()) == []


def test_without_nncf_the_export_goes_on(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    report = make(made, tmp_path / "model_int8.xml")
    assert not report.shipped
    assert "NNCF is not installed" in report.reason


def test_asking_for_what_is_not_there(made, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(made.export, tmp_path / "copy")
    (copy / "manifest.json").unlink()
    metadata = json.loads((copy / "metadata.json").read_text())
    metadata["int8"] = {"shipped": False, "reason": "too slow here"}
    (copy / "metadata.json").write_text(json.dumps(metadata))
    arguments = ["predict", str(copy), str(made.raw / "imagesTr"), "-o", str(tmp_path / "out"), "--precision", "int8"]
    assert main(arguments) == 1
    assert "has no INT8 model" in (message := capsys.readouterr().err)
    assert "too slow here" in message
