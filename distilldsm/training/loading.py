"""Batches of an epoch, in order, read here or ahead by worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from distilldsm.core.errors import ConfigError, UserError
from distilldsm.core.workers import end_with_parent
from distilldsm.training.distributed import Processes
from distilldsm.training.patches import PatchSampler

Batch = tuple[np.ndarray, np.ndarray, tuple[int, int, int], int]


def batch_size_of(set_to: int | None, *, begun_with: int, planned: int, unit: int) -> int:
    """Patches a step, over all processes.

    Args:
        set_to: `train.batch_size`, taken as it is; None: as near to the plan's as the processes can share.
        begun_with: of the training that is resumed, which keeps it: the schedule counts in its steps. 0: none is.
        unit: processes x accumulate, which the batch is shared by.

    Raises:
        ConfigError: it cannot be shared evenly.
    """
    batch = set_to or begun_with
    if not batch:
        return max(planned // unit, 1) * unit
    if batch % unit:
        raise ConfigError(
            "the batch cannot be shared evenly",
            where="train.batch_size",
            seen=f"{batch}" if set_to else f"{batch}, which the training was begun with",
            rule=f"a multiple of processes x accumulate ({unit})",
            hint=None if set_to else "resume on another number of processes",
        )
    return batch


def batches(sampler: PatchSampler, epoch: int, workers: int, processes: Processes) -> Iterator[Batch]:
    """This process's share of each batch of an epoch: images, labels, size (see `PatchSampler.batch`), and the step."""
    share = {"rank": processes.rank, "world": processes.world}
    steps = _Steps(sampler, epoch, share)
    if not workers:
        yield from (steps[step] for step in range(len(steps)))
        return
    from torch.utils.data import DataLoader

    loader = DataLoader(
        steps, batch_size=None, num_workers=workers, prefetch_factor=4, collate_fn=_keep, worker_init_fn=_begin
    )
    yield from loader


@contextmanager
def loaders_are_watched(workers: int) -> Iterator[None]:
    """Around all that goes on while batches are loaded: PyTorch tells of a killed worker wherever the program is.

    Raises:
        UserError: a worker was killed, most likely for want of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a worker process was killed, most likely for want of memory",
            where="train.workers",
            seen=f"{workers} workers",
            hint="set it to a smaller number, then run the same command again",
        ) from error


class _Steps(torch.utils.data.Dataset):
    """The steps of one epoch."""

    def __init__(self, sampler: PatchSampler, epoch: int, share: dict[str, int]) -> None:
        self.sampler, self.epoch, self.share = sampler, epoch, share

    def __len__(self) -> int:
        return self.sampler.steps_per_epoch

    def __getitem__(self, step: int) -> Batch:
        return (*self.sampler.batch(self.epoch, step, **self.share), step)


def _begin(number: int) -> None:
    # PyTorch's own watch over the parent does not end a worker that waits for its results to be taken.
    end_with_parent()


def _keep(item: Any) -> Any:
    return item
