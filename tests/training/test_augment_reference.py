"""Augmentation against the same, written slowly: every draw in its order, every voxel by scipy in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from distilldsm.config import AugmentConfig
from distilldsm.training import augment as module
from distilldsm.training.augment import augment, change_intensities, changes_nothing, coarsen

AXES = {"depth": 0, "height": 1, "width": 2}


def plane_rotation(angle: float, a: int, b: int) -> np.ndarray:
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def drawer(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return (lambda *shape: torch.rand(*shape, generator=generator).double().numpy()), (
        lambda *shape: torch.randn(*shape, generator=generator).double().numpy()
    )


def slow_coordinates(batch, grown, size, config: AugmentConfig, tilt_deg, spacing, rand, randn) -> list[np.ndarray]:
    """For each sample (3, D, H, W): where its voxels lie in the input."""
    turn, height, width = ((rand(batch) * 2 - 1) * math.radians(d) for d in (config.rotation_deg, tilt_deg, tilt_deg))
    scale = 1 + (rand(batch) * 2 - 1) * config.scale
    spatial = rand(batch) < config.spatial_probability
    offsets = np.stack(np.meshgrid(*[np.arange(n) - n // 2 for n in size], indexing="ij"))
    found = []
    for k in range(batch):
        matrix = np.eye(3)
        if spatial[k]:
            turned = plane_rotation(turn[k], 1, 2) @ plane_rotation(height[k], 0, 2) @ plane_rotation(width[k], 0, 1)
            matrix = np.diag(1 / np.array(spacing)) @ turned @ np.diag(spacing) / scale[k]
        middle = np.array([n // 2 for n in grown])[:, None, None, None]
        found.append(np.einsum("ij,jdhw->idhw", matrix, offsets) + middle)
    if config.elastic_probability:
        bends = randn(batch, 3, 5, 5, 5) * config.elastic_mm
        bent = rand(batch, 1, 1, 1, 1).ravel() < config.elastic_probability
        at = np.meshgrid(*[np.linspace(0, 4, n) for n in size], indexing="ij")
        for k in np.flatnonzero(bent):
            for axis in range(3):
                found[k][axis] += ndimage.map_coordinates(bends[k, axis], at, order=1) / spacing[axis]
    return found


@pytest.mark.parametrize("classes", [2, 8, 9])
@pytest.mark.parametrize("coarse", [False, True])
def test_geometry_is_that_of_scipy(classes, coarse):
    """Rotation in mm, scale, bend and flips, of some of the samples each."""
    spacing, size, grown, batch = (2.0, 1.0, 0.8), (7, 14, 17), (10, 20, 21), 6
    config = AugmentConfig(
        spatial_probability=0.6, rotation_deg=30, tilt_deg=None if coarse else 20, scale=0.2, elastic_probability=0.5,
        elastic_mm=2.0, intensity_probability=0, low_resolution_probability=0, mirror_axes=("height", "depth"),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = ndimage.gaussian_filter(rng.normal(size=(batch, 2, *grown)), (0, 0, 1, 1, 1)).astype(np.float32)
    labels = (np.add.outer(np.arange(batch), np.indices(grown).sum(0)) // 6) % classes
    found, found_labels = augment(
        torch.from_numpy(images), torch.from_numpy(labels), size, config, classes=classes, spacing_mm=spacing,
        coarse_slices=coarse, generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    rand, randn = drawer(5)
    places = slow_coordinates(batch, grown, size, config, 0 if coarse else 20, spacing, rand, randn)
    flips = [(axis, rand(batch) < 0.5) for axis in config.mirror_axes]
    for k in range(batch):
        turned = [axis for axis, flip in flips if flip[k]]
        for channel in range(2):
            slow = ndimage.map_coordinates(images[k, channel], places[k], order=1, mode="grid-constant")
            slow = np.flip(slow, [AXES[a] for a in turned])
            np.testing.assert_allclose(found[k, channel], slow, atol=2e-4)
        if classes <= 8:
            shares = [
                ndimage.map_coordinates((labels[k] == c) * 1.0, places[k], order=1, mode="grid-constant")
                for c in range(1, classes)
            ]
            slow = np.argmax([1 - np.sum(shares, axis=0), *shares], axis=0)
        else:
            slow = ndimage.map_coordinates(labels[k], np.round(places[k]), order=0, mode="grid-constant")
        slow = np.flip(slow, [AXES[a] for a in turned])
        assert (found_labels[k].numpy() == slow).mean() > 0.998


def slow_intensities(images: np.ndarray, probability: float, rand, randn) -> np.ndarray:
    batch, channels = images.shape[:2]

    def factor(low, high, neutral):
        drawn, applied = low + (high - low) * rand(batch, channels), rand(batch, 1) < probability
        return np.where(applied, drawn, neutral)

    contrast, brightness, gamma = factor(0.75, 1.3, 1), factor(-0.2, 0.2, 0), factor(0.7, 1.5, 1)
    blurred, sigma = rand(batch) < probability / 2, 0.5 + 0.7 * rand(batch)
    deviation = factor(0, 0.15, 0)
    noise = randn(*images.shape)
    out = np.empty(images.shape)
    for b, c in np.ndindex(batch, channels):
        x = images[b, c].astype(np.float64)
        x = (x - x.mean()) * contrast[b, c] + x.mean() + brightness[b, c]
        low, extent = x.min(), x.max() - x.min()
        x = ((x - low) / extent) ** gamma[b, c] * extent + low
        if blurred[b]:
            kernel = [math.exp(-0.5 * (t / sigma[b]) ** 2) for t in range(-3, 4)]
            for axis in (1, 2):  # in plane only
                x = ndimage.correlate1d(x, np.array(kernel) / sum(kernel), axis=axis, mode="nearest")
        out[b, c] = x + noise[b, c] * deviation[b, c]
    return out


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_intensities_are_those_written_slowly(probability):
    images = torch.rand(8, 2, 3, 9, 8, generator=torch.Generator().manual_seed(1)) * 5 - 1
    found = change_intensities(images, probability, torch.Generator().manual_seed(2))
    np.testing.assert_allclose(found, slow_intensities(images.numpy(), probability, *drawer(2)), atol=2e-4)


def slow_coarse(volume: np.ndarray, small: list[int]) -> np.ndarray:
    """Every axis by itself: the nearest voxel of each coarse one, then linearly back."""
    for axis, (n, few) in enumerate(zip(volume.shape, small, strict=True)):
        nearest = np.floor((np.arange(few) + 0.5) * n / few).astype(int)
        places = (np.arange(n) + 0.5) * few / n - 0.5
        volume = np.apply_along_axis(
            lambda line, nearest=nearest, places=places: np.interp(places, np.arange(len(nearest)), line[nearest]),
            axis,
            volume,
        )
    return volume


@pytest.mark.parametrize("coarse", [False, True])
def test_coarsening_is_that_written_slowly(coarse):
    images = torch.rand(4, 2, 5, 16, 11, generator=torch.Generator().manual_seed(0))
    drawn = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1))
    drawn[0, 0, 0] = 0.5  # not below the probability
    found = coarsen(images, 0.5, drawn, coarse_slices=coarse)
    for b, c in np.ndindex(4, 2):
        slow = images[b, c].numpy()
        if drawn[b, c, 0] < 0.5:
            small = [max(round(n * (0.5 + 0.5 * float(drawn[b, c, 1]))), 1) for n in slow.shape]
            slow = slow_coarse(slow, [5 if coarse else small[0], *small[1:]])
        np.testing.assert_allclose(found[b, c], slow, atol=1e-5)


def test_the_order_of_draws_and_changes():
    """Whether a channel is coarsened is drawn before the intensities, and done after them."""
    images = torch.rand(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = AugmentConfig(spatial_probability=0, intensity_probability=1, low_resolution_probability=0.5)
    found, _ = augment(
        images, torch.zeros(3, 4, 8, 8, dtype=torch.long), (4, 8, 8), config, classes=2, spacing_mm=(1, 1, 1),
        coarse_slices=False, generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    for _ in range(5):  # three angles, scale, and whether
        torch.rand(3, generator=generator)
    drawn = torch.rand(3, 2, 2, generator=generator)
    expected = coarsen(change_intensities(images, 1.0, generator), 0.5, drawn, coarse_slices=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["spatial", "elastic", "intensity", "low_resolution"])
def test_any_probability_is_a_change(name):
    nothing = {f"{n}_probability": 0.0 for n in ("spatial", "elastic", "intensity", "low_resolution")}
    assert changes_nothing(AugmentConfig(**nothing))
    assert not changes_nothing(AugmentConfig(**nothing | {f"{name}_probability": 0.1}))
    assert not changes_nothing(AugmentConfig(**nothing, mirror_axes=("width",)))


def test_shares_of_two_processes_are_every_second_sample():
    """White noise apart, which each draws from a stream of its own."""
    one = module.Draws(torch.Generator().manual_seed(1))
    whole = one.rand(6, 2), one.randn(6, 3)
    for rank in range(2):
        draws = module.Draws(torch.Generator().manual_seed(1), rank, 2, noise=torch.Generator().manual_seed(9))
        assert torch.equal(draws.rand(3, 2), whole[0][rank::2])
        assert torch.equal(draws.randn(3, 3), whole[1][rank::2])
        assert torch.equal(draws.noise((4,)), torch.randn(4, generator=torch.Generator().manual_seed(9)))
