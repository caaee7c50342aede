"""The plan: what is decided from the fingerprints, at and beside every threshold."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from distilldsm.config import PreprocessConfig
from distilldsm.core.errors import ConfigError
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.data.fingerprint import CaseFingerprint, LabelShape, summarise
from distilldsm.data.plan import Normalisation, Plan, TrainingPlan, make_plan, regions_of, resampled_shape
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
    whole = {"nonzero_shape": values["shape"], "foreground_shape": values["shape"]}
    return CaseFingerprint(**{**whole, "scan": scan, **values})


def index_of(patients: list[str], modality: str = "MRI") -> DatasetIndex:
    return DatasetIndex(
        name="x",
        channels=(Channel(name="c", modality=modality),),
        labels={"background": 0, "one": 1},
        cases=tuple(Case(id=f"{p}_{k}", patient=p, images=("i",), label="l") for k, p in enumerate(patients)),
    )


INDEX = index_of(["a"])


def test_whole_volumes():
    """As hippocampus: small scans, filled by their foreground."""
    cases = [
        case_fingerprint(foreground_shape=(28, 44, 30), labels={"one": LabelShape(components=1, shape=(14, 20, 12))})
    ] * 260
    plan = make_plan(INDEX, cases, PreprocessConfig())
    assert (plan.depth_axis, plan.target_spacing_mm, plan.median_shape) == ("y", (1, 1, 1), (50, 35, 36))
    assert (plan.patch_size, plan.batch_size) == ((50, 36, 36), 4)
    assert plan.training == TrainingPlan(
        patches=12_480, epochs=60, samples_per_case=1, foreground_oversampling=0.33, learning_rate=0.004,
        ema_decay=0.98397, rotation_deg=15, keep_largest=("one",),
    )  # fmt: skip
    assert plan.normalisation[0].scheme == "zscore"
    decided = {"depth_axis", "coarse_slices", "target_spacing_mm", "patch_size", "batch_size", "normalisation.c"}
    decided |= set(vars(plan.training)) - {"budget", "samples_per_case"}
    assert set(plan.reasons) == decided


def test_coarse_slices_with_a_small_structure():
    """As ACDC: thick slices, and a heart in the middle."""
    shape = LabelShape(components=2, shape=(60, 55, 6))
    case = case_fingerprint(
        shape=(216, 256, 10), spacing_mm=(1.5, 1.5, 10.0), foreground_shape=(80, 72, 9), labels={"one": shape}
    )
    plan = make_plan(INDEX, [case] * 200, PreprocessConfig())
    assert (plan.depth_axis, plan.axis_order, plan.coarse_slices) == ("z", (2, 0, 1), True)
    assert plan.target_spacing_mm == (10.0, 1.5, 1.5)
    assert plan.patch_size == (10, 80, 72)
    assert plan.training.patches == 34_722
    assert (plan.training.foreground_oversampling, plan.training.rotation_deg) == (0.8, 30)
    assert plan.training.keep_largest == ()


def test_fine_scans_become_coarser_until_the_budget_suffices():
    case = case_fingerprint(
        shape=(190, 140, 88), spacing_mm=(0.6, 0.6, 0.6), foreground_shape=(120, 100, 84),
        labels={"one": LabelShape(components=1, shape=(120, 100, 84))},
    )  # fmt: skip
    plans = [make_plan(INDEX, [case] * 100, PreprocessConfig(), budget=budget) for budget in (2e8, 2e9, 2e11)]
    spacings = [plan.target_spacing_mm[0] for plan in plans]
    assert spacings[0] > spacings[1] >= spacings[2] > 0.6
    for plan in plans:
        assert plan.training.budget / np.prod(plan.patch_size) >= 6000
        assert plan.training.patches >= 40 * 80
    fixed = make_plan(INDEX, [case], PreprocessConfig(target_spacing_mm=(0.6, 0.6, 0.6)), budget=2e8)
    assert fixed.target_spacing_mm == (0.6, 0.6, 0.6)
    assert np.prod(fixed.patch_size) <= 2e8 / 6000


def test_the_box_is_the_90th_percentile_and_the_smallest_label_counts():
    """One scan in ten may reach beyond the patch, and a small label keeps 10 voxels across."""
    large = LabelShape(components=1, shape=(100, 100, 84))
    cases = [
        case_fingerprint(
            shape=(400, 400, 84), spacing_mm=(0.6, 0.6, 0.6), foreground_shape=(80 + n, 100, 84),
            labels={"one": large, "small": LabelShape(components=1, shape=(15, 20, 20))},
        )
        for n in range(11)
    ]  # fmt: skip
    empty = case_fingerprint(
        shape=(400, 400, 84), spacing_mm=(0.6, 0.6, 0.6), foreground_shape=(0, 0, 0), label_volumes_ml={"one": 0.0}
    )
    plan = make_plan(INDEX, [*cases, empty], PreprocessConfig(), budget=1e8)
    assert sorted(plan.target_spacing_mm) == pytest.approx([0.9, 1.2, 1.2], abs=0.04)
    at_native = make_plan(
        INDEX, [*cases, empty], PreprocessConfig(target_spacing_mm=(0.6,) * 3, max_patch_voxels=10**6), budget=2e12
    )
    assert at_native.patch_size == (84, 90, 100)
    unlabelled = make_plan(
        INDEX, [empty], PreprocessConfig(target_spacing_mm=(0.6,) * 3, max_patch_voxels=10**8), budget=2e12
    )
    assert unlabelled.patch_size == (84, 400, 400)


def test_a_plan_without_training_values_gets_the_defaults(tmp_path):
    plan = test_geometry.make_plan()
    plan.save(tmp_path / "plan.json")
    text = json.loads((tmp_path / "plan.json").read_text())
    del text["training"]
    (tmp_path / "plan.json").write_text(json.dumps(text))
    assert Plan.load(tmp_path / "plan.json").training == TrainingPlan()


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
    kept = PreprocessConfig(target_spacing_mm=(1.0, 1.0, 1.0))
    plan = make_plan(INDEX, [case], kept)
    assert (plan.median_shape, plan.depth_axis) == ((137, 138, 169), "z")
    whole = make_plan(INDEX, [case], replace(kept, crop_to_nonzero=False))
    assert whole.median_shape == (155, 240, 240)


def test_plan_obeys_the_config():
    config = PreprocessConfig(depth_axis="y", target_spacing_mm=(1.0, 2.0, 3.0), patch_size=(4, 32, 16))
    plan = make_plan(INDEX, [case_fingerprint()], config)
    assert plan.depth_axis == "y"
    assert plan.target_spacing_mm == (2.0, 1.0, 3.0)
    assert plan.patch_size == (4, 32, 16)
    assert "set in" in plan.reasons["patch_size"]


def test_medians_over_the_cases_not_their_ends():
    sizes = [((10, 20, 30), (2.0, 1.0, 1.0)), ((12, 40, 36), (2.5, 1.0, 0.5)), ((30, 24, 20), (9.0, 3.0, 4.0))]
    plan = make_plan(INDEX, [case_fingerprint(shape=n, spacing_mm=mm) for n, mm in sizes], PreprocessConfig())
    assert plan.target_spacing_mm == (2.5, 1.0, 1.0)
    shapes = [tuple(max(1, round(n * mm / new)) for n, mm, new in zip(*one, (2.5, 1, 1), strict=True)) for one in sizes]
    assert plan.median_shape == tuple(sorted(column)[1] for column in zip(*shapes, strict=True)) == (12, 40, 30)
    assert resampled_shape((1, 10, 3), (0.1, 1.0, 2.0), (1.0, 4.0, 1.0)) == (1, 2, 6)


@pytest.mark.parametrize(("patch", "memory"), [((10, 32, 32), 0.45), ((64, 64, 32), 0.74), ((16, 256, 256), 3.13)])
def test_memory_goes_by_patch_and_batch(patch, memory):
    """1,300 bytes a voxel, and 0.4 GB besides."""
    assert make_plan(INDEX, [case_fingerprint()], PreprocessConfig(patch_size=patch)).training_memory_gb == memory


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
