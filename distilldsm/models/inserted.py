"""The user's own 2-D CNN in the pipeline: call the user's function and put depth shifts into the network it returns.

Importing this module loads no torch. Building a network imports and calls the code that the user's params.yaml names.
Code that a model's file names (`model.json`, `metadata.json`) runs only if the user trusts it: `require_trusted`.
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
"""Environment variable: a comma-separated list of builders that model files may name, with any arguments."""
WHERE = "train.model.options"
_trusted: set[str] = set()


def _code(options: Mapping[str, Any]) -> str:
    from distilldsm.core.mapping import to_mapping

    return json.dumps(to_mapping([options.get("builder"), options.get("arguments") or {}]), sort_keys=True)


def trust_builder(options: Mapping[str, Any]) -> None:
    """Trust the builder and arguments of the user's own `options`: model files may name them in this process."""
    if options.get("builder"):
        _trusted.add(_code(options))


def require_trusted(options: Mapping[str, Any], where: object) -> None:
    """Raise DataError unless the file's builder is trusted, by `trust_builder` or by the environment variable."""
    builder = str(options.get("builder", ""))
    trusted = [name.strip() for name in os.environ.get(TRUST_VARIABLE, "").split(",")]
    if _code(options) not in _trusted and not (builder and builder in trusted):
        raise DataError(
            "names code that builds its network; code that you did not allow is not run",
            where=str(where),
            seen=f"{builder!r} with {json.dumps(options.get('arguments') or {}, default=str)}"[:300],
            rule="the builder and arguments of train.model.options in your params.yaml",
            hint=f"set {TRUST_VARIABLE}={builder} if you trust that code; OpenVINO and ONNX models do not need it",
        )


def find_builder(name: str) -> Callable[..., Any]:
    """The function or class that `package.module:name` names.

    Raises:
        ConfigError: the text has another form, the import fails, or the object cannot be called.
    """
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise _wrong("does not name code", name, "package.module:function, e.g. monai.networks.nets:BasicUNet")
    try:
        builder: Any = importlib.import_module(module)
        for part in attribute.split("."):
            builder = getattr(builder, part)
    except Exception as error:  # an import may raise anything
        raise _wrong(
            "cannot be imported",
            f"{name}: {type(error).__name__}: {error}",
            "importable by the stage's Python",
            "install the package, or put the module's folder on PYTHONPATH",
        ) from error
    if not callable(builder):
        raise _wrong("cannot be called", name, "a function or class that returns a torch.nn.Module")
    return builder


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
        arguments: arguments of the builder, without the numbers of channels.
        in_argument, out_argument: the names of the builder's arguments for C and K.
        stride: height and width must be multiples of it.
        insertion: `kind`, `alpha`, `where`, `initialisation` of `insert_depth_shift`.

    Raises:
        ConfigError: the builder cannot be imported or called, or the network does not fit or has no place for a module.
    """
    from torch import nn

    from distilldsm.models.insert import insert_depth_shift

    call = find_builder(builder)
    all_arguments = {**arguments, in_argument: in_channels, out_argument: out_channels}
    try:
        flat = call(**all_arguments)
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in all_arguments.items())
        raise _wrong(
            f"failed: {type(error).__name__}: {error}",
            f"{builder}({shown})",
            "arguments of the builder; 'in_argument' and 'out_argument' name its arguments for the numbers of channels",
        ) from error
    if not isinstance(flat, nn.Module):
        raise _wrong("does not return a network", type(flat).__name__, "a torch.nn.Module")
    network = insert_depth_shift(flat, stride=stride, out_channels=out_channels, in_place=True, **insertion)
    network.in_channels = in_channels  # the first registered layer may be another than the one that reads the image
    _check(network, in_channels, builder)
    return network


def _check(network: VolumetricNetwork, in_channels: int, builder: str) -> None:
    """Raise ConfigError unless the network accepts multiples of its stride and returns logits of the image's size.

    The same forward pass measures the depth halo.
    """
    import torch

    from distilldsm.models.base import evaluating

    stride = network.stride[1]
    expected = (1, network.out_channels, 2, 2 * stride, 3 * stride)
    rule = f"(N, {in_channels}, H, W) to (N, {network.out_channels}, H, W), sizes multiples of the stride {stride}"
    try:
        with evaluating(network):
            logits = network.measure_halo(torch.zeros(1, in_channels, *expected[2:]))
    except Exception as error:
        raise _wrong("cannot compute", f"{builder}: {type(error).__name__}: {error}"[:500], rule, _HINT) from error
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
        is_tensor = isinstance(logits, torch.Tensor)
        seen = tuple(logits.shape[1:2] + logits.shape[3:]) if is_tensor else type(logits).__name__
        raise _wrong("does not return logits", f"{builder}: {seen}", rule, _HINT)


_HINT = "set 'stride' or the builder's arguments, or name a function of your own that returns such a network"


def _wrong(problem: str, seen: str, rule: str, hint: str | None = None) -> ConfigError:
    return ConfigError(f"'builder' {problem}", where=WHERE, seen=seen, rule=rule, hint=hint)
