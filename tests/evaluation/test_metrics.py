"""Scores against slow loops, analytic cases and other people's implementations."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import surface_distance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance

from distilldsm.config import ExportConfig
from distilldsm.evaluation.metrics import METRICS, confusion, main_metrics, score_case

SPACING = (2.0, 1.0, 0.5)


def masks(seed: int, shape=(12, 14, 13)) -> tuple[np.ndarray, np.ndarray]:
    """Two similar blobs."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    blobs = []
    for _ in range(2):
        centre = np.array(shape) / 2 + rng.uniform(-1.5, 1.5, 3)
        blobs.append((((grid - centre) / rng.uniform(2.5, 4.5, 3)) ** 2).sum(axis=-1) <= 1)
    return blobs[0], blobs[1]


def scores(truth: np.ndarray, prediction: np.ndarray, tolerance_mm: float = 1.0, spacing=SPACING) -> SimpleNamespace:
    """The scores of one binary mask."""
    masks = [mask.astype(np.uint8) for mask in (truth, prediction)]
    (row,) = score_case(*masks, spacing_mm=spacing, labels={"x": 1}, tolerance_mm=tolerance_mm)
    return SimpleNamespace(**row)


def slow_counts(truth: np.ndarray, prediction: np.ndarray) -> tuple[int, int, int, int]:
    tp = fp = fn = tn = 0
    for index in itertools.product(*map(range, truth.shape)):
        t, p = bool(truth[index]), bool(prediction[index])
        tp, fp, fn, tn = tp + (t and p), fp + (p and not t), fn + (t and not p), tn + (not t and not p)
    return tp, fp, fn, tn


@pytest.mark.parametrize("seed", range(3))
def test_overlap_scores_equal_a_slow_loop(seed):
    truth, prediction = masks(seed)
    tp, fp, fn, tn = slow_counts(truth, prediction)
    score = scores(truth, prediction)
    assert score.dice == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert score.sensitivity == pytest.approx(tp / (tp + fn))
    assert score.specificity == pytest.approx(tn / (tn + fp))
    assert score.precision == pytest.approx(tp / (tp + fp))
    assert score.volume_truth_ml == pytest.approx((tp + fn) / 1000)
    assert score.volume_predicted_ml == pytest.approx((tp + fp) / 1000)
    assert score.volume_error_ml == pytest.approx((fp - fn) / 1000)
    assert score.volume_error_abs_ml == abs(score.volume_error_ml)
    assert scores(truth, prediction, spacing=(2.0, 2.0, 5.0)).volume_truth_ml == pytest.approx((tp + fn) / 50)


def test_hd95_and_nsd_of_shifted_cubes():
    """Faces 3 voxels of 2 mm apart: the distance of most of the moved surface is 6 mm."""
    truth = np.zeros((30, 20, 20), dtype=bool)
    truth[5:15, 5:15, 5:15] = True
    score = scores(truth, np.roll(truth, 3, axis=0))
    assert score.hd95_mm == pytest.approx(6.0)
    assert scores(truth, np.roll(truth, 1, axis=2), 0.5).nsd == pytest.approx(1.0)
    assert score.nsd < 1


@pytest.mark.parametrize("seed", range(4))
def test_surface_scores_are_those_of_the_library_on_the_whole_volume(seed):
    truth, prediction = masks(seed)
    distances = surface_distance.compute_surface_distances(truth, prediction, SPACING)
    for tolerance in (0.4, 1.0, 2.5):
        score = scores(truth, prediction, tolerance)
        assert score.hd95_mm == pytest.approx(surface_distance.compute_robust_hausdorff(distances, 95))
        nsd = surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)
        assert score.nsd == pytest.approx(nsd)


@pytest.mark.parametrize("seed", range(6))
def test_hd95_agrees_with_monai(seed):
    """MONAI measures between surface voxels, the library used here between surface elements: within a voxel."""
    truth, prediction = masks(seed)
    ours = scores(truth, prediction).hd95_mm

    def tensor(mask: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack([~mask, mask])[None].astype(np.float32))

    theirs = compute_hausdorff_distance(
        tensor(prediction), tensor(truth), percentile=95, spacing=list(SPACING), include_background=False
    )
    assert ours == pytest.approx(float(theirs), abs=max(SPACING))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), order=st.permutations(range(3)))
def test_scores_do_not_depend_on_the_axis_order(seed, order):
    truth, prediction = masks(seed)
    a = scores(truth, prediction)
    b = scores(truth.transpose(order), prediction.transpose(order), spacing=tuple(SPACING[k] for k in order))
    assert a.dice == b.dice
    assert a.hd95_mm == pytest.approx(b.hd95_mm, rel=1e-6)
    assert a.nsd == pytest.approx(b.nsd, rel=1e-6)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000))
def test_symmetry_and_identity(seed):
    truth, prediction = masks(seed)
    a, b = (scores(*pair) for pair in ((truth, prediction), (prediction, truth)))
    assert a.dice == b.dice
    assert a.hd95_mm == pytest.approx(b.hd95_mm)
    assert (a.sensitivity, a.precision) == (b.precision, b.sensitivity)
    same = scores(truth, truth)
    assert (same.dice, same.hd95_mm, same.nsd, same.volume_error_ml) == (1.0, 0.0, 1.0, 0.0)


def test_cropping_changes_nothing_far_from_the_structures():
    truth, prediction = masks(1)
    wide = [np.pad(m, 9) for m in (truth, prediction)]
    a, b = scores(truth, prediction), scores(*wide)
    assert a.hd95_mm == pytest.approx(b.hd95_mm)
    assert a.nsd == pytest.approx(b.nsd)
    assert b.specificity > a.specificity


def test_structures_at_the_border():
    truth = np.zeros((6, 6, 6), dtype=bool)
    truth[:3] = True
    assert scores(truth, truth).hd95_mm == 0
    full = np.ones((3, 3, 3), dtype=bool)
    assert scores(full, full).specificity is None


def test_empty_masks_follow_the_convention():
    empty, full = np.zeros((4, 6, 8), dtype=bool), np.zeros((4, 6, 8), dtype=bool)
    full[1:3, 1:3, 1:3] = True
    diagonal = float(np.linalg.norm(np.array([4, 6, 8]) * SPACING))
    both = scores(empty, empty)
    assert (both.dice, both.nsd, both.hd95_mm, both.sensitivity, both.precision) == (1.0, 1.0, 0.0, None, None)
    invented = scores(empty, full)
    assert (invented.dice, invented.nsd, invented.sensitivity, invented.precision) == (0.0, 0.0, None, 0.0)
    assert invented.hd95_mm == pytest.approx(diagonal)
    missed = scores(full, empty)
    assert (missed.dice, missed.sensitivity, missed.precision) == (0.0, 0.0, None)
    assert missed.hd95_mm == pytest.approx(diagonal)


@pytest.mark.parametrize("missed", [True, False])
def test_the_penalty_is_that_of_the_brats_portal(missed):
    one, none = (np.zeros((240, 240, 155), dtype=np.uint8) for _ in range(2))
    one[100:110, 100:110, 70:80] = 4
    truth, prediction = (one, none) if missed else (none, one)
    found = score_case(truth, prediction, spacing_mm=(1.0, 1.0, 1.0), labels={"ET": 4})[0]
    assert (found["dice"], round(found["hd95_mm"], 4)) == (0.0, 373.1287)


def test_labels_by_value_and_shape_check():
    truth = np.zeros((4, 4, 4), dtype=np.uint8)
    truth[0], truth[1] = 1, 4
    prediction = np.where(truth == 4, 1, truth)
    labels = {"background": 0, "a": 1, "b": 4, "both": (1, 4)}
    rows = score_case(truth, prediction, spacing_mm=SPACING, labels=labels)
    assert [(row["label"], row["dice"]) for row in rows] == [("a", 2 / 3), ("b", 0.0), ("both", 1.0)]
    with pytest.raises(ValueError, match="different grids"):
        score_case(truth, truth[1:], spacing_mm=SPACING, labels={"a": 1})


def test_confusion_counts_every_voxel():
    truth = np.array([[[0, 1, 4, 4]]], dtype=np.uint8)
    prediction = np.array([[[0, 4, 4, 1]]], dtype=np.uint8)
    assert confusion(truth, prediction, (0, 1, 4)).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 1]]


def test_metrics_say_how_they_are_written_and_what_is_worse():
    assert {name: metric.name for name, metric in METRICS.items()} == {name: name for name in METRICS}
    headings = {name: METRICS[name].heading for name in ("dice", "hd95_mm", "volume_error_abs_ml")}
    assert headings == {"dice": "Dice", "hd95_mm": "HD95 mm", "volume_error_abs_ml": "|volume error| ml"}
    assert [METRICS["hd95_mm"].text(value) for value in (None, 1.236)] == ["-", "1.24"]
    assert [METRICS["dice"].text(value, sign="+") for value in (0.5, -0.25)] == ["+0.5000", "-0.2500"]
    values = np.array([-2.0, 0.5, 1.0])
    worst = {name: values[METRICS[name].badness(values).argmax()] for name in ("dice", "hd95_mm", "volume_error_ml")}
    assert worst == {"dice": -2.0, "hd95_mm": 1.0, "volume_error_ml": -2.0}


def test_a_perfect_mask_is_better_than_a_bad_one_in_every_metric():
    truth = np.zeros((6, 6, 6), dtype=bool)
    truth[1:4, 1:4, 1:4] = True
    bad = np.roll(truth, 2, axis=0)
    bad[5] = True
    perfect, worse = scores(truth, truth), scores(truth, bad)
    for name, metric in METRICS.items():
        values = np.array([getattr(perfect, name), getattr(worse, name)])
        assert metric.badness(values).argmax() == 1, name


def test_the_gate_takes_the_main_metrics():
    assert set(get_args(get_type_hints(ExportConfig)["gate_metric"])) == {metric.name for metric in main_metrics()}
    assert all(metric.higher_is_better is not None for metric in main_metrics()), "the gate asks which is better"


@pytest.mark.parametrize("truth", [0, 1])
@pytest.mark.parametrize("predicted", [0, 1])
def test_main_metrics_are_defined_for_all_masks(truth, predicted):
    """As the gate and the post-processing take it."""
    score = scores(np.full((2, 3, 4), bool(truth)), np.full((2, 3, 4), bool(predicted)))
    assert all(np.isfinite(vars(score)[metric.name]) for metric in main_metrics())
    assert np.isfinite([score.volume_error_ml, score.volume_error_abs_ml]).all()
