"""The measures that drift is judged by: their scales, limits and values, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.files import write_json
from distilldsm.data.dataset import Channel
from distilldsm.data.drift_measures import Measure, measures_of, values_of
from distilldsm.data.plan import Normalisation
from distilldsm.data.scan_measures import ChannelMeasures, LabelMeasures, ScanMeasures
from distilldsm.data.training_distribution import (
    KEPT,
    TrainingDistribution,
    distribution_of_fold,
    load_distribution,
    make_distribution,
)
from tests.data.test_geometry import make_plan
from tests.data.test_plan import case_fingerprint

HOUNSFIELD = Normalisation(scheme="ct", low=-200, high=450, mean=50, sd=100)
PLAN = make_plan(
    channels=(Channel(name="T1", modality="MRI"), Channel(name="ct", modality="CT")),
    normalisation=(Normalisation(scheme="zscore"), HOUNSFIELD),
)


def scan(t1: tuple = (1, 2, 3, 4, 6, 12, 20), ct: tuple = (-300, -100, 0, 50, 100, 400, 600), sd=2.0) -> ScanMeasures:
    return ScanMeasures(
        shape=(10, 20, 30),
        spacing_mm=(2.0, 1.0, 0.5),
        orientation="LPS",
        nonzero_fraction=0.75,
        channels=(
            ChannelMeasures(quantiles=t1, mean=5.0, sd=sd, centre=0.5, roughness=0.25),
            ChannelMeasures(quantiles=ct, mean=60.0, sd=120.0, centre=-0.5, roughness=0.125),
        ),
        labels={
            "one": LabelMeasures(volume_ml=1.5, means=(7.0, 250.0)),
            "absent": LabelMeasures(volume_ml=0.0, means=None),
        },
    )


def test_the_values_of_a_scan():
    expected = {
        "spacing_x_mm": 2, "spacing_y_mm": 1, "spacing_z_mm": 0.5, "fov_x_mm": 20, "fov_y_mm": 20, "fov_z_mm": 15,
        "shape_x": 10, "shape_y": 20, "shape_z": 30,
        "p5[T1]": 2, "p50[T1]": 4, "p95[T1]": 12, "nonzero[T1]": 0.75, "centre[T1]": 0.5, "roughness[T1]": 0.25,
        "normalised_p5[T1]": -1.5, "normalised_p50[T1]": -0.5, "normalised_p95[T1]": 3.5, "normalised_p99_5[T1]": 7.5,
        "asymmetry[T1]": 0.6,
        "p5[ct]": -100, "p50[ct]": 50, "p95[ct]": 400, "centre[ct]": -0.5, "roughness[ct]": 0.125,
        "normalised_p5[ct]": -1.5, "normalised_p50[ct]": 0, "normalised_p95[ct]": 3.5, "normalised_p99_5[ct]": 4,
        "asymmetry[ct]": 0.4, "clipped_low[ct]": 0.0275, "clipped_high[ct]": 0.03875,
        "volume_ml[one]": 1.5, "contrast[one,T1]": 1, "contrast[one,ct]": 2, "volume_ml[absent]": 0,
    }  # fmt: skip
    assert values_of(scan(), PLAN) == pytest.approx(expected)
    flat = values_of(scan(t1=(5,) * 7, ct=(50,) * 7, sd=0.0), PLAN)
    assert [flat[f"{name}[T1]"] for name in ("normalised_p50", "asymmetry")] == [0, 0]
    as_stored = make_plan(channels=PLAN.channels, normalisation=(Normalisation(scheme="none"), HOUNSFIELD))
    assert values_of(scan(), as_stored)["normalised_p95[T1]"] == 12


@pytest.mark.parametrize(
    ("low", "high", "shares"),
    [(-300, 600, (0, 0)), (-301, 601, (0, 0)), (0, 100, (0.25, 0.25)), (700, 800, (1, 0))],
)
def test_the_share_that_a_window_clips(low, high, shares):
    rule = Normalisation(scheme="ct", low=low, high=high, mean=0, sd=1)
    found = values_of(scan(), make_plan(channels=PLAN.channels, normalisation=(PLAN.normalisation[0], rule)))
    assert (found["clipped_low[ct]"], found["clipped_high[ct]"]) == pytest.approx(shares, abs=1e-6)


def test_every_measure_has_its_scale_and_floor():
    """What each one is, in the order of the report; a z-score undoes another scale of the intensities."""
    found = [(m.name, m.unit, m.transform, m.floor, m.undone) for m in measures_of(PLAN)]
    sizes = [
        (f"{name}_{axis}{unit and '_mm'}", unit, "log", 0.03, undone)
        for name, unit, undone in (("spacing", "mm", False), ("fov", "mm", False), ("shape", "", True))
        for axis in "xyz"
    ]

    def of_channel(c: str, stored: tuple[str, float, bool]) -> list[tuple]:
        return [
            *((f"{name}[{c}]", "", *stored) for name in ("p5", "p50", "p95")),
            *((f"normalised_{name}[{c}]", "sd", "linear", 0.1, False) for name in ("p5", "p50", "p95", "p99_5")),
            (f"asymmetry[{c}]", "", "linear", 0.05, False),
            *((f"clipped_{end}[{c}]", "", "linear", 0.05, False) for end in ("low", "high") if c == "ct"),
            (f"centre[{c}]", "sd", "linear", 0.1, False),
            (f"roughness[{c}]", "sd", "linear", 0.03, False),
            *[(f"nonzero[{c}]", "", "linear", 0.05, False)] * (c != "ct"),
        ]

    structures = [
        ("volume_ml[one]", "ml", "root", 0.05, False),
        ("contrast[one,T1]", "sd", "linear", 0.1, False),
        ("contrast[one,ct]", "sd", "linear", 0.1, False),
    ]
    channels = of_channel("T1", ("asinh", 0.05, True)) + of_channel("ct", ("linear", 20.0, False))
    assert found == sizes + channels + structures
    values = values_of(scan(), PLAN)
    assert {name for name, *_ in found} <= values.keys()
    assert {m.meaning for m in measures_of(PLAN) if m.name == "p5[T1]"} == {
        "another scanner's intensity scale; the normalisation undoes it"
    }


@pytest.mark.parametrize(
    ("transform", "value", "scaled", "back"),
    [
        ("linear", -3.0, -3.0, -3.0),
        ("log", math.e, 1.0, math.e),
        ("log", 0.0, math.log(1e-9), 1e-9),
        ("root", 27.0, 3.0, 27.0),
        ("root", -8.0, 0.0, 0.0),
        ("asinh", -2.0, math.asinh(-2.0), -2.0),
    ],
)
def test_scales_and_their_inverse(transform, value, scaled, back):
    measure = Measure(name="m", title="m", unit="", group="g", transform=transform, floor=0, undone=False, meaning="")
    assert measure.scaled(value) == pytest.approx(scaled)
    assert measure.unscaled(scaled) == pytest.approx(back)
    far = {"linear": 1e4, "log": math.exp(700), "root": 1e12, "asinh": math.sinh(700)}[transform]
    assert measure.unscaled(1e4) == pytest.approx(far)
    assert measure.unscaled(-1e4) == pytest.approx({"log": 0.0, "root": 0.0, "asinh": -far, "linear": -1e4}[transform])


def sized(n: int) -> ScanMeasures:
    return ScanMeasures(
        shape=(n, 1, 1), spacing_mm=(1.0, 1.0, 1.23456789), orientation="LPS" if n % 2 else "RAS",
        nonzero_fraction=1.0, channels=scan().channels,
    )  # fmt: skip


def test_a_distribution_keeps_sorted_values_or_so_many_quantiles():
    few = make_distribution("x", [sized(n) for n in (3, 1, 2)], PLAN)
    assert (few.name, few.cases, few.orientations) == ("x", 3, {"LPS": 2, "RAS": 1})
    assert few.measures["shape_x"] == (1, 2, 3)
    assert few.measures["spacing_z_mm"] == (1.23457,) * 3
    assert "volume_ml[one]" not in few.measures, "no scan has a mask"
    many = make_distribution("x", [sized(n) for n in range(1, 400)], PLAN).measures["shape_x"]
    assert len(many) == KEPT == 200
    assert many == pytest.approx(np.linspace(1, 399, 200), rel=1e-5)


def test_the_distribution_of_a_fold_is_that_of_its_training_cases(tmp_path):
    cases = [case_fingerprint(case=name, scan=sized(n)) for n, name in enumerate("abc", start=1)]
    write_json(tmp_path / "fingerprint.json", {"name": "x", "per_case": cases})
    found = distribution_of_fold(tmp_path, ["a", "c"], PLAN)
    assert (found.cases, found.measures["shape_x"]) == (2, (1, 3))


@pytest.mark.parametrize(
    ("values", "version"), [((), 1), ((2.0, 1.0), 1), ((1.0, math.inf), 1), ((math.nan,), 1), ((1.0, 2.0), 2)]
)
def test_what_is_no_distribution_is_refused(values, version):
    with pytest.raises(ConfigError, match=r"not a distribution|unknown version"):
        TrainingDistribution(schema_version=version, name="x", cases=3, orientations={}, measures={"m": values})


def test_two_training_cases_are_too_few_to_judge_by(tmp_path):
    for cases in (3, 2):
        found = make_distribution("x", [sized(n) for n in range(1, cases + 1)], PLAN)
        write_json(tmp_path / "training_distribution.json", found)
        if cases == 3:
            assert load_distribution(tmp_path) == found
    with pytest.raises(DataError, match="too few training cases"):
        load_distribution(tmp_path)
    (tmp_path / "training_distribution.json").unlink()
    with pytest.raises(DataError, match="has no record of its training data"):
        load_distribution(tmp_path)
