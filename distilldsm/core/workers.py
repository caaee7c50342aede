"""Worker processes of a stage: they end with their parent, and the death of one is a clear error."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from distilldsm.core.errors import UserError
from distilldsm.core.machine import usable_cores
from distilldsm.core.shell import handled


@contextmanager
def worker_pool(workers: int, *, setting: str) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes with one thread each.

    Args:
        setting: the parameter that sets the number of workers, for the error's hint.

    Raises:
        UserError: a worker was killed, most likely for want of memory.
    """
    # spawn: forking a process that holds threads (BLAS, torch) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        _start(pool, workers)
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely for want of memory",
            where=setting,
            seen=f"{workers} workers",
            hint="set it to a smaller number, then run the same command again",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, what has not begun is not wanted any more


def _start(pool: ProcessPoolExecutor, workers: int) -> None:
    # Ctrl-C reaches every process of a terminal. The parent decides what it means: workers finish what they have begun
    # (a case that is done is kept). They inherit that, for they load Python and packages before any code of ours runs.
    with handled({signal.SIGINT: signal.SIG_IGN}):
        for _ in range(workers):
            pool.submit(os.getpid)


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


def worker_count(requested: int, tasks: int) -> int:
    """Processes to use: `requested`, or one per available core for 0, and never more than there are tasks."""
    return max(1, min(requested or usable_cores(), tasks))
