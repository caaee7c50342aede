"""The rules of the plan: each is a pure function of numbers from the fingerprint, and says its reason.

Axes are in the order (depth, height, width), but in `depth_axis`. Sizes are in voxels unless a name says mm. The
thresholds were tried on hippocampus and ACDC (docs/recipe.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distilldsm.config import AugmentConfig

Size = tuple[int, int, int]
Spacing = tuple[float, float, float]
Numbers = Sequence[float] | npt.NDArray[np.floating]

COARSE = 3.0
"""Slices are coarse if their spacing is at least this many times the in-plane spacing."""
LONGEST = 1.25
"""The box's longest axis becomes the depth axis if it is this many times as long as the next one."""
SAME_SPACING = 1.25
"""Spacings that differ by at most this factor count as the same."""
WHOLE_AXIS = 0.65
"""A patch covers the whole axis if the box fills at least this share of it."""
CONTEXT: Size = (16, 64, 64)
"""Patches are not smaller than this, as far as the scans reach: the network sees that much around a voxel."""
LEAST_PATCHES, LEAST_PER_CASE = 6_000, 40
"""Spacing and patch are chosen so that a training sees this many patches, and this many of each case."""
COARSER_STEP, COARSEST = 1.03, 2.5
"""Factor of one step to a coarser spacing, and the largest factor in all."""
DEEPEST_BOX = 48
"""Slices. The network sees 8 slices each way."""
LABEL_ACROSS = 10
"""Voxels that the smallest label keeps across."""
VOXELS_PER_STEP = 250_000
ENOUGH_PATCHES, ENOUGH_PER_CASE = 10_000, 60
"""A training on whole volumes stops after the larger of: this many patches, this many for each case."""
EPOCH_PATCHES = 200
"""An epoch has about this many patches, because it ends with a line, a record and perhaps a checkpoint."""
EMA_SHARE, EMA_STEPS = 0.02, 50
ONE_COMPONENT = 0.99
FEW_STEPS, FEW_PER_CASE = 1_500, 20
"""A training below one of these is warned about."""


def depth_axis(spacing_mm: Numbers, box_mm: Numbers, shape: Sequence[int]) -> tuple[int, str]:
    """Index of the depth axis among x, y, z, in whose order the arguments are, and the reason.

    Args:
        spacing_mm: the data set's spacing.
        box_mm: size of the foreground's box.
        shape: median shape.
    """
    coarsest = int(np.argmax(spacing_mm))
    others = [mm for k, mm in enumerate(spacing_mm) if k != coarsest]
    if spacing_mm[coarsest] >= COARSE * max(others):
        return coarsest, f"coarse slices ({spacing_mm[coarsest]:.3g} mm, {max(others):.3g} mm in plane)"
    second, longest = np.argsort(box_mm, kind="stable")[1:]
    if box_mm[longest] >= LONGEST * box_mm[second]:
        return int(longest), (
            f"longest axis of the foreground ({box_mm[longest]:.0f} mm, the next {box_mm[second]:.0f} mm): "
            "cross-sections are compact"
        )
    if max(spacing_mm) > SAME_SPACING * min(spacing_mm):
        return coarsest, f"coarsest spacing ({spacing_mm[coarsest]:.3g} mm)"
    smallest = int(np.argmin(shape))
    return smallest, f"spacing is about the same everywhere; smallest extent ({shape[smallest]})"


def is_coarse(spacing_mm: Numbers) -> tuple[bool, str]:
    """Whether slices are coarse, and the reason."""
    ratio = spacing_mm[0] / max(spacing_mm[1:])
    return bool(ratio >= COARSE), f"depth spacing is {ratio:.2g} times the in-plane spacing; coarse from {COARSE:g} on"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What spacing and patch are decided from."""

    spacing_mm: Spacing
    """Median of the data set."""
    extent_mm: Spacing
    """Median size of the scans after cropping."""
    box_mm: Spacing
    """Size of the foreground's box, 90th percentile per axis."""
    label_mm: Spacing
    """Size of the smallest label per axis; infinite without labels."""
    coarse: bool

    def shape(self, spacing_mm: Numbers) -> Size:
        """Shape of the median scan at a spacing."""
        d, h, w = (max(1, round(mm / s)) for mm, s in zip(self.extent_mm, spacing_mm, strict=True))
        return d, h, w

    def box(self, spacing_mm: Numbers) -> Size:
        """Size of the foreground's box at a spacing, at most the scan's shape."""
        # Rounded before the ceiling: a header in float32 makes 30.000001 voxels of 30.
        voxels = (int(np.ceil(round(mm / s, 3))) for mm, s in zip(self.box_mm, spacing_mm, strict=True))
        d, h, w = (min(max(1, v), n) for v, n in zip(voxels, self.shape(spacing_mm), strict=True))
        return d, h, w


def patch_around(shape: Size, box: Size) -> Size:
    """The patch: the box, at least CONTEXT, or the whole axis where the box fills WHOLE_AXIS of it; even in plane."""
    wanted = [n if b >= WHOLE_AXIS * n else min(max(b, c), n) for n, b, c in zip(shape, box, CONTEXT, strict=True)]
    return wanted[0], wanted[1] + wanted[1] % 2, wanted[2] + wanted[2] % 2


def patch_limit(budget: float, cases: int) -> int:
    """Largest number of voxels in a patch with which the budget is enough patches, see LEAST_PATCHES."""
    return int(budget / max(LEAST_PATCHES, LEAST_PER_CASE * cases))


def choose_spacing(grid: Grid, limit: int) -> tuple[Spacing, str]:
    """The finest spacing at which the patch has at most `limit` voxels and the box at most DEEPEST_BOX slices.

    From the native spacing, each step makes the finest axes 3 % coarser. Coarse slices stay. No axis becomes more than
    2.5 times as coarse, or so coarse that the smallest label is less than LABEL_ACROSS voxels across.
    """
    native = np.array(grid.spacing_mm)
    limits = np.minimum(COARSEST * native, np.maximum(native, np.array(grid.label_mm) / LABEL_ACROSS))
    if grid.coarse:
        limits[0] = native[0]
    floor, spacing, binding = native.min(), native, ""
    while True:
        patch = patch_around(grid.shape(spacing), grid.box(spacing))
        too_large, too_deep = int(np.prod(patch)) > limit, grid.box(spacing)[0] > DEEPEST_BOX and not grid.coarse
        if not (too_large or too_deep) or (spacing >= limits).all():
            break
        binding = f"patches of more than {limit:,} voxels would be too few" if too_large else binding
        binding = binding or f"the foreground was deeper than {DEEPEST_BOX} slices"
        floor *= COARSER_STEP
        spacing = np.clip(floor, native, limits)
    d, h, w = (round(float(v), 6) for v in spacing)
    if not binding:
        return (d, h, w), "median of the data set"
    stopped = (
        "" if not (too_large or too_deep) else f", as far as {COARSEST:g} times and {LABEL_ACROSS} voxels a label go"
    )
    times = " x ".join(f"{v:.3g}" for v in spacing / native)
    return (d, h, w), f"{times} times the median of the data set, because {binding}{stopped}"


def choose_patch(shape: Size, box: Size, limit: int) -> tuple[Size, str]:
    """The patch around the box, shrunk to at most `limit` voxels, and the reason.

    The depth shrinks first, down to 16 slices, then the larger side in plane, down to 64, then the depth again.
    """
    wanted = patch_around(shape, box)
    depth, height, width = wanted
    least_depth, *least = CONTEXT
    while depth * height * width > limit and depth > least_depth:
        depth -= 1
    while depth * height * width > limit and (height > least[0] or width > least[1]):
        if height - least[0] >= width - least[1]:
            height -= 2
        else:
            width -= 2
    while depth * height * width > limit and depth > 1:
        depth -= 1
    whole = [n <= p for n, p in zip(shape, wanted, strict=True)]
    reason = "the whole scan" if all(whole) else f"the foreground's box ({' x '.join(map(str, box))})"
    if any(whole) and not all(whole):
        names = ", ".join(name for name, one in zip(("depth", "height", "width"), whole, strict=True) if one)
        reason += f", the whole scan along {names}"
    reason += "; even in plane, so that every level halves alike"
    shrunk = f"; from {' x '.join(map(str, wanted))} to at most {limit:,} voxels"
    return (depth, height, width), reason + (shrunk if (depth, height, width) != wanted else "")


def batch_size(patch: Size) -> tuple[int, str]:
    """Patches per step, and the reason."""
    batch = int(np.clip(round(VOXELS_PER_STEP / np.prod(patch)), 2, 4))
    return batch, f"about {VOXELS_PER_STEP:,} voxels per step, from 2 to 4 patches; train.batch_size overrides it"


def patches_to_see(budget: float, patch: Size, cases: int, *, whole: bool) -> tuple[int, str]:
    """Number of patches of a training, and the reason."""
    affordable = max(1, int(budget / np.prod(patch)))
    enough = max(ENOUGH_PATCHES, ENOUGH_PER_CASE * cases)
    if whole and affordable > enough:
        return enough, f"whole volumes: {ENOUGH_PATCHES:,} patches or {ENOUGH_PER_CASE} a case are enough"
    return affordable, f"train.budget of {budget:.3g} voxels / {int(np.prod(patch)):,} a patch"


def epochs(patches: int, cases: int) -> tuple[int, int]:
    """Epochs, and patches of each case in an epoch, for a number of patches."""
    samples = max(1, round(EPOCH_PATCHES / cases))
    return max(1, round(patches / (cases * samples))), samples


def foreground_share(*, whole: bool) -> tuple[float, str]:
    """Share of patches centred on foreground, and the reason."""
    return (0.33, "patches are whole volumes") if whole else (0.8, "patches are parts of volumes")


def ema_decay(steps: int) -> tuple[float, str]:
    """Decay of the averaged weights, and the reason."""
    over = max(EMA_STEPS, EMA_SHARE * steps)
    return round(1 - 1 / over, 5), f"over {EMA_SHARE:.0%} of {steps:,} steps, at least {EMA_STEPS}"


def rotation_deg(*, coarse: bool) -> tuple[float, str]:
    """Largest rotation about the depth axis, and the reason."""
    largest = AugmentConfig().largest_rotation(coarse_slices=coarse)
    return largest, "coarse slices are not tilted" if coarse else "patches are tilted, too"


def single_labels(components: Sequence[dict[str, int]]) -> tuple[str, ...]:
    """Labels that are one component in ONE_COMPONENT of the cases that hold them.

    Args:
        components: for each case, label to its number of components.
    """
    names = {name: None for one in components for name in one}
    counts = {name: [one[name] for one in components if one.get(name)] for name in names}
    return tuple(n for n, found in counts.items() if found and np.mean(np.array(found) == 1) >= ONE_COMPONENT)


def remark_on_few_steps(
    *, steps: int, patches: int, cases: int, patch_voxels: int, budget: float, by_plan: bool
) -> str | None:
    """A warning if a training has few steps or sees few patches of a case; None if it has enough.

    Args:
        steps, patches: of the training.
        cases: number of training cases.
        patch_voxels: voxels of a patch.
        budget: the plan's.
        by_plan: the plan decided the length, and not `train.epochs`.
    """
    # An epoch leaves out the rest of its last batch: a plan of exactly enough patches has a few steps less.
    if 1.03 * steps >= FEW_STEPS and 1.03 * patches >= FEW_PER_CASE * cases:
        return None
    needed = max(-(-FEW_STEPS * patches // steps), FEW_PER_CASE * cases)
    wanted = max(needed * patch_voxels, budget * needed / patches if by_plan else 0.0)
    digit = 10.0 ** (math.floor(math.log10(wanted)) - 1)
    enough = math.ceil(wanted / digit) * digit
    settings = ([] if by_plan else ["train.epochs=null"]) + ([f"train.budget={enough:g}"] if enough > budget else [])
    return (
        f"train: {steps:,} optimizer steps and {patches / cases:.0f} patches a case are few for real scans. "
        f"For {FEW_STEPS:,} steps and {FEW_PER_CASE} patches a case, set {' and '.join(settings)}"
    )
