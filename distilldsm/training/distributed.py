"""Several training processes, started by torchrun; a single one otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process among all training processes."""

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

    def gather(self, value: dict[str, list[float]]) -> dict[str, list[float]]:
        """Merge the processes' dictionaries. Uses JSON bytes: nothing that is received is unpickled."""
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


@contextmanager
def training_processes(device_type: str) -> Iterator[Processes]:
    """Join the group torchrun describes in the environment; a group of one without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(rank=dist.get_rank(), world=world, local_rank=local_rank)
    finally:
        dist.destroy_process_group()
