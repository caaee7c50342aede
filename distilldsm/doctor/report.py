"""The doctor's findings as text for a person, or as JSON for a program."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TextIO

from distilldsm.core.text import one_line
from distilldsm.core.version import __version__
from distilldsm.doctor.checks import STATUSES, Finding, Status

_COLOURS: Mapping[Status, int] = {"ok": 32, "warn": 33, "fail": 31, "skip": 90}
_WIDEST_NAME = 28


def has_failed(findings: Sequence[Finding]) -> bool:
    return any(one.status == "fail" for one in findings)


def wants_colour(stream: TextIO) -> bool:
    """Whether colours are shown: on a terminal that supports them, unless NO_COLOR is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def render(findings: Sequence[Finding], seconds: float, *, colour: bool, width: int | None = None) -> str:
    """Aligned lines; a finding that is not ok has its hint below."""
    name_width = min(max(len(one.name) for one in findings), _WIDEST_NAME)
    room = max((width or shutil.get_terminal_size((120, 24)).columns) - name_width - 8, 40)
    lines: list[str] = []
    for one in findings:
        status = f"\x1b[{_COLOURS[one.status]}m{one.status:4}\x1b[0m" if colour else f"{one.status:4}"
        first, *rest = textwrap.wrap(one_line(one.seen), room, break_on_hyphens=False) or [""]
        lines.append(f"{status}  {one_line(one.name):{name_width}}  {first}".rstrip())
        if one.hint and one.status != "ok":
            rest += textwrap.wrap(f"hint: {one_line(one.hint)}", room, break_on_hyphens=False)
        lines += [" " * (name_width + 8) + line for line in rest]
    counts = Counter(one.status for one in findings)
    words = {"ok": "ok", "warn": "warnings", "fail": "failed", "skip": "skipped"}
    totals = ", ".join(f"{counts[status]} {words[status]}" for status in STATUSES)
    return "\n".join([*lines, "", f"{totals} ({seconds:.1f} s)"])


def to_json(findings: Sequence[Finding], seconds: float) -> str:
    """`{"version", "ok", "seconds", "checks": [{"name", "status", "seen", "hint"}]}`."""
    checks = [asdict(one) for one in findings]
    answer = {"version": __version__, "ok": not has_failed(findings), "seconds": round(seconds, 1), "checks": checks}
    return json.dumps(answer, indent=2)
