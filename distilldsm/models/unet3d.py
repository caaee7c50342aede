"""The 3-D U-Net the paper compares with: residual blocks, pre-activation, GroupNorm, trilinear upsampling.

Structure and sizes: the UNet of ellisdg/3DUnetCNN with base width 8 (after Myronenko, "3D MRI brain tumor
segmentation using autoencoder regularization", BrainLes 2018). Each level has two residual blocks in the encoder and
one in the decoder. The code here is our own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilldsm.models.base import SegmentationNetwork

GROUPS = 8


class Conv3d(nn.Conv3d):
    """3x3x3 convolution with a correct weight gradient for two slices in bf16 on a CPU.

    oneDNN (torch 2.13) reads uninitialised memory in bf16 if the depth is 2, the kernel 3 and the padding 1: the
    gradient is wrong, sometimes NaN. A third slice of zeros avoids this; the result is the same, as padding is zero.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, K, D, H, W)."""
        if torch.is_grad_enabled() and x.device.type == "cpu" and x.shape[2] == 2:
            return super().forward(F.pad(x, (0, 0, 0, 0, 0, 1)))[:, :, :2]
        return super().forward(x)


class PreActivationConv(nn.Sequential):
    """GroupNorm, ReLU, 3x3x3 convolution without bias on (B, C, D, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        groups = GROUPS if in_channels % GROUPS == 0 else in_channels
        super().__init__(
            nn.GroupNorm(groups, in_channels),
            nn.ReLU(),
            Conv3d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        )


class ResidualBlock(nn.Module):
    """Two pre-activation convolutions and a shortcut. A 1x1x1 convolution adapts the shortcut if the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            PreActivationConv(in_channels, out_channels), PreActivationConv(out_channels, out_channels)
        )
        self.shortcut: nn.Module = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv3d(in_channels, out_channels, kernel_size=1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convolutions(x) + self.shortcut(x)


class UNet3D(SegmentationNetwork):
    """Residual 3-D U-Net of five levels, widths base_width * (1, 2, 4, 8, 16)."""

    def __init__(self, in_channels: int, out_channels: int, *, base_width: int = 8) -> None:
        super().__init__(in_channels, out_channels)
        widths = [base_width * 2**level for level in range(5)]
        self.encoder = nn.ModuleList(
            nn.Sequential(ResidualBlock(i, o), ResidualBlock(o, o))
            for i, o in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.downsampling = nn.ModuleList(
            nn.Conv3d(w, w, kernel_size=3, stride=2, padding=1, bias=False) for w in widths[:-1]
        )
        self.bottom = ResidualBlock(widths[-1], widths[-1])
        self.reduce = nn.ModuleList()
        self.decoder = nn.ModuleList()
        below, decoder_widths = widths[-1], []
        for width in reversed(widths[:-1]):
            self.reduce.append(nn.Conv3d(below, width, kernel_size=1, bias=False))
            out = 2 * width if width != base_width else width
            self.decoder.append(ResidualBlock(2 * width, out))
            below = out
            decoder_widths.append(out)
        self.decoder_widths = tuple(decoder_widths)
        self.head = nn.Conv3d(below, out_channels, kernel_size=1, bias=False)
        self.stride = (16, 16, 16)
        self.depth_halo = None

    def forward(self, x: Tensor, features: list[Tensor] | None = None) -> Tensor:
        """(B, C, D, H, W) image to (B, K, D, H, W) logits; `features`: see `SegmentationNetwork`."""
        if not torch.compiler.is_compiling():
            self.check_input(x)
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x)
            if level < len(self.downsampling):
                skips.append(x)
                x = self.downsampling[level](x)
        x = self.bottom(x)
        for reduce, block in zip(self.reduce, self.decoder, strict=True):
            x = F.interpolate(reduce(x), scale_factor=2, mode="trilinear", align_corners=False)
            x = block(torch.cat((x, skips.pop()), dim=1))
            if features is not None:
                features.append(x)
        return self.head(x)


build = UNet3D
