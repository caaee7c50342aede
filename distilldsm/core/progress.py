"""Progress of a long loop: on a terminal one line with rate, time left and memory; elsewhere a plain line at times.

DISTILLDSM_PROGRESS selects `bar`, `plain` or `off`. `bar` moves the cursor with `\\r` only and writes no colours.
`plain` writes text lines only, for a log of Kubernetes or a file.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO, TypeVar, get_args

from distilldsm.core.errors import ConfigError
from distilldsm.core.machine import held_memory_bytes
from distilldsm.core.text import one_line, unescaped

T = TypeVar("T")
Mode = Literal["bar", "plain", "off"]
VARIABLE = "DISTILLDSM_PROGRESS"
LOG_EVERY_SECONDS = 30.0
_MEMORY_EVERY_SECONDS = 1.0
_DRAW_EVERY_SECONDS = 0.1


def mode(stream: TextIO | None = None) -> Mode:
    """How progress is shown: as DISTILLDSM_PROGRESS says, else a bar on a capable terminal, else plain lines."""
    asked = os.environ.get(VARIABLE, "")
    if asked in get_args(Mode):
        return asked  # type: ignore[return-value]
    stream = stream or sys.stderr
    return "bar" if stream.isatty() and os.environ.get("TERM") != "dumb" else "plain"


def progress(
    items: Iterable[T], *, total: int | None, title: str, unit: str, brief: bool = False, file: TextIO | None = None
) -> Iterator[T]:
    """Iterate over `items` and show the progress on stderr.

    Args:
        total: number of items; None if it is unknown.
        title: name of the work.
        unit: word for one item.
        brief: show nothing for a loop that ends before the first line is due, e.g. one of many loops.
        file: stream to write to instead of stderr.
    """
    with meter(total=total, title=title, unit=unit, brief=brief, file=file) as shown:
        for item in items:
            yield item
            shown.advance()


@contextmanager
def meter(
    *,
    total: int | None,
    title: str,
    unit: str,
    brief: bool = False,
    initial: int = 0,
    shown: bool = True,
    file: TextIO | None = None,
) -> Iterator[Meter]:
    """Yield a meter to advance at each step. If the block ends with an error, no closing line is written.

    Args:
        unit: word for one step; `B` counts bytes.
        initial: steps done before.
        shown: False shows nothing, e.g. in all processes of a training but the first.
    """
    file = unescaped(file or sys.stderr)
    kind = {"bar": _Bar, "plain": _Plain, "off": Meter}[mode(file) if shown else "off"]
    made = kind(total=total, title=one_line(title), unit=unit, brief=brief, initial=initial, file=file)
    try:
        yield made
    except BaseException:
        made.close(whole=False)
        raise
    made.close(whole=True)


class Meter:
    """Counts steps and shows nothing."""

    def __init__(self, *, total: int | None, title: str, unit: str, brief: bool, initial: int, file: TextIO) -> None:
        self.total, self.title, self.unit, self.brief, self.file = total, title, unit, brief, file
        self.initial = self.done = initial
        self.begun = self.told = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more steps; `note` is added to the line, e.g. the loss."""
        self.done += count

    def close(self, *, whole: bool) -> None:
        """End the progress line; `whole` says that all steps are done."""

    def _say(self, *words: str) -> None:
        print(f"{self.title}: {', '.join(filter(None, words))}", file=self.file, flush=True)

    def _say_end(self) -> None:
        done, seconds = self.done - self.initial, time.monotonic() - self.begun
        text = f"{self.done / 1e6:,.1f} MB" if self.unit == "B" else f"{done} {_plural(self.unit, done)}"
        self._say(f"{text} in {seconds:.1f} s", memory_text())


class _Plain(Meter):
    def advance(self, count: int = 1, note: str = "") -> None:
        super().advance(count, note)
        now = time.monotonic()
        if now - self.told >= LOG_EVERY_SECONDS and self.done != self.total:
            self.told = now
            self._say(self._count(), *self._rate(now - self.begun), note, memory_text())

    def close(self, *, whole: bool) -> None:
        if whole and self.done and (not self.brief or self.told > self.begun):
            self._say_end()

    def _count(self) -> str:
        if self.unit == "B":
            of = "" if self.total is None else f" of {self.total / 1e6:,.1f}"
            share = f" ({self.done / self.total:.0%})" if self.total else ""
            return f"{self.done / 1e6:,.1f}{of} MB{share}"
        return f"{self.done}{'' if self.total is None else f'/{self.total}'} {_plural(self.unit, self.total or 2)}"

    def _rate(self, seconds: float) -> list[str]:
        rate = max(self.done - self.initial, 1e-9) / max(seconds, 1e-9)
        if self.unit == "B":
            words = [f"{rate / 1e6:.1f} MB/s"]
        else:
            words = [f"{rate:.1f} {_plural(self.unit, 2)}/s" if rate >= 1 else f"{1 / rate:.1f} s/{self.unit}"]
        if self.total is not None:
            words.append(f"about {duration((self.total - self.done) / rate)} left")
        return words


class _Bar(Meter):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no monitor thread: processes are forked while a bar is shown
        self._memory, self._memory_told = "", 0.0
        _open_bars.append(self)
        self._bar = tqdm(
            total=self.total,
            initial=self.initial,
            desc=self.title,
            unit=self.unit,
            unit_scale=self.unit == "B",
            file=self.file,
            leave=False,
            mininterval=_DRAW_EVERY_SECONDS,
            **({"dynamic_ncols": True} if _columns(self.file) else {"ncols": 80}),
        )

    def advance(self, count: int = 1, note: str = "") -> None:
        super().advance(count, note)
        now = time.monotonic()
        if now - self._memory_told >= _MEMORY_EVERY_SECONDS:
            self._memory, self._memory_told = memory_text(), now
        self._bar.set_postfix_str(", ".join(filter(None, (note, self._memory))), refresh=False)
        self._bar.update(count)

    def close(self, *, whole: bool) -> None:
        if self in _open_bars:
            _open_bars.remove(self)
        self._bar.close()
        if whole and self.done and not self.brief:
            self._say_end()


_open_bars: list[_Bar] = []


def close_bars() -> None:
    """End all progress lines, so that an error starts on a new line. A traceback would keep the loops alive."""
    for bar in list(_open_bars):
        bar.close(whole=False)


@contextmanager
def beside_the_bar() -> Iterator[None]:
    """Print inside this block without breaking the progress line."""
    if not _open_bars:
        yield
        return
    with sys.modules["tqdm"].tqdm.external_write_mode(file=sys.stdout):
        yield


def duration(seconds: float) -> str:
    """A duration for people: in seconds, in minutes, or in hours and minutes."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def seconds_of(text: str, *, where: str) -> float:
    """The seconds of a time such as `60 min`, `1.5 h` or `90 s`.

    Raises:
        ConfigError: it is not such a time.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", text)
    seconds = float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]] if found else 0.0
    if seconds <= 0:
        raise ConfigError(
            "is not a time", where=where, seen=text, rule="a number and s, min or h", hint='e.g. "60 min"'
        )
    return seconds


def memory_text() -> str:
    """Memory held now, e.g. `1.2 GB`; empty if the system does not report it."""
    held = held_memory_bytes()
    return f"{held / 1e9:.1f} GB" if held >= 1e8 else f"{held / 1e6:.0f} MB" if held else ""


def _columns(stream: TextIO) -> int:
    """Width of a terminal; 0 if it is unknown, e.g. in a container."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def _plural(unit: str, count: int) -> str:
    return unit if count == 1 else f"{unit}s"
