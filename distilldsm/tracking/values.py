"""What is written into a run: values in the form that MLflow takes, and tags that lead back to code and data."""

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
    """What leads from the run back to the code and the data."""
    tags = {"distilldsm.version": __version__, "mlflow.source.type": "LOCAL", "mlflow.source.name": sys.argv[0] or "-"}
    with contextlib.suppress(Exception):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    facts = provenance()
    if "git_commit" in facts:
        tags["mlflow.source.git.commit"] = facts["git_commit"]
    return tags | facts


def key_name(name: object) -> str:
    """A name that MLflow takes: letters, digits and a little punctuation, and no path that leads elsewhere."""
    name = re.sub(r"[^\w .:/-]", "_", str(name))[:KEY_LENGTH]
    parts = name.split("/")
    return "_".join(parts) if {"", ".", ".."} & set(parts) else name


def texts(values: Mapping[str, Any], length: int) -> dict[str, str]:
    """Names and values as MLflow's parameters and tags take them, values of at most `length` characters."""
    return {key_name(key): text(value, length) for key, value in values.items()}


def text(value: Any, length: int) -> str:
    """A parameter as YAML would show it; an over-long one ends in a hash of the whole."""
    whole = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
    if len(whole) <= length:
        return whole
    return f"{whole[: length - 40]}... (sha256 {hashlib.sha256(whole.encode()).hexdigest()[:16]})"


def plain(value: Any) -> Any:
    """Only what strict JSON knows: numbers of numpy become Python's, NaN and infinities null, anything else text."""
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
    """A float for strict JSON: NaN and the infinities become text, which `float` reads back."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def clean(error: BaseException | str) -> str:
    """An error's text for a person: one line, no passwords, not endless."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return redaction.redact(" ".join(text.split()))[:600]
