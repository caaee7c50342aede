"""The only readers and writers of scans and labels.

The interface is `read_scan`, `read_labels` and `write_mask`. formats.py lists the formats; header_rules.py says which
headers are allowed. Names are imported at their first use, because the import of nibabel is slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distilldsm.io.formats import Channel, Labels, Scan, read_labels, read_scan, write_mask

__all__ = ["Channel", "Labels", "Scan", "read_labels", "read_scan", "write_mask"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distilldsm.io import formats

    return getattr(formats, name)
