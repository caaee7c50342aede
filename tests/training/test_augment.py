"""Augmentation: image and label move together, in mm, and the same for any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distilldsm.config import AugmentConfig
from distilldsm.training.augment import Draws, augment, centre_crop, change_intensities, likeliest


def ball_batch(size=(12, 24, 24)) -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.stack(torch.meshgrid(*[torch.arange(n) - n // 2 for n in size], indexing="ij"))
    label = ((grid[0] / 4) ** 2 + (grid[1] / 8) ** 2 + (grid[2] / 5) ** 2 <= 1).long()
    return label[None, None].float().repeat(4, 1, 1, 1, 1), label[None].repeat(4, 1, 1, 1)


def run_augment(config: AugmentConfig, size=(12, 24, 24), seed=0, spacing=(1.0, 1.0, 1.0), classes=2):
    images, labels = ball_batch()
    generator = torch.Generator().manual_seed(seed)
    return augment(
        images, labels, size, config, classes=classes, spacing_mm=spacing, coarse_slices=False, generator=generator
    )


CUBES = {"classes": 2, "spacing_mm": (1, 1, 1), "coarse_slices": False}
NOTHING = AugmentConfig(spatial_probability=0, intensity_probability=0)


@pytest.mark.parametrize("size", [(12, 24, 24), (8, 16, 16), (7, 15, 13)])
def test_augmenting_with_nothing_is_a_centre_crop(size):
    images, labels = ball_batch()
    x, y = run_augment(NOTHING, size)
    cropped = centre_crop(images, labels, size)
    torch.testing.assert_close(x, cropped[0], atol=1e-5, rtol=0)
    assert torch.equal(y, cropped[1])


def test_shares_are_moved_like_the_classes():
    """Turned, bent and mirrored shares of 0 and 1 give the classes where one share is above a half."""
    config = AugmentConfig(spatial_probability=1, elastic_probability=1, mirror_axes=("depth", "height", "width"))
    images, labels = ball_batch()
    shares = torch.stack([labels == 1], dim=1).to(torch.uint8) * 255
    both = [
        augment(images, y, (8, 16, 16), config, **CUBES, generator=torch.Generator().manual_seed(3))
        for y in (labels, shares)
    ]
    assert torch.equal(both[0][0], both[1][0])
    moved = both[1][1]
    assert moved.dtype == torch.float32
    assert ((moved > 0.1) & (moved < 0.9)).any()
    assert torch.equal(both[0][1], (moved[:, 0] > 0.5).long())
    cropped = centre_crop(images, shares, (8, 16, 16))[1]
    assert torch.equal(cropped[:, 0].long(), centre_crop(images, labels, (8, 16, 16))[1])


def test_augmentation_repeats_with_its_seed_and_differs_between_samples():
    config = AugmentConfig(mirror_axes=("depth", "height", "width"))
    a, b, c = run_augment(config), run_augment(config), run_augment(config, seed=1)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])
    assert not torch.equal(a[0][0], a[0][1])


def test_the_likeliest_class_is_that_of_argmax_ties_included():
    shares = (torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2).round() / 4
    every = torch.cat((1 - shares.sum(dim=1, keepdim=True), shares), dim=1)
    assert (every == every.amax(dim=1, keepdim=True)).sum(dim=1).gt(1).any()
    assert np.array_equal(likeliest(shares).numpy(), every.numpy().argmax(axis=1))


@pytest.mark.parametrize("slices_mm", [4.0, 1.0])
@pytest.mark.parametrize("coarse", [True, False])
def test_slices_that_the_plan_calls_coarse_are_not_tilted(slices_mm, coarse):
    """Every slice holds its own number: turned about the depth axis it still does, tilted it does not."""
    images = torch.arange(9.0)[None, None, :, None, None].expand(4, 1, 9, 32, 32).clone()
    config = AugmentConfig(spatial_probability=1, intensity_probability=0, scale=0)
    middle, _ = augment(
        images,
        torch.zeros(4, 9, 32, 32, dtype=torch.int64),
        (9, 12, 12),
        config,
        classes=2,
        spacing_mm=(slices_mm, 1.0, 1.0),
        coarse_slices=coarse,
        generator=torch.Generator().manual_seed(0),
    )
    spread = (middle[:, :, 4].amax() - middle[:, :, 4].amin()).item()
    assert (spread > 0.1) == (not coarse)


def test_processes_draw_what_one_would():
    """White noise apart, which is switched off here."""
    images, labels = ball_batch()
    everything = AugmentConfig(
        spatial_probability=1,
        elastic_probability=1,
        intensity_probability=1,
        low_resolution_probability=1,
        mirror_axes=("width",),
    )

    def run(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.Generator().manual_seed(9) if world > 1 else None
        draws = Draws(torch.Generator().manual_seed(3), rank, world, noise=own)
        draw = draws.noise
        draws.noise = lambda shape: 0 * draw(shape)
        share = images[rank::world], labels[rank::world]
        return augment(*share, (12, 24, 24), everything, **CUBES, generator=draws)

    whole = run(0, 1)
    for rank in range(2):
        for mine, of_one in zip(run(rank, 2), whole, strict=True):
            torch.testing.assert_close(mine, of_one[rank::2])


def test_intensity_changes_are_finite_and_optional():
    images = torch.randn(8, 2, 4, 16, 16)
    assert change_intensities(images, 0.0, torch.Generator()) is images
    before = images.clone()
    changed = change_intensities(images, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
    assert torch.isfinite(changed).all()
    assert not torch.allclose(changed, images)
    assert torch.isfinite(change_intensities(torch.zeros(2, 1, 2, 16, 16), 1.0, torch.Generator())).all()
