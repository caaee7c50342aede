"""Depth shift: how the slices of a volume exchange features inside a 2-D network.

Paper: H. Maheshwari, V. Goel, R. Sethuraman, D. Sheet, "Distill DSM: Computationally efficient method for
segmentation of medical imaging volumes", MIDL 2021, https://openreview.net/forum?id=_n48l6YKc6d.
The paper's: the distilled shift (retain, forward, backward) and the residual shift it is compared with.
Ours: the three convolutions are one with stacked filters (same function, same parameters), volumes of a batch are
isolated from each other, and the number of slices may differ from call to call.

A slice batch has shape (B*D, C, H, W): the D slices of the first volume, then those of the second, and so on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distilldsm.errors import ConfigError


def shift_slices(x: Tensor, depth: int, offset: int) -> Tensor:
    """Give every slice the features of the slice `offset` before it in the same volume, zeros at the ends.

    Args:
        x: (B*D, C, H, W).
        depth: D, the number of slices of each volume.
        offset: +1 passes features forward (slice i receives from i-1), -1 backward (i receives from i+1).

    Returns:
        (B*D, C, H, W), a new tensor.

    Raises:
        ValueError: the batch is no whole number of volumes.
    """
    slices = x.shape[0]
    if not torch.compiler.is_compiling() and (depth < 1 or slices % depth):
        raise ValueError(f"{slices} slices are no whole number of volumes of {depth} slices")
    if offset == 0:
        return x
    steps = abs(offset)
    # Volumes are told apart on an own axis, so that nothing crosses from one to the next.
    volumes = x.unflatten(0, (-1, depth))
    padding = torch.zeros_like(volumes[:, :1]).expand(-1, min(steps, depth), -1, -1, -1)
    if offset > 0:
        shifted = torch.cat((padding, volumes[:, : max(depth - steps, 0)]), dim=1)
    else:
        shifted = torch.cat((volumes[:, steps:], padding), dim=1)
    return shifted.flatten(0, 1)


def depth_shift(x: Tensor, depth: int, forward: int, backward: int) -> Tensor:
    """Shift the last `backward + forward` channels to the neighbouring slices; the others stay.

    The last `forward` channels of slice i come from slice i-1, the `backward` ones before them from slice i+1.

    Args:
        x: (B*D, C, H, W).
        depth: D.
        forward, backward: numbers of channels.

    Returns:
        (B*D, C, H, W).

    Raises:
        ValueError: more channels to shift than there are, or no whole number of volumes.
    """
    channels = x.shape[1]
    stay = channels - forward - backward
    if stay < 0 or forward < 0 or backward < 0:
        raise ValueError(f"cannot shift {forward} + {backward} of {channels} channels")
    kept, to_previous, to_next = x.split((stay, backward, forward), dim=1)
    return torch.cat((kept, shift_slices(to_previous, depth, -1), shift_slices(to_next, depth, +1)), dim=1)


class DepthModule(nn.Module):
    """A module of a 2-D network that also needs to know how many slices a volume has."""

    def forward(self, x: Tensor, depth: int) -> Tensor:
        raise NotImplementedError


class ResidualDepthShift(DepthModule):
    """A parameter-free shift of `fraction` of the channels, half of them each way.

    With `add`, the unshifted features are added back (the paper's form); without, it only shifts (the form of the
    temporal shift module, Lin et al., ICCV 2019).
    """

    def __init__(self, channels: int, *, fraction: float = 0.5, add: bool = True) -> None:
        super().__init__()
        _check_share("fraction", fraction)
        self.each_way = int(channels * fraction) // 2
        self.add = bool(add)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        shifted = depth_shift(x, depth, self.each_way, self.each_way)
        return x + shifted if self.add else shifted

    def extra_repr(self) -> str:
        return f"each_way={self.each_way}, add={self.add}"


class DistillDepthShift(DepthModule):
    """The distilled depth shift: the last alpha*C channels are distilled by 3x3 convolutions into R, B and F.

    R (half of them) stays in its slice, F (a quarter) goes to the next, B (a quarter) to the previous slice. The first
    (1-alpha)*C channels pass unchanged. Where the numbers do not divide, B = F = a quarter rounded down, R the rest.
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
        distilled = depth_shift(self.convolution(last), depth, self.each_way, self.each_way)
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
