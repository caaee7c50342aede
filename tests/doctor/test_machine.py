"""What the doctor says of Python, packages, CPU, GPU, memory and disk, on machines that are made up."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from distilldsm.core import machine as core_machine
from distilldsm.core.errors import DataError
from distilldsm.doctor import devices, machine
from distilldsm.doctor.checks import Finding
from distilldsm.inference import memory
from tests.doctor.conftest import contents


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {one.name: one.status for one in findings}


def test_python(monkeypatch):
    assert statuses(machine.check_python(1)) == {"python": "ok"}
    monkeypatch.setattr(machine, "OLDEST_PYTHON", (99, 1))
    (found,) = machine.check_python(1)
    assert (found.status, found.hint) == ("fail", "install Python 99.1 or newer")


def test_the_packages_of_this_installation():
    found = machine.check_packages(1)
    assert [one.name for one in found] == ["packages", *(f"packages: {extra}" for extra in machine.EXTRAS)]
    assert found[0].status == "ok"
    assert set(machine.EXTRAS) <= set(machine.requirements())


def group(versions: dict[str, str], table: dict[str, list[str]], monkeypatch) -> dict[str, Finding]:
    def version(name: str) -> str:
        if name not in versions:
            raise machine.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(machine.metadata, "version", version)
    monkeypatch.setattr(machine, "requirements", lambda: table)
    return {one.name.removeprefix("packages: "): one for one in machine.check_packages(1)}


def test_packages_that_are_missing_or_too_old(monkeypatch):
    table = {
        "": ["numpy>=2.0", "openvino>=2026.0"],
        "data": ["pandas>=2.2"],
        "train": ["torch>=2.6", "mlflow>=3.10", "pandas>=2.2"],
        "export": ["torch>=2.6", "onnx>=1.18"],
        "pipeline": ["dvc>=3.60"],
    }
    found = group({"numpy": "2.1", "pandas": "3.0rc1", "torch": "2.5", "mlflow-skinny": "3.17"}, table, monkeypatch)
    assert {name: one.status for name, one in found.items()} == {
        "packages": "warn",
        "data": "ok",
        "train": "fail",
        "export": "fail",
        "pipeline": "skip",
        "dicom": "ok",
        "monai": "ok",
    }
    assert found["packages"].seen == "not installed: openvino"
    assert found["train"].seen == "too old: torch 2.5 (needs >=2.6)", "the small mlflow does"
    assert found["train"].hint == "in the repository: pip install -c constraints.txt '.[train]'"
    found = group({"openvino": "2026.1", "mlflow": "3.10", "torch": "2.6"}, table, monkeypatch)
    assert (found["packages"].status, found["packages"].seen) == ("fail", "not installed: numpy")
    assert (found["train"].status, found["train"].seen) == ("warn", "not installed: pandas")
    assert found["export"].status == "skip", "torch alone belongs to the training"


def test_requirements_of_an_installed_package(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "a/b/c/machine.py"))
    lines = ["numpy>=2.0", 'torch>=2.6; extra == "train"', "dvc>=3; extra == 'pipeline'", "mlflow; extra=='train'"]
    monkeypatch.setattr(machine.metadata, "requires", lambda name: lines)
    assert machine.requirements() == {"": ["numpy>=2.0"], "train": ["torch>=2.6", "mlflow"], "pipeline": ["dvc>=3"]}


def test_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr("distilldsm.core.machine._PROC", tmp_path)
    (tmp_path / "cpuinfo").write_text("model name : x\nflags\t\t: fpu avx2 avx512f amx_tile\n")
    monkeypatch.setattr(machine, "cpu_name", lambda: "Model 7")
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "core_quota", lambda: None)
    (found,) = machine.check_cpu(1)
    assert found.status == "ok"
    assert found.seen.startswith("Model 7; 8 cores usable of ")
    assert found.seen.endswith("; AVX2, AVX-512, AMX")
    monkeypatch.setattr(machine, "core_quota", lambda: 2.5)
    (found,) = machine.check_cpu(1)
    assert found.status == "ok"
    assert " (CPU time of 2.5: cgroup); " in found.seen
    monkeypatch.setattr(machine, "core_quota", lambda: None)
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu sse2\n")
    assert statuses(machine.check_cpu(1)) == {"cpu": "warn"}
    (tmp_path / "cpuinfo").unlink()  # a system that lists nothing
    assert statuses(machine.check_cpu(1)) == {"cpu": "ok"}


def test_memory_and_the_largest_scan(monkeypatch):
    slices = machine.largest_scan(3_000_000_000)
    held = slices * 512 * 512 * 3
    assert held < 3e9 * memory.USABLE - memory.BASE_BYTES < held + 512 * 512 * 1500
    assert machine.largest_scan(100_000_000) == 0
    with pytest.raises(DataError):
        memory.plan_pieces(
            (slices + 1, 512, 512),
            stride=(1, 16, 16),
            depth_halo=8,
            per_voxel=memory.activation_bytes("distill_dsm", {}, "openvino"),
            channels=1,
            classes=3,
            held_bytes=(slices + 1) * 512 * 512 * 3 + 512 * 512 * 280,
            budget=3_000_000_000,
            where=None,
        )
    free = {"bytes": 8_000_000_000}
    for module in (core_machine, machine):
        monkeypatch.setattr(module, "available_memory_bytes", lambda: free["bytes"])
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: 9_000_000_000)
    (found,) = machine.check_memory(1)
    assert found.status == "ok"
    assert found.seen.endswith(f"container 9.0 GB; predict uses up to 3.0 GB, enough for a CT of 512 x 512 x {slices}")
    free["bytes"] = 600_000_000
    (found,) = machine.check_memory(1)
    assert found.status == "warn"
    assert "too little for a CT of 512 x 512" in found.seen
    free["bytes"] = None
    assert statuses(machine.check_memory(1)) == {"memory": "skip"}


def test_disk_is_written_and_left_as_it_was(place):
    (place / "data").mkdir()
    (place / "data/scan.nii").write_bytes(b"scan")
    before = contents(place), sorted(p.name for p in Path(tempfile.gettempdir()).glob(".distilldsm*"))
    found = machine.check_disk(1)
    assert (contents(place), sorted(p.name for p in Path(tempfile.gettempdir()).glob(".distilldsm*"))) == before
    named = ", ".join(one.name for one in found)
    for folder in (*machine.FOLDERS, tempfile.gettempdir()):
        assert folder in named


def test_a_disk_that_is_full_or_cannot_be_written(place, monkeypatch):
    free = SimpleNamespace(free=5e9, total=1e12)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: free)
    folders = machine.check_disk(1)[0]
    assert (folders.status, folders.seen) == ("warn", "5.0 GB free, a test file was written and deleted")
    free.free = 5e8
    assert machine.check_disk(1)[0].status == "fail"

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    free.free = 5e11
    monkeypatch.setattr(machine.tempfile, "NamedTemporaryFile", refuse)
    folders = machine.check_disk(1)[0]
    assert folders.status == "fail"
    assert folders.seen == f"{place}: cannot be written: Permission denied; 500.0 GB free"
    assert "write permission" in folders.hint
    free.total = 64 << 20
    assert machine.check_disk(1)[-1].hint.startswith("for several GPUs: docker run --shm-size 1g")


class Numbers:
    """As little of a tensor as the check needs; `right`: what it is multiplied by."""

    T = property(lambda self: self)

    def __init__(self, right: float) -> None:
        self.right = right

    def reshape(self, *_):
        return self

    def __matmul__(self, other):
        return self

    def trace(self) -> float:
        return self.right * sum(k * k for k in range(4096))


def torch_of(monkeypatch, *, available=True, cuda="13.0", right=1.0, error: Exception | None = None) -> None:
    def arange(*_, **__):
        if error:
            raise error
        return Numbers(right)

    gpu = SimpleNamespace(
        is_available=lambda: available,
        device_count=lambda: 1,
        get_device_properties=lambda number: SimpleNamespace(name="H200", total_memory=150e9),
        mem_get_info=lambda number: (140e9, 150e9),
    )
    version = SimpleNamespace(cuda=cuda, hip=None)
    fake = SimpleNamespace(cuda=gpu, version=version, arange=arange, float32=0, __version__="2.13.0")
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(devices, "driver_version", lambda: "580.1")


@pytest.mark.parametrize(
    ("torch", "status", "words"),
    [
        ({}, "ok", "H200, 150 GB; PyTorch 2.13.0, driver 580.1; a computation is correct, 140 GB free"),
        ({"right": 0.5}, "fail", "a computation is wrong"),
        ({"error": RuntimeError("out of memory")}, "fail", "a computation fails: out of memory"),
        ({"available": False}, "warn", "(CUDA 13.0) cannot use it"),
        ({"available": False, "cuda": None}, "warn", "is the build for CPUs"),
    ],
)
def test_gpu(torch, status, words, monkeypatch):
    torch_of(monkeypatch, **torch)
    (found,) = devices.gpu_finding(1)
    assert found.status == status
    assert words in found.seen
    assert bool(found.hint) == (status != "ok")


def test_torch_is_imported_only_where_there_is_a_sign_of_a_gpu(monkeypatch):
    started = []
    monkeypatch.setattr(machine, "in_child", lambda name, function, limit_s: started.append(function) or [])
    monkeypatch.setattr(machine, "is_installed", lambda package: True)
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    (found,) = machine.check_gpu(1)
    assert (found.status, started) == ("skip", [])
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    machine.check_gpu(1)
    assert started == ["distilldsm.doctor.devices:gpu_finding"]
    monkeypatch.setattr(machine, "is_installed", lambda package: False)
    assert statuses(machine.check_gpu(1) + machine.check_openvino(1)) == {"gpu": "skip", "openvino": "skip"}


def test_the_drivers_version(monkeypatch, tmp_path):
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.195.03  Release Build\n"
    monkeypatch.setattr(machine, "_read", lambda path: line)
    assert machine.driver_version() == "570.195.03"
    monkeypatch.setattr(machine, "_read", lambda path: "")
    if shutil.which("nvidia-smi") is None:
        assert machine.driver_version() == ""
