"""The plan: what is decided from the fingerprints, at and beside every threshold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distilldsm.config import PreprocessConfig
from distilldsm.core.errors import ConfigError
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.data.fingerprint import CaseFingerprint, summarise
from distilldsm.data.plan import Normalisation, choose_patch, make_plan, regions_of, resampled_shape
from distilldsm.data.scan_measures import ScanMeasures
from distilldsm.data.targets import Region
from tests.data import test_geometry


def case_fingerprint(**changes) -> CaseFingerprint:
    values = {
        "case": "a",
        "shape": (35, 50, 36),
        "spacing_mm": (1.0, 1.0, 1.0),
        "nonzero_fraction": 0.99,
        "foreground_mean": (100.0,),
        "foreground_sd": (10.0,),
        "foreground_percentiles": ((50.0, 60.0, 100.0, 140.0, 150.0),),
        "label_volumes_ml": {"one": 1.0},
    } | changes
    scan = ScanMeasures(
        shape=values["shape"],
        spacing_mm=values["spacing_mm"],
        orientation="RAS",
        nonzero_fraction=values["nonzero_fraction"],
        channels=(),
    )
    return CaseFingerprint(**{"nonzero_shape": values["shape"], "scan": scan, **values})


def index_of(patients: list[str], modality: str = "MRI") -> DatasetIndex:
    return DatasetIndex(
        name="x",
        channels=(Channel(name="c", modality=modality),),
        labels={"background": 0, "one": 1},
        cases=tuple(Case(id=f"{p}_{k}", patient=p, images=("i",), label="l") for k, p in enumerate(patients)),
    )


INDEX = index_of(["a"])


def test_plan_isotropic_takes_the_smallest_extent_as_depth():
    plan = make_plan(INDEX, [case_fingerprint()], PreprocessConfig())
    assert plan.depth_axis == "x"
    assert plan.patch_size == (35, 64, 48)
    assert plan.normalisation[0].scheme == "zscore"
    assert plan.median_shape == (35, 50, 36)


def test_plan_anisotropic_takes_the_coarsest_axis():
    case = case_fingerprint(shape=(216, 256, 10), spacing_mm=(1.5, 1.5, 10.0))
    plan = make_plan(INDEX, [case], PreprocessConfig())
    assert plan.depth_axis == "z"
    assert plan.axis_order == (2, 0, 1)
    assert plan.coarse_slices
    assert plan.target_spacing_mm == (10.0, 1.5, 1.5)
    assert plan.patch_size == (10, 224, 256)


def test_plan_normalises_by_modality():
    masked = make_plan(INDEX, [case_fingerprint(nonzero_fraction=0.2)], PreprocessConfig())
    assert masked.normalisation[0].scheme == "zscore_foreground"
    ct = make_plan(index_of(["a"], "CT"), [case_fingerprint()], PreprocessConfig()).normalisation[0]
    assert (ct.scheme, ct.low, ct.high, ct.mean, ct.sd) == ("ct", 50.0, 150.0, 100.0, 10.0)
    forced = make_plan(INDEX, [case_fingerprint()], PreprocessConfig(normalisation="none"))
    assert forced.normalisation[0].scheme == "none"


def test_healthy_cases_leave_the_ct_window_alone():
    """The foreground of a case without labels is all of it, air included."""
    index = index_of(["a"], "CT")
    lesion = case_fingerprint(foreground_mean=(60.0,), foreground_sd=(15.0,))
    healthy = case_fingerprint(
        foreground_mean=(-600.0,),
        foreground_sd=(500.0,),
        foreground_percentiles=((-1000.0, -990.0, -700.0, 60.0, 300.0),),
        label_volumes_ml={"one": 0.0},
    )
    alone = make_plan(index, [lesion], PreprocessConfig()).normalisation
    assert make_plan(index, [lesion, healthy, healthy], PreprocessConfig()).normalisation == alone
    assert summarise([lesion, healthy], index)["foreground_intensity"]["c"]["mean"] == 60.0
    assert make_plan(index, [healthy], PreprocessConfig()).normalisation[0].mean == -600.0  # there is nothing else


def test_plan_measures_what_is_left_by_the_crop():
    case = case_fingerprint(shape=(240, 240, 155), nonzero_shape=(138, 169, 137))
    plan = make_plan(INDEX, [case], PreprocessConfig())
    assert (plan.median_shape, plan.depth_axis) == ((137, 138, 169), "z")
    whole = make_plan(INDEX, [case], PreprocessConfig(crop_to_nonzero=False))
    assert whole.median_shape == (155, 240, 240)


def test_plan_obeys_the_config():
    config = PreprocessConfig(depth_axis="y", target_spacing_mm=(1.0, 2.0, 3.0), patch_size=(4, 32, 16))
    plan = make_plan(INDEX, [case_fingerprint()], config)
    assert plan.depth_axis == "y"
    assert plan.target_spacing_mm == (2.0, 1.0, 3.0)
    assert plan.patch_size == (4, 32, 16)
    assert "set in" in plan.reasons["patch_size"]


@pytest.mark.parametrize(
    ("median", "limit", "patch"),
    [
        ((35, 50, 36), 655_360, (35, 64, 48)),
        ((16, 64, 64), 16 * 64 * 64, (16, 64, 64)),  # just fits
        ((20, 64, 64), 70_000, (17, 64, 64)),  # first the depth, to 16
        ((300, 512, 512), 655_360, (16, 192, 208)),  # then the larger side
        ((30, 50, 100), 16 * 64 * 96, (16, 64, 96)),
        ((3, 900, 900), 9000, (2, 64, 64)),  # then the depth again
        ((40, 30, 30), 4096, (4, 32, 32)),
        ((2, 10, 10), 100, (1, 16, 16)),  # no smaller one
    ],
)
def test_patches_shrink_in_a_known_order(median, limit, patch):
    assert choose_patch(median, limit) == patch


@pytest.mark.parametrize(
    ("spacing", "depth", "coarse"),
    [
        ((1.0, 1.0, 1.25), "x", False),  # about the same everywhere: the smallest extent
        ((1.0, 1.0, 1.26), "z", False),
        ((1.0, 1.26, 1.0), "y", False),
        ((1.0, 0.5, 2.99), "z", False),
        ((1.0, 0.5, 3.0), "z", True),
        ((1.0, 1.0, 10.0), "z", True),
    ],
)
def test_the_depth_axis_and_whether_slices_are_coarse(spacing, depth, coarse):
    plan = make_plan(INDEX, [case_fingerprint(spacing_mm=spacing)], PreprocessConfig())
    assert (plan.depth_axis, plan.coarse_slices) == (depth, coarse)
    ratio = plan.target_spacing_mm[0] / max(plan.target_spacing_mm[1:])
    assert plan.reasons["coarse_slices"] == (
        f"depth spacing is {ratio:.2g} times the in-plane spacing; coarse from 3 on"
    )
    assert plan.reasons["depth_axis"].startswith("spacing is about" if depth == "x" else "coarsest spacing")


def test_medians_over_the_cases_not_their_ends():
    sizes = [((10, 20, 30), (2.0, 1.0, 1.0)), ((12, 40, 36), (2.5, 1.0, 0.5)), ((30, 24, 20), (9.0, 3.0, 4.0))]
    plan = make_plan(INDEX, [case_fingerprint(shape=n, spacing_mm=mm) for n, mm in sizes], PreprocessConfig())
    assert plan.target_spacing_mm == (2.5, 1.0, 1.0)
    shapes = [tuple(max(1, round(n * mm / new)) for n, mm, new in zip(*one, (2.5, 1, 1), strict=True)) for one in sizes]
    assert plan.median_shape == tuple(sorted(column)[1] for column in zip(*shapes, strict=True)) == (12, 40, 30)
    assert resampled_shape((1, 10, 3), (0.1, 1.0, 2.0), (1.0, 4.0, 1.0)) == (1, 2, 6)


@pytest.mark.parametrize(
    ("patch", "batch", "memory"),
    [((10, 32, 32), 8, 0.51), ((16, 64, 64), 6, 0.91), ((64, 64, 32), 3, 0.91), ((16, 256, 256), 2, 3.13)],
)
def test_batch_and_memory_go_by_the_patch(patch, batch, memory):
    """About 400,000 voxels a step, from 2 to 8 patches; 1,300 bytes a voxel and 0.4 GB besides."""
    plan = make_plan(INDEX, [case_fingerprint()], PreprocessConfig(patch_size=patch))
    assert (plan.batch_size, plan.training_memory_gb) == (batch, memory)


@pytest.mark.parametrize(("shares", "scheme"), [((0.75,), "zscore"), ((0.74,), "zscore_foreground"),
                                                ((0.1, 0.9, 0.8), "zscore")])  # fmt: skip
def test_masked_data_are_known_by_their_zeros(shares, scheme):
    plan = make_plan(INDEX, [case_fingerprint(nonzero_fraction=share) for share in shares], PreprocessConfig())
    assert plan.normalisation == (Normalisation(scheme=scheme),)
    if scheme != "zscore":
        assert "MRI; 26% of the voxels are zero" in plan.reasons["normalisation.c"]


def test_the_ct_window_is_of_all_cases():
    """Median of their percentiles; mean and sd of the foregrounds laid together."""
    cases = [
        case_fingerprint(foreground_mean=(m,), foreground_sd=(sd,), foreground_percentiles=((low, 0, 0, 0, high),))
        for m, sd, low, high in ((10.0, 3.0, -5.0, 50.0), (30.0, 4.0, -50.0, 60.0), (50.0, 5.0, -4.0, 90.0))
    ]
    found = make_plan(index_of(["a"], "CT"), cases, PreprocessConfig()).normalisation[0]
    assert (found.low, found.high, found.mean) == (-5, 60, 30)
    pooled = np.concatenate([m + sd * np.array([-1.0, 1.0]) for m, sd in ((10, 3), (30, 4), (50, 5))])
    assert found.sd == pytest.approx(pooled.std())
    flat = case_fingerprint(foreground_sd=(0.0,))
    assert make_plan(index_of(["a"], "CT"), [flat], PreprocessConfig()).normalisation[0].sd == 1e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, "unknown plan version"),
        ({"normalisation": ()}, "one entry per channel"),
        ({"normalisation": (), "channels": ()}, "one entry per channel"),
        ({"class_names": ("background",), "class_values": (0,)}, "must start with 0"),
        ({"class_values": (1, 2)}, "must start with 0"),
        ({"class_values": (0, 1, 2)}, "must start with 0"),
        ({"target_spacing_mm": (1.0, 0.0, 1.0)}, "must be positive"),
        ({"patch_size": (0, 1, 1)}, "must be positive"),
        ({"batch_size": 0}, "must be positive"),
        ({"regions": (Region(name="r", values=(7,), written_as=7),)}, "does not have"),
    ],
)
def test_impossible_plans_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        test_geometry.make_plan(**changes)
    assert test_geometry.make_plan(patch_size=(1, 1, 1), batch_size=1, target_spacing_mm=(0.1, 0.1, 0.1))


@pytest.mark.parametrize(("axis", "order"), [("x", (0, 1, 2)), ("y", (1, 0, 2)), ("z", (2, 0, 1))])
def test_the_order_of_axes(axis, order):
    assert test_geometry.make_plan(depth_axis=axis).axis_order == order


def test_regions_are_the_configs_or_the_data_sets():
    own = (Region(name="all", values=(1,), written_as=1),)
    index, with_regions = INDEX, replace(INDEX, regions=own)
    assert regions_of(index, PreprocessConfig()) == ()
    assert regions_of(with_regions, PreprocessConfig()) == regions_of(with_regions, LABELS_AS_REGIONS) == own
    assert [r.name for r in regions_of(index, LABELS_AS_REGIONS)] == ["one"]
    named = PreprocessConfig(regions={"mine": ("one",)})
    assert [r.name for r in regions_of(with_regions, named)] == ["mine"]
    for config, reason in ((PreprocessConfig(), "the data set's"), (named, "set in preprocess.regions")):
        assert make_plan(with_regions, [case_fingerprint()], config).reasons["regions"] == reason
    assert "regions" not in make_plan(index, [case_fingerprint()], PreprocessConfig()).reasons


LABELS_AS_REGIONS = PreprocessConfig(regions="labels")
