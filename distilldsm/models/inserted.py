"""A 2-D CNN of one's own as a network of the pipeline: depth shifts are put into what a function of the user's returns.

Importing this module loads no torch. Building imports and calls code: that which the user's own params.yaml names. What
a file of a model names (`model.json`, `metadata.json`) is imported only if it was trusted before: `require_trusted`.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from distilldsm.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from distilldsm.models.insert import VolumetricNetwork

TRUST_VARIABLE = "DISTILLDSM_BUILDER"
"""Environment variable: builders, separated by commas, that files of models may name, with any arguments."""
WHERE = "train.model.options"
_trusted: set[str] = set()


def _code(options: Mapping[str, Any]) -> str:
    from distilldsm.core.mapping import to_mapping

    return json.dumps(to_mapping([options.get("builder"), options.get("arguments") or {}]), sort_keys=True)


def trust_builder(options: Mapping[str, Any]) -> None:
    """Let files of models name the builder and arguments of one's own `options`, in this process."""
    if options.get("builder"):
        _trusted.add(_code(options))


def require_trusted(options: Mapping[str, Any], where: object) -> None:
    """Raise DataError unless a file's builder was trusted by `trust_builder` or the environment."""
    builder = str(options.get("builder", ""))
    named = [name.strip() for name in os.environ.get(TRUST_VARIABLE, "").split(",")]
    if _code(options) not in _trusted and not (builder and builder in named):
        raise DataError(
            "names code that builds its network, which is not carried out unasked",
            where=str(where),
            seen=f"{builder!r} with {json.dumps(options.get('arguments') or {}, default=str)}"[:300],
            rule="the builder and arguments of train.model.options in your params.yaml",
            hint=f"set {TRUST_VARIABLE}={builder} if you trust that code; the OpenVINO and ONNX of an export need none",
        )


def find_builder(name: str) -> Callable[..., Any]:
    """The function or class that `package.module:name` names.

    Raises:
        ConfigError: no such form, module or name, or nothing to call.
    """
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise _wrong("names no code", name, "package.module:function, e.g. monai.networks.nets:BasicUNet")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module may do anything while it is imported
        raise _wrong(
            "cannot be imported",
            f"{name}: {type(error).__name__}: {error}",
            "importable by the stage's Python",
            "install the package, or put the module's folder on PYTHONPATH",
        ) from error
    if not callable(found):
        raise _wrong("cannot be called", name, "a function or class that returns a torch.nn.Module")
    return found


def build(
    in_channels: int,
    out_channels: int,
    *,
    builder: str,
    arguments: Mapping[str, Any],
    in_argument: str,
    out_argument: str,
    stride: int,
    **insertion: Any,
) -> VolumetricNetwork:
    """Call the builder and put depth shift modules into the 2-D network that it returns.

    Args:
        builder: `package.module:function`; returns a network from (N, C, H, W) to (N, K, H, W).
        arguments: what it is called with, besides the numbers of channels.
        in_argument, out_argument: what it calls C and K.
        stride: what height and width must be multiples of.
        insertion: `kind`, `alpha`, `where`, `initialisation` of `insert_depth_shift`.

    Raises:
        ConfigError: the builder cannot be imported or called, returns no such network, or has no place for a module.
    """
    from torch import nn

    from distilldsm.models.insert import insert_depth_shift

    call = find_builder(builder)
    given = {**arguments, in_argument: in_channels, out_argument: out_channels}
    try:
        flat = call(**given)
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise _wrong(
            f"failed: {type(error).__name__}: {error}",
            f"{builder}({shown})",
            "arguments it takes; 'in_argument' and 'out_argument' say what it calls the numbers of channels",
        ) from error
    if not isinstance(flat, nn.Module):
        raise _wrong("returns no network", type(flat).__name__, "a torch.nn.Module")
    network = insert_depth_shift(flat, stride=stride, out_channels=out_channels, in_place=True, **insertion)
    network.in_channels = in_channels  # the layer that is registered first need not be the one that reads the image
    _check(network, in_channels, builder)
    return network


def _check(network: VolumetricNetwork, in_channels: int, builder: str) -> None:
    """Raise ConfigError unless the network takes images of its stride and gives logits of their size.

    The same pass tells how many slices away its logits reach.
    """
    import torch

    from distilldsm.models.base import evaluating

    stride = network.stride[1]
    expected = (1, network.out_channels, 2, 2 * stride, 3 * stride)
    rule = f"(N, {in_channels}, H, W) to (N, {network.out_channels}, H, W), sizes multiples of the stride {stride}"
    try:
        with evaluating(network):
            found = network.measure_halo(torch.zeros(1, in_channels, *expected[2:]))
    except Exception as error:
        raise _wrong("cannot compute", f"{builder}: {type(error).__name__}: {error}"[:500], rule, _MEND) from error
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != expected:
        seen = tuple(found.shape[1:2] + found.shape[3:]) if isinstance(found, torch.Tensor) else type(found).__name__
        raise _wrong("gives something else than logits", f"{builder}: {seen}", rule, _MEND)


_MEND = "set 'stride' or the builder's arguments, or name a function of your own that returns such a network"


def _wrong(problem: str, seen: str, rule: str, hint: str | None = None) -> ConfigError:
    return ConfigError(f"'builder' {problem}", where=WHERE, seen=seen, rule=rule, hint=hint)
