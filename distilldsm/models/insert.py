"""Any 2-D CNN as a network of volumes: depth shift modules in front of its convolutions.

Paper: see depth_shift.py; it claims that its module fits any 2-D CNN, and puts one between the two convolutions of each
block but the first. Ours: the rule that finds such places in a network that was not made for them (`auto_places`), and
an initialisation with which a pretrained network computes at first what it computed before.
"""

from __future__ import annotations

import copy
import fnmatch
import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distilldsm.core.errors import ConfigError
from distilldsm.models.base import SegmentationNetwork
from distilldsm.models.depth_shift import DepthModule, DistillDepthShift, ResidualDepthShift

Kind = Literal["distill", "residual", "shift"]
Initialisation = Literal["identity", "paper"]
Where = Literal["auto"] | Iterable[str] | Callable[[str, nn.Conv2d], bool]


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
    """x + gate * shift(x), or x + gate * (shift(x) - x) without `add`; a gate per shifted channel, zero as it is made.

    The gate's gradient is not zero. At 1 the shifted channels are those of a `ResidualDepthShift`.
    """

    def __init__(self, channels: int, *, fraction: float = 0.5, add: bool = True) -> None:
        super().__init__()
        self.each_way = ResidualDepthShift(channels, fraction=fraction).each_way
        self.add = add
        self.gate = nn.Parameter(torch.zeros(2 * self.each_way))

    def forward(self, x: Tensor, depth: int) -> Tensor:
        stay = x.shape[1] - 2 * self.each_way
        kept, last = x.split((stay, 2 * self.each_way), dim=1)
        moved = self.shift(last, depth, self.each_way, self.each_way)
        change = moved if self.add else moved - last
        return torch.cat((kept, last + self.gate.to(x.dtype)[:, None, None] * change), dim=1)


class _Slices:
    """How many slices the volumes have that are going through the network: its own code hands on only tensors.

    Every thread has its own number. Gradient checkpointing runs modules once more in the backward pass, on a GPU in
    another thread: outside of the forward pass the number is that of the latest one with gradients.
    """

    def __init__(self) -> None:
        self._thread = threading.local()
        self._latest: int | None = None

    def __reduce__(self) -> tuple[type[_Slices], tuple[()]]:
        return _Slices, ()  # a copied or pickled network has its own

    def begin(self, count: int) -> None:
        if torch.compiler.is_compiling():
            self._latest = count  # one trace sees it set and read; it may be symbolic, and there are no threads
            return
        self._thread.count = count
        if torch.is_grad_enabled():
            self._latest = count

    def end(self) -> None:
        if torch.compiler.is_compiling():
            self._latest = None
        else:
            self._thread.count = None

    def count(self) -> int:
        inside = None if torch.compiler.is_compiling() else getattr(self._thread, "count", None)
        count = self._latest if inside is None else inside
        if count is None:
            raise RuntimeError(_ALONE)
        return count

    def require_volumes(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Pre-hook of the 2-D network: slices that nobody said the volumes of must not take those of another call."""
        if not torch.compiler.is_compiling() and getattr(self._thread, "count", None) is None:
            raise RuntimeError(_ALONE)


_ALONE = "the number of slices of a volume is not known: call the VolumetricNetwork, not the network inside it"


class _BeforeConvolution:
    """Lets a depth shift module change what a convolution reads. A class, so that copies of a network copy it, too.

    A hook leaves the convolution where it is: code that reads its attributes, and weights that go by its name, do not
    notice.
    """

    def __init__(self, module: DepthModule, slices: _Slices) -> None:
        self.module, self.slices = module, slices

    def __call__(self, convolution: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.module(inputs[0], self.slices.count()), *inputs[1:])


class VolumetricNetwork(SegmentationNetwork):
    """A 2-D network that runs on the slices of volumes, and the modules through which these exchange features.

    network: the 2-D network, its weights under their own names; it cannot be called by itself.
    inserted: the convolutions that have a module in front of them.
    shifts: these modules, in the same order.
    """

    def __init__(
        self, network: nn.Module, modules: dict[str, DepthModule], *, in_channels: int, stride: int, out_channels: int
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.network = network
        self.inserted = tuple(modules)
        self.shifts = nn.ModuleList(modules.values())
        self._slices = _Slices()
        network.register_forward_pre_hook(self._slices.require_volumes)
        for name, module in modules.items():
            network.get_submodule(name).register_forward_pre_hook(_BeforeConvolution(module, self._slices))
        self.stride = (1, stride, stride)
        # Each module looks one slice further; where some lie on parallel branches, this is more than is needed, and
        # where a convolution is used more than once in a pass, too little: see `measure_halo`.
        self.depth_halo = len(modules)
        self._frozen = _frozen(network)

    def train(self, mode: bool = True) -> Self:
        """See `nn.Module.train`; what was frozen when the modules were put in stays in evaluation mode."""
        super().train(mode)
        for name in self._frozen:
            self.network.get_submodule(name).training = False
        return self

    def measure_halo(self, x: Tensor) -> Any:
        """`forward`, which also sets `depth_halo` to the number of shifts in the pass, counting every use of a module.

        Building it does not tell how often the 2-D network uses a convolution, such as one of a recurrent block. A
        module that is not used counts as one: other passes may use it.
        """
        uses = [0] * len(self.shifts)

        def count(k: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                uses[k] += 1

            return add

        hooks = [module.register_forward_pre_hook(count(k)) for k, module in enumerate(self.shifts)]
        try:
            outputs = self(x)
        finally:
            for hook in hooks:
                hook.remove()
        self.depth_halo = sum(max(1, n) for n in uses)
        return outputs

    def flat_names(self) -> dict[str, str]:
        """See `SegmentationNetwork`."""
        return {name: f"network.{name}" for name in self.network.state_dict()}

    def forward(self, x: Tensor, features: list[Tensor] | None = None) -> Any:
        """(B, C, D, H, W) volumes to what the network gives for slices, each tensor (N, K, ...) as (B, K, D, ...).

        A U-Net's logits become (B, K, D, H, W), a classifier's (B, K, D), feature maps (B, K, D, h, w); lists, tuples
        and dictionaries stay such. `features` is left empty: where the network's decoder is, nobody knows.

        Raises:
            ValueError: x is no batch of volumes of `in_channels`, or its sizes are no multiples of the stride.
        """
        if not torch.compiler.is_compiling():
            self.check_input(x)
        batch, channels, depth, height, width = x.shape
        slices = x.transpose(1, 2).reshape(batch * depth, channels, height, width)
        self._slices.begin(depth)
        try:
            outputs = self.network(slices)
        finally:
            self._slices.end()
        return _as_volumes(outputs, batch, depth)


def _frozen(network: nn.Module) -> tuple[str, ...]:
    """Modules in evaluation mode within a network in training mode, and BatchNorm whose weights are not trained."""

    def is_frozen(module: nn.Module) -> bool:
        weights = list(module.parameters(recurse=False)) if isinstance(module, _BatchNorm) else []
        fixed = bool(weights) and not any(weight.requires_grad for weight in weights)
        return fixed or (network.training and not module.training)

    return tuple(name for name, module in network.named_modules() if is_frozen(module))


def _as_volumes(value: Any, batch: int, depth: int) -> Any:
    if isinstance(value, Tensor):
        volumes = value.unflatten(0, (batch, depth))
        return volumes.transpose(1, 2) if volumes.ndim > 2 else volumes
    if isinstance(value, dict):
        return {key: _as_volumes(one, batch, depth) for key, one in value.items()}
    if isinstance(value, list | tuple):
        parts = [_as_volumes(one, batch, depth) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def insert_depth_shift(
    network: nn.Module,
    *,
    kind: Kind = "distill",
    alpha: float = 0.5,
    where: Where = "auto",
    initialisation: Initialisation = "identity",
    stride: int = 32,
    out_channels: int = 0,
    in_place: bool = False,
) -> VolumetricNetwork:
    """Turn a 2-D CNN into a network of volumes.

    Args:
        network: takes (N, C, H, W), whatever its weights; it is copied, and stays as it is.
        kind: `distill` (learned), `residual` (moved as they are and added, the paper's baseline) or `shift` (moved as
            they are in the place of the others; Lin et al., "TSM", ICCV 2019).
        alpha: share of a convolution's input channels that take part.
        where: `auto` (`auto_places`), patterns of module names (`*` and `?` as in file names), e.g.
            `["layer3.*.conv2"]`, or a function of a convolution's name and the convolution.
        initialisation: `identity`: at first the output is that of the 2-D network, slice by slice; for a network with
            weights worth keeping. `paper`: the modules of the paper, which change the features from the start.
        stride: what height and width must be multiples of: the network's downsampling in all.
        out_channels: of a segmentation network; written into exports, not otherwise used.
        in_place: give the network itself its modules, not a copy.

    Raises:
        ConfigError: an unknown kind or initialisation, an alpha that is no share, nowhere to put a module, a pattern
            that names no convolution, or a network that has modules already.
    """
    for key, value, known in (
        ("kind", kind, ("distill", "residual", "shift")),
        ("initialisation", initialisation, ("identity", "paper")),
    ):
        if value not in known:
            raise ConfigError(f"'{key}' has an unknown value", seen=repr(value), rule=" or ".join(known))
    if any(
        isinstance(m, DepthModule)
        or any(isinstance(hook, _BeforeConvolution) for hook in m._forward_pre_hooks.values())
        for m in network.modules()
    ):
        raise ConfigError("the network has depth shift modules already", seen=type(network).__name__)
    convolutions = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    if not convolutions:
        raise ConfigError("the network has no 2-D convolution", seen=type(network).__name__)
    modules = {}
    for name in _places(network, convolutions, where):
        module = _module(convolutions[name], kind, alpha, initialisation)
        if module is not None:
            modules[name] = module
    if not modules:
        raise ConfigError(
            "no convolution has channels enough to pass one each way", seen=f"alpha={alpha}", hint="a larger alpha"
        )
    first = next(iter(convolutions.values()))
    volumetric = VolumetricNetwork(
        network if in_place else copy.deepcopy(network),
        modules,
        in_channels=first.in_channels,
        stride=stride,
        out_channels=out_channels,
    )
    # The network's own modules keep their modes: frozen normalisation stays frozen.
    volumetric.shifts.train(network.training)
    volumetric.training = network.training
    return volumetric


def auto_places(network: nn.Module) -> tuple[str, ...]:
    """Names of the convolutions that get a depth shift module in front with `where="auto"`.

    The rule, layers being in the order in which the network registers them:

    - a *layer* is a 2-D convolution or a linear layer, a *spatial* one a convolution with a kernel above 1;
    - a *block* is a smallest module that holds two layers or more, a spatial one among them;
    - in every block, each spatial layer of stride 1 gets a module, but not the block's first layer if a spatial one
      follows;
    - the network's first convolution, which reads the image, gets none, nor does anything in its block unless that is
      the only one.

    In the paper's U-Net that is the paper's place, between the convolutions of every block but the first. In a ResNet
    it is on the residual branch, between its convolutions; in a ConvNeXt in front of the depthwise one; in a DenseNet
    in front of the 3x3 one. Shortcuts have 1x1 convolutions or strides, and so no modules.
    """
    names = {name for name, _ in network.named_modules()}  # of a module that has two, the first
    image = next((name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)), None)
    blocks = _blocks(network, "")
    places: list[str] = []
    for block in [block for block in blocks if image not in block] or blocks:
        first, *rest = block
        skipped = first if any(_is_spatial(block[name]) for name in rest) else None
        places += [
            n for n, m in block.items() if n in names - {skipped, image} and _is_spatial(m) and max(m.stride) == 1
        ]
    return tuple(places)


def _is_spatial(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    return isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1


def _blocks(module: nn.Module, prefix: str) -> list[dict[str, nn.Module]]:
    """The layers of each block in a module (see `auto_places`), by their full names."""
    inner = [block for name, child in module.named_children() for block in _blocks(child, f"{prefix}{name}.")]
    if inner:
        return inner
    layers: dict[str, nn.Module] = {
        prefix + name: m for name, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }
    return [layers] if len(layers) > 1 and any(_is_spatial(m) for m in layers.values()) else []


def _places(network: nn.Module, convolutions: dict[str, nn.Conv2d], where: Where) -> tuple[str, ...]:
    if isinstance(where, str) and where != "auto":
        where = [where]
    if where == "auto":
        places = auto_places(network)
    elif callable(where):
        places = tuple(name for name, m in convolutions.items() if where(name, m))
    else:
        places = _matching(convolutions, list(where))
    if not places:
        raise ConfigError(
            "no place for a depth shift was found",
            seen=type(network).__name__,
            rule="a convolution with a kernel above 1 and stride 1 that is not the first layer",
            hint="name convolutions in 'where'",
        )
    return places


def _matching(convolutions: dict[str, nn.Conv2d], patterns: list[str]) -> tuple[str, ...]:
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
    return tuple(name for name in convolutions if name in chosen)


def _module(convolution: nn.Conv2d, kind: Kind, alpha: float, initialisation: Initialisation) -> DepthModule | None:
    """What goes in front of a convolution; None where it has too few channels to pass one each way."""
    channels = convolution.in_channels
    module: DepthModule
    if kind == "distill":
        plain = DistillDepthShift(channels, alpha=alpha)
        module = plain if initialisation == "paper" else AddedDistillDepthShift(channels, alpha=alpha)
        each_way = plain.each_way
    elif initialisation == "identity":
        module = GatedDepthShift(channels, fraction=alpha, add=kind == "residual")
        each_way = module.each_way
    else:
        module = ResidualDepthShift(channels, fraction=alpha, add=kind == "residual")
        each_way = module.each_way
    return module.to(convolution.weight) if each_way else None
