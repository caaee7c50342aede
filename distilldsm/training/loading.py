"""Batches of an epoch, in order, read here or ahead by worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from distilldsm.data.patches import PatchSampler
from distilldsm.errors import UserError
from distilldsm.training.distributed import Processes
from distilldsm.workers import end_with_parent

Batch = tuple[np.ndarray, np.ndarray, tuple[int, int, int], int]


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
            mend="set it to a smaller number, then run the same command again",
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
