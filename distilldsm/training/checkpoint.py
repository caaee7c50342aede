"""Checkpoints: tensors in safetensors, everything else as JSON in its header. No pickle, one file, whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distilldsm.errors import DataError
from distilldsm.models.base import SegmentationNetwork
from distilldsm.stage import read_json


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and JSON-able metadata into one safetensors file; an existing one is replaced at once."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Shared storage is not allowed in the file; clones also free it from a GPU and from odd memory formats.
        plain = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
        save_file(plain, temporary, metadata={"json": json.dumps(meta, allow_nan=False)})
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        DataError: missing or damaged file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            meta = json.loads((file.metadata() or {}).get("json", "{}"))
            return {k: file.get_tensor(k) for k in file.keys()}, meta  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise DataError("checkpoint not found", where=path, mend="train the model first (dvc repro)") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError("is no readable checkpoint", where=path, seen=str(error)) from None


def load_weights(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load weights strictly.

    Raises:
        DataError: names or shapes that differ from the network's.
    """
    try:
        network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise DataError("does not fit the network", where=path, seen=str(error)[:500]) from None


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and plain JSON."""
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
        DataError: a missing, damaged or unfitting file; a network with random weights is never returned.
    """
    from distilldsm.models.registry import build_model

    spec = read_json(model_dir / "model.json")
    path = model_dir / f"{checkpoint}.safetensors"
    tensors, _ = load_tensors(path)
    network = build_model(
        spec["name"], in_channels=spec["in_channels"], out_channels=spec["out_channels"], **spec["options"]
    )
    load_weights(network, tensors, path)
    return network.eval()
