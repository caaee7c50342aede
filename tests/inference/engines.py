"""Engines whose right answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from unittest.mock import patch

import numpy as np

from distilldsm.data.dataset import Channel as PlanChannel
from distilldsm.data.geometry import mask_of, to_network_space
from distilldsm.data.plan import Normalisation, Plan
from distilldsm.data.targets import softmax
from distilldsm.inference.engines import Engine
from distilldsm.inference.predict import Prediction, Predictor
from distilldsm.inference.probabilities import Ensemble, Member
from distilldsm.inference.windows import Pieces
from distilldsm.io.scan import Channel, Scan

HALO = 2


class Function(Engine):
    """A function of the image (1, C, D, H, W) as an engine; notes the shapes it was given."""

    def __init__(
        self,
        function: Callable[[np.ndarray], np.ndarray],
        *,
        stride: tuple[int, int, int] = (1, 4, 4),
        depth_halo: int | None = HALO,
    ) -> None:
        self.function, self.stride, self.depth_halo = function, stride, depth_halo
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, image: np.ndarray) -> np.ndarray:
        assert all(n % s == 0 for n, s in zip(image.shape[2:], self.stride, strict=True))
        self.shapes.append(image.shape)
        return self.function(image)


def threshold(image: np.ndarray) -> np.ndarray:
    """Bright where the image is above one half."""
    return np.concatenate([0.5 - image, image - 0.5], axis=1).astype(np.float32)


def neighbours(image: np.ndarray) -> np.ndarray:
    """Three classes; a slice's logits depend on HALO slices to each side, zeros beyond the volume. Exact in pieces."""
    mean = image.mean(axis=1, keepdims=True).astype(np.float64)
    logits = [np.zeros_like(mean) for _ in range(3)]
    for k, weight in zip(range(-HALO, HALO + 1), (0.2, 0.4, 1.0, -0.3, 0.1), strict=True):
        moved = np.zeros_like(mean)
        depth = mean.shape[2]
        moved[:, :, max(-k, 0) : depth - max(k, 0)] = mean[:, :, max(k, 0) : depth - max(-k, 0)]
        logits[1] += weight * moved
        logits[2] -= weight**2 * moved
    return np.concatenate(logits, axis=1).astype(np.float32)


def slanted(image: np.ndarray) -> np.ndarray:
    """Like `neighbours`, and different along every axis, so that every flip shows."""
    logits = neighbours(image)
    _, _, _, height, width = image.shape
    logits[:, 1] += np.linspace(0, 0.5, height, dtype=np.float32)[:, None]
    logits[:, 2] += np.linspace(0, 0.7, width, dtype=np.float32)
    return logits


def stored(data: np.ndarray, matrix: np.ndarray) -> Scan:
    """(C, X, Y, Z) as the reader leaves it."""
    return Scan(tuple(Channel(np.asfortranarray(channel)) for channel in data), matrix, Path("scan.nii"), None)


def in_pieces(engine: Engine | Ensemble, scan: Scan, plan: Plan, pieces: Pieces, **options) -> Prediction:
    """A scan through an engine in just these pieces, whatever memory there is."""
    network = engine if isinstance(engine, Ensemble) else Ensemble([Member(engine)])
    with patch.object(Predictor, "_plan_pieces", return_value=pieces):
        return Predictor(network, plan).predict(scan, **options)


def at_once(engine: Engine, scan: Scan, plan: Plan) -> np.ndarray:
    """The mask, the obvious way: the whole volume in memory, padded, through the function, back."""
    image, record = to_network_space(scan, plan)
    steps = [engine.stride[0], *(math.lcm(s, 4) for s in engine.stride[1:])]
    before = [(-n % s) // 2 for n, s in zip(image.shape[1:], steps, strict=True)]
    after = [-n % s - b for n, s, b in zip(image.shape[1:], steps, before, strict=True)]
    logits = engine(np.pad(image, [(0, 0), *zip(before, after, strict=True)])[None])[0]
    inside = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    return mask_of(softmax(logits[:, *inside]), record, plan)


PLAN = Plan(
    name="threshold",
    channels=(PlanChannel(name="T", modality="MRI"),),
    normalisation=(Normalisation(scheme="none"),),
    class_names=("background", "bright"),
    class_values=(0, 7),
    depth_axis="z",
    target_spacing_mm=(3.0, 1.0, 2.0),
    crop_to_nonzero=True,
    coarse_slices=False,
    patch_size=(8, 16, 16),
    batch_size=2,
    median_shape=(8, 16, 16),
    training_memory_gb=1.0,
    reasons={},
)
THREE = replace(PLAN, class_names=("background", "a", "b"), class_values=(0, 7, 3), target_spacing_mm=(1.3, 1.0, 0.8))
ORIENTATIONS = [
    "".join(axis[sign] for axis, sign in zip(order, signs, strict=True))
    for order in permutations(("RL", "AP", "SI"))
    for signs in product((0, 1), repeat=3)
]
