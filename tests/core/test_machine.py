"""What is measured of this machine, and what is said where the system does not tell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distilldsm.core import machine
from distilldsm.core.errors import DataError
from distilldsm.core.machine import check_space, held_memory_bytes, peak_memory_gb, usable_cores


def test_the_peak_grows_and_stays():
    before = peak_memory_gb()
    block = np.ones(40_000_000)  # 0.32 GB
    during = peak_memory_gb()
    del block
    assert during >= max(before, 0.32)
    assert peak_memory_gb() >= during


def test_the_peak_stays_where_the_system_tells_less_later(monkeypatch):
    told = iter([90.087, 90.086, 90.1])
    monkeypatch.setattr(machine, "_largest_peak", {})
    monkeypatch.setattr(machine, "_measured_peak_gb", lambda: next(told))
    assert [peak_memory_gb() for _ in range(3)] == [90.087, 90.087, 90.1]
    monkeypatch.setattr(machine, "_measured_peak_gb", lambda: 1.0)
    monkeypatch.setattr(machine.os, "getpid", lambda: -1)  # another process does not inherit it
    assert peak_memory_gb() == 1.0


def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    block = np.ones(100_000_000)  # 0.8 GB
    code = "from distilldsm.core.machine import peak_memory_gb; print(peak_memory_gb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.4
    del block


def test_memory_is_that_of_all_processes():
    code = "x = bytearray(b'x' * 200_000_000); print(flush=True); input()"
    before = held_memory_bytes()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        if not Path("/proc/self/task").exists():
            pytest.skip("the children's memory is known on Linux only")
        assert held_memory_bytes() - before > 190_000_000
    finally:
        child.communicate(b"\n")


def test_memory_where_proc_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    assert held_memory_bytes() > 1_000_000, "the peak of this process"
    process = tmp_path / str(os.getpid())
    (process / "task/1").mkdir(parents=True)
    (tmp_path / "self").mkdir()
    (tmp_path / "self/statm").touch()
    (process / "task/1/children").write_text("77 78 ")
    (process / "smaps_rollup").write_text("head\nRss: 9000 kB\nPss:     4000 kB\n")
    (tmp_path / "77").mkdir()
    (tmp_path / "77/statm").write_text("500 100 50")
    assert held_memory_bytes() == 4_096_000 + 100 * os.sysconf("SC_PAGE_SIZE"), "78 has ended in the meantime"


def test_where_nothing_tells(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine, "resource", None)
    assert (peak_memory_gb(), held_memory_bytes()) == (None, 0)


def test_the_cpu_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Model 7\nflags\t: fpu\n")
    assert machine.cpu_name() == "Model 7"
    (tmp_path / "cpuinfo").unlink()
    assert machine.cpu_name()


def test_cores_that_are_usable(monkeypatch, system):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 6}, raising=False)
    assert usable_cores() == 3
    for quota, cores, limit in ((900_000, 3, None), (250_000, 2, "2"), (50_000, 1, "1")):
        system({"cpu/cpu.cfs_quota_us": quota})
        monkeypatch.setattr(os, "environ", {})
        machine.limit_threads()
        assert (usable_cores(), os.environ.get("OMP_NUM_THREADS")) == (cores, limit)
    os.environ["OMP_NUM_THREADS"] = "7"
    machine.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7", "what the user has set"
    system({"cpu/cpu.cfs_quota_us": -1})
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_a_user_without_name_and_home(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    for given, added in (
        ({}, {"HOME": "/nonexistent", "LOGNAME": "user54321"}),
        ({"HOME": "/tmp"}, {"LOGNAME": "user54321"}),
        ({"HOME": "/tmp", "USER": "me"}, {}),
    ):
        monkeypatch.setattr(os, "environ", dict(given))
        machine.complete_user()
        assert os.environ == given | added
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(os, "environ", {})
    machine.complete_user()
    assert os.environ == {}, "the system knows root's home"


def test_space_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2000, 1000, 1000))
    check_space(tmp_path, 1000, hint="free space")
    with pytest.raises(DataError, match=r"not enough space\n  seen: 1,000 bytes free\n  rule: 1,001 needed"):
        check_space(tmp_path, 1001, hint="free space")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of a made-up /sys/fs/cgroup; /proc/meminfo says 9.2 GB are free."""
    (tmp_path / "meminfo").write_text("MemTotal:       10000000 kB\nMemAvailable:    9000000 kB\n")
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)

    def write(files: dict[str, object]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")

    return write


def test_limits_of_a_container(system):
    def limits() -> tuple:
        return machine.core_quota(), machine.memory_limit_bytes(), machine.available_memory_bytes()

    assert machine.total_memory_bytes() == 10_240_000_000
    assert limits() == (None, None, 9_216_000_000)
    system({"cpu/cpu.cfs_quota_us": -1, "memory/memory.limit_in_bytes": (1 << 63) - 4096})
    assert limits() == (None, None, 9_216_000_000)
    used = {"memory/memory.usage_in_bytes": 3_500_000_000, "memory/memory.stat": "total_rss 1\ntotal_cache 3000000000"}
    system({"cpu/cpu.cfs_quota_us": 150_000, "memory/memory.limit_in_bytes": 4_000_000_000, **used})
    assert limits() == (1.5, 4_000_000_000, 3_500_000_000), "the cache of files makes room"
    system({"cpu.max": "max 100000", "memory.max": "max"})
    assert limits() == (1.5, 4_000_000_000, 3_500_000_000), "of version 1, where version 2 has none"
    system({"memory.current": 1_900_000_000, "memory.stat": "anon 1\nfile 300000000"})
    system({"cpu.max": "50000 100000", "memory.max": 2_000_000_000})
    assert limits() == (0.5, 2_000_000_000, 400_000_000)


def test_limits_of_a_group_below_the_root(system):
    """As systemd and batch systems set them; a group is limited by its parents, too."""
    system({"self/cgroup": "9:cpu,cpuacct:/jobs/7\n4:memory:/jobs/7\n1:name=systemd:/x:y\n0::/user.slice/job"})
    assert (machine.core_quota(), machine.memory_limit_bytes()) == (None, None)
    system({"cpu/jobs/7/cpu.cfs_quota_us": 200_000, "memory/jobs/memory.limit_in_bytes": 4_000_000_000})
    assert (machine.core_quota(), machine.memory_limit_bytes()) == (2.0, 4_000_000_000)
    system({"user.slice/job/cpu.max": "max 100000", "user.slice/cpu.max": "150000 100000"})
    system({"user.slice/job/memory.max": 3_000_000_000, "user.slice/memory.max": "max"})
    assert (machine.core_quota(), machine.memory_limit_bytes()) == (1.5, 3_000_000_000)


def test_memory_where_nothing_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert (machine.total_memory_bytes(), machine.available_memory_bytes()) == (None, None)
