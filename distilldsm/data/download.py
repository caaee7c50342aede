"""Fetching archives: resumed, retried, mirrored, checked."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from tqdm import tqdm

from distilldsm.errors import DataError
from distilldsm.stage import read_json, write_json

ATTEMPTS = 5
"""Tries per address before the next mirror."""
TIMEOUT_SECONDS = (10.0, 60.0)
"""To connect, and between two packets."""
_CHUNK = 1 << 20
_GONE = {400, 401, 403, 404, 410, 451}
"""Answers that another try will not change."""


class _GiveUpError(Exception):
    """This address will not serve the file."""


def is_url(source: str) -> bool:
    """Whether a source is an address rather than a path."""
    return urlsplit(source).scheme in ("http", "https", "file")


def local_path(source: str) -> Path | None:
    """The path a `file://` address or plain path names; None for http."""
    parts = urlsplit(source)
    if parts.scheme == "file":
        return Path(url2pathname(unquote(parts.path)))
    return None if parts.scheme in ("http", "https") else Path(source)


def fetch(
    urls: Sequence[str],
    target: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    md5: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Bring a file to `target` from the first address that serves it whole and with the right checksum.

    A file that is already there and has the right checksum (or none to check) is used as it is. An interrupted download
    lies beside the target as `.part` and is continued with an HTTP range request, as long as the server still has the
    same file (ETag or Last-Modified).

    Raises:
        DataError: no address served the file; tells what each of them answered.
    """
    target = Path(target)
    if target.is_file() and _checksum_problem(target, sha256, md5) is None:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    answers = []
    for url in urls:
        try:
            _fetch_one(url, target, sleep)
        except _GiveUpError as error:
            answers.append(f"{url}: {error}")
            continue
        part = _part(target)
        problem = _checksum_problem(part, sha256, md5)
        if problem is None:
            os.replace(part, target)
            _validator(target).unlink(missing_ok=True)
            return target
        answers.append(f"{url}: {problem}")
        part.unlink()
    raise DataError(
        "could not be fetched",
        where=target,
        seen="\n    ".join(answers),
        mend="check the address, the network and download.sha256; or download it yourself and name the file",
    )


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _validator(target: Path) -> Path:
    return target.with_name(target.name + ".part.json")


def _checksum_problem(path: Path, sha256: str | None, md5: str | None) -> str | None:
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected is None:
            continue
        with open(path, "rb") as stream:
            seen = hashlib.file_digest(stream, name).hexdigest()
        if seen != expected.lower():
            return f"wrong {name}: {seen}, expected {expected.lower()}"
    return None


def _fetch_one(url: str, target: Path, sleep: Callable[[float], None]) -> None:
    """Download `url` completely into the part file."""
    path = local_path(url)
    if path is not None:
        if not path.is_file():
            raise _GiveUpError("no such file")
        _check_space(target, path.stat().st_size)
        shutil.copyfile(path, _part(target))
        return
    import requests

    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            sleep(min(2.0**attempt, 60.0) * (0.5 + random.random() / 2))  # noqa: S311 - jitter, no secret
        try:
            if _download(url, target):
                return
            problem = "the connection ended early"
        except (requests.RequestException, OSError) as error:
            if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
                raise
            problem = str(error)
    raise _GiveUpError(f"{problem} (after {ATTEMPTS} tries)")


def _download(url: str, target: Path) -> bool:
    """One try; returns whether the part file is whole now."""
    import requests

    part = _part(target)
    have = part.stat().st_size if part.exists() else 0
    validator = read_json(_validator(target)).get("validator") if have and _validator(target).exists() else None
    headers = {"Accept-Encoding": "identity"}
    if have and validator:
        # If-Range: the server sends the rest only if its file is still the one we began with.
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as answer:
        if answer.status_code in _GONE:
            raise _GiveUpError(f"HTTP {answer.status_code}")
        if answer.status_code == 416:
            part.unlink(missing_ok=True)
            return False
        answer.raise_for_status()
        resumed = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not resumed:
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        _check_space(target, (total or 0) - have)
        found = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        # A weak ETag does not promise the same bytes.
        write_json(_validator(target), {"validator": None if (found or "W/").startswith("W/") else found})
        with (
            open(part, "ab" if resumed else "wb") as sink,
            tqdm(
                total=total, initial=have, unit="B", unit_scale=True, desc=target.name, disable=not sys.stderr.isatty()
            ) as bar,
        ):
            for chunk in answer.iter_content(_CHUNK):
                sink.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise DataError("not enough space", where=target, seen=f"{free:,} bytes free", rule=f"{needed:,} needed")
