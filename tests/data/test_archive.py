"""Archives that mean harm, are broken, or are merely odd."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import shutil
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distilldsm.data.archive as archive_module
from distilldsm.core.errors import DataError
from distilldsm.core.hashes import file_hashes
from distilldsm.data.archive import extract, find_root, wrapped

NOISE = bytes(np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def zip_of(path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in members:
            archive.writestr(info, content)
    return path


def refused(archive: Path, words: str) -> None:
    """The archive is refused, in words that name it, before anything is written."""
    target = archive.parent / "out"
    with pytest.raises(DataError, match=words) as caught:
        extract(archive, target)
    assert str(archive) in str(caught.value)
    assert not target.exists()
    assert [p.name for p in archive.parent.iterdir()] == [archive.name]


@pytest.mark.parametrize(
    "evil",
    [
        member("../outside.txt"),
        member("/tmp/absolute.txt"),
        member("a/../../outside.txt"),
        member("..\\outside.txt"),
        member("C:\\outside.txt"),
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("inner", tarfile.SYMTYPE, "good.txt"),
        member("hard", tarfile.LNKTYPE, "good.txt"),
        member("device", tarfile.CHRTYPE),
        member("block", tarfile.BLKTYPE),
        member("fifo", tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)
def test_harmful_tar_members_are_refused_and_named(tmp_path, evil):
    archive = tar_of(tmp_path / "x.tar", [(member("good.txt"), b"good"), (evil, b"")])
    with pytest.raises(DataError) as caught:
        extract(archive, tmp_path / "out")
    assert caught.value.seen == evil.name
    refused(archive, "outside|link|device")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..\\x"])
def test_zip_members_that_would_land_outside(tmp_path, name):
    refused(zip_of(tmp_path / "x.zip", [("good", b"good"), (name, b"x")]), "outside")


def test_zip_links_and_encryption(tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(zip_of(tmp_path / "x.zip", [(info, b"/etc/passwd")]), "link")
    archive = zip_of(tmp_path / "x.zip", [("secret", b"x")])
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    refused(archive, "encrypted")


@pytest.mark.parametrize("kind", ["zip", "gz"])
def test_bombs(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archive_module, "RATIO_FREE_BYTES", 1_000_000)
    zeros = b"\0" * 3_000_000
    if kind == "zip":
        archive = zip_of(tmp_path / "x", [("zeros", zeros)])
    else:
        archive = tar_of(tmp_path / "x", [(member("zeros"), zeros), (member("../x"), b"")], "w:gz")
    refused(archive, "bomb")  # and not the second member: it is refused as soon as it is seen


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = member(name, kind)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_sizes_below_zero(tmp_path, kind):
    content = tar_header("good", 512) + b"x" * 512 + tar_header("evil", -1024, kind) + bytes(4096)
    (tmp_path / "x.tar").write_bytes(content)
    refused(tmp_path / "x.tar", "negative size|not a readable archive")
    pax = tar_of(tmp_path / "x.tar", [(member("evil"), b"x")], "w").read_bytes()
    record = b"13 size=-512\n"
    pax = tar_header("p", len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0") + pax
    (tmp_path / "x.tar").write_bytes(pax)
    refused(tmp_path / "x.tar", "negative size|not a readable archive")


@pytest.mark.parametrize("kind", ["one long name", "many long names", "attributes", "one name often", "folders"])
@pytest.mark.parametrize("packed", [gzip.compress, lzma.compress])
def test_headers_that_grow_while_they_are_read(tmp_path, kind, packed, monkeypatch):
    monkeypatch.setattr(archive_module, "MAX_EXTENDED_BYTES", 1_000_000)
    monkeypatch.setattr(archive_module, "MIN_MEMBERS", 1_000)
    size = 4_000_000 if kind == "one long name" else 100_352
    long = tar_header("p", size, tarfile.XHDTYPE if kind == "attributes" else tarfile.GNUTYPE_LONGNAME) + b"a" * size
    content = {
        "one long name": long + tar_header("a", 0),
        "many long names": (long + tar_header("a", 0)) * 30,
        "attributes": (long + tar_header("a", 0)) * 30,
        "one name often": tar_header("a", 0) * 3_000,
        "folders": tar_header("a", 0, tarfile.DIRTYPE) * 3_000,
    }[kind]
    (tmp_path / "x.tar").write_bytes(packed(content + bytes(10_240)))
    tracemalloc.start()
    try:
        refused(tmp_path / "x.tar", "too large or too many")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "MAX_MEMBERS", 3)
    refused(tar_of(tmp_path / "x.tar", [(member(str(k)), b"") for k in range(4)]), "4 files")


def test_a_zip_that_lies_about_a_size(tmp_path):
    archive = zip_of(tmp_path / "x.zip", [("a", NOISE)])
    content = bytearray(archive.read_bytes())
    for mark, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = content.index(mark) + offset
        content[at : at + 4] = (10).to_bytes(4, "little")
    archive.write_bytes(content)
    with pytest.raises(DataError):
        extract(archive, tmp_path / "out")
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()) <= 10


def test_no_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    archive = tar_of(tmp_path / "x.tar", [(member("a"), NOISE)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 99})())
    with pytest.raises(DataError, match=r"99 bytes free(.|\n)*100,000 needed"):
        extract(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_below_a_file(tmp_path):
    refused(tar_of(tmp_path / "x.tar", [(member("a"), b""), (member("a/b"), b"")]), "same name")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_all_compressions_and_plain_permissions(tmp_path, mode):
    strange = member("set/sub/b.nii")
    strange.mode, strange.uid = 0o7777, 12345
    archive = tar_of(
        tmp_path / "x", [(member("set", tarfile.DIRTYPE), b""), (member("set/a"), NOISE), (strange, b"b")], mode
    )
    extract(archive, tmp_path / "out")
    assert (tmp_path / "out" / "set" / "a").read_bytes() == NOISE
    plain = tmp_path / "plain"
    plain.touch()
    written = (tmp_path / "out" / "set" / "sub" / "b.nii").stat()
    assert (written.st_mode, written.st_uid) == (plain.stat().st_mode, os.getuid())


def test_litter_is_skipped(tmp_path):
    names = ["set/._a.nii", "__MACOSX/b", "set/.DS_Store", "set/a.nii", "__MACOSX/set/._a.nii"]
    extract(tar_of(tmp_path / "x.tar", [(member(n), b"x") for n in names]), tmp_path / "tar")
    extract(zip_of(tmp_path / "x.zip", [(n, b"x") for n in names]), tmp_path / "zip")
    assert set(file_hashes(tmp_path / "tar")) == set(file_hashes(tmp_path / "zip")) == {"set/a.nii"}


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path):
    inner = zip_of(tmp_path / "inner.zip", [("of the zip", b"x")]).read_bytes()
    extract(tar_of(tmp_path / "x", [(member("inner.zip"), inner)]), tmp_path / "out")
    assert list(file_hashes(tmp_path / "out")) == ["inner.zip"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_archives(tmp_path, mode, share):
    archive = tar_of(tmp_path / "x.tar", [(member("a"), NOISE), (member("b"), NOISE)], mode)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(len(whole) * share)])
    refused(archive, "truncated")


def test_a_tar_cut_between_two_members(tmp_path):
    archive = tar_of(tmp_path / "x.tar", [(member("a"), b"a"), (member("b"), b"b")])
    archive.write_bytes(archive.read_bytes()[:1024])
    refused(archive, "end mark is missing")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_damaged_bytes(tmp_path, mode):
    archive = tar_of(tmp_path / "x.tar", [(member("a"), NOISE)], mode)
    content = bytearray(archive.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = b"\xff" * 64
    archive.write_bytes(content)
    with pytest.raises(DataError):
        extract(archive, tmp_path / "out")


def test_damaged_zip(tmp_path):
    archive = zip_of(tmp_path / "x.zip", [("a", NOISE)])
    content = bytearray(archive.read_bytes())
    content[5000:5064] = b"\xff" * 64
    archive.write_bytes(content)
    with pytest.raises(DataError):
        extract(archive, tmp_path / "out")
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(DataError, match="truncated"):
        extract(archive, tmp_path / "out2")


@pytest.mark.parametrize(
    "content", [b"no archive at all", b"", gzip.compress(b"a single file", mtime=0), b"PK but no zip"]
)
def test_other_files(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    refused(tmp_path / "x", "not a readable archive|no files")


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii", "dataset.json"])
def test_a_single_file_is_told_what_a_source_may_be(tmp_path, name):
    content = b"\1" * 2000
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    refused(
        tmp_path / name, r"one file, not a data set(.|\n)*tar\.gz/bz2/xz, zip\) or a folder(.|\n)*hint: name the folder"
    )


def test_what_tar_says_of_other_bytes_is_told_in_one_line(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"\1" * 2000)
    refused(tmp_path / "x.tar.gz", r"truncated\n  seen: .*\n  rule: .*\n  hint: .*\Z")


def test_an_archive_of_litter_only_and_a_missing_one(tmp_path):
    refused(tar_of(tmp_path / "x.tar", [(member("._a"), b"x")]), "holds no files")
    with pytest.raises(DataError, match="file not found"):
        extract(tmp_path / "none.tar", tmp_path / "out")


def test_find_root_looks_into_folders_that_only_wrap(tmp_path):
    deep = tmp_path / "a" / "b" / "c"
    (deep / "x").mkdir(parents=True)
    (deep / "y").mkdir()
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "a" / "__MACOSX").mkdir()
    assert find_root(tmp_path) == deep
    (tmp_path / "a" / "dataset.json").write_text("{}")
    assert find_root(tmp_path) == tmp_path / "a"
    assert find_root(tmp_path, "other.json") == tmp_path / "a"


def test_a_link_to_itself_ends(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(list(wrapped(tmp_path))) < 20


names = st.lists(
    st.one_of(st.sampled_from(["..", ".", "", "a", "b", "C:", "\\", "._x"]), st.text("ab./\\:~ ", max_size=6)),
    min_size=1,
    max_size=4,
).map("/".join)


@settings(deadline=None, max_examples=150)
@given(name=names)
def test_whatever_the_name_nothing_is_written_outside(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("names")
    archive = tar_of(folder / "x.tar", [(member(name), b"x")])
    try:
        extract(archive, folder / "inside" / "out")
    except DataError:
        assert not (folder / "inside").exists()
        return
    assert {p.name for p in folder.iterdir()} == {"x.tar", "inside"}
    assert [p.name for p in (folder / "inside").iterdir()] == ["out"]
    assert len(file_hashes(folder / "inside" / "out")) == 1
    assert ".." not in PurePosixPath(name).parts
