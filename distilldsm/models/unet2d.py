"""The 2-D U-Net of the Distill DSM paper, with or without depth shift modules.

Paper: see depth_shift.py. From the paper: five levels, two 3x3 convolutions with BatchNorm per block, max-pooling in
plane, bilinear upsampling with aligned corners, a depth shift module between the two convolutions of every block except
the first.
Ours: any number of slices per call and any size in plane, a volume interface, widths as a parameter, other places and
another initialisation of the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilldsm.core.errors import ConfigError
from distilldsm.models.base import SegmentationNetwork
from distilldsm.models.depth_shift import DepthModule, DistillDepthShift, ResidualDepthShift
from distilldsm.models.insert import AddedDistillDepthShift, GatedDepthShift

PAPER_WIDTHS = (16, 32, 64, 128, 128)
"""Channels of the levels, from full resolution down."""

_MODULES: Mapping[tuple[str, str], Callable[..., DepthModule]] = {
    ("distill", "paper"): DistillDepthShift,
    ("distill", "identity"): AddedDistillDepthShift,
    ("residual", "paper"): ResidualDepthShift,
    ("residual", "identity"): GatedDepthShift,
}


class ConvNormReLU(nn.Sequential):
    """3x3 convolution, BatchNorm, ReLU on (N, C, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Block(nn.Module):
    """Two convolutions with an optional depth shift between them."""

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
    """U-Net on slices; its blocks may exchange features between slices.

    Args:
        in_channels, out_channels: channels of the volume and of the logits.
        widths: channels of the levels, from full resolution down.
        shift: `none`, `residual` or `distill`; further arguments go to that module.
        shift_at: the blocks that have a module: `all` (except the first), `encoder` (with the lowest block), `decoder`,
            or a list of levels, from 0 at full resolution to 4.
        initialisation: `paper`, or `identity`: at first the modules do not change what the network computes.

    Raises:
        ConfigError: an impossible `shift_at`, `initialisation` or share of channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int] = PAPER_WIDTHS,
        shift: str = "none",
        shift_at: str | Sequence[int] = "all",
        initialisation: str = "paper",
        **shift_options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels)
        _check_shift_at(shift_at, len(widths))
        if initialisation not in ("paper", "identity"):
            raise _impossible("initialisation", initialisation, "paper or identity")

        def make_shift(part: str, level: int, channels: int) -> DepthModule | None:
            chosen = shift_at in ("all", part) if isinstance(shift_at, str) else level in shift_at
            if shift == "none" or not chosen or (part, level) == ("encoder", 0):
                return None
            return _MODULES[shift, initialisation](channels, **shift_options)

        inputs = (in_channels, *widths[:-1])
        self.encoder = nn.ModuleList(
            Block(i, o, o, make_shift("encoder", level, o))
            for level, (i, o) in enumerate(zip(inputs, widths, strict=True))
        )
        decoder = []
        below = widths[-1]
        for level in range(len(widths) - 2, -1, -1):
            # A level's output has the width of the level above it. So both inputs of the next block are equally wide.
            joined, out = widths[level] + below, widths[max(level - 1, 0)]
            decoder.append(Block(joined, joined // 2, out, make_shift("decoder", level, joined // 2)))
            below = out
        self.decoder = nn.ModuleList(decoder)
        self.decoder_widths = tuple(widths[max(level - 1, 0)] for level in range(len(widths) - 2, -1, -1))
        self.head = nn.Conv2d(below, out_channels, kernel_size=1)
        # Each module looks one slice further. The path through the lowest block passes all modules, so the halo is
        # their number.
        self.depth_halo = sum(isinstance(m, Block) and m.shift is not None for m in self.modules())

    def flat_names(self) -> dict[str, str]:
        """See `SegmentationNetwork`."""
        return {name: name for name in self.state_dict() if ".shift." not in name}

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
                x = pool(x)
            x = block(x, depth)
            skips.append(x)
        skips.pop()
        for block in self.decoder:
            x = block(join(skips.pop(), x), depth)
            if features is not None:
                features.append(x)
        return self.head(x)


def pool(x: Tensor) -> Tensor:
    """Max-pooling of (N, C, h, w) to (N, C, ceil(h / 2), ceil(w / 2)). The last window of an odd size is half empty."""
    return F.max_pool2d(x, 2, ceil_mode=True)


def join(skip: Tensor, below: Tensor) -> Tensor:
    """Upsample the level below by 2, cut it to the size of the skip connection, and append it along the channels.

    Upsampling by exactly 2, also where the skip has an odd size, keeps each voxel where pooling took it from.
    """
    below = F.interpolate(below, scale_factor=2, mode="bilinear", align_corners=True)
    for axis in (2, 3):
        below = below.narrow(axis, 0, skip.shape[axis])
    return torch.cat((skip, below), dim=1)


def build(in_channels: int, out_channels: int, *, width: float, **arguments: Any) -> UNet2D:
    """The network with `width` times the paper's widths, at least 4 channels a level."""
    widths = tuple(max(4, round(channels * float(width))) for channels in PAPER_WIDTHS)
    return UNet2D(in_channels, out_channels, widths=widths, **arguments)


def _check_shift_at(value: object, levels: int) -> None:
    rule = f"all, encoder, decoder, or a list of levels from 0 (full resolution) to {levels - 1}"
    if isinstance(value, str):
        if value not in ("all", "encoder", "decoder"):
            raise _impossible("shift_at", value, rule)
    elif not (isinstance(value, Sequence) and value and all(type(v) is int and 0 <= v < levels for v in value)):
        raise _impossible("shift_at", value, rule, "the network without modules is unet2d")


def _impossible(name: str, value: object, rule: str, hint: str | None = None) -> ConfigError:
    return ConfigError(
        f"'{name}' has an impossible value", where="train.model.options", seen=repr(value), rule=rule, hint=hint
    )
