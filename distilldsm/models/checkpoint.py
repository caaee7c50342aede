"""Checkpoints: one safetensors file with JSON in its header. No pickle. The file is complete or it does not exist."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distilldsm.config.networks import MODELS, Options
from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.files import read_json, whole_file
from distilldsm.core.mapping import from_mapping
from distilldsm.models import build_model
from distilldsm.models.base import SegmentationNetwork
from distilldsm.models.inserted import require_trusted

MAX_SIZE = 4096
"""Upper limit for channels and for every number in a network's options. A larger one means a damaged file."""


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and JSON metadata into one safetensors file. An existing file is replaced in one step.

    Raises:
        DataError: a tensor is not finite.
    """
    from safetensors.torch import save_file

    _require_finite(tensors, path)
    with whole_file(path) as temporary:
        # safetensors refuses tensors that share memory. The copies are also on the CPU and contiguous.
        plain = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
        # One entry only: safetensors writes several in random order.
        save_file(plain, temporary, metadata={"json": _json({**meta, "sha256": _digest(plain, meta)})})
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        DataError: missing or damaged file, or a tensor is not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            meta = json.loads((file.metadata() or {}).get("json", "{}"))
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - no mapping
            expected = meta.pop("sha256", None)
            if expected not in (None, _digest(tensors, meta)):
                raise ValueError("its numbers have changed since they were written")
    except FileNotFoundError:
        raise DataError("checkpoint not found", where=path, hint="train the model first (dvc repro)") from None
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            "is not a readable checkpoint",
            where=path,
            seen=str(error),
            rule="safetensors; a pickle (.pt, .pth) is never loaded",
            hint="train again, or copy the file again",
        ) from None
    _require_finite(tensors, path)
    return tensors, meta


def _json(meta: Mapping[str, Any]) -> str:
    return json.dumps(meta, sort_keys=True, allow_nan=False)


def _digest(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """SHA-256 of metadata, names and values."""
    digest = hashlib.sha256(_json(meta).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise DataError if a tensor holds NaN or infinity. Its network may still give finite outputs, all wrong."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(tensors)} tensors are not finite",
            where=path,
            seen=", ".join(bad[:3]),
            rule="no NaN and no infinity",
            hint="train again with a lower train.learning_rate, or with train.precision: fp32",
        )


def load_weights(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load weights; every name and shape must match.

    Raises:
        DataError: the names or shapes differ from the network's.
    """
    try:
        network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise DataError("does not fit the network", where=path, seen=str(error)[:500]) from None


def load_file(network: SegmentationNetwork, path: Path) -> SegmentationNetwork:
    """The network with the weights of a file, in evaluation mode.

    Raises:
        DataError: missing or damaged file, or it does not fit.
    """
    load_weights(network, load_tensors(path)[0], path)
    return network.eval()


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into named tensors and plain JSON."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            key = f"optimizer.{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                plain[key] = value
    return tensors, {"plain": plain, "groups": state["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """The inverse of `pack_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    values: dict[str, Any] = {**tensors, **meta["plain"]}
    for key, value in values.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    # JSON has no tuples, torch's optimizers expect them.
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in meta["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_network(model_dir: Path, checkpoint: str = "last") -> SegmentationNetwork:
    """Rebuild the network of a training directory with its averaged weights, on the CPU, in evaluation mode.

    Args:
        model_dir: what the train stage wrote (`model.json` and `<checkpoint>.safetensors`).
        checkpoint: `last` or `best`.

    Raises:
        DataError: a file is missing or damaged, or does not fit. A network with random weights is never returned.
    """
    spec = read_model_spec(model_dir)
    path = model_dir / "model.json"
    network = described_network(spec.name, spec.options, spec.in_channels, spec.out_channels, where=path)
    return load_file(network, model_dir / f"{checkpoint}.safetensors")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The entries of `model.json` that are needed to build the network again. The file holds more."""

    name: str
    options: Options
    in_channels: int
    out_channels: int


def read_model_spec(model_dir: Path) -> ModelSpec:
    """Read `model.json` of a training directory.

    Raises:
        UserError: the file is missing or is not valid JSON.
        DataError: the file does not describe a network.
    """
    path = model_dir / "model.json"
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError("does not describe a network", where=path, seen=type(content).__name__, rule="a mapping")
    names = {field.name for field in fields(ModelSpec)}
    try:
        return from_mapping(ModelSpec, {key: value for key, value in content.items() if key in names}, where=str(path))
    except ConfigError as error:
        raise DataError(
            error.problem, where=error.where, seen=error.seen, rule=error.rule, hint="train the model again"
        ) from None


def described_network(
    name: str, options: Mapping[str, Any], in_channels: int, out_channels: int, *, where: Path
) -> SegmentationNetwork:
    """Build the network that the file `where` describes. The content of the file is not trusted.

    Raises:
        DataError: the network is unknown, it is larger than MAX_SIZE allows, or code that is not trusted
            builds it (models/inserted.py).
    """
    if name in MODELS and MODELS[name].family == "inserted":
        require_trusted(options, where)
    sizes = [in_channels, out_channels, *_numbers(options)]
    try:
        if max(sizes) > MAX_SIZE:
            raise ValueError(f"{max(sizes)} is more than {MAX_SIZE}")
        if {"name", "in_channels", "out_channels"} & set(options):
            raise ValueError("'name', 'in_channels' and 'out_channels' are not options")
        return build_model(name, in_channels=in_channels, out_channels=out_channels, **options)
    except (ConfigError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise DataError(
            "does not describe a network of this version",
            where=where,
            seen=str(error)[:500],
            rule="a name and options of `distilldsm info --models`",
            hint="train the model again, or copy the file again",
        ) from None


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield value
