"""Checks that DVC's remote can be written and read, with one small object that is deleted at once."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvc.config import Config
from dvc.fs import get_cloud_fs

from distilldsm.core.errors import UserError
from distilldsm.core.redaction import public_address
from distilldsm.doctor.checks import Finding, clean, leaving_no_folder

NAME = "dvc remote"
_READ_ONLY = ("http", "https")
_REFUSED = re.compile(
    r"denied|forbidden|unauthori[sz]ed|credentials|InvalidAccessKeyId|SignatureDoesNotMatch|\b40[13]\b", re.I
)


def check(limit_s: float) -> list[Finding]:
    """Check the default remote of the repository in the current directory."""
    config = Config(str(Path(".dvc").absolute()))
    remote = config["core"].get("remote")
    if not remote:
        others = ", ".join(config["remote"])
        if others:
            hint = f"dvc remote default {next(iter(config['remote']))}"
            return [Finding(name=NAME, status="warn", seen=f"no default remote (configured: {others})", hint=hint)]
        return [Finding(name=NAME, status="skip", seen="not configured: data and models stay on this machine")]
    url = _public(config["remote"][remote]["url"])
    with _explained(remote, url):
        cls, settings, path = get_cloud_fs(config, name=remote)
        fs = cls(**settings)
        if cls.protocol in _READ_ONLY:
            fs.exists(path)
            return [Finding(name=NAME, status="ok", seen=f"{remote}: {url}: answers (writing was not tested)")]
        if fs.protocol != "local":  # create no folder: in an object store that would be a bucket
            _round_trip(fs, path)
        else:
            with leaving_no_folder(Path(path)):
                Path(path).mkdir(parents=True, exist_ok=True)  # as `dvc push` would
                _round_trip(fs, path)
    return [Finding(name=NAME, status="ok", seen=f"{remote}: {url}: an object was written, read back and deleted")]


def _round_trip(fs: Any, folder: str) -> None:
    path, content = fs.join(folder, f".distilldsm-doctor-{uuid.uuid4().hex}"), uuid.uuid4().bytes
    try:
        fs.pipe_file(path, content)
        if fs.cat_file(path) != content:
            raise OSError("the content read differs from the content written")
    finally:
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)


def _public(url: str) -> str:
    return public_address(url) if "://" in url else url


@contextlib.contextmanager
def _explained(remote: str, url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = clean(f"{type(error).__name__}: {error}", 200)
        if type(error).__name__ == "RemoteMissingDepsError":
            problem = f"a package for {url} is missing"
            hint = f"pip install -c constraints.txt 'dvc[{url.partition('://')[0]}]'"
        elif isinstance(error, PermissionError) or _REFUSED.search(text):
            problem = f"access to {url} is refused"
            hint = "the credentials are missing, expired or do not allow writing; for S3 check AWS_ACCESS_KEY_ID and "
            hint += "AWS_SECRET_ACCESS_KEY, for a folder its owner"
        else:
            problem = f"{url} cannot be used"
            hint = "is the address right (dvc remote list), the disk mounted, the network up?"
        raise UserError(problem, where=remote, seen=text, hint=hint) from None
