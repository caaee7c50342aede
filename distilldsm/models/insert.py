"""Turn any 2-D CNN into a network for volumes: put depth shift modules in front of its convolutions.

Paper: see depth_shift.py. It says that its module fits any 2-D CNN, and puts one between the two convolutions of each
block except the first. Ours: the rule that finds such places in any network (`auto_places`), and an initialisation that
leaves the output of a pretrained network unchanged at first.
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
    """The distilled depth shift, added to its input features instead of replacing them.

    The convolution starts at zero, so the module changes nothing at first. The convolution's gradient is not zero, so
    the module learns from the first step.
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
    """x + gate * shift(x), or x + gate * (shift(x) - x) without `add`. Each shifted channel has a gate; it starts at 0.

    The gate's gradient is not zero. With all gates at 1, the module equals `ResidualDepthShift`.
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
    """The number of slices of the volumes in the current forward pass. The 2-D network's own code cannot pass it on.

    Every thread has its own number. Gradient checkpointing runs modules again in the backward pass (on a GPU, in
    another thread). Outside a forward pass, the number is therefore that of the latest forward pass with gradients.
    """

    def __init__(self) -> None:
        self._thread = threading.local()
        self._latest: int | None = None

    def __reduce__(self) -> tuple[type[_Slices], tuple[()]]:
        return _Slices, ()  # a copied or pickled network gets a new object

    def begin(self, count: int) -> None:
        if torch.compiler.is_compiling():
            self._latest = count  # set and read within one trace, without threads; the count may be symbolic
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
        """Pre-hook of the 2-D network: a call without a number of slices must not use that of an earlier call."""
        if not torch.compiler.is_compiling() and getattr(self._thread, "count", None) is None:
            raise RuntimeError(_ALONE)


_ALONE = "the number of slices of a volume is not known: call the VolumetricNetwork, not the network inside it"


class _BeforeConvolution:
    """A hook: a depth shift module changes the input of a convolution. It is a class, so copies of a network copy it.

    The convolution stays in its place. So its attributes and the names of its weights stay the same.
    """

    def __init__(self, module: DepthModule, slices: _Slices) -> None:
        self.module, self.slices = module, slices

    def __call__(self, convolution: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.module(inputs[0], self.slices.count()), *inputs[1:])


class VolumetricNetwork(SegmentationNetwork):
    """A 2-D network that runs on the slices of volumes, with modules that exchange features between the slices.

    network: the 2-D network. Its weights keep their names. It cannot be called by itself.
    inserted: the names of the convolutions that have a module in front of them.
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
        # Each module looks one slice further. This is too much if modules lie on parallel branches, and too little if
        # a convolution is used more than once in a pass: see `measure_halo`.
        self.depth_halo = len(modules)
        self._frozen = _frozen(network)

    def train(self, mode: bool = True) -> Self:
        """See `nn.Module.train`. Modules that were frozen at the insertion stay in evaluation mode."""
        super().train(mode)
        for name in self._frozen:
            self.network.get_submodule(name).training = False
        return self

    def measure_halo(self, x: Tensor) -> Any:
        """Run `forward` and set `depth_halo` to the number of shifts in this pass. Every use of a module counts.

        Only a pass shows how often the 2-D network uses a convolution, for example in a recurrent block. A module that
        this pass does not use counts once, because other passes may use it.
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
        """Run the 2-D network on (B, C, D, H, W) volumes; each output tensor (N, K, ...) is returned as (B, K, D, ...).

        A U-Net's logits become (B, K, D, H, W), a classifier's (B, K, D), feature maps (B, K, D, h, w). Lists, tuples
        and dictionaries keep their type. `features` stays empty, because the network's decoder is not known.

        Raises:
            ValueError: x is not (B, in_channels, D, H, W), or its sizes are not multiples of the stride.
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
    """Modules in evaluation mode inside a network in training mode, and BatchNorm layers without trainable weights."""

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
        network: a network for (N, C, H, W) with any weights. It is copied; the original does not change.
        kind: `distill` (learned shift), `residual` (shifted features are added; the paper's baseline) or `shift`
            (shifted features replace the originals; Lin et al., "TSM", ICCV 2019).
        alpha: share of a convolution's input channels that take part, from 0 to 1.
        where: `auto` (`auto_places`), patterns of module names (`*` and `?` as in file names), e.g.
            `["layer3.*.conv2"]`, or a function of a convolution's name and the convolution.
        initialisation: `identity`: at first the output is that of the 2-D network, slice by slice; use it for a
            pretrained network. `paper`: the modules of the paper, which change the features from the start.
        stride: height and width must be multiples of it. It is the total downsampling of the network.
        out_channels: number of classes of a segmentation network; written into exports, not used otherwise.
        in_place: change the network itself, not a copy.

    Raises:
        ConfigError: an unknown kind or initialisation, an alpha outside 0 to 1, no place for a module, a pattern
            that matches no convolution, or a network that already has modules.
    """
    for key, value, allowed in (
        ("kind", kind, ("distill", "residual", "shift")),
        ("initialisation", initialisation, ("identity", "paper")),
    ):
        if value not in allowed:
            raise ConfigError(f"'{key}' has an unknown value", seen=repr(value), rule=" or ".join(allowed))
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
            "no convolution has enough channels to shift one each way", seen=f"alpha={alpha}", hint="a larger alpha"
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

    The rule goes through the layers in the order in which the network registers them:

    - A *layer* is a 2-D convolution or a linear layer. A *spatial* layer is a convolution with a kernel above 1.
    - A *block* is a smallest module that holds at least two layers, at least one of them spatial.
    - In every block, each spatial layer of stride 1 gets a module. The block's first layer gets none if another
      spatial layer follows.
    - The network's first convolution, which reads the image, gets none. The other layers of its block get none either,
      unless it is the only block.

    In the paper's U-Net these are the paper's places: between the convolutions of every block except the first. In a
    ResNet they are on the residual branch, between its convolutions; in a ConvNeXt in front of the depthwise
    convolution; in a DenseNet in front of the 3x3 convolution. Shortcuts have 1x1 kernels or strides: no modules.
    """
    names = {name for name, _ in network.named_modules()}  # a module with two names is listed under the first
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
            "has no place for a depth shift",
            seen=type(network).__name__,
            rule="a convolution with a kernel above 1 and stride 1 that is not the first layer",
            hint="name convolutions in 'where'",
        )
    return places


def _matching(convolutions: dict[str, nn.Conv2d], patterns: list[str]) -> tuple[str, ...]:
    chosen: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(convolutions, pattern)
        if not matches:
            raise ConfigError(
                "matches no 2-D convolution of the network",
                where="where",
                seen=repr(pattern),
                rule="such as " + ", ".join(list(convolutions)[:3]),
            )
        chosen.update(matches)
    return tuple(name for name in convolutions if name in chosen)


def _module(convolution: nn.Conv2d, kind: Kind, alpha: float, initialisation: Initialisation) -> DepthModule | None:
    """The module for the input of a convolution; None if there are too few channels to shift one each way."""
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
