"""Outputs are whole or absent, and say what they were made from."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distilldsm.config import EvaluateConfig
from distilldsm.core.errors import UserError
from distilldsm.core.files import read_json, sha256_file, whole_file, write_json
from distilldsm.core.hashes import PIECES, code_hash, content_hash, finish, is_finished
from distilldsm.core.output_directory import is_current, output_directory
from distilldsm.core.workers import worker_count


def make(path: Path, text: str = "x", **options) -> None:
    with output_directory(
        path, stage="s", config=options.pop("config", EvaluateConfig()), inputs={}, **options
    ) as work:
        (work / "a.txt").write_text(text)


def test_manifest_tells_config_and_hashes(tmp_path: Path):
    source = tmp_path / "in.txt"
    source.write_text("input")
    with output_directory(
        tmp_path / "out", stage="s", config=EvaluateConfig(), inputs={"in": source}, extra={"fold": 2}
    ) as work:
        (work / "sub").mkdir()
        (work / "sub" / "b.txt").write_text("b")
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert manifest["stage"] == "s"
    assert manifest["fold"] == 2
    assert manifest["config"]["nsd_tolerance_mm"] == 1.0
    assert manifest["inputs"] == {"in": sha256_file(source)}
    assert manifest["files"] == {"sub/b.txt": sha256_file(tmp_path / "out" / "sub" / "b.txt")}
    assert "numpy" in manifest["packages"]
    assert {p.name for p in tmp_path.iterdir()} == {"in.txt", "out", ".out.lock", ".out.hashes.json"}


def test_an_input_that_is_replaced_meanwhile_is_told(tmp_path: Path):
    make(tmp_path / "data", "first")
    make(tmp_path / "out", "old")
    with pytest.raises(UserError, match=r"data: was replaced while s was reading it(.|\n)*run the same command again"):
        with output_directory(tmp_path / "out", stage="s", config={}, inputs={"data": tmp_path / "data"}):
            make(tmp_path / "data", "second")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


def test_what_goes_on_is_there_until_all_is_written(tmp_path: Path, monkeypatch):
    def begin() -> None:
        with output_directory(
            tmp_path / "out", stage="s", config={}, inputs={}, resumable=True, until_done=["state"]
        ) as work:
            (work / "a.txt").write_text("a")
            (work / "state").write_text("far")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:

        def write(path, value):
            return full() if path.name == "manifest.json" else write_json(path, value)

        broken.setattr("distilldsm.core.output_directory.write_json", write)
        with pytest.raises(UserError, match="no space left"):
            begin()
    assert (tmp_path / ".out.partial" / "state").is_file()
    begin()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.txt", "manifest.json"}
    assert read_json(tmp_path / "out" / "manifest.json")["files"].keys() == {"a.txt"}


def test_an_error_leaves_the_old_output(tmp_path: Path):
    make(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError):
        with output_directory(tmp_path / "out", stage="s", config={}, inputs={}) as work:
            (work / "a.txt").write_text("half")
            (work / "missing").read_text()
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert not (tmp_path / ".out.partial").exists()


def test_new_output_replaces_the_old_wholly(tmp_path: Path):
    make(tmp_path / "out", "old")
    (tmp_path / "out" / "stale.txt").write_text("stale")
    make(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a.txt").read_text() == "new"
    assert not (tmp_path / "out" / "stale.txt").exists()


def test_resume_only_with_the_same_key(tmp_path: Path, capsys):
    def interrupted(config):
        with (
            pytest.raises(KeyboardInterrupt),
            output_directory(tmp_path / "out", stage="s", config=config, inputs={}, resumable=True) as work,
        ):
            seen = sorted(p.name for p in work.iterdir() if not p.name.startswith("."))
            (work / "done.txt").write_text("done")
            raise KeyboardInterrupt
        return seen

    assert interrupted({"a": 1}) == []
    assert interrupted({"a": 1}) == ["done.txt"]
    assert interrupted({"a": 1, "workers": 2, "device": "cpu", "memory_gb": 9.0}) == ["done.txt"]  # how, not what
    assert capsys.readouterr().err == ""
    assert interrupted({"a": 2}) == []
    assert "begun with other parameters, inputs, code or packages; starting again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_killed_process_was_writing_is_no_part_of_the_output(tmp_path: Path):
    key = {"stage": "s", "config": {}, "inputs": {}, "resumable": True}
    with pytest.raises(KeyboardInterrupt), output_directory(tmp_path / "out", **key) as work:
        (work / "predictions").mkdir()
        for name in ("best.safetensors", "predictions/a.nii.gz"):
            with contextlib.suppress(ZeroDivisionError), whole_file(work / name, "".join(Path(name).suffixes)) as left:
                raise ZeroDivisionError
            left.write_text("half of it")  # what `finally` takes away stays after a SIGKILL
        (work / ".user.tmp").write_text("no name of ours")
        raise KeyboardInterrupt
    with output_directory(tmp_path / "out", **key) as work:
        assert sum(".tmp" in p.name for p in work.rglob(".*")) == 3
        write_json(work / "a.json", {})
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} == {"manifest.json", "a.json", ".user.tmp"}
    assert set(read_json(tmp_path / "out" / "manifest.json")["files"]) == {"a.json", ".user.tmp"}


def test_what_is_current_need_not_be_made_again(tmp_path: Path):
    source = tmp_path / "in.txt"
    source.write_text("input")
    key = {"stage": "s", "config": EvaluateConfig(), "inputs": {"in": source}, "extra": {"fold": 2}}
    assert not is_current(tmp_path / "out", **key)
    with output_directory(tmp_path / "out", **key) as work:
        (work / "a.txt").write_text("a")
    assert is_current(tmp_path / "out", **key)
    assert not is_current(tmp_path / "out", **{**key, "extra": {"fold": 1}})
    assert not is_current(tmp_path / "out", **{**key, "config": EvaluateConfig(checkpoint="best")})
    assert is_current(tmp_path / "out", **{**key, "config": EvaluateConfig(workers=2)})
    (tmp_path / "out" / "a.txt").unlink()
    assert not is_current(tmp_path / "out", **key)
    (tmp_path / "out" / "a.txt").write_text("a")
    source.write_text("changed")
    assert not is_current(tmp_path / "out", **key)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b'{"files"', b"[]", b"{}"])
def test_what_a_power_cut_left_unreadable_is_made_again(tmp_path: Path, content):
    key = {"stage": "s", "config": {}, "inputs": {}}
    for name in ("out/manifest.json", ".out.hashes.json"):
        make(tmp_path / "out", config={})
        (tmp_path / name).write_bytes(content)
        assert is_current(tmp_path / "out", **key) is (name != "out/manifest.json")
    (tmp_path / "out" / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"out/manifest\.json(.|\n)*dvc repro"):
        content_hash(tmp_path / "out")
    for name in (".out.partial.json", ".out.partial/manifest.json"):
        with pytest.raises(KeyboardInterrupt), output_directory(tmp_path / "out", **key, resumable=True) as work:
            (work / "old").touch()
            raise KeyboardInterrupt
        (tmp_path / name).write_bytes(content)
        with output_directory(tmp_path / "out", **key, resumable=True) as work:
            assert (work / "old").exists() is (name != ".out.partial.json")
        assert is_current(tmp_path / "out", **key)


def test_a_piece_counts_only_with_the_files_that_it_had(tmp_path: Path):
    key = {"stage": "s", "config": {}, "inputs": {}, "resumable": True}
    with pytest.raises(KeyboardInterrupt), output_directory(tmp_path / "out", **key) as work:
        for name in "abcd":
            (work / name).write_text(name)
            finish(work, f"letters/{name}", work / name)
        raise KeyboardInterrupt
    (work / "b").write_text("")
    (work / "c").unlink()
    (work / PIECES / "letters" / "d.json").write_text("")
    with output_directory(tmp_path / "out", **key) as work:
        assert [name for name in "abcde" if is_finished(work, f"letters/{name}")] == ["a"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b", "d", "manifest.json"]
    assert sorted(read_json(tmp_path / "out" / "manifest.json")["files"]) == ["a", "b", "d"]


def test_packages_decide_whether_work_is_resumed(tmp_path: Path, monkeypatch, capsys):
    def begin() -> bool:
        with (
            pytest.raises(KeyboardInterrupt),
            output_directory(tmp_path / "out", stage="s", config={}, inputs={}, resumable=True) as work,
        ):
            found = (work / "done").exists()
            (work / "done").touch()
            raise KeyboardInterrupt
        return found

    assert [begin(), begin()] == [False, True]
    sound = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "mlflow" else sound(name))
    assert begin()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "scipy" else sound(name))
    assert not begin()
    assert "other parameters, inputs, code or packages" in capsys.readouterr().err


def test_all_is_on_the_disk_before_the_rename_and_the_rename_too(tmp_path: Path, monkeypatch):
    done: list[str] = []
    sound = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: done.append(str(Path(f"/proc/self/fd/{file}").readlink())) or sound(file)
    )
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda one, to: done.append("rename") or rename(one, to))
    with output_directory(tmp_path / "out", stage="s", config={}, inputs={}) as work:
        (work / "sub").mkdir()
        for name in ("a", "sub/b"):
            (work / name).write_text(name)
        done.clear()
    before = [Path(one).relative_to(work).as_posix() for one in done[: done.index("rename")]]
    assert sorted(before) == [".", "a", "manifest.json", "sub", "sub/b"], "each once"
    assert before.index("manifest.json") > max(before.index("a"), before.index("sub/b"))
    assert done[done.index("rename") + 1 :] == [str(tmp_path)]


def test_missing_input_is_named(tmp_path: Path):
    with (
        pytest.raises(UserError, match=r"nothing.*\n.*hint"),
        output_directory(tmp_path / "out", stage="s", config={}, inputs={"x": tmp_path / "nothing"}),
    ):
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("69120 requested and 36800 written"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["Python", "NumPy", "safetensors"],
)
def test_full_disk_is_said_plainly(tmp_path: Path, error: Exception):
    with (
        pytest.raises(UserError, match="no space left"),
        output_directory(tmp_path / "out", stage="s", config={}, inputs={}),
    ):
        raise error
    assert not (tmp_path / "out").exists()


def test_what_tells_nothing_is_believed_to_be_the_full_disk_where_it_is_full(tmp_path: Path, monkeypatch):
    for free, expected in ((1000, UserError), (10**9, RuntimeError)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(10**9, 0, free))
        with (
            pytest.raises(expected, match="iostream"),
            output_directory(tmp_path / "out", stage="s", config={}, inputs={}),
        ):
            raise RuntimeError("basic_ios::clear: iostream error")


def killed_at(step: int, write: Callable[[], None], manifest: Path) -> bool:
    """Run `write` in a process that is killed before it removes or renames a file the n-th time, once all is written.

    Returns:
        Whether it got that far.
    """
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] != 0
    steps = 0

    def kill(event: str, arguments: object) -> None:
        nonlocal steps
        if event in ("os.remove", "os.rename", "os.rmdir") and manifest.is_file():
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    try:
        write()
    finally:
        os._exit(0)


@pytest.mark.parametrize("old", [False, True], ids=["first", "again"])
def test_killed_at_a_step_of_the_end_what_is_finished_is_not_made_again(tmp_path: Path, old):
    key = {"stage": "s", "config": {"a": 1}, "inputs": {}, "extra": {"fold": 0}}

    def write() -> None:
        with output_directory(out, **key, resumable=True, until_done=["resume"]) as work:
            (work / "weights").write_text("trained")
            (work / "resume").write_text("state")

    for step in itertools.count(1):
        out = tmp_path / f"{step}" / "out"
        if old:
            make(out, "old")
        was_killed = killed_at(step, write, out.with_name(".out.partial") / "manifest.json")
        assert is_current(out, **key), step
        assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "weights"], "no checkpoint for resuming"
        assert (out / "weights").read_text() == "trained"
        assert not out.with_name(".out.partial").exists()
        if not was_killed:
            break
    assert step > 3, "the checkpoint is removed, the work directory renamed, the stamp removed"


def test_a_work_directory_that_is_not_complete_is_not_put_in_place(tmp_path: Path, monkeypatch):
    key = {"stage": "s", "config": {"a": 1}, "inputs": {}}
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as killed:
        killed.setattr(
            "distilldsm.core.output_directory.replace_directory", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with output_directory(tmp_path / "out", **key, resumable=True) as work:
            (work / "weights").write_text("trained")
    partial = tmp_path / ".out.partial"
    assert not is_current(tmp_path / "out", **{**key, "config": {"a": 2}}), "of other parameters"
    assert not is_current(tmp_path / "out", **key, code=("core/stage.py",)), "of other code"
    (partial / "weights").write_text("half")
    assert not is_current(tmp_path / "out", **key), "a file that changed since"
    assert not (tmp_path / "out").exists()
    with output_directory(tmp_path / "out", **key, resumable=True) as work:
        assert (work / "weights").read_text() == "half", "it is gone on with"
        (work / "weights").write_text("trained")
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == [".out.hashes.json", "out"]


def test_code_decides_too(tmp_path: Path, monkeypatch):
    from distilldsm.core import hashes as module

    package = tmp_path / "package"
    (package / "room" / "__pycache__").mkdir(parents=True)
    (package / "core").mkdir()
    (package / "room" / "a.py").write_text("1")
    (package / "other.py").write_text("1")
    monkeypatch.setattr(module, "__file__", str(package / "core" / "hashes.py"))
    key = {"stage": "s", "config": {}, "inputs": {}, "code": ("room", "component.py")}
    code_hash.cache_clear()
    with output_directory(tmp_path / "out", **key):
        pass
    for file, current in (("other.py", True), ("room/__pycache__/a.pyc", True), ("room/a.py", False)):
        (package / file).write_text("2")
        code_hash.cache_clear()
        assert is_current(tmp_path / "out", **key) is current, file
    code_hash.cache_clear()


def _second(path: Path, queue) -> None:
    try:
        make(path)
        queue.put("wrote")
    except UserError as error:
        queue.put(str(error))


def test_a_second_process_is_turned_away(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with output_directory(tmp_path / "out", stage="s", config={}, inputs={}) as work:
        process = context.Process(target=_second, args=(tmp_path / "out", queue))
        process.start()
        message = queue.get(timeout=60)
        process.join()
        (work / "a.txt").write_text("first")
    assert "another process" in message
    assert (tmp_path / "out" / "a.txt").read_text() == "first"


def test_worker_count():
    assert worker_count(4, 2) == 2
    assert worker_count(1, 10) == 1
    assert worker_count(0, 100) >= 1
