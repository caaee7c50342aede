"""Converts values to a form that MLflow accepts, and lists the tags with the versions of code and data."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from distilldsm.core import redaction
from distilldsm.core.provenance import provenance
from distilldsm.core.version import __version__

KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH, DIGEST_LENGTH = 250, 6000, 5000, 36


def version_tags() -> dict[str, str]:
    """Tags with the versions of the code and the data."""
    tags = {"distilldsm.version": __version__, "mlflow.source.type": "LOCAL", "mlflow.source.name": sys.argv[0] or "-"}
    with contextlib.suppress(Exception):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    facts = provenance()
    if "git_commit" in facts:
        tags["mlflow.source.git.commit"] = facts["git_commit"]
    if "kfp_run_id" in facts:
        tags["kfp.pipeline_run_id"] = facts["kfp_run_id"]  # the name that KFP's MLflow plugin uses
    return tags | facts


def key_name(name: object) -> str:
    """A valid MLflow name: letters, digits and some punctuation; no path that leaves its folder."""
    name = re.sub(r"[^\w .:/-]", "_", str(name))[:KEY_LENGTH]
    parts = name.split("/")
    return "_".join(parts) if {"", ".", ".."} & set(parts) else name


def texts(values: Mapping[str, Any], length: int) -> dict[str, str]:
    """Valid names and values for MLflow's parameters and tags; values have at most `length` characters."""
    return {key_name(key): text(value, length) for key, value in values.items()}


def text(value: Any, length: int) -> str:
    """A string unchanged, any other value as JSON. Text over `length` characters is cut and ends in its SHA-256."""
    whole = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
    if len(whole) <= length:
        return whole
    return f"{whole[: length - 40]}... (sha256 {hashlib.sha256(whole.encode()).hexdigest()[:16]})"


def plain(value: Any) -> Any:
    """The value in strict JSON types: NumPy numbers become Python's, NaN and infinities null, other types text."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def encode_number(value: float) -> float | str:
    """A float for strict JSON: NaN and infinities become text that `float` can read."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def clean(error: BaseException | str) -> str:
    """An error's text for users: one line, without passwords, at most 600 characters."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return redaction.redact(" ".join(text.split()))[:600]
