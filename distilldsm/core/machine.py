"""Cores, memory and disk space: what this machine has, and what this process uses."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from distilldsm.core.errors import ConfigError, DataError

try:
    import resource
except ImportError:  # Windows does not have this module
    resource = None  # type: ignore[assignment]

DEFAULT_GB = 3.0
"""Memory budget of a command that reads scans, 10^9 bytes."""
_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY_FILES = (
    ("memory.max", "memory.current", "file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
)
"""Files of a control group with its limit and its use, and the part of memory.stat that is the cache of files: of
version 2 and 1."""
_EXTENSIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_tile": "AMX",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "asimd": "NEON",
    "sve": "SVE",
}
"""CPU flag in /proc/cpuinfo to its usual name: the vector extensions that speed up OpenVINO and PyTorch."""
_largest_peak: dict[int, float] = {}
"""Process id to the largest peak measured so far. A forked process has another id, so it begins at zero."""


def usable_cores() -> int:
    """Cores that this process may use at once: those it may run on, or less if its container has less CPU time."""
    return thread_limit() or _cores()


def thread_limit() -> int | None:
    """Largest useful number of threads, if the container's CPU time is less than all cores; None without such a limit.

    Libraries see only the cores: with a thread on each of 64, of which the time of 8 may be used, they wait for threads
    that are held up.
    """
    quota = core_quota()
    return max(1, int(quota)) if quota is not None and quota < _cores() else None


def limit_threads() -> None:
    """Let the libraries that are loaded later, and child processes, keep the container's limit. User settings stay."""
    if limit := thread_limit():
        for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
            os.environ.setdefault(name, str(limit))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def complete_user() -> None:
    """Give an unknown user, as in a container, a name and a home folder that does not exist: packages fail without."""
    missing = [names for names in (("HOME",), ("LOGNAME", "USER", "LNAME", "USERNAME")) if not _any_set(names)]
    if not missing:
        return
    try:
        import pwd
    except ImportError:  # Windows
        return
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        defaults = {"HOME": "/nonexistent", "LOGNAME": f"user{os.getuid()}"}
        os.environ.update({names[0]: defaults[names[0]] for names in missing})


def _any_set(names: Iterable[str]) -> bool:
    return any(os.environ.get(name) for name in names)


def cpu_name() -> str:
    """The CPU's model, e.g. `AMD EPYC 9575F`; the architecture if the system does not name the model."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read(_PROC / "cpuinfo"), flags=re.MULTILINE)
    import platform

    return found[1].strip() if found else platform.processor() or platform.machine()


def vector_extensions() -> tuple[str, ...] | None:
    """The CPU's vector extensions, e.g. `AVX2`; None if the system does not list them."""
    found = re.search(r"^(?:flags|Features)\s*: (.*)$", _read(_PROC / "cpuinfo"), flags=re.MULTILINE)
    return tuple(words for flag, words in _EXTENSIONS.items() if flag in found[1].split()) if found else None


def peak_memory_gb() -> float | None:
    """Largest resident memory of this process so far, 10^9 bytes, without its children. The value never falls.

    None if the system does not report it. Linux adds up the pages per CPU only roughly, so its own peak can be some
    pages lower a moment later.
    """
    peak = _measured_peak_gb()
    if peak is None:
        return None
    process = os.getpid()
    _largest_peak[process] = max(peak, _largest_peak.get(process, 0.0))
    return _largest_peak[process]


def _measured_peak_gb() -> float | None:
    # getrusage is the last choice: it returns the peak of the parent process if that one was larger.
    found = re.search(r"^VmHWM:\s+(\d+) kB", _read(_PROC / "self/status"), flags=re.MULTILINE)
    if found:
        return int(found[1]) * 1024 / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def total_memory_bytes() -> int | None:
    """Memory of this machine; None where nothing tells."""
    return _memory_of_machine("MemTotal")


def memory_limit_bytes() -> int | None:
    """Limit of the container that this process runs in; None for none."""
    texts = [_read(group / limit).strip() for group in _groups("memory") for limit, *_ in _MEMORY_FILES]
    # What version 1 calls no limit is a huge number.
    return min((int(text) for text in texts if text.isdigit() and int(text) < 1 << 60), default=None)


def available_memory_bytes() -> int | None:
    """Memory that is free on this machine or in this container; None where nothing tells."""
    free = _memory_of_machine("MemAvailable")
    found = [] if free is None else [free]
    for group in _groups("memory"):
        for limit, used, cache in _MEMORY_FILES:
            try:
                left = int(_read(group / limit)) - int(_read(group / used))
            except ValueError:  # no such group, or no limit ("max")
                continue
            # Files in the cache count as used, but make room when memory is asked for.
            stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            found.append(left + int(stat.get(cache, 0)))
    return max(min(found), 0) if found else None


def _memory_of_machine(field: str) -> int | None:
    found = re.search(rf"^{field}:\s+(\d+) kB", _read(_PROC / "meminfo"), flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def core_quota() -> float | None:
    """Cores' worth of time that a container may use; None for no limit."""
    quotas = []
    for group in _groups("cpu"):
        for text in (_read(group / "cpu.max"), _read(group / "cpu.cfs_quota_us") + _read(group / "cpu.cfs_period_us")):
            quota, period = [*text.split(), "100000", "100000"][:2] if text else ("max", "")
            if quota.isdigit() and period.isdigit() and int(period):  # no limit: "max", or -1
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _groups(controller: str) -> list[Path]:
    """Folders of the control groups that limit this process, of version 2 and of version 1's `controller`.

    In a container the root is its own group. Elsewhere (systemd, a batch system) the groups lie below the root.
    """
    folders = [_CGROUP, _CGROUP / controller]
    for line in _read(_PROC / "self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if not names or controller in names.split(","):
            group = PurePosixPath(path.lstrip("/"))
            folders += [_CGROUP / (controller if names else "") / one for one in (group, *group.parents)]
    return list(dict.fromkeys(folders))


def held_memory_bytes() -> int:
    """Memory in bytes that this process and its child processes hold now. Shared pages count once if Linux reports it.

    On other systems: the peak of this process alone, or 0 if it is unknown.
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
        if line.startswith("Pss:"):  # a page shared by n processes counts 1/n in each of them
            return int(line.split()[1]) * 1024
    numbers = _read(_PROC / f"{pid}/statm").split()
    return int(numbers[1]) * os.sysconf("SC_PAGE_SIZE") if len(numbers) > 1 else 0


def check_space(folder: Path, needed: int, *, hint: str) -> None:
    """Check that the disk of `folder` has `needed` bytes free.

    Raises:
        DataError: the disk has less space; `hint` says what to do.
    """
    import shutil

    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            "not enough space", where=folder, seen=f"{free:,} bytes free", rule=f"{needed:,} needed", hint=hint
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # another system, a process that has ended, or no permission
        return ""


def budget_bytes(max_memory_gb: float | None) -> int:
    """The budget in bytes: `max_memory_gb`, or by default DEFAULT_GB or half of the available memory if that is less.

    Raises:
        ConfigError: the value is not a positive number.
    """
    if max_memory_gb is not None:
        if not (math.isfinite(max_memory_gb) and max_memory_gb > 0):
            raise ConfigError(
                "has an impossible value", where="--max-memory", seen=max_memory_gb, rule="above 0, in GB"
            )
        return int(max_memory_gb * 1e9)
    free = available_memory_bytes()
    return int(DEFAULT_GB * 1e9) if free is None else min(int(DEFAULT_GB * 1e9), free // 2)
