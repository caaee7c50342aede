"""The batches of an epoch, in order. This process reads them, or worker processes read them ahead."""

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
    """Batch size: patches per step, over all processes.

    Args:
        set_to: `train.batch_size`, used unchanged; None: the multiple of `unit` nearest to the plan's batch size.
        begun_with: batch size of a resumed training; it stays, because the schedule counts steps. 0: not resumed.
        unit: processes x accumulate; the batch size must be a multiple of it.

    Raises:
        ConfigError: the batch cannot be divided evenly.
    """
    batch = set_to or begun_with
    if not batch:
        return max(planned // unit, 1) * unit
    if batch % unit:
        raise ConfigError(
            "the batch cannot be divided evenly",
            where="train.batch_size",
            seen=f"{batch}" if set_to else f"{batch}, from the start of this training",
            rule=f"a multiple of processes x accumulate ({unit})",
            hint=None if set_to else "resume with another number of processes",
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
    """Wrap all code that runs while batches are loaded, because PyTorch can report a killed worker at any point.

    Raises:
        UserError: a worker was killed, most likely because memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a worker process was killed, most likely because memory ran out",
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
    # If the parent dies, PyTorch does not end a worker that waits until its results are read.
    end_with_parent()


def _keep(item: Any) -> Any:
    return item
