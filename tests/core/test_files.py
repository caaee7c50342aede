"""Files are whole or old, hashes follow their content, and errors name the path."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from distilldsm.core import hashes
from distilldsm.core.errors import UserError
from distilldsm.core.files import read_json, sha256_file, whole_file, write_json
from distilldsm.core.hashes import content_hash
from distilldsm.core.output_directory import is_current
from tests.core.test_output_directory import make


def test_a_file_counts_as_unchanged_by_its_state_else_by_its_content(tmp_path: Path, monkeypatch):
    key = {"stage": "s", "config": {}, "inputs": {}}
    make(tmp_path / "out", config={})
    file, read = tmp_path / "out" / "a.txt", []
    monkeypatch.setattr(hashes, "sha256_file", lambda path: read.append(path.name) or sha256_file(path))
    before = content_hash(tmp_path / "out")
    assert is_current(tmp_path / "out", **key)
    assert read == [], "nothing is read again"
    os.utime(file)
    assert is_current(tmp_path / "out", **key)
    assert content_hash(tmp_path / "out") == before
    assert read == ["a.txt"], "once"
    state = file.stat()
    file.write_text("y")  # as long as before, and with its old times, as a copy that keeps times has
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert not is_current(tmp_path / "out", **key)
    assert content_hash(tmp_path / "out") != before, "its user runs again"
    file.write_text("x")
    assert is_current(tmp_path / "out", **key)
    assert content_hash(tmp_path / "out") == before


def test_two_writers_of_one_name_have_two_temporary_files(tmp_path: Path, monkeypatch):
    """Process ids are the same in two containers."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with whole_file(tmp_path / "mask") as one, whole_file(tmp_path / "mask") as two:
        one.write_text("one")
        two.write_text("two")
        assert one.read_text() == "one"
    monkeypatch.setattr(os, "urandom", lambda size: b"\0" * size)
    with whole_file(tmp_path / "mask") as one, pytest.raises(FileExistsError), whole_file(tmp_path / "mask"):
        pass


def test_content_hash_follows_content_not_names_of_places(tmp_path: Path):
    make(tmp_path / "one")
    make(tmp_path / "two")
    make(tmp_path / "three", "other")
    assert content_hash(tmp_path / "one") == content_hash(tmp_path / "two") != content_hash(tmp_path / "three")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.txt").write_text("x")
    assert content_hash(plain) == content_hash(tmp_path / "one")


def test_json_is_whole_or_old(tmp_path: Path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    path.write_text("{")
    with pytest.raises(UserError, match="JSON"):
        read_json(path)


def test_what_cannot_be_written_is_told_by_its_name(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for write in (lambda: make(tmp_path / "file" / "out"), lambda: write_json(tmp_path / "file" / "x.json", {})):
        with pytest.raises(UserError, match=r"(out|x\.json): cannot be written(.|\n)*hint") as caught:
            write()
        assert "/." not in str(caught.value).replace(str(tmp_path), "")

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".out.lock"))

    monkeypatch.setattr(FileLock, "acquire", refused)
    with pytest.raises(UserError, match=r"/out: cannot be written\n  seen: Permission denied"):
        make(tmp_path / "out")
