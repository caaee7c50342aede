"""What a scan looks like, slice by slice, against the same over the whole volume."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import distilldsm.data.scan_measures as module
from distilldsm.data import scan_measures
from distilldsm.data.dataset import Channel
from distilldsm.data.scan_measures import QUANTILES, measure_channel, measure_scan
from distilldsm.io.scan import Channel as Stored
from distilldsm.io.scan import Scan
from tests.data.volumes import affine


def volume(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Noise about a slope, a third of the voxels 0."""
    rng = np.random.default_rng(seed)
    values = rng.normal(5, 2, shape) + np.indices(shape).sum(axis=0)
    return np.where(rng.random(shape) < 1 / 3, 0, values)


def obvious(values: np.ndarray, whole: bool) -> dict:
    """Of all voxels at once, as the descriptions say."""
    use = np.ones(values.shape, dtype=bool) if whole else values != 0
    middle = np.zeros(values.shape, dtype=bool)
    middle[tuple(slice(n // 4, max(n - n // 4, n // 4 + 1)) for n in values.shape)] = True
    differences = []
    for axis in range(3):
        pairs = [np.moveaxis(a, axis, 0) for a in (values, use)]
        both = pairs[1][1:] & pairs[1][:-1]
        if both.any():
            differences.append(np.abs(pairs[0][1:] - pairs[0][:-1])[both].mean())
    sd = values[use].std()
    inside, outside = values[use & middle], values[use & ~middle]
    rest = outside.mean() if outside.size else values[use].mean()
    return {
        "quantiles": np.percentile(values[use], QUANTILES),
        "mean": values[use].mean(),
        "sd": sd,
        "centre": (inside.mean() - rest) / (sd or 1) if inside.size else 0,
        "roughness": np.mean(differences) / (sd or 1) if differences else 0,
    }


@pytest.mark.parametrize("shape", [(9, 10, 11), (4, 5, 6), (8, 8, 1), (1, 1, 1), (2, 3, 2)])
@pytest.mark.parametrize("whole", [True, False])
def test_a_channel_is_measured_as_the_whole_volume(shape, whole):
    values = volume(shape) if math.prod(shape) > 1 else np.full(shape, 7.0)
    found = measure_channel(lambda k: values[..., k], shape, whole=whole)
    for name, expected in obvious(values, whole).items():
        assert getattr(found.measures, name) == pytest.approx(expected), name
    assert found.nonzero_fraction == pytest.approx((values != 0).mean())
    assert found.label_means == ()


@pytest.mark.parametrize("whole", [True, False])
def test_a_quick_measurement_of_a_large_channel_is_close(whole, monkeypatch):
    monkeypatch.setattr(scan_measures, "QUICK_VOXELS", 20_000)
    values, read = volume((30, 40, 160)), []

    def plane(k: int) -> np.ndarray:
        read.append(k)
        return values[..., k]

    quick = measure_channel(plane, values.shape, whole=whole, quick=True)
    assert read == [k for k in range(160) if k // 2 % 9 == 4]
    full = measure_channel(lambda k: values[..., k], values.shape, whole=whole)
    assert quick.nonzero_fraction == pytest.approx(full.nonzero_fraction, abs=0.02)
    for name in ("mean", "sd", "roughness"):
        assert getattr(quick.measures, name) == pytest.approx(getattr(full.measures, name), rel=0.05), name
    assert quick.measures.centre == pytest.approx(full.measures.centre, abs=0.1)
    few = values[..., :20]
    assert measure_channel(lambda k: few[..., k], few.shape, whole=whole, quick=True) == measure_channel(
        lambda k: few[..., k], few.shape, whole=whole
    ), "few slices are all measured"


def test_an_empty_channel_is_all_zeros():
    found = measure_channel(lambda _: np.zeros((3, 4)), (3, 4, 2), whole=False)
    assert found.measures == module.ChannelMeasures(
        quantiles=(0.0,) * len(QUANTILES), mean=0.0, sd=0.0, centre=0.0, roughness=0.0
    )
    assert found.nonzero_fraction == 0


@pytest.mark.parametrize("shape", [(9, 10, 11), (6, 7, 4), (3, 4, 5), (10, 10, 1)])
def test_quantiles_of_a_large_channel_are_of_every_so_manieth_voxel(monkeypatch, shape):
    """The step shares no factor with a line's length, else the same columns would be taken only."""
    monkeypatch.setattr(module, "SAMPLES", 100)
    values = volume(shape)
    least = math.ceil(values.size / 100)
    step = next(n for n in range(least, 1000) if n == 1 or math.gcd(n, shape[1]) == 1)
    taken = [v for k in range(shape[2]) for j, v in enumerate(values[..., k].flat) if j % step == k % step]
    found = measure_channel(lambda k: values[..., k], shape, whole=True)
    assert found.measures.quantiles == pytest.approx(np.percentile(taken, QUANTILES))
    assert found.measures.mean == pytest.approx(values.mean()), "means are of all"


def test_a_scan_with_structures():
    shape = (6, 7, 8)
    data = [volume(shape, seed).astype(np.float32) for seed in (1, 2)]
    data[1][:3] = 0
    matrix = affine("LSA", (2.0, 0.5, 3.0))
    scan = Scan(tuple(Stored(np.asfortranarray(d)) for d in data), matrix, Path("x.nii"), None)
    channels = (Channel(name="T1", modality="MRI"), Channel(name="ct", modality="CT"))
    classes = np.random.default_rng(0).integers(0, 3, shape)
    found = measure_scan(scan, channels, ("background", "a", "b", "absent"), classes)
    assert (found.shape, found.spacing_mm, found.orientation) == ((6, 8, 7), pytest.approx((2.0, 3.0, 0.5)), "LSA")
    assert found.nonzero_fraction == pytest.approx(min((d != 0).mean() for d in data))
    for k, (one, whole) in enumerate(zip(found.channels, (False, True), strict=True)):
        assert one.mean == pytest.approx(obvious(data[k].astype(float), whole)["mean"])
    for k, name in enumerate(("a", "b"), start=1):
        assert found.labels[name].volume_ml == pytest.approx((classes == k).sum() * 3 / 1000)
        assert found.labels[name].means == pytest.approx([d[classes == k].mean(dtype=np.float64) for d in data])
    assert (found.labels["absent"].volume_ml, found.labels["absent"].means) == (0, None)
    assert list(found.labels) == ["a", "b", "absent"]
    assert measure_scan(scan, channels, ("background", "a")).labels == {}
