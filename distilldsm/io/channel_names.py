"""Checks the channels of a scan against the names of its files, e.g. `patient_t1.nii.gz` given as FLAIR."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from distilldsm.core.errors import ConfigError

Tokens = tuple[str, ...]

SAME = {"t1w": "t1", "t2w": "t2", "pdw": "pd", "t1ce": "t1gd", "t1c": "t1gd"}
"""Names of one contrast; those on the left are read as those on the right."""
KNOWN = frozenset({"t1", "t2", "t1gd", "flair", "pd", "dwi", "adc", "swi", "ct", "pet"})
"""Contrasts whose names mean the same everywhere. A model need not have all of them."""


def check_channel_names(paths: Sequence[Path], stems: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a file whose name ends with another channel than the one it is given for.

    Names are compared as whole words, in upper or lower case: `_t1` is not T1CE. A name that ends with no channel is
    accepted. Names of one case that end with numbers must number the channels from _0000 without a gap.

    Args:
        paths: the files or series of one scan, in order.
        stems: their names without the endings of their formats.
        names: the model's channels, as many as paths.

    Raises:
        ConfigError: names the file, the channel, and the right order if there is one.
    """
    numbered = [re.fullmatch(r"(.*)_(\d{4})", stem) for stem in stems]
    found = {(match[1], match[2]) for match in numbered if match}
    expected = {(case, f"{k:04d}") for case, _ in found for k in range(len(names))}
    if len(names) > 1 and len(found) == len({case for case, _ in found}) * len(names) and found != expected:
        raise ConfigError(
            "the numbers in the names of the files are not those of the model's channels",
            where=paths[0].parent,
            seen=" ".join(path.name for path in paths),
            rule=", ".join(f"_{k:04d} {name}" for k, name in enumerate(names)),
            hint="give the file of every channel; rename the files, if they are the right ones",
        )
    channels = [_tokens(name) for name in names]
    ends = [_end(_tokens(stem), channels) for stem in stems]
    for path, end, channel, name in zip(paths, ends, channels, names, strict=True):
        if end is None or end == channel or not (end in channels or set(channel) <= KNOWN):
            continue
        right = [paths[ends.index(one)] for one in channels if one in ends]
        raise ConfigError(
            "the order of the channels does not match their names" if len(names) > 1 else "is named like another image",
            where=path,
            seen=f"given as {name}",
            rule="the model's channels: " + ", ".join(names),
            hint="give " + " ".join(map(str, right)) if len(right) == len(paths) else "rename the file, if it is right",
        )


def without_channel(stem: str) -> str | None:
    """A file's stem without the channel's number (`_0001`) or contrast (`_t1`) at its end; None if it has neither."""
    match = re.fullmatch(r"(.+)[_-](?:(\d{4})|([A-Za-z0-9]+))", stem)
    if match is None or not (match[2] or {match[3].lower(), SAME.get(match[3].lower(), "")} & KNOWN):
        return None
    return match[1]


def _tokens(text: str) -> Tokens:
    return tuple(SAME.get(token, token) for token in re.findall(r"[a-z0-9]+", text.lower()))


def _end(stem: Tokens, channels: Sequence[Tokens]) -> Tokens | None:
    """The longest name, of the model's channels and the known contrasts, that the stem ends with."""
    every = {*channels, *((name,) for name in KNOWN)}
    return max((one for one in every if one and stem[-len(one) :] == one), key=len, default=None)
