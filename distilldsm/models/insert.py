"""Any 2-D CNN as a network of volumes: depth shift modules in front of its convolutions.

Paper: see depth_shift.py; it claims that its module fits any 2-D CNN. Ours: where the modules go in a network that was
not made for them, and an initialisation with which a pretrained network computes at first what it computed before.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distilldsm.errors import ConfigError
from distilldsm.models.base import SegmentationNetwork
from distilldsm.models.depth_shift import DepthModule, DistillDepthShift, ResidualDepthShift

Kind = Literal["distill", "residual"]
Initialisation = Literal["identity", "paper"]


class AddedDistillDepthShift(DepthModule):
    """The distilled depth shift, added to the features it is computed from instead of put in their place.

    With its convolution at zero, as it is made, it changes nothing; the convolution's gradient is not zero, so that it
    learns from the first step on.
    """

    def __init__(self, channels: int, *, alpha: float = 0.5) -> None:
        super().__init__()
        self.distil = DistillDepthShift(channels, alpha=alpha)
        if self.distil.convolution is not None:
            nn.init.zeros_(self.distil.convolution.weight)
            nn.init.zeros_(self.distil.convolution.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, depth: int) -> Tensor:
        if self.distil.convolution is None:
            return x
        unchanged, last = x.split((self.distil.unchanged, self.distil.distilled), dim=1)
        each_way = self.distil.each_way
        return torch.cat((unchanged, last + self.shift(self.distil.convolution(last), depth, each_way, each_way)), 1)


class GatedDepthShift(DepthModule):
    """x + gate * shift(x) with a gate per shifted channel, zero as it is made."""

    def __init__(self, channels: int, *, fraction: float = 0.5) -> None:
        super().__init__()
        self.each_way = ResidualDepthShift(channels, fraction=fraction).each_way
        self.gate = nn.Parameter(torch.zeros(2 * self.each_way))

    def forward(self, x: Tensor, depth: int) -> Tensor:
        stay = x.shape[1] - 2 * self.each_way
        kept, last = x.split((stay, 2 * self.each_way), dim=1)
        moved = self.shift(last, depth, self.each_way, self.each_way)
        return torch.cat((kept, last + self.gate[:, None, None] * moved), dim=1)


class _Slices:
    """How many slices the volumes have that are going through the network; None outside of a volume."""

    count: int | None = None


class _BeforeConvolution:
    """Lets a depth shift module change what a convolution reads. A class, so that copies of a network copy it, too."""

    def __init__(self, module: DepthModule, slices: _Slices) -> None:
        self.module, self.slices = module, slices

    def __call__(self, convolution: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.slices.count is None:
            return inputs
        return (self.module(inputs[0], self.slices.count), *inputs[1:])


class VolumetricNetwork(SegmentationNetwork):
    """A 2-D network that runs on the slices of volumes, and the modules through which these exchange features.

    network: the 2-D network, its weights under their own names; called by itself, it still takes single slices.
    inserted: the convolutions that have a module in front of them.
    """

    def __init__(
        self, network: nn.Module, modules: dict[str, DepthModule], *, in_channels: int, stride: int, out_channels: int
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.network = network
        self.inserted = tuple(modules)
        self.shifts = nn.ModuleList(modules.values())
        self.slices = _Slices()
        for name, module in modules.items():
            network.get_submodule(name).register_forward_pre_hook(_BeforeConvolution(module, self.slices))
        self.stride = (1, stride, stride)
        self.depth_halo = len(modules)

    def forward(self, x: Tensor, features: list[Tensor] | None = None) -> Any:
        """(B, C, D, H, W) volumes to what the network gives for slices, each tensor (N, K, ...) as (B, K, D, ...).

        A U-Net's logits become (B, K, D, H, W), a classifier's (B, K, D); lists and dictionaries stay such.

        Raises:
            ValueError: x is no batch of volumes of `in_channels`, or its sizes are no multiples of the stride.
        """
        if not torch.compiler.is_compiling():
            self.check_input(x)
        batch, channels, depth, height, width = x.shape
        slices = x.transpose(1, 2).reshape(batch * depth, channels, height, width)
        self.slices.count = depth
        try:
            outputs = self.network(slices)
        finally:
            self.slices.count = None
        return _as_volumes(outputs, batch, depth)


def _as_volumes(value: Any, batch: int, depth: int) -> Any:
    if isinstance(value, Tensor):
        return value.unflatten(0, (batch, depth)).transpose(1, 2)
    if isinstance(value, dict):
        return {key: _as_volumes(one, batch, depth) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_as_volumes(one, batch, depth) for one in value)
    return value


def insert_depth_shift(
    network: nn.Module,
    *,
    kind: Kind = "distill",
    alpha: float = 0.5,
    where: Literal["auto"] | Iterable[str] = "auto",
    initialisation: Initialisation = "identity",
    stride: int = 32,
    out_channels: int = 0,
) -> VolumetricNetwork:
    """Turn a 2-D CNN into a network of volumes.

    `where="auto"`: a module goes in front of every 2-D convolution that has a kernel larger than one, stride 1 and as
    many output as input channels, except the first such one: like the paper's network, the features of highest
    resolution stay in their slice. In a residual block that is on the residual branch, never on the shortcut.

    Args:
        network: takes (N, C, H, W); it is copied, and stays as it is.
        kind: `distill` (learned) or `residual` (moved as they are).
        alpha: share of the channels that take part.
        where: or patterns of module names (`*` and `?` as in file names), e.g. `["layer3.*.conv2"]`.
        initialisation: `identity`: at first the output is that of the 2-D network, slice by slice; for a network with
            weights worth keeping. `paper`: the modules of the paper, which change the features from the start.
        stride: what height and width must be multiples of: the network's downsampling in all.
        out_channels: of a segmentation network; written into exports, not otherwise used.

    Raises:
        ConfigError: an unknown kind or initialisation, an alpha that is no share, nowhere to put a module, or a pattern
            that names no convolution.
    """
    for key, value, known in (
        ("kind", kind, ("distill", "residual")),
        ("initialisation", initialisation, ("identity", "paper")),
    ):
        if value not in known:
            raise ConfigError(f"'{key}' has an unknown value", seen=repr(value), rule=" or ".join(known))
    network = copy.deepcopy(network)
    convolutions = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    if not convolutions:
        raise ConfigError("the network has no 2-D convolution", seen=type(network).__name__)
    if where == "auto":
        names = [name for name, convolution in convolutions.items() if _keeps_its_shape(convolution)][1:]
        if not names:
            raise ConfigError(
                "no place for a depth shift was found",
                seen=type(network).__name__,
                rule="two convolutions or more with a kernel above 1, stride 1 and equal numbers of channels",
                mend="name convolutions in 'where'",
            )
    else:
        names = _matching(convolutions, list(where))
    modules = {name: _module(convolutions[name], kind, alpha, initialisation) for name in names}
    first = next(iter(convolutions.values()))
    return VolumetricNetwork(
        network, modules, in_channels=first.in_channels, stride=stride, out_channels=out_channels
    ).train(network.training)


def _keeps_its_shape(convolution: nn.Conv2d) -> bool:
    return (
        max(convolution.kernel_size) > 1
        and max(convolution.stride) == 1
        and convolution.in_channels == convolution.out_channels
    )


def _matching(convolutions: dict[str, nn.Conv2d], patterns: list[str]) -> list[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(convolutions, pattern)
        if not found:
            raise ConfigError(
                "names no 2-D convolution of the network",
                where="where",
                seen=repr(pattern),
                rule="such as " + ", ".join(list(convolutions)[:3]),
            )
        chosen.update(found)
    return [name for name in convolutions if name in chosen]


def _module(convolution: nn.Conv2d, kind: Kind, alpha: float, initialisation: Initialisation) -> DepthModule:
    channels = convolution.in_channels
    module: DepthModule
    if kind == "distill":
        make = AddedDistillDepthShift if initialisation == "identity" else DistillDepthShift
        module = make(channels, alpha=alpha)
    elif initialisation == "identity":
        module = GatedDepthShift(channels, fraction=alpha)
    else:
        module = ResidualDepthShift(channels, fraction=alpha)
    return module.to(convolution.weight)
