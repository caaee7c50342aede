"""The depth shift against a slow loop, and what it must never do: leak between volumes, or be wrong in its gradient."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.core.errors import ConfigError
from distilldsm.models.depth_shift import (
    DistillDepthShift,
    ResidualDepthShift,
    depth_shift,
    masked_depth_shift,
    shift_slices,
)


def slow_depth_shift(x: torch.Tensor, depth: int, forward: int, backward: int) -> torch.Tensor:
    """Slice by slice, channel by channel, as the paper describes it."""
    out = torch.zeros_like(x)
    slices, channels = x.shape[:2]
    stay = channels - forward - backward
    for n in range(slices):
        volume, i = divmod(n, depth)
        for c in range(channels):
            if c < stay:
                source = i
            elif c < stay + backward:
                source = i + 1
            else:
                source = i - 1
            if 0 <= source < depth:
                out[n, c] = x[volume * depth + source, c]
    return out


@settings(deadline=None, max_examples=60)
@given(
    volumes=st.integers(1, 3),
    depth=st.integers(1, 5),
    channels=st.integers(1, 9),
    data=st.data(),
)
def test_equals_the_slow_loop(volumes, depth, channels, data):
    forward = data.draw(st.integers(0, channels))
    backward = data.draw(st.integers(0, channels - forward))
    x = torch.randn(volumes * depth, channels, 3, 2)
    expected = slow_depth_shift(x, depth, forward, backward)
    assert torch.equal(depth_shift(x, depth, forward, backward), expected)
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        assert torch.equal(depth_shift(x, depth, forward, backward), expected)
    assert torch.equal(masked_depth_shift(x[:depth], depth, forward, backward), expected[:depth])


def test_the_memory_layout_stays():
    x = torch.randn(4, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    assert depth_shift(x, 2, 2, 2).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("offset", [-7, -2, -1, 0, 1, 2, 7])
def test_shift_by_any_offset(depth, offset):
    x = torch.arange(2 * depth, dtype=torch.float32).reshape(-1, 1, 1, 1) + 1
    shifted = shift_slices(x, depth, offset).flatten().tolist()
    for volume in range(2):
        for i in range(depth):
            source = i - offset
            expected = volume * depth + source + 1 if 0 <= source < depth else 0
            assert shifted[volume * depth + i] == expected


def test_input_is_not_changed():
    x = torch.randn(6, 8, 4, 4)
    before = x.clone()
    for module in (DistillDepthShift(8), ResidualDepthShift(8), ResidualDepthShift(8, add=False)):
        module(x, 3)
        assert torch.equal(x, before)


@pytest.mark.parametrize("module", [DistillDepthShift(8), ResidualDepthShift(8), ResidualDepthShift(8, add=False)])
def test_volumes_of_a_batch_are_isolated(module):
    """Even not-a-number in one volume leaves the other as it is alone."""
    x = torch.randn(6, 8, 4, 4)
    alone = module(x[3:], 3)
    poisoned = x.clone()
    poisoned[:3] = float("nan")
    assert torch.equal(module(poisoned, 3)[3:], alone)


def test_distill_is_the_papers_formula():
    """R, F, B by three separate convolutions, then assembled slice by slice."""
    torch.manual_seed(0)
    channels, depth, alpha = 16, 4, 0.5
    module = DistillDepthShift(channels, alpha=alpha)
    assert module.convolution is not None
    x = torch.randn(depth, channels, 5, 6)
    last = x[:, channels - 8 :]
    weight, bias = module.convolution.weight, module.convolution.bias

    def convolve(a: int, b: int) -> torch.Tensor:
        return torch.nn.functional.conv2d(last, weight[a:b], bias[a:b], padding=1)

    retained, backward, forward = convolve(0, 4), convolve(4, 6), convolve(6, 8)
    expected = torch.zeros_like(x)
    for i in range(depth):
        expected[i, :8] = x[i, :8]
        expected[i, 8:12] = retained[i]
        if i + 1 < depth:
            expected[i, 12:14] = backward[i + 1]
        if i > 0:
            expected[i, 14:16] = forward[i - 1]
    torch.testing.assert_close(module(x, depth), expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7, 10])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_odd_channel_counts_and_shallow_volumes(channels, alpha, depth):
    x = torch.randn(2 * depth, channels, 4, 4)
    for module in (DistillDepthShift(channels, alpha=alpha), ResidualDepthShift(channels, fraction=alpha)):
        y = module(x, depth)
        assert y.shape == x.shape
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("module", [DistillDepthShift(6, alpha=0.7), ResidualDepthShift(6, fraction=0.7)])
def test_gradients(module):
    module = module.double()
    x = torch.randn(4, 6, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: module(t, 2), (x,))


def test_refuses_what_is_no_whole_number_of_volumes():
    with pytest.raises(ValueError, match="7 slices"):
        shift_slices(torch.zeros(7, 1, 1, 1), 2, 1)
    with pytest.raises(ValueError, match="cannot shift"):
        depth_shift(torch.zeros(2, 3, 1, 1), 2, 2, 2)
    with pytest.raises(ValueError, match="7 slices"):
        depth_shift(torch.zeros(7, 4, 1, 1), 2, 1, 1)
    with pytest.raises(ValueError, match="cannot shift"):
        masked_depth_shift(torch.zeros(2, 3, 1, 1), 2, 2, 2)


@pytest.mark.parametrize("value", [-0.1, 1.5, "half", True])
def test_refuses_impossible_shares(value):
    with pytest.raises(ConfigError, match="from 0 to 1"):
        DistillDepthShift(8, alpha=value)
    with pytest.raises(ConfigError, match="from 0 to 1"):
        ResidualDepthShift(8, fraction=value)
