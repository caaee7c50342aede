"""The 3-D baseline's convolution."""

from __future__ import annotations

import pytest
import torch

from distilldsm.models.unet3d import Conv3d


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_a_plain_convolution_in_double_precision(depth, dtype):
    torch.manual_seed(0)
    ours = Conv3d(8, 8, kernel_size=3, padding=1, bias=False).to(dtype)
    plain = torch.nn.Conv3d(8, 8, kernel_size=3, padding=1, bias=False).double()
    plain.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    x = torch.randn(2, 8, depth, 4, 4).to(dtype)
    tolerance = {"rtol": 5e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    # What the broken kernel reads is chance: without the hint, 27 to 30 of 30 attempts gave NaN with memory made dirty.
    for _ in range(10):
        dirty = [torch.full((97 * n,), float("nan"), dtype=dtype) for n in range(1, 200)]
        del dirty
        ours.zero_grad()
        plain.zero_grad()
        y, expected = ours(x), plain(x.double())
        torch.testing.assert_close(y.double(), expected, **tolerance)
        weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        (y.float() * weights).sum().backward()
        (expected * weights.double()).sum().backward()
        torch.testing.assert_close(ours.weight.grad.double(), plain.weight.grad, **tolerance)
