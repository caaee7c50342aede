"""Finds the cases in a folder by file name patterns such as `*/{case}/flair.nii.gz`."""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from distilldsm.config import PatternConfig
from distilldsm.core.errors import DataError
from distilldsm.core.shell import time_limit
from distilldsm.data.archive import is_litter, wrapped

_SHOWN = 10
SECONDS_PER_NAME = 1.0
"""Time for one pattern on one name. Some patterns take hours on a name that they do not match."""


@dataclass(frozen=True)
class Files:
    """The files of one case, as paths relative to the data set's root."""

    id: str
    images: tuple[str, ...]
    label: str


def some(findings: Sequence[str]) -> str:
    """The first findings as text, and how many more there are."""
    more = f" and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
    return ", ".join(findings[:_SHOWN]) + more


def find_cases(root: Path, pattern: PatternConfig) -> tuple[Path, list[Files]]:
    """Find all cases: `{case}` in the label pattern gives the ids, and the image patterns must match the same ids.

    Scans without a label are listed on stderr.

    Returns:
        The folder to which the patterns are relative (the root, or the only folder in it), and the cases.

    Raises:
        DataError: no label matches, or a pattern does not match exactly one file for each case.
    """
    inner, files, labels = root, [], {}
    for inner in wrapped(root):
        files = list(_walk(inner))
        if labels := matches(pattern.label, files):
            break
    else:
        raise DataError(
            "no file matches the label pattern",
            where=inner,
            seen=f"{pattern.label}, among files such as {', '.join(files[:3]) or '(none)'}",
            hint="correct download.pattern.label",
        )
    images = [matches(image, files) for image in pattern.images]
    problems, cases = [], []
    for case, label in labels.items():
        for wanted, hits in [
            (pattern.label, label),
            *zip(pattern.images, [m.get(case, []) for m in images], strict=True),
        ]:
            if len(hits) != 1:
                problems.append(f"case {case}: {len(hits)} files match {wanted.replace('{case}', case)}")
        cases.append(Files(case, tuple(m[case][0] for m in images if m.get(case)), label[0]))
    if problems:
        raise DataError(
            "the patterns do not name one file each", where=inner, seen=some(problems), hint="correct download.pattern"
        )
    masks = {name for hits in labels.values() for name in hits}  # a scan's pattern may match them too
    scans = {case for found in images for case, hits in found.items() if case not in labels and masks.isdisjoint(hits)}
    if scans:
        print(
            f"{inner}: {len(scans)} scans have no file that matches {pattern.label} and are left out: "
            f"{some(sorted(scans))}",
            file=sys.stderr,
        )
    return inner, cases


def _walk(root: Path) -> Iterator[str]:
    """All files below `root`, as sorted relative POSIX paths, without system files. Linked folders count once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(names):
            relative = (Path(folder) / name).relative_to(root)
            if not is_litter(PurePosixPath(relative)):
                yield relative.as_posix()


def limited(pattern: str, name: str) -> AbstractContextManager[None]:
    """A context that refuses a pattern that takes longer than SECONDS_PER_NAME on a name."""
    error = DataError(
        "a pattern takes too long",
        where=name,
        seen=pattern,
        rule=f"at most {SECONDS_PER_NAME:g} s for a name",
        hint="use a simpler pattern, with fewer * or nested repetitions",
    )
    return time_limit(SECONDS_PER_NAME, error)


def matches(pattern: str, files: Sequence[str]) -> dict[str, list[str]]:
    """Case id to the files that match a pattern with `{case}`, `*`, `?` (within a name) and `**/` (any folders)."""
    parts = re.split(r"(\{case\}|\*\*/|\*|\?)", pattern.removeprefix("./"))
    special = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    text, seen = "", False
    for part in parts:
        if part == "{case}":
            text, seen = text + ("(?P=case)" if seen else "(?P<case>[^/]+)"), True
        else:
            text += special.get(part, re.escape(part))
    matcher = re.compile(text)
    found = defaultdict(list)
    for file in files:
        with limited(pattern, file):
            match = matcher.fullmatch(file)
        if match:
            found[match["case"]].append(file)
    return dict(found)
