"""Fetching archives: resumed, retried, mirrored, checked."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock, Timeout

from distilldsm.core.errors import ConfigError, DataError, UserError
from distilldsm.core.files import write_json
from distilldsm.core.interruption import explains_interrupt
from distilldsm.core.machine import check_space
from distilldsm.core.progress import meter
from distilldsm.core.redaction import public_address, redact

ATTEMPTS = 5
"""Tries per address before the next mirror; one that got further than all before starts the count anew."""
TIMEOUT_SECONDS = (10.0, 60.0)
"""To connect, and between two packets."""
_CHUNK = 1 << 20
_NO_SPACE_HINT = "free space, or set download.archive_dir to another disk"
_GONE = {400, 401, 403, 404, 410, 451}
"""Answers that another try will not change."""
_QUERY = re.compile(r"\?[^\s)'\"]+=[^\s)'\"]*")
_LOCAL = {"localhost", "127.0.0.1", "::1"}


class _GiveUpError(Exception):
    """This address will not serve the file."""


@dataclass(frozen=True)
class _Checksums:
    sha256: str | None
    md5: str | None

    def problem(self, path: Path) -> str | None:
        """What is wrong with the file, None if nothing is (or there is nothing to check)."""
        for name, expected in (("sha256", self.sha256), ("md5", self.md5)):
            if expected is None:
                continue
            with open(path, "rb") as stream:
                seen = hashlib.file_digest(stream, name).hexdigest()
            if seen != expected.lower():
                return f"wrong {name}: {seen}, expected {expected.lower()}"
        return None


def is_url(source: str) -> bool:
    """Whether a source is an address rather than a path."""
    return urlsplit(source).scheme in ("http", "https", "file")


def local_path(source: str) -> Path | None:
    """The path a `file://` address or plain path (with `~` for the home folder) names; None for http."""
    parts = urlsplit(source)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return None if parts.scheme in ("http", "https") else Path(source).expanduser()


@dataclass(frozen=True)
class Credentials:
    """What a server asks for, for the server of `address` only: never a mirror's, never where a redirect leads to."""

    address: str
    username: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    signature: str = field(default="", repr=False)
    """The query of a signed address, e.g. `X-Amz-Signature=...&X-Amz-Date=...`."""

    @classmethod
    def from_environment(cls, address: str) -> Credentials:
        """DISTILLDSM_DOWNLOAD_USERNAME and _PASSWORD, or _TOKEN (a bearer's), or _SIGNATURE; none of them: no secret.

        Raises:
            ConfigError: a user without a password, both a password and a token, or an address that is not encrypted.
        """
        names = ("username", "password", "token", "signature")
        found = {name: os.environ.get(f"DISTILLDSM_DOWNLOAD_{name.upper()}", "") for name in names}
        given = ", ".join(f"DISTILLDSM_DOWNLOAD_{name.upper()}" for name, value in found.items() if value)
        if bool(found["username"]) != bool(found["password"]) or (found["password"] and found["token"]):
            rule = "DISTILLDSM_DOWNLOAD_USERNAME and _PASSWORD, or DISTILLDSM_DOWNLOAD_TOKEN"
            raise ConfigError("cannot tell how to log in for the download", seen=f"set: {given}", rule=rule)
        parts = urlsplit(address)
        if given and parts.scheme == "http" and parts.hostname not in _LOCAL:
            raise ConfigError(
                "a password would go over the network for all to read",
                where="download.source",
                seen=f"{public_address(address)} and {given}",
                rule="https:// where the environment holds a secret for it",
            )
        return cls(address, **found)

    def applied(self, url: str) -> tuple[str, dict[str, Any]]:
        """The address to ask for, and requests' arguments."""
        mine, other = urlsplit(self.address), urlsplit(url)
        if (mine.scheme, mine.netloc) != (other.scheme, other.netloc):
            return url, {}
        if self.signature:
            url += ("&" if other.query else "?") + self.signature.lstrip("?&")
        if self.token:
            return url, {"auth": self._bear}
        return url, {"auth": (self.username, self.password)} if self.username else {}

    def _bear(self, request: Any) -> Any:
        # As `auth` and not as a header: else requests would prefer an entry of .netrc.
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request


def fetch(
    urls: Sequence[str],
    target: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    md5: str | None = None,
    credentials: Credentials | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Bring a file to `target` from the first address that serves it whole and with the right checksum.

    A file that is already there and has the right checksum (or none to check) is used as it is. An interrupted download
    lies beside the target as `.part` and is continued with an HTTP range request, as long as the server still has the
    same file (ETag or Last-Modified). The target appears whole, by a rename.

    Args:
        urls: http(s):// or file:// addresses or paths, in the order to try them.
        sha256, md5: expected checksums, hex.
        credentials: for the one server that they name.
        sleep: waits between two tries, seconds.

    Raises:
        DataError: no address served the file (tells what each of them answered), or there is not enough space.
        UserError: another process is fetching the same file.
    """
    target = Path(target)
    checksums = _Checksums(sha256, md5)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        if target.is_file() and checksums.problem(target) is None:
            return target
        answers = []
        for url in urls:
            problem = _fetch_checked(url, target, checksums, credentials, sleep)
            if problem is None:
                os.replace(_part(target), target)
                _sidecar(target).unlink(missing_ok=True)
                return target
            answers.append(f"{public_address(url) if is_url(url) else url}: {problem}")
    raise DataError(
        "could not be fetched",
        where=target,
        seen="\n    ".join(answers) or "no address",
        hint="check the address, the network and download.sha256; or download it yourself and name the file",
    )


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    name = target.with_name(f".{target.name}.lock")
    lock = FileLock(name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            "another process is fetching this file", where=target, hint="wait for it, or stop it, then run again"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not remove a file that is open
            name.unlink()
        lock.release()


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _sidecar(target: Path) -> Path:
    """Where the version of the file that the part belongs to is remembered."""
    return target.with_name(target.name + ".part.json")


def _validator(target: Path) -> str | None:
    """The ETag or date of the file whose beginning the part is; None where that is not known."""
    try:
        found = json.loads(_sidecar(target).read_text(encoding="utf-8"))["validator"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a damaged note costs a new start, no more
    return found if isinstance(found, str) else None


def _fetch_checked(
    url: str, target: Path, checksums: _Checksums, credentials: Credentials | None, sleep: Callable[[float], None]
) -> str | None:
    """Download `url` into the part file and check it; returns what went wrong."""
    problem = None
    for _ in range(2):
        try:
            from_start = _fetch_one(url, target, credentials, sleep)
        except _GiveUpError as error:
            return str(error)
        problem = checksums.problem(_part(target))
        if problem is None:
            return None
        _part(target).unlink()
        if from_start:
            break
        # The beginning may come from another mirror or day: the address deserves one try of its own.
    return problem


def _fetch_one(url: str, target: Path, credentials: Credentials | None, sleep: Callable[[float], None]) -> bool:
    """Download `url` completely into the part file; returns whether all of it came in this call."""
    path = local_path(url)
    if path is not None:
        if not path.is_file():
            raise _GiveUpError("no such file")
        check_space(target.parent, path.stat().st_size, hint=_NO_SPACE_HINT)
        _sidecar(target).unlink(missing_ok=True)  # what is copied now is not what a server's version speaks of
        shutil.copyfile(path, _part(target))
        return True
    import requests

    hopeless = (
        requests.exceptions.InvalidURL,
        requests.exceptions.InvalidSchema,
        requests.exceptions.TooManyRedirects,
    )
    part = _part(target)
    best, problem = _size(part), ""
    from_start, failures, fruitless = best == 0, 0, 0
    while fruitless < ATTEMPTS:
        if failures:
            sleep(min(2.0**failures, 60.0) * (0.5 + random.random() / 2))  # noqa: S311 - jitter, no secret
        try:
            whole, resumed = _download(url, target, credentials)
            from_start = from_start or not resumed
            if whole:
                return from_start
            problem = "the connection ended early"
        except hopeless as error:
            raise _GiveUpError(_hide_query(error, url)) from None
        except requests.RequestException as error:
            problem = _hide_query(error, url)
        failures += 1
        # Compared with the best so far, not with the last try: a server that always starts again may get a little
        # further by chance now and then, and must not keep us here for ever.
        fruitless = 0 if _size(part) > best > 0 else fruitless + 1
        best = max(best, _size(part))
    raise _GiveUpError(f"{problem} (after {failures} tries)")


def _hide_query(error: Exception, url: str) -> str:
    """The error without the queries in it: that of a redirect's target may be a signature too."""
    return redact(_QUERY.sub("", str(error).replace(url, public_address(url))))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download(url: str, target: Path, credentials: Credentials | None) -> tuple[bool, bool]:
    """One try; returns whether the part file is whole now, and whether it continued what was there."""
    import requests

    part = _part(target)
    have = _size(part)
    validator = _validator(target) if have else None
    headers = {"Accept-Encoding": "identity"}
    if have and validator:
        # If-Range: the server sends the rest only if its file is still the one we began with.
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    asked, options = credentials.applied(url) if credentials else (url, {})
    with requests.get(asked, headers=headers, stream=True, timeout=TIMEOUT_SECONDS, **options) as answer:
        if answer.status_code in _GONE:
            raise _GiveUpError(f"HTTP {answer.status_code}")
        span = answer.headers.get("Content-Range", "")
        if answer.status_code == 416:
            if have and span == f"bytes */{have}":  # stopped between the last byte and the rename
                return True, True
            part.unlink(missing_ok=True)
            return False, False
        answer.raise_for_status()
        resumed = answer.status_code == 206
        if resumed and not (have and span.startswith(f"bytes {have}-")):
            part.unlink(missing_ok=True)  # another range than the one asked for
            return False, False
        if not resumed:
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        check_space(target.parent, (total or 0) - have, hint=_NO_SPACE_HINT)
        if not resumed:
            # The old bytes go before the new note comes: at no time does a note vouch for bytes of another version.
            part.unlink(missing_ok=True)
            found = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            # A weak ETag does not promise the same bytes.
            strong = None if (found or "W/").startswith("W/") else found
            write_json(_sidecar(target), {"validator": strong, "address": public_address(url)})
        with (
            explains_interrupt(lambda: f"{target.name}: {_size(part) / 1e6:,.1f} MB are kept"),
            open(part, "ab") as sink,
            meter(total=total, initial=have, title=target.name, unit="B") as shown,
        ):
            for chunk in answer.iter_content(_CHUNK):
                sink.write(chunk)
                shown.advance(len(chunk))
    return total is None or _size(part) == total, resumed
