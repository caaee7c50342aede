"""The 2-D networks take slices of any size; where the old rule, multiples of 16, holds, nothing has changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distilldsm.models import build_model


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_model("distill_dsm", in_channels=1, out_channels=2, width=0.25).eval()


def padded_by_hand(network, volume: Tensor) -> Tensor:
    """Logits with each level padded by a zero row and column before pooling: after a ReLU, zeros are no maximum."""
    depth = volume.shape[2]
    x, skips = volume[0].transpose(0, 1), []
    for level, block in enumerate(network.encoder):
        if level:
            x = F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2)
        x = block(x, depth)
        skips.append(x)
    skips.pop()
    for block in network.decoder:
        skip = skips.pop()
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = block(torch.cat((skip, x[:, :, : skip.shape[2], : skip.shape[3]]), dim=1), depth)
    return network.head(x).transpose(0, 1)[None]


@given(depth=st.integers(1, 3), height=st.integers(1, 50), width=st.integers(1, 50))
@settings(max_examples=25, deadline=None)
def test_any_size_gives_what_padding_level_by_level_gives(network, depth, height, width):
    volume = torch.randn(1, 1, depth, height, width, generator=torch.Generator().manual_seed(height))
    with torch.no_grad():
        logits = network(volume)
        assert logits.shape == (1, 2, depth, height, width)
        torch.testing.assert_close(logits, padded_by_hand(network, volume))


def test_multiples_of_16_give_what_plain_pooling_and_upsampling_give(network, monkeypatch):
    volume = torch.randn(1, 1, 2, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = network(volume)
        monkeypatch.setattr("distilldsm.models.unet2d.pool", lambda x: F.max_pool2d(x, 2))
        monkeypatch.setattr(
            "distilldsm.models.unet2d.join",
            lambda skip, x: torch.cat(
                (skip, F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)), dim=1
            ),
        )
        assert torch.equal(network(volume), logits)
