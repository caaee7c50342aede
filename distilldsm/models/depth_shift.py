"""Depth shift: how the slices of a volume exchange features inside a 2-D network.

Paper: H. Maheshwari, V. Goel, R. Sethuraman, D. Sheet, "Distill DSM: Computationally efficient method for
segmentation of medical imaging volumes", MIDL 2021, https://openreview.net/forum?id=_n48l6YKc6d.
From the paper: the distilled shift (retain, forward, backward) and the residual shift it is compared with.
Ours: one convolution with stacked filters replaces three (same function, same parameters). The volumes of a batch do
not mix. The number of slices may differ from call to call.

A slice batch has shape (B*D, C, H, W): the D slices of the first volume, then those of the second, and so on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distilldsm.core.errors import ConfigError


def shift_slices(x: Tensor, depth: int, offset: int) -> Tensor:
    """Give every slice the features of the slice `offset` positions before it in its volume. The ends get zeros.

    Args:
        x: (B*D, C, H, W).
        depth: D, the number of slices of each volume.
        offset: +1 passes features forward (slice i receives from i-1), -1 backward (i receives from i+1).

    Returns:
        (B*D, C, H, W), a new tensor.

    Raises:
        ValueError: the number of slices is not a multiple of `depth`.
    """
    if not torch.compiler.is_compiling():
        _require_whole_volumes(x, depth)
    if offset == 0:
        return x
    steps = abs(offset)
    # Volumes get an axis of their own. So no features cross from one volume to the next.
    volumes = x.unflatten(0, (-1, depth))
    padding = torch.zeros_like(volumes[:, :1]).expand(-1, min(steps, depth), -1, -1, -1)
    if offset > 0:
        shifted = torch.cat((padding, volumes[:, : max(depth - steps, 0)]), dim=1)
    else:
        shifted = torch.cat((volumes[:, steps:], padding), dim=1)
    return shifted.flatten(0, 1)


def _require_whole_volumes(x: Tensor, depth: int) -> None:
    if depth < 1 or x.shape[0] % depth:
        raise ValueError(f"{x.shape[0]} slices cannot be divided into volumes of {depth} slices")


def depth_shift(x: Tensor, depth: int, forward: int, backward: int) -> Tensor:
    """Shift the last `backward + forward` channels to the neighbouring slices; the others stay.

    The last `forward` channels of slice i come from slice i-1. The `backward` channels before them come from slice i+1.

    Args:
        x: (B*D, C, H, W).
        depth: D.
        forward, backward: numbers of channels.

    Returns:
        (B*D, C, H, W).

    Raises:
        ValueError: `forward + backward` exceeds C, or the number of slices is not a multiple of `depth`.
    """
    channels = x.shape[1]
    stay = channels - forward - backward
    if stay < 0 or forward < 0 or backward < 0:
        raise ValueError(f"cannot shift {forward} + {backward} of {channels} channels")
    if not torch.compiler.is_compiling():
        _require_whole_volumes(x, depth)
        return _Shift.apply(x, depth, forward, backward)
    kept, to_previous, to_next = x.split((stay, backward, forward), dim=1)
    return torch.cat((kept, shift_slices(to_previous, depth, -1), shift_slices(to_next, depth, +1)), dim=1)


class _Shift(torch.autograd.Function):
    """`depth_shift` in place of split and concatenation: copy `x` in its memory layout, then overwrite what moves.

    Its gradient is the shift in the other direction. (A compiler needs no such help: it fuses the plain form.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, forward: int, backward: int) -> Tensor:
        ctx.shift = depth, forward, backward
        return _move(x, depth, forward, backward, +1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        depth, forward, backward = ctx.shift
        return _move(gradient, depth, forward, backward, -1), None, None, None


def _move(x: Tensor, depth: int, forward: int, backward: int, direction: int) -> Tensor:
    moved = x.clone()
    source, target = x.unflatten(0, (-1, depth)), moved.unflatten(0, (-1, depth))
    stay = x.shape[1] - forward - backward
    for channels, step in ((slice(stay, stay + backward), -direction), (slice(stay + backward, None), direction)):
        if step > 0:
            target[:, 1:, channels] = source[:, :-1, channels]
            target[:, 0, channels] = 0
        else:
            target[:, :-1, channels] = source[:, 1:, channels]
            target[:, -1, channels] = 0
    return moved


def masked_depth_shift(x: Tensor, depth: int, forward: int, backward: int) -> Tensor:
    """`depth_shift` of one volume, (D, C, H, W), in the form that runtimes execute fastest.

    Each channel is chosen from the volume or from the volume moved by one slice. This reads all channels three times,
    but in OpenVINO one pass over memory is faster than splitting and concatenating a few channels
    (`python -m benchmarks.latency`).

    Raises:
        ValueError: as in `depth_shift`.
    """
    channels = x.shape[1]
    stay = channels - forward - backward
    if stay < 0 or forward < 0 or backward < 0:
        raise ValueError(f"cannot shift {forward} + {backward} of {channels} channels")
    channel = torch.arange(channels, device=x.device).view(1, channels, 1, 1)
    # Negative padding crops: the slices move by one, and the other end is filled with zeros.
    from_next = F.pad(x, (0, 0, 0, 0, 0, 0, -1, 1))
    from_previous = F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1))
    return torch.where(channel < stay, x, torch.where(channel < stay + backward, from_next, from_previous))


class DepthModule(nn.Module):
    """A module of a 2-D network that also needs the number of slices of a volume."""

    shift = staticmethod(depth_shift)
    """The shift function. Exported networks use `masked_depth_shift`."""

    def forward(self, x: Tensor, depth: int) -> Tensor:
        raise NotImplementedError


class ResidualDepthShift(DepthModule):
    """A shift without parameters of `fraction` of the channels, half of them in each direction.

    With `add`, the unshifted features are added (the paper's form). Without it, the module only shifts (the form of
    the temporal shift module, Lin et al., ICCV 2019).
    """

    def __init__(self, channels: int, *, fraction: float = 0.5, add: bool = True) -> None:
        super().__init__()
        _check_share("fraction", fraction)
        self.each_way = int(channels * fraction) // 2
        self.add = bool(add)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        shifted = self.shift(x, depth, self.each_way, self.each_way)
        return x + shifted if self.add else shifted

    def extra_repr(self) -> str:
        return f"each_way={self.each_way}, add={self.add}"


class DistillDepthShift(DepthModule):
    """The distilled depth shift: the last alpha*C channels are distilled by 3x3 convolutions into R, B and F.

    R (half of them) stays in its slice, F (a quarter) goes to the next slice, B (a quarter) to the previous one. The
    first (1-alpha)*C channels pass unchanged. If a quarter is not a whole number, B and F are rounded down.
    """

    def __init__(self, channels: int, *, alpha: float = 0.5) -> None:
        super().__init__()
        _check_share("alpha", alpha)
        self.distilled = round(channels * alpha)
        self.unchanged = channels - self.distilled
        self.each_way = self.distilled // 4
        self.convolution = (
            nn.Conv2d(self.distilled, self.distilled, kernel_size=3, padding=1) if self.distilled else None
        )

    def forward(self, x: Tensor, depth: int) -> Tensor:
        if self.convolution is None:
            return x
        unchanged, last = x.split((self.unchanged, self.distilled), dim=1)
        distilled = self.shift(self.convolution(last), depth, self.each_way, self.each_way)
        return torch.cat((unchanged, distilled), dim=1)

    def extra_repr(self) -> str:
        return f"unchanged={self.unchanged}, distilled={self.distilled}, each_way={self.each_way}"


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(
            f"'{name}' has an impossible value",
            where="train.model.options",
            seen=repr(value),
            rule="from 0 to 1",
        )
