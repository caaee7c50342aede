"""One progress line on a terminal, plain lines at sensible intervals elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
LOG_EVERY_SECONDS = 30.0


def progress(items: Iterable[T], *, total: int, title: str, unit: str) -> Iterator[T]:
    """Iterate over `items` and tell how far it is, on stderr."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=title, unit=unit, leave=False)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= LOG_EVERY_SECONDS and done < total:
            last = now
            remaining = (now - start) / done * (total - done)
            print(f"{title}: {done}/{total} {unit}s, about {remaining:.0f} s left", file=sys.stderr, flush=True)
    if total:
        print(f"{title}: {total} {unit}s in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
