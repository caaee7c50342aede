"""Downloads archives: with resuming, retries, mirrors and checksums."""

from __future__ import annotations

import hashlib
import json
import os
import random
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
from distilldsm.core.hashes import is_as_kept, keep
from distilldsm.core.interruption import explains_interrupt
from distilldsm.core.machine import check_space
from distilldsm.core.progress import meter
from distilldsm.core.redaction import public_address, redact

ATTEMPTS = 5
"""Tries per address before the next mirror. A try that gets further than all earlier ones resets the count."""
TIMEOUT_SECONDS = (10.0, 60.0)
"""Timeout for the connection, and between two packets."""
_CHUNK = 1 << 20
_NO_SPACE_HINT = "free space, or set download.archive_dir to another disk"
_GONE = {400, 401, 403, 404, 410, 451}
"""HTTP status codes for which another try is useless."""
_LOCAL = {"localhost", "127.0.0.1", "::1"}


class _GiveUpError(Exception):
    """This address cannot serve the file."""


@dataclass(frozen=True)
class _Checksums:
    sha256: str | None
    md5: str | None

    def problem(self, path: Path) -> str | None:
        """The error of the file; None if its checksums are right, or there is nothing to check."""
        for name, expected in (("sha256", self.sha256), ("md5", self.md5)):
            if expected is None:
                continue
            with open(path, "rb") as stream:
                seen = hashlib.file_digest(stream, name).hexdigest()
            if seen != expected.lower():
                return f"wrong {name}: {seen}, expected {expected.lower()}"
        return None


def is_url(source: str) -> bool:
    """Whether a source is an address and not a path."""
    return _scheme(source) in ("http", "https", "file")


def local_path(source: str) -> Path | None:
    """The path of a `file://` address or of a plain path (`~` is the home folder); None for http(s)."""
    if _scheme(source) == "file":
        return Path(url2pathname(urlsplit(source).path))
    return None if is_url(source) else Path(source).expanduser()


def _scheme(source: str) -> str:
    return source.partition("://")[0].lower()


@dataclass(frozen=True)
class Credentials:
    """Login data for the server of `address` only. They are never sent to a mirror or to the target of a redirect."""

    address: str
    username: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    signature: str = field(default="", repr=False)
    """The query of a signed address, e.g. `X-Amz-Signature=...&X-Amz-Date=...`."""

    @classmethod
    def from_environment(cls, address: str) -> Credentials:
        """Read DISTILLDSM_DOWNLOAD_USERNAME and _PASSWORD, or _TOKEN (bearer token), or _SIGNATURE. All are optional.

        Raises:
            ConfigError: the address is none, a user has no password, there are a password and a token, or the
                address is unencrypted.
        """
        names = ("username", "password", "token", "signature")
        found = {name: os.environ.get(f"DISTILLDSM_DOWNLOAD_{name.upper()}", "") for name in names}
        variables = ", ".join(f"DISTILLDSM_DOWNLOAD_{name.upper()}" for name, value in found.items() if value)
        if bool(found["username"]) != bool(found["password"]) or (found["password"] and found["token"]):
            rule = "DISTILLDSM_DOWNLOAD_USERNAME and _PASSWORD, or DISTILLDSM_DOWNLOAD_TOKEN"
            raise ConfigError("cannot tell how to log in for the download", seen=f"set: {variables}", rule=rule)
        try:
            is_private = _is_private(address)
        except ValueError as error:
            raise ConfigError(
                "is not an address", where="download.source", seen=f"{public_address(address)}: {error}"
            ) from None
        if variables and is_url(address) and not is_private:
            raise ConfigError(
                "the password would be sent unencrypted",
                where="download.source",
                seen=f"{public_address(address)} and {variables}",
                rule="https:// if the environment holds a secret for the address",
            )
        return cls(address, **found)

    def applied(self, url: str) -> tuple[str, Callable[[Any], Any] | None]:
        """The address to request, and the function that adds a login to a request of requests, if there is one."""
        mine, other = urlsplit(self.address), urlsplit(url)
        if (mine.scheme, mine.netloc) != (other.scheme, other.netloc):
            return url, None
        if self.signature:
            url += ("&" if other.query else "?") + self.signature.lstrip("?&")
        if self.token:
            return url, self._bear
        if not self.username:
            return url, None
        from requests.auth import HTTPBasicAuth

        return url, HTTPBasicAuth(self.username.encode(), self.password.encode())

    def _bear(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self.token}".encode()
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
    """Download a file to `target` from the first address that serves it completely and with the right checksum.

    An existing file with the right checksum (without one to check: with the bytes that were fetched) is used. An
    interrupted download stays beside
    the target as `.part`. It is resumed with an HTTP range request if the server still has the same file (ETag or
    Last-Modified). The target is complete from the start, because it is renamed at the end.

    Args:
        urls: http(s):// or file:// addresses or paths, in the order to try them.
        sha256, md5: expected checksums, hex.
        credentials: login data; they are used for their own server only.
        sleep: function that waits between two tries, seconds.

    Raises:
        DataError: no address served the file (the error lists each answer), or there is not enough space.
        UserError: another process is fetching the same file.
    """
    target = Path(target)
    checksums = _Checksums(sha256, md5)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        if is_as_kept(target) and checksums.problem(target) is None:
            return target
        answers = []
        for url in urls:
            problem = _fetch_checked(url, target, checksums, credentials, sleep)
            if problem is None:
                os.replace(_part(target), target)
                keep(target, noted=sha256 is None and md5 is None)
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
    """File that stores which version of the remote file the `.part` file belongs to."""
    return target.with_name(target.name + ".part.json")


def _validator(target: Path) -> str | None:
    """ETag or date of the remote file to which the `.part` file belongs; None if it is unknown."""
    try:
        found = json.loads(_sidecar(target).read_text(encoding="utf-8"))["validator"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # with a damaged note, the download only starts again
    return found if isinstance(found, str) else None


def _fetch_checked(
    url: str, target: Path, checksums: _Checksums, credentials: Credentials | None, sleep: Callable[[float], None]
) -> str | None:
    """Download `url` into the part file and check it. Returns the error, or None."""
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
        # The beginning may come from another mirror or an older version: try this address once from the start.
    return problem


def _fetch_one(url: str, target: Path, credentials: Credentials | None, sleep: Callable[[float], None]) -> bool:
    """Download `url` completely into the part file. Returns whether it started from the first byte."""
    path = local_path(url)
    if path is not None:
        if not path.is_file():
            raise _GiveUpError("no such file")
        check_space(target.parent, path.stat().st_size, hint=_NO_SPACE_HINT)
        _sidecar(target).unlink(missing_ok=True)  # the copied file has nothing to do with the server's version
        shutil.copyfile(path, _part(target))
        return True
    import requests

    # A ValueError: an address that cannot be parsed, here or as the target of a redirect.
    hopeless = (ValueError, requests.exceptions.InvalidSchema, requests.exceptions.TooManyRedirects)
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
            raise _GiveUpError(redact(str(error))) from None
        except requests.RequestException as error:
            problem = redact(str(error))
        failures += 1
        # Compare with the best try so far, not with the last one: a server that always starts again may get further
        # than the last time by chance, and we would try for ever.
        fruitless = 0 if _size(part) > best > 0 else fruitless + 1
        best = max(best, _size(part))
    raise _GiveUpError(f"{problem} (after {failures} tries)")


def _is_private(url: str) -> bool:
    """Whether nobody on the way can read a request to this address."""
    parts = urlsplit(url)
    return parts.scheme in ("https", "file") or parts.hostname in _LOCAL


def _from_netrc(request: Any) -> Any:
    """Add the login that `.netrc` has for the request's server. Unlike requests, only if nobody on the way reads it."""
    from requests.auth import HTTPBasicAuth
    from requests.utils import get_netrc_auth

    login = get_netrc_auth(request.url) if _is_private(request.url) else None
    return HTTPBasicAuth(*login)(request) if login else request


def _session() -> Any:
    """A session that never takes a login to the target of a redirect on another server."""
    import requests

    class Session(requests.Session):
        def rebuild_auth(self, prepared_request: Any, response: Any) -> None:
            # requests would also look the new server up in .netrc.
            before, after = urlsplit(response.request.url), urlsplit(prepared_request.url)
            if (before.scheme, before.netloc) != (after.scheme, after.netloc):
                prepared_request.headers.pop("Authorization", None)

    return Session()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download(url: str, target: Path, credentials: Credentials | None) -> tuple[bool, bool]:
    """One try. Returns whether the part file is complete now, and whether the try resumed an older part."""
    part = _part(target)
    have = _size(part)
    validator = _validator(target) if have else None
    headers = {"Accept-Encoding": "identity"}
    if have and validator:
        # If-Range: the server sends the rest only if it still has the same file.
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    asked, login = credentials.applied(url) if credentials else (url, None)
    request = {"headers": headers, "stream": True, "timeout": TIMEOUT_SECONDS, "auth": login or _from_netrc}
    with _session() as session, session.get(asked, **request) as answer:
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
            part.unlink(missing_ok=True)  # the server sent another range than requested
            return False, False
        if not resumed:
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length and length.isascii() and length.isdigit() else None
        check_space(target.parent, (total or 0) - have, hint=_NO_SPACE_HINT)
        if not resumed:
            # Delete the old bytes before the new note is written: a note must never describe bytes of another version.
            part.unlink(missing_ok=True)
            found = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            # A weak ETag does not guarantee the same bytes.
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
