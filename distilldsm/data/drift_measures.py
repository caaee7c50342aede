"""The measures for drift: the name, the scale and the meaning of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from distilldsm.data.dataset import Channel
from distilldsm.data.plan import Normalisation, Plan
from distilldsm.data.scan_measures import QUANTILES, ChannelMeasures, ScanMeasures

Transform = Literal["linear", "log", "asinh", "root"]
AXES = ("x", "y", "z")
_P0_5, _P5, _P25, _P50, _P75, _P95, _P99_5 = range(len(QUANTILES))


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of a scan."""

    name: str
    title: str
    unit: str
    group: str
    transform: Transform
    """Scale for computing distances: log for sizes, cube root for volumes, asinh for intensities of any unit."""
    floor: float
    """Differences below this, in that scale, are ignored."""
    undone: bool
    """The model's preprocessing undoes a change of this measure. The change is listed, but it is not drift."""
    meaning: str
    """Possible causes of a change."""

    def scaled(self, value: float) -> float:
        """The value in the scale of `transform`."""
        if self.transform == "log":
            return math.log(max(value, 1e-9))
        if self.transform == "root":
            return math.cbrt(max(value, 0.0))
        return math.asinh(value) if self.transform == "asinh" else value

    def unscaled(self, value: float) -> float:
        """The inverse of `scaled`."""
        if self.transform == "log":
            return math.exp(min(value, 700.0))
        if self.transform == "root":
            return max(value, 0.0) ** 3
        return math.sinh(max(min(value, 700.0), -700.0)) if self.transform == "asinh" else value


def measures_of(plan: Plan) -> tuple[Measure, ...]:
    """All measures for scans of a model with this plan, in the order of the report."""
    found = [*_geometry()]
    for channel, rule in zip(plan.channels, plan.normalisation, strict=True):
        found += _intensities(channel, rule)
    for label in plan.class_names[1:]:
        found.append(
            Measure(
                name=f"volume_ml[{label}]", title=f"volume of {label}", unit="ml", group="structures", transform="root",
                floor=0.05, undone=False, meaning="other anatomy or pathology, a wrong voxel size, or a failed mask",
            )
        )  # fmt: skip
        found += [
            Measure(
                name=f"contrast[{label},{c.name}]", title=f"{c.name} in {label}, normalised", unit="sd",
                group="structures", transform="linear", floor=0.1, undone=False,
                meaning="another contrast, or a mask that lies elsewhere",
            )
            for c in plan.channels
        ]  # fmt: skip
    return tuple(found)


def _geometry() -> list[Measure]:
    return [
        *(
            Measure(
                name=f"spacing_{a}_mm", title=f"voxel size along {a}", unit="mm", group="geometry", transform="log",
                floor=0.03, undone=False,
                meaning="another protocol or a wrong header; resampling matches the size, not the detail",
            )
            for a in AXES
        ),
        *(
            Measure(
                name=f"fov_{a}_mm", title=f"field of view along {a}", unit="mm", group="geometry", transform="log",
                floor=0.03, undone=False, meaning="a cropped or a larger field of view, another part of the body",
            )
            for a in AXES
        ),
        *(
            Measure(
                name=f"shape_{a}", title=f"voxels along {a}", unit="", group="geometry", transform="log", floor=0.03,
                undone=True, meaning="another matrix; resampling undoes it, field of view and voxel size tell the rest",
            )
            for a in AXES
        ),
    ]  # fmt: skip


def _intensities(channel: Channel, rule: Normalisation) -> list[Measure]:
    c, z_score = channel.name, rule.scheme in ("zscore", "zscore_foreground")

    def measure(name: str, title: str, unit: str, group: str, floor: float, meaning: str, **other: bool) -> Measure:
        asinh = group == "intensity as stored" and channel.modality != "CT"
        return Measure(
            name=f"{name}[{c}]", title=f"{c}: {title}", unit=unit, group=group, floor=floor, meaning=meaning,
            transform="asinh" if asinh else "linear", undone=other.get("undone", False),
        )  # fmt: skip

    scanner = "another scanner's intensity scale" + ("; the normalisation undoes it" if z_score else "")
    raw_floor = 20.0 if channel.modality == "CT" else 0.05
    raw = [
        measure(name, title, "", "intensity as stored", raw_floor, scanner, undone=z_score)
        for name, title in (("p5", "5 % of voxels below"), ("p50", "median"), ("p95", "95 % of voxels below"))
    ]
    shape = "another contrast or sequence, more or less background, fill values"
    normalised = [
        measure(f"normalised_{key}", f"{title}, normalised", "sd", "intensity after normalisation", 0.1, shape)
        for key, title in (("p5", "5 %"), ("p50", "median"), ("p95", "95 %"), ("p99_5", "99.5 %"))
    ]
    normalised.append(
        measure("asymmetry", "asymmetry of the histogram", "", "intensity after normalisation", 0.05, shape)
    )
    if rule.scheme == "ct":
        clipped = "voxels beyond the range that the network sees: metal, air, fill values, or no Hounsfield units"
        normalised += [
            measure(f"clipped_{end}", f"share clipped, {end}", "", "intensity after normalisation", 0.05, clipped)
            for end in ("low", "high")
        ]
    picture = [
        measure("centre", "centre minus border", "sd", "picture", 0.1, "an inverted contrast, or another anatomy"),
        measure("roughness", "difference of neighbours", "sd", "picture", 0.03, "more noise, smoothing, other detail"),
    ]
    if channel.modality != "CT":
        picture.append(measure("nonzero", "share that is not 0", "", "picture", 0.05, "padding, masking or cropping"))
    return [*raw, *normalised, *picture]


def values_of(scan: ScanMeasures, plan: Plan) -> dict[str, float]:
    """The measures of one scan. Measures of a structure need a mask that holds the structure."""
    found: dict[str, float] = {}
    for a, size, spacing in zip(AXES, scan.shape, scan.spacing_mm, strict=True):
        found |= {f"spacing_{a}_mm": spacing, f"fov_{a}_mm": size * spacing, f"shape_{a}": float(size)}
    for channel, rule, one in zip(plan.channels, plan.normalisation, scan.channels, strict=True):
        found |= _channel_values(channel, rule, one, scan.nonzero_fraction)
    for label, measured in scan.labels.items():
        found[f"volume_ml[{label}]"] = measured.volume_ml
        for k, mean in enumerate(measured.means or ()):
            found[f"contrast[{label},{plan.channels[k].name}]"] = _normalised(mean, plan.normalisation[k], scan, k)
    return found


def _channel_values(
    channel: Channel, rule: Normalisation, one: ChannelMeasures, nonzero_fraction: float
) -> Mapping[str, float]:
    q = one.quantiles
    n = [_normalise(value, rule, one) for value in q]
    width = n[_P95] - n[_P5]
    values = {
        "p5": q[_P5], "p50": q[_P50], "p95": q[_P95],
        "normalised_p5": n[_P5], "normalised_p50": n[_P50], "normalised_p95": n[_P95], "normalised_p99_5": n[_P99_5],
        "asymmetry": (n[_P95] + n[_P5] - 2 * n[_P50]) / width if width > 0 else 0.0,
        "centre": one.centre, "roughness": one.roughness,
    }  # fmt: skip
    if rule.scheme == "ct":
        values["clipped_low"], values["clipped_high"] = _share_below(q, rule.low), 1 - _share_below(q, rule.high)
    if channel.modality != "CT":
        values["nonzero"] = nonzero_fraction
    return {f"{name}[{channel.name}]": float(value) for name, value in values.items()}


def _normalised(value: float, rule: Normalisation, scan: ScanMeasures, channel: int) -> float:
    return _normalise(value, rule, scan.channels[channel])


def _normalise(value: float, rule: Normalisation, one: ChannelMeasures) -> float:
    """One intensity as the network sees it, see `geometry.Normaliser`."""
    if rule.scheme == "none":
        return value
    if rule.scheme == "ct":
        return (min(max(value, rule.low), rule.high) - rule.mean) / rule.sd
    return (value - one.mean) / max(one.sd, 1e-8)


def _share_below(quantiles: tuple[float, ...], limit: float) -> float:
    """Share of voxels below a limit, interpolated linearly between the stored quantiles."""
    if limit <= quantiles[0]:
        return 0.0
    if limit >= quantiles[-1]:
        return 1.0
    # np.interp needs increasing values; equal quantiles are moved apart a little.
    spread = np.array(quantiles) + np.arange(len(quantiles)) * 1e-9
    return float(np.interp(limit, spread, QUANTILES)) / 100
