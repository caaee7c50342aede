"""Set up a training run: device, precision, seeds, network, optimizer."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from distilldsm.config import TrainConfig
from distilldsm.core.errors import ConfigError, UserError
from distilldsm.data.plan import Plan
from distilldsm.models import build_model
from distilldsm.models.base import SegmentationNetwork

T = TypeVar("T")

VALIDATIONS = 8
"""Validations in a training, unless `train.validate_every` is set."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that the user, or else the plan, decides."""

    epochs: int
    samples_per_case: int
    foreground_oversampling: float
    learning_rate: float
    ema_decay: float
    validate_every: int
    rotation_deg: float

    @classmethod
    def of(cls, config: TrainConfig, plan: Plan, cases: int) -> Settings:
        """The values of the config; where it holds null, those of the plan, for a number of training cases.

        If only one of `epochs` and `samples_per_case` is set, the plan's value for the other one does not fit to it.
        """
        planned = plan.training

        def chosen(value: T | None, other: T) -> T:
            return other if value is None else value

        if config.epochs is None:
            samples = chosen(config.samples_per_case, planned.samples_per_case)
            epochs = max(1, round(planned.patches / (cases * samples)))
        else:
            samples, epochs = chosen(config.samples_per_case, 1), config.epochs
        return cls(
            epochs=epochs,
            samples_per_case=samples,
            foreground_oversampling=chosen(config.foreground_oversampling, planned.foreground_oversampling),
            learning_rate=chosen(config.learning_rate, planned.learning_rate),
            ema_decay=chosen(config.ema_decay, planned.ema_decay),
            validate_every=chosen(config.validate_every, max(1, round(epochs / VALIDATIONS))),
            rotation_deg=chosen(config.augment.rotation_deg, planned.rotation_deg),
        )

    def filled(self, config: TrainConfig) -> TrainConfig:
        """The config with these values instead of null."""
        values = {key: value for key, value in vars(self).items() if key != "rotation_deg"}
        return replace(config, augment=replace(config.augment, rotation_deg=self.rotation_deg), **values)


def hash_seed(*parts: int) -> int:
    """Make one seed from several integers; it is well mixed and the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(2, np.uint32).view(np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed torch. With `deterministic`, request repeatable algorithms (torch warns if a GPU does not have one)."""
    torch.manual_seed(seed)
    if deterministic:  # for matrix products on a GPU; read once by the library
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Filling every new tensor costs a tenth of a step on a CPU. Only code that reads uninitialised memory needs it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = torch.cuda.is_available() and not deterministic


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device for a setting; `auto` is the GPU if there is one.

    Raises:
        ConfigError: `cuda` without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no GPU is available", where="train.device", seen="cuda", hint="use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def require_compiler(device: str) -> None:
    """Check that the compiler is there which torch.compile calls on a device (`cpu` or `cuda`).

    PyTorch's own error would come in the first step, as a traceback.

    Raises:
        UserError: it is not.
    """
    variable, names = ("CC", ("clang", "gcc")) if device == "cuda" else ("CXX", ("g++",))
    names = (os.environ[variable],) if os.environ.get(variable) else names
    if not any(map(shutil.which, names)):
        raise UserError(
            "needs a C++ compiler",
            where="train.compile",
            seen=f"no {' and no '.join(names)} on the PATH",
            hint=f"install one, set {variable} to its name, or set train.compile to false",
        )


def build_network(config: TrainConfig, plan: Plan, device: torch.device) -> SegmentationNetwork:
    """The network for a plan's channels and classes, on the device.

    Raises:
        ConfigError: see `build_model`.
    """
    network = build_model(
        config.model.name,
        in_channels=len(plan.channels),
        out_channels=plan.targets.channels,
        **dict(config.model.options),
    ).to(device)
    if config.channels_last and network.depth_halo is not None:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def choose_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16; `auto`: if the hardware has bf16 multiplication."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def make_optimizer(config: TrainConfig, network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The configured optimizer; weight decay acts on convolution weights only, not on biases and norms."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum, nesterov=True)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate)
