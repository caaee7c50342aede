"""The 2-D U-Net of the Distill DSM paper, with or without depth shift modules.

Paper: see depth_shift.py. The paper's: five levels, two 3x3 convolutions with BatchNorm a block, max-pooling in plane,
bilinear upsampling with aligned corners, a depth shift module between the two convolutions of every block but the
first.
Ours: any number of slices per call, a volume interface, widths as a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilldsm.models.base import SegmentationNetwork
from distilldsm.models.depth_shift import DepthModule, DistillDepthShift, ResidualDepthShift


class ConvNormReLU(nn.Sequential):
    """3x3 convolution, BatchNorm, ReLU on (N, C, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Block(nn.Module):
    """Two convolutions with, between them, an optional depth shift."""

    def __init__(self, in_channels: int, middle: int, out_channels: int, shift: DepthModule | None) -> None:
        super().__init__()
        self.first = ConvNormReLU(in_channels, middle)
        self.shift = shift
        self.second = ConvNormReLU(middle, out_channels)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        x = self.first(x)
        if self.shift is not None:
            x = self.shift(x, depth)
        return self.second(x)


class UNet2D(SegmentationNetwork):
    """U-Net on slices whose blocks may exchange features between slices.

    Args:
        in_channels, out_channels: of the volume.
        widths: channels of the levels, from full resolution down.
        shift: `none`, `residual` or `distill`; further arguments go to that module.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int] = (16, 32, 64, 128, 128),
        shift: str = "none",
        **shift_options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels)

        def make_shift(channels: int) -> DepthModule | None:
            if shift == "distill":
                return DistillDepthShift(channels, **shift_options)
            return ResidualDepthShift(channels, **shift_options) if shift == "residual" else None

        inputs = (in_channels, *widths[:-1])
        self.encoder = nn.ModuleList(
            Block(i, o, o, make_shift(o) if level else None)
            for level, (i, o) in enumerate(zip(inputs, widths, strict=True))
        )
        decoder = []
        below = widths[-1]
        for level in range(len(widths) - 2, -1, -1):
            # A level's output has the width of the level above it, so that the next concatenation is balanced.
            joined, out = widths[level] + below, widths[max(level - 1, 0)]
            decoder.append(Block(joined, joined // 2, out, make_shift(joined // 2)))
            below = out
        self.decoder = nn.ModuleList(decoder)
        self.decoder_widths = tuple(widths[max(level - 1, 0)] for level in range(len(widths) - 2, -1, -1))
        self.head = nn.Conv2d(below, out_channels, kernel_size=1)
        in_plane = 2 ** (len(widths) - 1)
        self.stride = (1, in_plane, in_plane)
        # Each module looks one slice further, so that many slices beyond a slice take part in its logits.
        self.depth_halo = sum(isinstance(m, DepthModule) for m in self.modules())

    def forward(self, x: Tensor, features: list[Tensor] | None = None) -> Tensor:
        """(B, C, D, H, W) image to (B, K, D, H, W) logits; `features`: see `SegmentationNetwork`."""
        if not torch.compiler.is_compiling():
            self.check_input(x)
        batch, channels, depth, height, width = x.shape
        slices = x.transpose(1, 2).reshape(batch * depth, channels, height, width)
        logits = self.forward_slices(slices, depth, features)
        if features is not None:
            features[:] = [f.unflatten(0, (batch, depth)).transpose(1, 2) for f in features]
        return logits.unflatten(0, (batch, depth)).transpose(1, 2)

    def forward_slices(self, x: Tensor, depth: int, features: list[Tensor] | None = None) -> Tensor:
        """(B*D, C, H, W) slices of volumes with `depth` slices each to (B*D, K, H, W) logits."""
        skips = []
        for level, block in enumerate(self.encoder):
            if level:
                x = F.max_pool2d(x, 2)
            x = block(x, depth)
            skips.append(x)
        skips.pop()
        for block in self.decoder:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = block(torch.cat((skips.pop(), x), dim=1), depth)
            if features is not None:
                features.append(x)
        return self.head(x)
