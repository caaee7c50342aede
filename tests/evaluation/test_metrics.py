"""Scores against slow loops, analytic cases and other people's implementations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance

from distilldsm.evaluation.metrics import confusion, score_case, score_label

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
    score = score_label("x", truth, prediction, SPACING, 1.0)
    assert score.dice == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert score.sensitivity == pytest.approx(tp / (tp + fn))
    assert score.specificity == pytest.approx(tn / (tn + fp))
    assert score.precision == pytest.approx(tp / (tp + fp))
    assert score.volume_truth_ml == pytest.approx((tp + fn) / 1000)
    assert score.volume_error_ml == pytest.approx((fp - fn) / 1000)


def test_hd95_and_nsd_of_shifted_cubes():
    """Faces 3 voxels of 2 mm apart: the distance of most of the moved surface is 6 mm."""
    truth = np.zeros((30, 20, 20), dtype=bool)
    truth[5:15, 5:15, 5:15] = True
    score = score_label("x", truth, np.roll(truth, 3, axis=0), SPACING, 1.0)
    assert score.hd95_mm == pytest.approx(6.0)
    assert score_label("x", truth, np.roll(truth, 1, axis=2), SPACING, 0.5).nsd == pytest.approx(1.0)
    assert score.nsd < 1


@pytest.mark.parametrize("seed", range(6))
def test_hd95_agrees_with_monai(seed):
    """MONAI measures between surface voxels, the library used here between surface elements: within a voxel."""
    truth, prediction = masks(seed)
    ours = score_label("x", truth, prediction, SPACING, 1.0).hd95_mm

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
    a = score_label("x", truth, prediction, SPACING, 1.0)
    b = score_label("x", truth.transpose(order), prediction.transpose(order), tuple(SPACING[k] for k in order), 1.0)
    assert a.dice == b.dice
    assert a.hd95_mm == pytest.approx(b.hd95_mm, rel=1e-6)
    assert a.nsd == pytest.approx(b.nsd, rel=1e-6)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000))
def test_symmetry_and_identity(seed):
    truth, prediction = masks(seed)
    a, b = (score_label("x", *pair, SPACING, 1.0) for pair in ((truth, prediction), (prediction, truth)))
    assert a.dice == b.dice
    assert a.hd95_mm == pytest.approx(b.hd95_mm)
    assert (a.sensitivity, a.precision) == (b.precision, b.sensitivity)
    same = score_label("x", truth, truth, SPACING, 1.0)
    assert (same.dice, same.hd95_mm, same.nsd, same.volume_error_ml) == (1.0, 0.0, 1.0, 0.0)


def test_cropping_changes_nothing_far_from_the_structures():
    truth, prediction = masks(1)
    wide = [np.pad(m, 9) for m in (truth, prediction)]
    a, b = score_label("x", truth, prediction, SPACING, 1.0), score_label("x", *wide, SPACING, 1.0)
    assert a.hd95_mm == pytest.approx(b.hd95_mm)
    assert a.nsd == pytest.approx(b.nsd)
    assert b.specificity > a.specificity


def test_structures_at_the_border():
    truth = np.zeros((6, 6, 6), dtype=bool)
    truth[:3] = True
    assert score_label("x", truth, truth, SPACING, 1.0).hd95_mm == 0
    full = np.ones((3, 3, 3), dtype=bool)
    assert score_label("x", full, full, SPACING, 1.0).specificity is None


def test_empty_masks_follow_the_convention():
    empty, full = np.zeros((4, 6, 8), dtype=bool), np.zeros((4, 6, 8), dtype=bool)
    full[1:3, 1:3, 1:3] = True
    diagonal = float(np.linalg.norm(np.array([4, 6, 8]) * SPACING))
    both = score_label("x", empty, empty, SPACING, 1.0)
    assert (both.dice, both.nsd, both.hd95_mm, both.sensitivity, both.precision) == (1.0, 1.0, 0.0, None, None)
    invented = score_label("x", empty, full, SPACING, 1.0)
    assert (invented.dice, invented.nsd, invented.sensitivity, invented.precision) == (0.0, 0.0, None, 0.0)
    assert invented.hd95_mm == pytest.approx(diagonal)
    missed = score_label("x", full, empty, SPACING, 1.0)
    assert (missed.dice, missed.sensitivity, missed.precision) == (0.0, 0.0, None)
    assert missed.hd95_mm == pytest.approx(diagonal)


@pytest.mark.parametrize("missed", [True, False])
def test_the_penalty_is_that_of_the_brats_portal(missed):
    one, none = (np.zeros((240, 240, 155), dtype=np.uint8) for _ in range(2))
    one[100:110, 100:110, 70:80] = 4
    truth, prediction = (one, none) if missed else (none, one)
    found = score_case(truth, prediction, spacing_mm=(1.0, 1.0, 1.0), labels={"ET": 4})[0]
    assert (found.dice, round(found.hd95_mm, 4)) == (0.0, 373.1287)


def test_labels_by_value_and_shape_check():
    truth = np.zeros((4, 4, 4), dtype=np.uint8)
    truth[0], truth[1] = 1, 4
    scores = score_case(truth, truth, spacing_mm=SPACING, labels={"background": 0, "a": 1, "b": 4})
    assert [s.label for s in scores] == ["a", "b"]
    with pytest.raises(ValueError, match="different grids"):
        score_case(truth, truth[1:], spacing_mm=SPACING, labels={"a": 1})


def test_confusion_counts_every_voxel():
    truth = np.array([[[0, 1, 4, 4]]], dtype=np.uint8)
    prediction = np.array([[[0, 4, 4, 1]]], dtype=np.uint8)
    assert confusion(truth, prediction, (0, 1, 4)).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 1]]
