"""Each rule of the plan, on made-up numbers: at and beside its threshold, and what holds for all numbers."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilldsm.data import plan_rules as rules
from distilldsm.data.plan_rules import Grid

THREE_MM = st.tuples(*[st.floats(0.3, 6.0)] * 3)
LIMITS = st.integers(4096, 700_000)


def grid(**changes) -> Grid:
    """An isotropic scan of 0.6 mm, 190 x 140 x 88 voxels, with one structure."""
    values = {
        "spacing_mm": (0.6, 0.6, 0.6),
        "extent_mm": (52.8, 114.0, 84.0),
        "box_mm": (48.0, 60.0, 72.0),
        "label_mm": (48.0, 60.0, 72.0),
        "coarse": False,
    }
    return Grid(**{**values, **changes})


@st.composite
def grids(draw) -> Grid:
    extent = draw(st.tuples(*[st.floats(5, 300)] * 3))
    box = tuple(draw(st.floats(0.02, 1)) * mm for mm in extent)
    label = tuple(draw(st.floats(0.05, 1)) * mm for mm in box)
    return grid(spacing_mm=draw(THREE_MM), extent_mm=extent, box_mm=box, label_mm=label, coarse=draw(st.booleans()))


@pytest.mark.parametrize(
    ("spacing", "box", "axis", "reason"),
    [
        ((1.0, 1.0, 3.0), (90, 40, 40), 2, "coarse slices (3 mm, 1 mm in plane)"),
        ((1.0, 3.0, 1.0), (90, 40, 40), 1, "coarse slices"),
        ((1.0, 0.5, 2.9), (49, 40, 40), 2, "coarsest spacing (2.9 mm)"),
        ((1.0, 0.5, 2.9), (50, 40, 40), 0, "longest axis of the foreground (50 mm, the next 40 mm)"),
        ((1.0, 1.0, 1.0), (20, 40, 30), 1, "longest axis"),
        ((1.0, 1.0, 1.0), (20, 37, 30), 2, "spacing is about the same everywhere; smallest extent (30)"),
        ((1.0, 1.0, 1.25), (40, 40, 40), 2, "spacing is about the same"),
        ((1.26, 1.0, 1.0), (40, 40, 40), 0, "coarsest spacing"),
    ],
)
def test_the_depth_axis(spacing, box, axis, reason):
    found, why = rules.depth_axis(spacing, box, (35, 50, 30))
    assert found == axis
    assert why.startswith(reason)


@pytest.mark.parametrize(("spacing", "coarse"), [((3.0, 1.0, 0.5), True), ((2.99, 1.0, 1.0), False)])
def test_coarse_slices(spacing, coarse):
    found, why = rules.is_coarse(spacing)
    assert found == coarse
    assert why.endswith("times the in-plane spacing; coarse from 3 on")


@pytest.mark.parametrize(
    ("shape", "box", "patch"),
    [
        ((36, 50, 36), (30, 40, 25), (36, 50, 36)),  # .65 of each axis and more: whole
        ((100, 100, 200), (65, 64, 129), (100, 64, 130)),
        ((100, 200, 200), (7, 31, 71), (16, 64, 72)),  # context around small foreground
        ((9, 40, 51), (2, 3, 4), (9, 40, 52)),  # as far as the scan reaches, even in plane
    ],
)
def test_the_patch_is_the_box_or_the_whole_axis(shape, box, patch):
    assert rules.patch_around(shape, box) == patch


@pytest.mark.parametrize(
    ("shape", "limit", "patch"),
    [
        ((35, 50, 36), 63_000, (35, 50, 36)),  # just fits
        ((35, 50, 36), 62_999, (34, 50, 36)),
        ((20, 64, 64), 70_000, (17, 64, 64)),  # first the depth, to 16
        ((300, 512, 512), 655_360, (16, 202, 202)),  # then the larger side
        ((30, 50, 100), 16 * 50 * 70, (16, 50, 70)),
        ((3, 900, 900), 9000, (2, 64, 64)),  # then the depth again
        ((2, 10, 10), 50, (1, 10, 10)),  # no smaller one
    ],
)
def test_patches_shrink_in_a_known_order(shape, limit, patch):
    found, reason = rules.choose_patch(shape, shape, limit)
    assert found == patch
    assert ("to at most" in reason) == (found != rules.patch_around(shape, shape))
    assert reason.startswith("the whole scan")


@given(grids(), LIMITS)
def test_the_chosen_spacing_is_the_finest_that_meets_the_conditions(one, limit):
    """Slow reference: try every step of 3 % from the finest axis on, one after the other."""
    found, reason = rules.choose_spacing(one, limit)
    native = one.spacing_mm
    highest = [min(2.5 * s, max(s, mm / 10)) for s, mm in zip(native, one.label_mm, strict=True)]
    if one.coarse:
        highest[0] = native[0]
    for step in range(200):
        tried = [min(max(s, min(native) * 1.03**step), h) for s, h in zip(native, highest, strict=True)]
        patch = rules.patch_around(one.shape(tried), one.box(tried))
        if np.prod(patch) <= limit and (one.coarse or one.box(tried)[0] <= 48):
            break
    assert found == pytest.approx(tried, abs=1e-5)
    assert (reason == "median of the data set") == (step == 0 or tried == list(native))


@given(grids(), LIMITS, st.integers(1, 3))
def test_a_larger_limit_is_never_coarser_and_labels_stay_visible(one, limit, more):
    found, finer = (rules.choose_spacing(one, n)[0] for n in (limit, limit * more))
    assert all(a <= b + 1e-6 for a, b in zip(finer, found, strict=True))
    for mm, native, size in zip(found, one.spacing_mm, one.label_mm, strict=True):
        assert native - 1e-6 <= mm <= 2.5 * native + 1e-6
        assert mm <= native + 1e-6 or size / mm >= 10 - 1e-3
    assert not one.coarse or found[0] == pytest.approx(one.spacing_mm[0], abs=1e-6)


@given(grids(), st.floats(0.1, 10))
def test_the_unit_of_length_does_not_matter(one, unit):
    """Twice as large anatomy with voxels twice as large gives the same patch."""
    scaled = {
        key: tuple(v * unit for v in getattr(one, key)) for key in ("spacing_mm", "extent_mm", "box_mm", "label_mm")
    }
    other = grid(**scaled, coarse=one.coarse)
    (a, _), (b, _) = rules.choose_spacing(one, 200_000), rules.choose_spacing(other, 200_000)
    assert np.array(b) == pytest.approx(np.array(a) * unit, rel=0.031, abs=1e-5)


def test_reasons_name_what_made_the_spacing_coarser():
    assert rules.choose_spacing(grid(), 10**7)[1].endswith("because the foreground was deeper than 48 slices")
    spacing, reason = rules.choose_spacing(grid(), 100_000)
    assert "because patches of more than 100,000 voxels would be too few" in reason
    assert spacing[0] == spacing[1] == spacing[2]
    assert rules.choose_spacing(grid(label_mm=(9.0, 9.0, 9.0)), 100_000)[0] == (0.9, 0.9, 0.9)
    thick = grid(spacing_mm=(10.0, 1.5, 1.5), extent_mm=(90, 384, 330), box_mm=(80, 120, 110), coarse=True)
    assert rules.choose_spacing(thick, 10**6) == ((10.0, 1.5, 1.5), "median of the data set")
    assert rules.choose_spacing(thick, 20_000)[0][0] == 10.0


@pytest.mark.parametrize(("cases", "limit"), [(150, 333_333), (151, 331_125), (4, 333_333)])
def test_the_budget_limits_the_patch(cases, limit):
    assert rules.patch_limit(2e9, cases) == limit


@pytest.mark.parametrize(("patch", "batch"), [((10, 32, 32), 4), ((16, 72, 72), 3), ((64, 64, 64), 2)])
def test_the_batch(patch, batch):
    assert rules.batch_size(patch)[0] == batch


@pytest.mark.parametrize(
    ("budget", "cases", "whole", "patches"),
    [(2e9, 208, True, 12_480), (2e9, 100, True, 10_000), (2e9, 208, False, 31_746), (1e8, 208, True, 1587)],
)
def test_whole_volumes_stop_at_enough_patches(budget, cases, whole, patches):
    assert rules.patches_to_see(budget, (35, 50, 36), cases, whole=whole)[0] == patches


@given(st.integers(1, 60_000), st.integers(1, 2000))
def test_epochs_make_up_the_patches(patches, cases):
    epochs, samples = rules.epochs(patches, cases)
    assert epochs >= 1 <= samples
    assert abs(epochs * samples * cases - patches) <= max(samples * cases / 2, samples * cases - patches)
    assert samples == 1 or samples * cases <= 1.5 * rules.EPOCH_PATCHES


def test_what_training_uses():
    assert rules.foreground_share(whole=True)[0] == 0.33
    assert rules.foreground_share(whole=False)[0] == 0.8
    assert [rules.ema_decay(steps)[0] for steps in (100, 2500, 5000)] == [0.98, 0.98, 0.99]
    assert rules.rotation_deg(coarse=True)[0] == 30
    assert rules.rotation_deg(coarse=False)[0] == 15


def test_labels_that_are_one_component():
    cases = [{"a": 1, "b": 1, "c": 2}] + [{"a": 1, "b": 1}] * 98 + [{"b": 3}]
    assert rules.single_labels(cases) == ("a", "b")
    assert rules.single_labels([*cases, {"b": 2}]) == ("a",)
    assert rules.single_labels([{}]) == ()


@given(st.integers(1, 60), st.integers(1, 200), st.integers(1, 300), st.integers(1, 4), st.integers(100, 400_000))
def test_the_budget_that_a_warning_names_is_enough(epochs, steps_per_epoch, cases, batch, voxels):
    steps = epochs * steps_per_epoch
    by_plan = bool(epochs % 2)
    remark = rules.remark_on_few_steps(
        steps=steps, patches=steps * batch, cases=cases, patch_voxels=voxels,
        budget=steps * batch * voxels if by_plan else 1.0, by_plan=by_plan,
    )  # fmt: skip
    assert (remark is None) == (steps * 1.03 >= 1500 and steps * batch * 1.03 >= 20 * cases)
    if remark:
        budget = float(re.findall(r"train\.budget=([\d.e+]+)", remark)[0])
        assert budget / voxels / batch >= 1500 * 0.999
        assert budget / voxels >= 20 * cases * 0.999
        assert budget / voxels <= 1.11 * max(1500 * batch, 20 * cases)
        assert ("train.epochs=null and" in remark) == (not by_plan)


def test_the_words_of_the_warning():
    few = {"steps": 70, "patches": 140, "cases": 13, "patch_voxels": 50_000}
    begin = "train: 70 optimizer steps and 11 patches a case are few for real scans. "
    begin += "For 1,500 steps and 20 patches a case, set "
    for budget, by_plan, setting in (
        (7e6, True, "train.budget=1.5e+08"),
        (7e6, False, "train.epochs=null and train.budget=1.5e+08"),
        (2e9, False, "train.epochs=null"),
    ):
        assert rules.remark_on_few_steps(**few, budget=budget, by_plan=by_plan) == begin + setting
