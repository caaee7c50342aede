"""Escapes names and other foreign text, one function for each kind of output. HTML: the templates of `report` do it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move the cursor, colour the terminal, end a line or turn the direction of text (not newline and tab),
and the bytes of a file name that are not UTF-8."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
"""First characters of a cell that a spreadsheet would compute; and the mark of those that are escaped."""


def printable(text: str) -> str:
    """Text for a terminal or a log; newlines and tabs stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(name: object) -> str:
    """A name for a terminal or a log: it cannot begin a line of its own."""
    return printable(str(name)).replace("\n", "\\n").replace("\t", "\\t")


def is_plain(name: str) -> bool:
    """Whether a name is one line without control characters, so that it looks the same everywhere."""
    return one_line(name) == name


def markdown(text: object) -> str:
    """Text inside a paragraph or a table of Markdown: no markup, no HTML, no new line."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", one_line(" ".join(str(text).split())))


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file: a text that a spreadsheet would compute as a formula gets a ' in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def from_csv_cell(text: str) -> str:
    """The text that `csv_cell` was given."""
    return text[1:] if text.startswith("'") else text


class _Escaped:
    """A text stream that writes `printable` text."""

    def __init__(self, stream: Any) -> None:
        self._wrapped = stream  # tqdm compares streams by this attribute of its own wrapper

    def write(self, text: str) -> int:
        return int(self._wrapped.write(printable(text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Inside the block, all text that is printed is `printable`, and no character is an error where it is unknown."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # Closed by the caller (>&-). The null device takes its number, else the next file that we write would, and
            # libraries would print into it.
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    before = sys.stdout, sys.stderr
    for stream in before:
        with contextlib.suppress(AttributeError, ValueError):  # not a file, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout, sys.stderr = (one if isinstance(one, _Escaped) else _Escaped(one) for one in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def unescaped(stream: Any) -> Any:
    """The stream below `escaped_output`, for our own colours and progress lines."""
    return stream._wrapped if isinstance(stream, _Escaped) else stream
