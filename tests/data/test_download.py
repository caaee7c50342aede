"""Fetching against a server that cuts, lies, refuses and forgets."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import distilldsm.core.progress as progress_module
import distilldsm.data.download as download_module
from distilldsm.core.errors import DataError, UserError
from distilldsm.data.download import fetch, is_url, local_path, public_address
from tests.data.http_server import CONTENT, MODIFIED, serving

SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    with serving() as running:
        yield running


@pytest.fixture
def get(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(download_module, "_CHUNK", 10_000)
    waits: list[float] = []

    def fetch_here(*urls: str, **options) -> Path:
        return fetch(urls, tmp_path / "archive.tar", sleep=waits.append, **options)

    fetch_here.waits = waits
    return fetch_here


def leave_part(folder: Path, content: bytes, validator: str | None = '"one"') -> None:
    (folder / "archive.tar.part").write_bytes(content)
    (folder / "archive.tar.part.json").write_text(json.dumps({"validator": validator}))


def test_plain_download_leaves_only_the_file(server, get, tmp_path):
    assert get(server.url(), sha256=SHA256.upper()).read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["archive.tar"]
    assert get.waits == []


CUT = {"cut_after": 100_000, "cuts_left": 1}


@pytest.mark.parametrize(
    ("part", "validator", "settings", "starts"),
    [
        (None, "", CUT | {"cuts_left": 2}, [0, 100_000, 200_000]),
        (None, "", CUT | {"etag": None, "modified": MODIFIED}, [0, 100_000]),
        (None, "", CUT | {"etag": 'W/"one"'}, [0, 0]),  # a weak ETag is no promise
        (None, "", CUT | {"ranges": False}, [0, 100_000]),
        (None, "", {"length": False}, [0]),
        (CONTENT[:123_456], '"one"', {}, [123_456]),  # of a run that was killed
        (CONTENT, '"one"', {}, [len(CONTENT)]),
        (CONTENT + b"more", '"one"', {}, [len(CONTENT) + 4, 0]),
        (b"\0" * 1000, '"one"', {}, [1000, 0]),  # the same ETag, other bytes
        (b"old bytes of another version", '"zero"', {}, [28]),
        (CONTENT[:1000], '"one"', {"wrong_range": True}, None),
    ],
)
def test_what_is_there_is_continued_or_started_again(server, get, tmp_path, part, validator, settings, starts):
    for name, value in settings.items():
        setattr(server, name, value)
    if part is not None:
        leave_part(tmp_path, part, validator)
    # Where a checksum would catch it, the bytes must be right without one.
    checksum = {} if validator == '"zero"' or "wrong_range" in settings else {"sha256": SHA256}
    assert get(server.url(), **checksum).read_bytes() == CONTENT
    assert starts is None or server.starts == starts
    if len(get.waits) == 2:
        assert get.waits[0] < 2.01 <= get.waits[1] + 0.01  # jittered, and doubled


def test_tries_that_get_further_are_not_counted(server, get):
    server.cut_after, server.cuts_left = 30_000, 9  # more cuts than tries
    assert get(server.url(), sha256=SHA256).read_bytes() == CONTENT
    assert len(server.requests) == 10
    assert max(get.waits) <= 60


@pytest.mark.parametrize("note", [None, "{broken", "[]", '{"validator": 5}'])
def test_a_part_whose_note_is_missing_or_broken_is_started_again(server, get, tmp_path, note):
    (tmp_path / "archive.tar.part").write_bytes(b"who knows from where")
    if note is not None:
        (tmp_path / "archive.tar.part.json").write_text(note)
    assert get(server.url()).read_bytes() == CONTENT
    assert server.requests == [("/file", None)]


def test_server_errors_are_retried_and_redirects_followed(server, get):
    server.failures_left = 2
    assert get(server.url("/moved"), sha256=SHA256).read_bytes() == CONTENT
    assert len(get.waits) == 2


@pytest.mark.parametrize("bad", ["/gone", "/circle"])
def test_what_another_try_cannot_change_goes_to_the_mirror_at_once(server, get, bad):
    assert get(server.url(bad), server.url(), sha256=SHA256).read_bytes() == CONTENT
    assert get.waits == []


def test_an_impossible_address_is_told_at_once(get):
    with pytest.raises(DataError, match="could not be fetched"):
        get("http://")
    assert get.waits == []


def test_wrong_checksum_goes_to_the_mirror(server, get):
    assert get(server.url("/other"), server.url(), sha256=SHA256).read_bytes() == CONTENT


def test_all_answers_are_told_and_secrets_are_not(server, get, tmp_path):
    server.failures_left = 99
    with pytest.raises(DataError) as caught:
        get(server.url("/gone"), "http://me:word@127.0.0.1:9/x?key=hidden", server.url("/file"), sha256="0" * 64)
    message = str(caught.value)
    assert "HTTP 404" in message
    assert "http://127.0.0.1:9/x" in message
    assert "503" in message
    assert "hidden" not in message
    assert "word@" not in message
    server.failures_left = 0
    with pytest.raises(DataError, match=f"wrong sha256: {SHA256}, expected 0000"):
        get(server.url(), sha256="0" * 64)
    assert list(tmp_path.glob("archive.tar*")) == [tmp_path / "archive.tar.part.json"]


def test_a_file_that_is_there_is_used_again_if_its_checksum_is_right(server, get, tmp_path):
    get(server.url(), md5=hashlib.md5(CONTENT).hexdigest())
    get(server.url(), sha256=SHA256)
    assert len(server.requests) == 1
    (tmp_path / "archive.tar").write_bytes(b"damaged since")
    assert get(server.url(), sha256=SHA256).read_bytes() == CONTENT


def test_a_failed_fetch_leaves_what_was_there(server, get, tmp_path):
    (tmp_path / "archive.tar").write_bytes(b"another version")
    with pytest.raises(DataError):
        get(server.url("/gone"), sha256=SHA256)
    assert (tmp_path / "archive.tar").read_bytes() == b"another version"


@pytest.mark.parametrize("name", ["with space.bin", "100%25.bin", "ünïcode.bin"])
def test_file_addresses_and_paths(tmp_path, get, name):
    source = tmp_path / name
    source.write_bytes(CONTENT)
    assert local_path(source.as_uri()) == source
    assert get(source.as_uri(), sha256=SHA256).read_bytes() == CONTENT
    assert get(str(source), sha256=SHA256).read_bytes() == CONTENT
    assert source.read_bytes() == CONTENT


def test_a_missing_file_goes_to_the_mirror(tmp_path, get, server):
    none = (tmp_path / "none").as_uri()
    with pytest.raises(DataError, match="no such file"):
        get(none)
    assert get(none, server.url()).read_bytes() == CONTENT


def test_a_part_copied_from_a_path_is_not_continued_from_a_server(tmp_path, get, server):
    leave_part(tmp_path, CONTENT[:1000])
    wrong = tmp_path / "wrong.tar"
    wrong.write_bytes(b"wrong")
    assert get(str(wrong), server.url(), sha256=SHA256).read_bytes() == CONTENT


def test_kinds_of_sources(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("https://host/x.tar") is None
    assert local_path("~/x.tar") == Path("/home/me/x.tar")
    assert [is_url(s) for s in ("http://h/x", "file:///x", "x.tar", "C:\\x.tar", "msd:Task")] == [True, True] + [
        False
    ] * 3
    assert public_address("https://me:word@host:8/a/b.tar?sig=1#x") == "https://host:8/a/b.tar"


def test_no_space_is_told_before_anything_is_written(server, get, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 10})())
    with pytest.raises(DataError, match=r"not enough space(.|\n)*300,000 needed"):
        get(server.url())
    assert list(tmp_path.glob("archive.tar*")) == []


def test_two_processes_do_not_write_one_file(server, get, tmp_path):
    with FileLock(tmp_path / ".archive.tar.lock"), pytest.raises(UserError, match="another process"):
        get(server.url())


def test_progress_is_told_in_lines_off_a_terminal_and_as_a_bar_on_one(server, get, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(progress_module, "LOG_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(download_module, "_CHUNK", 100_000)
    get(server.url())
    plain = capsys.readouterr().err
    assert re.search(r"archive.tar: 0.1 of 0.3 MB \(33%\), [\d.]+ MB/s, about \d+ s left", plain)
    assert "archive.tar: 0.3 MB in 0." in plain
    assert "\r" not in plain
    (tmp_path / "archive.tar").unlink()
    monkeypatch.setenv("DISTILLDSM_PROGRESS", "bar")
    get(server.url())
    assert "\rarchive.tar:" in capsys.readouterr().err


def test_an_interrupted_download_tells_what_is_kept(server, get, monkeypatch, tmp_path):
    monkeypatch.setattr(download_module, "_CHUNK", 100_000)

    def interrupt(self, count, note=""):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress_module.Meter, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        get(server.url())
    assert caught.value.__notes__ == ["archive.tar: 0.1 MB are kept"]
    assert (tmp_path / "archive.tar.part").stat().st_size == 100_000


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 120_000), min_size=1, max_size=4), ranges=st.booleans())
def test_wherever_it_is_cut_the_bytes_are_the_same(tmp_path_factory, cuts, ranges):
    folder = tmp_path_factory.mktemp("cut")
    with serving() as server:
        server.ranges = ranges
        server.cuts_left = len(cuts)
        lengths = iter([*cuts, 1])

        def wait(_: float) -> None:
            server.cut_after = next(lengths)

        wait(0)
        assert fetch([server.url()], folder / "x", sleep=wait).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00\xff no HTTP at all",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1e3\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nno gzip",
        b"HTTP/1.1 206 Partial\r\nContent-Range: bytes x-y/z\r\n\r\nshort",
        b"HTTP/1.1 416 Range\r\nContent-Range: \xff\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nETag: \xff\xfe\r\nContent-Length: 9\r\n\r\nshort",
        *(
            b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + place + b"\r\n\r\n"
            for place in (b"http://[", b"http://a:99999/", b"file:///etc/passwd", b"http://\xff/", b"http://.../", b"")
        ),
    ],
)
def test_malformed_answers_end_in_one_error(server, get, raw, monkeypatch):
    monkeypatch.setattr(download_module, "ATTEMPTS", 2)
    server.raw = raw
    with pytest.raises(UserError) as caught:
        get(server.url(), sha256=SHA256)
    assert caught.value.problem in ("could not be fetched", "not enough space")
    server.raw = None
    assert get(server.url(), sha256=SHA256).read_bytes() == CONTENT, "and nothing of it stays"


@pytest.mark.parametrize(
    "name", ["%00", "%2e%2e%2fx", "a" * 400, "%ff%fe", "..", ".", "", "%0a%0d", "\udce9", "x y\u2028z", "a?b=c#d"]
)
def test_odd_names_in_addresses_end_in_one_error(tmp_path, monkeypatch, capsys, server, name):
    from distilldsm.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download_module, "ATTEMPTS", 1)
    (tmp_path / "p.yaml").write_text("train: {}\n")
    address = server.url("/gone").replace("/gone", f"/gone/{name}")
    assert main(["download", "--params", "p.yaml", "--set", f"download.source='{address}'"]) in (1, 2)
    text = capsys.readouterr().err
    assert [line.startswith("error: ") for line in text.splitlines()].count(True) == 1
    assert "Traceback" not in text
    assert {path.parent.name for path in tmp_path.rglob("*") if path.is_file()} <= {tmp_path.name, "data", "archives"}


def test_a_write_that_is_cut_in_mid_file_is_one_error_and_goes_on_later(server, get, tmp_path, monkeypatch):
    real, written = open, []

    class Full:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.stream.close()

        def write(self, chunk: bytes) -> int:
            written.append(self.stream.write(chunk[: len(chunk) // 2]))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.stream.name)

    monkeypatch.setattr(download_module, "open", lambda *a, **k: Full(real(*a, **k)), raising=False)
    with pytest.raises((OSError, UserError), match="No space left"):
        get(server.url(), sha256=SHA256)
    monkeypatch.undo()
    assert get(server.url(), sha256=SHA256).read_bytes() == CONTENT
    assert server.starts == [0, written[0]]
