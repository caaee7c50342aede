"""What this machine has and what this process takes of it: cores, memory, disk space."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from distilldsm.core.errors import DataError

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]

_PROC = Path("/proc")
_largest_peak: dict[int, float] = {}
"""Process id to the largest peak measured so far. A forked process has another id, so it starts anew."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The CPU's model, e.g. `AMD EPYC 9575F`; the architecture where the system does not name it."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read(_PROC / "cpuinfo"), flags=re.MULTILINE)
    import platform

    return found[1].strip() if found else platform.processor() or platform.machine()


def peak_memory_gb() -> float | None:
    """The most memory that this process has held (resident, 10^9 bytes), without its children; it never falls.

    None where the system does not tell. Linux counts resident pages by CPU and adds them up roughly: its own peak can
    be some pages lower a moment later.
    """
    peak = _measured_peak_gb()
    if peak is None:
        return None
    process = os.getpid()
    _largest_peak[process] = max(peak, _largest_peak.get(process, 0.0))
    return _largest_peak[process]


def _measured_peak_gb() -> float | None:
    # Not getrusage where there is a choice: it gives the peak of the process that started this one, if that was larger.
    found = re.search(r"^VmHWM:\s+(\d+) kB", _read(_PROC / "self/status"), flags=re.MULTILINE)
    if found:
        return int(found[1]) * 1024 / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def held_memory_bytes() -> int:
    """Memory that this process and those it started hold now; pages they share are counted once where Linux tells.

    Elsewhere the peak of this process alone, and 0 where nothing is known.
    """
    if not (_PROC / "self/statm").exists():
        return round((peak_memory_gb() or 0.0) * 1e9)
    return sum(_held(pid) for pid in _family(os.getpid()))


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in _PROC.glob(f"{pid}/task/*/children"):
        for child in _read(children).split():
            yield from _family(int(child))


def _held(pid: int) -> int:
    for line in _read(_PROC / f"{pid}/smaps_rollup").splitlines():
        if line.startswith("Pss:"):  # a page that n processes share is an n-th of each
            return int(line.split()[1]) * 1024
    numbers = _read(_PROC / f"{pid}/statm").split()
    return int(numbers[1]) * os.sysconf("SC_PAGE_SIZE") if len(numbers) > 1 else 0


def check_space(folder: Path, needed: int, *, hint: str) -> None:
    """Check that the disk of `folder` has `needed` bytes free.

    Raises:
        DataError: it has less; `hint` says what to do.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            "not enough space", where=folder, seen=f"{free:,} bytes free", rule=f"{needed:,} needed", hint=hint
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # no such file on this system, a process that ended, or not ours to see
        return ""
