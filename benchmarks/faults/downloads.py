"""Faulty servers and archives while a data set is downloaded."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from benchmarks.faults.report import Row
from distilldsm.core.errors import UserError
from distilldsm.data.archive import extract
from distilldsm.data.download import fetch
from tests.data.http_server import CONTENT, Server, serving

SHA256 = hashlib.sha256(CONTENT).hexdigest()


def cut(server: Server, rng: random.Random) -> list[str]:
    """The server cuts the connection up to three times."""
    server.cuts_left, server.cut_after = rng.randint(1, 3), rng.randint(1, len(CONTENT) // 2)
    return [server.url()]


def cut_without_range(server: Server, rng: random.Random) -> list[str]:
    """As `cut`, but the server does not support range requests: every request starts at byte 0."""
    server.ranges = False
    return cut(server, rng)


def wrong_then_mirror(server: Server, rng: random.Random) -> list[str]:
    """The server has a file with a wrong checksum, the mirror the right file."""
    return [server.url("/other"), server.url()]


def wrong(server: Server, rng: random.Random) -> list[str]:
    """The server has a file with a wrong checksum; there is no mirror."""
    return [server.url("/other")]


def gone_then_mirror(server: Server, rng: random.Random) -> list[str]:
    """The server answers 404, and the mirror cuts the connection."""
    return [server.url("/gone"), *cut(server, rng)]


def moved(server: Server, rng: random.Random) -> list[str]:
    """The server redirects, and fails up to three times before it works."""
    server.failures_left = rng.randint(0, 3)
    return [server.url("/moved")]


SERVERS: dict[str, tuple[Callable[[Server, random.Random], list[str]], bool]] = {
    "cut at random bytes": (cut, True),
    "cut, server without ranges": (cut_without_range, True),
    "wrong checksum, then a mirror": (wrong_then_mirror, True),
    "wrong checksum": (wrong, False),
    "404, then a mirror that is cut": (gone_then_mirror, True),
    "redirect and server errors": (moved, True),
}
"""Name of the fault to the function that prepares it, and whether the download can succeed."""


def download_faults(work: Path, *, times: int, rng: random.Random) -> list[Row]:
    """Download with each fault. Either the file is complete, or there is an error and no file."""
    rows: list[Row] = []
    for name, (prepare, possible) in SERVERS.items():
        row = Row(f"download: {name}")
        for number in range(times):
            target = work / f"download-{len(rows)}-{number}" / "file"
            with serving() as server:
                sources = prepare(server, rng)
                try:
                    fetch(sources, target, sha256=SHA256, sleep=lambda _: None)
                    problem = None if possible and target.read_bytes() == CONTENT else "other bytes were taken"
                except UserError as error:
                    problem = f"{error}"[:200] if possible or target.exists() else None
            row.record(problem)
        rows.append(row)
    return rows


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


MEMBERS = (
    _member("../outside"),
    _member("a/../../outside"),
    _member("/tmp/outside-of-everything"),
    _member("link", tarfile.SYMTYPE, "/etc/passwd"),
    _member("link", tarfile.SYMTYPE, "../outside"),
    _member("hard", tarfile.LNKTYPE, "good"),
    _member("device", tarfile.CHRTYPE),
    _member("block", tarfile.BLKTYPE),
    _member("fifo", tarfile.FIFOTYPE),
)


def archive_faults(work: Path, *, rng: random.Random) -> list[Row]:
    """Extract archives with paths outside the target, bombs and cut archives. All must be refused without output."""
    work.mkdir(parents=True, exist_ok=True)
    evil, bombs, torn, litter = (
        Row("archive: member outside, link or device"),
        Row("archive: bomb"),
        Row("archive: cut at a random byte"),
        Row("archive: macOS `._` members"),
    )
    noise = rng.randbytes(200_000)
    for number, info in enumerate(MEMBERS):
        path = _tar(work / f"evil-{number}.tar", [(_member("good"), b"good"), (info, b"")])
        evil.record(_extraction_problem(path, work))
    bomb = work / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        packed.writestr("a/zeros.nii", bytes(1200 << 20))
    bombs.record(_extraction_problem(bomb, work))
    for number in range(30):
        path = _tar(work / f"torn-{number}.tar.gz", [(_member("a"), noise), (_member("b"), noise)], "w:gz")
        whole = path.read_bytes()
        path.write_bytes(whole[: rng.randint(1, len(whole) - 1)])
        torn.record(_extraction_problem(path, work))
    path = _tar(work / "mac.tar", [(_member("d/._dataset.json"), b"x"), (_member("d/dataset.json"), b"{}")])
    target = work / "mac"
    extract(path, target)
    names = sorted(p.name for p in target.rglob("*") if p.is_file())
    litter.record(None if names == ["dataset.json"] else f"extracted {names}")
    return [evil, bombs, torn, litter]


def _tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: Literal["w", "w:gz"] = "w") -> Path:
    with tarfile.open(path, mode) as packed:
        for info, content in members:
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return path


def _extraction_problem(path: Path, work: Path) -> str | None:
    """Extract a bad archive. Returns the problem; None if it was refused and nothing was written."""
    target = work / "extracted"
    try:
        extract(path, target)
    except UserError:
        return f"{path.name}: files were written" if target.exists() or (work / "outside").exists() else None
    return f"{path.name} was extracted"
