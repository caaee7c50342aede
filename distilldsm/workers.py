"""Worker processes of a stage: they end with their parent, and the death of one is a clear error."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from distilldsm.errors import UserError


@contextmanager
def worker_pool(workers: int, *, setting: str) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes with one thread each.

    Args:
        setting: the parameter that sets the number of workers, for the error's mend.

    Raises:
        UserError: a worker was killed, most likely for want of memory.
    """
    # spawn: forking a process that holds threads (BLAS, torch) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely for want of memory",
            where=setting,
            seen=f"{workers} workers",
            mend="set it to a smaller number, then run the same command again",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, what has not begun is not wanted any more


def end_with_parent() -> None:
    """To be called in a worker process: when its parent is gone, it ends at once.

    Otherwise it waits for ever, for work or for its results to be taken: it holds an end of each pipe itself.
    """
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _begin() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    end_with_parent()


def _wait_for_the_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
