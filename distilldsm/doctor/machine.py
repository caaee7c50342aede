"""Checks of Python, packages, CPU, GPU, memory and disk."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from distilldsm.core.machine import (
    available_memory_bytes,
    core_quota,
    cpu_name,
    memory_limit_bytes,
    total_memory_bytes,
    usable_cores,
    vector_extensions,
)
from distilldsm.doctor.checks import Finding, Status, clean, in_child
from distilldsm.doctor.services import is_installed

OLDEST_PYTHON = (3, 11)
EXTRAS = ("data", "train", "export", "pipeline", "dicom", "monai")
PARTS = {"mlflow": "mlflow-skinny"}
"""Smaller package that the images contain instead of the full one."""
FOLDERS = ("data", "models", "evaluation", "export")
LITTLE_DISK_GB, NO_DISK_GB = 10.0, 1.0
SHARED_BYTES = 64 << 20
"""Docker's default for /dev/shm; too small for several GPU processes (NCCL)."""
_PROBE_BYTES = 1 << 20
_SLICE = 512 * 512
_MOST_SLICES = 20_000


def check_python(limit_s: float) -> list[Finding]:
    """Check Python's version; show where it is installed."""
    seen = f"{platform.python_version()}, {sys.prefix}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return [Finding(name="python", status="fail", seen=seen, hint=f"install Python {oldest} or newer")]
    return [Finding(name="python", status="ok", seen=seen)]


def check_packages(limit_s: float) -> list[Finding]:
    """Compare the installed packages of each optional group with the minimums of pyproject.toml."""
    table = requirements()
    base = {_name(line) for line in table[""]}
    findings = [_group("packages", "", table[""], set())]
    for extra in EXTRAS:
        shared = base | {_name(line) for other in EXTRAS if other != extra for line in table.get(other, ())}
        findings.append(_group(f"packages: {extra}", extra, table.get(extra, []), shared))
    return findings


def requirements() -> dict[str, list[str]]:
    """Requirements by optional group ("": always needed), from this checkout or else from the installed package."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if project.is_file():
        import tomllib

        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        return {"": table["dependencies"], **table["optional-dependencies"]}
    groups: dict[str, list[str]] = {"": []}
    for line in metadata.requires("distilldsm") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
        groups.setdefault(extra[1] if extra else "", []).append(requirement.strip())
    return groups


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def _group(name: str, extra: str, lines: Sequence[str], shared: set[str]) -> Finding:
    from packaging.requirements import Requirement

    missing, old, own = [], [], 0
    for line in lines:
        requirement = Requirement(line)
        version = _version(requirement.name)
        if version is None:
            missing.append(requirement.name)
            continue
        own += _name(line) not in shared
        if not requirement.specifier.contains(version, prereleases=True):
            old.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    target = f"'.[{extra}]'" if extra else "."
    hint = f"in the repository: pip install -c constraints.txt {target}"
    if old:
        return Finding(name=name, status="fail", seen=f"too old: {', '.join(old)}", hint=hint)
    if missing and extra and not own:
        return Finding(name=name, status="skip", seen="not installed (an optional group)")
    if missing:
        # The image of the first stages has no OpenVINO: they do not predict.
        only_later = missing == ["openvino"] or extra
        seen = f"not installed: {', '.join(missing)}"
        return Finding(name=name, status="warn" if only_later else "fail", seen=seen, hint=hint)
    return Finding(name=name, status="ok", seen=f"{len(lines)} packages, none too old")


def _version(name: str) -> str | None:
    for candidate in (name, PARTS.get(name.lower())):
        if candidate:
            with contextlib.suppress(metadata.PackageNotFoundError):
                return metadata.version(candidate)
    return None


def check_cpu(limit_s: float) -> list[Finding]:
    """Usable cores, the container's CPU limit, and the vector extensions."""
    name, cores, quota = "cpu", usable_cores(), core_quota()
    extensions = vector_extensions()
    listed = ", ".join(extensions or ()) or "no vector extensions"
    limited = f" (CPU time of {quota:g}: cgroup)" if quota is not None else ""
    seen = f"{cpu_name()}; {cores} cores usable of {os.cpu_count()}{limited}; {listed}"
    if platform.machine() in ("x86_64", "AMD64") and extensions is not None and "AVX2" not in extensions:
        return [Finding(name=name, status="warn", seen=seen, hint="use a CPU with AVX2; this one works, but slowly")]
    return [Finding(name=name, status="ok", seen=seen)]


def check_openvino(limit_s: float) -> list[Finding]:
    """Check OpenVINO, which prediction runs on; in its own process, because it is native code."""
    if not is_installed("openvino"):
        return [Finding(name="openvino", status="skip", seen="not installed")]
    return in_child("openvino", "distilldsm.doctor.devices:openvino_finding", limit_s)


def check_gpu(limit_s: float) -> list[Finding]:
    """Check that PyTorch computes on the GPU. It is only imported if there is a sign of a GPU."""
    if not is_installed("torch"):
        return [Finding(name="gpu", status="skip", seen="PyTorch is not installed: no training here")]
    if not has_gpu():
        return [Finding(name="gpu", status="skip", seen="none: training runs on the CPU")]
    return in_child("gpu", "distilldsm.doctor.devices:gpu_finding", limit_s)


def has_gpu() -> bool:
    """Whether there is a sign of a GPU that PyTorch could use."""
    nodes = ("/dev/nvidia0", "/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/kfd", "/dev/dxg")
    return any(Path(node).exists() for node in nodes) or shutil.which("nvidia-smi") is not None


def driver_version() -> str:
    """Version of NVIDIA's driver; empty if unknown."""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+[.\d]*)\s", _read(Path("/proc/driver/nvidia/version")))
    if found:
        return found[1]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.split("\n")[0]
    return ""


def check_memory(limit_s: float) -> list[Finding]:
    """Free memory, and the largest scan that prediction accepts with it, by its own estimate."""
    from distilldsm.core.machine import budget_bytes

    name, free, total = "memory", available_memory_bytes(), total_memory_bytes()
    if free is None:
        return [Finding(name=name, status="skip", seen="this system does not report its free memory")]
    limit = memory_limit_bytes()
    of = f" of {total / 1e9:.1f}" if total else ""
    limited = f", limit of the container {limit / 1e9:.1f} GB" if limit is not None else ""
    budget = budget_bytes(None)
    slices = largest_scan(budget)
    scan = f"enough for a CT of 512 x 512 x {slices}" if slices else "too little for a CT of 512 x 512"
    seen = f"{free / 1e9:.1f}{of} GB free{limited}; predict uses up to {budget / 1e9:.1f} GB, {scan}"
    if slices < 200:
        return [Finding(name=name, status="warn", seen=seen, hint="free some memory, or use a machine with 4 GB free")]
    return [Finding(name=name, status="ok", seen=seen)]


def largest_scan(budget: int) -> int:
    """Most slices (512 x 512 voxels, one channel, int16) that the default network can predict within `budget` bytes."""
    from distilldsm.core.errors import DataError
    from distilldsm.inference.memory import activation_bytes, plan_pieces

    def fits(slices: int) -> bool:
        try:
            plan_pieces(
                (slices, 512, 512),
                stride=(1, 1, 1),
                depth_halo=8,
                per_voxel=activation_bytes("distill_dsm", {}, "openvino"),
                channels=1,
                classes=3,
                held_bytes=slices * _SLICE * 3 + _SLICE * (160 + 3 * 40),  # the scan, its mask, slices being processed
                budget=budget,
                where=None,
            )
        except DataError:
            return False
        return True

    low, high = 0, _MOST_SLICES
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def check_disk(limit_s: float) -> list[Finding]:
    """Free space for outputs and temporary files, and write permission."""
    places: dict[int, list[Path]] = {}
    for path in (*map(Path, FOLDERS), Path(tempfile.gettempdir())):
        places.setdefault(_existing(path).stat().st_dev, []).append(path)
    return [*(_disk(paths) for paths in places.values()), *_shared_memory()]


def _existing(path: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def _disk(paths: Sequence[Path]) -> Finding:
    name = f"disk: {', '.join(map(str, paths))}"
    free_gb = shutil.disk_usage(_existing(paths[0])).free / 1e9
    for folder in dict.fromkeys(map(_existing, paths)):
        try:
            _write_and_delete(folder)
        except OSError as error:
            seen = f"{folder}: cannot be written: {error.strerror or error}; {free_gb:.1f} GB free"
            hint = "free space" if free_gb < NO_DISK_GB else "get write permission, or use another folder"
            return Finding(name=name, status="fail", seen=clean(seen), hint=hint)
    seen = f"{free_gb:.1f} GB free, a test file was written and deleted"
    if free_gb < LITTLE_DISK_GB:
        status: Status = "fail" if free_gb < NO_DISK_GB else "warn"
        return Finding(name=name, status=status, seen=seen, hint="free space, or link the folders to another disk")
    return Finding(name=name, status="ok", seen=seen)


def _write_and_delete(folder: Path) -> None:
    content = os.urandom(_PROBE_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".distilldsm-doctor-") as probe:
        probe.write(content)
        probe.flush()
        os.fsync(probe.fileno())
        if Path(probe.name).read_bytes() != content:
            raise OSError("the content read differs from the content written")


def _shared_memory() -> list[Finding]:
    if not Path("/dev/shm").is_dir():  # noqa: S108 - only read
        return []
    size = shutil.disk_usage("/dev/shm").total  # noqa: S108
    seen = f"{size / 1e9:.1f} GB"
    if size > SHARED_BYTES:
        return [Finding(name="disk: /dev/shm", status="ok", seen=seen)]
    hint = "for several GPUs: docker run --shm-size 1g, or shared_memory in conf/cluster.yaml"
    return [Finding(name="disk: /dev/shm", status="warn", seen=seen, hint=hint)]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
