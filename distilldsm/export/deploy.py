"""Rearrange a trained network so that runtimes execute it fastest. The computed function stays the same.

Measured with `python -m benchmarks.latency`. BatchNorm is folded into the convolution before it. The convolution after
a distilled shift is split by its input channels into two convolutions, and their outputs are added. So the shifted and
the other channels are not concatenated. The shift itself is `masked_depth_shift`.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from distilldsm.models.base import SegmentationNetwork
from distilldsm.models.depth_shift import DepthModule, DistillDepthShift, masked_depth_shift
from distilldsm.models.unet2d import Block, ConvNormReLU


def deployed(network: SegmentationNetwork) -> SegmentationNetwork:
    """A copy on the CPU, in evaluation mode, for one volume at a time. `network` does not change."""
    network = copy.deepcopy(network).cpu().eval()
    for module in network.modules():
        if isinstance(module, DepthModule):
            module.shift = masked_depth_shift
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Block) and isinstance(child.shift, DistillDepthShift) and child.shift.distilled:
                setattr(parent, name, _DistillBlock(child, child.shift))
    return network


class _DistillBlock(nn.Module):
    """A block with a distilled shift between its convolutions."""

    def __init__(self, block: Block, shift: DistillDepthShift) -> None:
        super().__init__()
        assert shift.convolution is not None
        second = _folded(block.second)
        self.first, self.distil = _folded(block.first), shift.convolution
        self.unchanged, self.each_way = shift.unchanged, shift.each_way
        self.passing = _part(second, slice(None, self.unchanged), bias=True) if self.unchanged else None
        self.shifted = _part(second, slice(self.unchanged, None), bias=self.passing is None)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        x = F.relu(self.first(x))
        shifted = masked_depth_shift(self.distil(x[:, self.unchanged :]), depth, self.each_way, self.each_way)
        y = self.shifted(shifted)
        if self.passing is not None:
            y = self.passing(x[:, : self.unchanged]) + y
        return F.relu(y)


def _folded(layers: ConvNormReLU) -> nn.Conv2d:
    convolution, norm = layers[0], layers[1]
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_eval(convolution, norm)


def _part(convolution: nn.Conv2d, channels: slice, *, bias: bool) -> nn.Conv2d:
    """A 3x3 convolution with the weights of some of the input channels."""
    weight = convolution.weight[:, channels]
    part = nn.Conv2d(weight.shape[1], weight.shape[0], kernel_size=3, padding=1, bias=bias)
    with torch.no_grad():
        part.weight.copy_(weight)
        if bias:
            assert part.bias is not None
            assert convolution.bias is not None
            part.bias.copy_(convolution.bias)
    return part
