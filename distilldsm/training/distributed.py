"""Training in several processes (started by torchrun) or in a single one.

Several processes compute the same as a single process with the whole batch. Batch statistics, soft Dice and gradients
cover all shares together; only the order of sums differs.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from distilldsm.core.errors import UserError

TIMEOUT = timedelta(minutes=30)
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")
"""A back end's message contains one of these if another process has ended."""


@dataclass(frozen=True)
class Processes:
    """This process and its place among all training processes."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def differentiable_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, as a new tensor. Its gradient is that of the sum of all processes' losses."""
        return _Sum.apply(values) if self.world > 1 else values

    def gather(self, value: dict[str, list[float]]) -> dict[str, list[float]]:
        """Merge the processes' dictionaries. They are sent as JSON; no received data are unpickled."""
        if self.world == 1:
            return value
        import json

        payload = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(payload)
        device = torch.device("cuda", self.local_rank) if dist.get_backend() == "nccl" else torch.device("cpu")
        sizes = self.sum(sizes.to(device)).cpu()
        table = torch.zeros(self.world, int(sizes.max()), dtype=torch.int32, device=device)
        table[self.rank, : len(payload)] = payload.to(device, torch.int32)
        table = self.sum(table).cpu()
        merged: dict[str, list[float]] = {}
        for row, size in zip(table, sizes.tolist(), strict=True):
            merged.update(json.loads(bytes(row[:size].tolist())))
        return merged


class _Sum(torch.autograd.Function):
    """Each process's loss depends on the values of all processes, so gradients are summed like the values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with statistics over all processes. PyTorch's own SyncBatchNorm needs a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not self.training:
            return super().forward(x)
        values = x.float()
        count = float(values.numel() // values.shape[1]) * dist.get_world_size()
        mean = _Sum.apply(values.sum((0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum or 0.0)
        normal = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        return (normal * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def share_batch_statistics(network: nn.Module, device_type: str) -> nn.Module:
    """Let every BatchNorm of a network use the whole batch. The processes have equal shares of it."""
    if device_type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
    return network


def _check_main_address(world: int) -> None:
    """Use the loopback address for a main process on this machine whose host name does not resolve.

    Raises:
        UserError: the main process is on another machine.
    """
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        if os.environ.get("LOCAL_WORLD_SIZE") != str(world):
            raise UserError(
                "the name of the main process's machine does not resolve",
                where="MASTER_ADDR",
                seen=address,
                hint="give addresses as numbers: torchrun --local-addr (with --rdzv-endpoint), or --master-addr",
            ) from error
        os.environ["MASTER_ADDR"] = "127.0.0.1"


def _join(backend: str, world: int) -> None:
    _check_main_address(world)
    store, rank, _ = next(rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        # torchrun keeps its store after a restart, with the addresses of ended processes (PyTorch issue 135712).
        # Several nodes may count restarts differently: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)


@contextmanager
def training_processes(device_type: str) -> Iterator[Processes]:
    """Join the process group that torchrun describes in the environment; without torchrun, a group of one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    # A process that waits inside a collective cannot run our signal handler. So SIGTERM must end it at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _join("nccl" if device_type == "cuda" else "gloo", world)
    rank = dist.get_rank()
    try:
        yield Processes(rank=rank, world=world, local_rank=local_rank)
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in _LOST):
            raise
        if rank:
            raise SystemExit(1) from None  # one message is enough
        raise UserError(
            "another process of this training has ended",
            seen=str(error).splitlines()[0],
            hint="read that process's own message; then run the same command again to resume from the last checkpoint",
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
