"""Worker processes of a stage. They end with their parent; if one is killed, the user gets a clear error."""

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
        UserError: a worker was killed, most likely because memory ran out.
    """
    # spawn: forking a process with threads (BLAS, torch) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        _start(pool, workers)
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely because memory ran out",
            where=setting,
            seen=f"{workers} workers",
            hint="set it to a smaller number, then run the same command again",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, tasks that have not begun are dropped


def _start(pool: ProcessPoolExecutor, workers: int) -> None:
    # Ctrl-C reaches every process of a terminal, but the parent alone handles it: workers finish the case they have
    # begun. They inherit the ignored signal, because they load Python and packages before any of our code runs.
    with handled({signal.SIGINT: signal.SIG_IGN}):
        for _ in range(workers):
            pool.submit(os.getpid)


def end_with_parent() -> None:
    """Call this in a worker process: it then ends as soon as its parent is gone.

    Without it, the worker would wait for ever on its pipes, because it holds both ends of them.
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
    """Number of processes: `requested`, or one per available core if it is 0; never more than there are tasks."""
    return max(1, min(requested or usable_cores(), tasks))
