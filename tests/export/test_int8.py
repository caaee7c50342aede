"""INT8: calibrated on training cases, judged on held-out ones, and only shipped where it is worth it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy.stats import ttest_1samp

from distilldsm.cli.main import main
from distilldsm.config import Int8Config
from distilldsm.data.geometry import NetworkImage
from distilldsm.data.plan import Plan
from distilldsm.data.splits import load_fold
from distilldsm.export import int8
from distilldsm.inference.engines import OpenVINOEngine
from distilldsm.inference.loading import load_exported
from distilldsm.inference.windows import predict_logits
from distilldsm.io import read_scan
from distilldsm.models.package import load_metadata
from distilldsm.training.patches import open_array
from distilldsm.training.validation import structure_dice
from tests.export.fake import FOLD, NETWORK, TARGETS, Exported, exported


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Exported:
    return exported(tmp_path_factory)


def make(made: Exported, target, *, cases: int | None = None, **config):
    training, held_out = load_fold(made.preprocessed / "splits.json", FOLD)
    held_out = held_out[:cases]
    return int8.make_int8(
        made.export / "model.xml",
        target,
        made.preprocessed,
        config=Int8Config(**{"min_speedup": 1e-3, "max_dice_loss": 1.0, **config}),
        training_cases=training,
        held_out=held_out,
        network=NETWORK,
        plan=Plan.load(made.export / "plan.json"),
    )


def simulated(made: Exported, image: np.ndarray) -> np.ndarray:
    """The logits of the quantised IR, with every quantised value computed in float32."""
    engine = OpenVINOEngine(made.export / "int8" / "model.xml", NETWORK)
    engine._properties["LP_TRANSFORMS_MODE"] = "NO"
    engine._compile_for(None)
    return predict_logits(engine, image)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


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
    assert report.pairs >= 6
    assert report.instruction_set in report.reason
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


def test_the_timed_scans_have_the_geometry_of_the_originals(made, tmp_path):
    plan = Plan.load(made.export / "plan.json")
    for image in sorted((made.raw / "imagesTr").glob("*_0000.nii.gz"))[:2]:
        case = image.name.removesuffix("_0000.nii.gz")
        scan = read_scan(int8._scan_files(made.preprocessed, case, plan, tmp_path), 2)
        original = nib.load(image)
        assert scan.shape == original.shape
        np.testing.assert_allclose(scan.affine, original.affine, atol=1e-5)
        assert NetworkImage(scan, plan).shape == open_array(made.preprocessed / "labels" / f"{case}.npy").shape


def test_avx2_alone_gives_the_same_logits(made, tmp_path):
    """Without VNNI the CPU saturates 8-bit sums that are too large."""
    image = noise(2, 7, 33, 50)
    np.save(tmp_path / "image.npy", image)
    code = (
        "import sys, numpy as np; from pathlib import Path; from distilldsm.inference.loading import load_exported; "
        "model, folder = map(Path, sys.argv[1:]); predictor = load_exported(model, precision='int8'); "
        "np.save(folder / 'logits.npy', predictor.logits(np.load(folder / 'image.npy')))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", code, str(made.export), str(tmp_path)], check=True, env=environment)
    expected = simulated(made, image)
    assert np.abs(np.load(tmp_path / "logits.npy") - expected).mean() < 0.1 * np.abs(expected).mean()


def test_any_size_goes_through(made):
    predictor = load_exported(made.export, precision="int8")
    for image in (noise(2, 1, 16, 16), noise(2, 7, 33, 50)):
        expected, found = simulated(made, image), predictor.logits(image)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 0.1 * np.abs(expected).mean()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"min_speedup": 1e6}, "the limits are 1e+06 times"),
        ({"enabled": False}, "not asked for"),
        ({"cases": 4}, "needs training cases and 5 held-out cases"),
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
    assert (report.speedup, report.pairs) == (None, 0)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_clear_in_time_is_not_shipped(made, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "TIMED_S", 0.0)
    report = make(made, tmp_path / "model_int8.xml")
    assert (report.shipped, report.pairs) == (False, 1)


@pytest.mark.parametrize(
    ("ratios", "clear"),
    [([1.5, 1.52, 1.49, 1.5, 1.51, 1.5], True), ([1.0, 2.0, 1.1, 1.9, 1.2, 1.8], False), ([1.5], False)],
)
def test_the_interval_of_the_ratios(ratios, clear):
    low, high = int8._interval(ratios)
    assert low < int8._mean(ratios) < high
    assert (low > 1.3) is clear
    if len(ratios) > 1:
        found = ttest_1samp(np.log(ratios), 0).confidence_interval(0.99)
        assert np.log([low, high]) == pytest.approx([found.low, found.high])


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
