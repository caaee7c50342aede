"""Distill DSM: volumetric segmentation with 2-D networks whose slices exchange features.

    import distilldsm

    model = distilldsm.load_model("export/fold0")  # or "models:/NAME@champion"
    result = model.predict("scan.nii.gz")
    distilldsm.write_mask("mask.nii.gz", result.mask, result.scan)

Names are imported at their first use, so `import distilldsm` stays fast. Nothing here needs torch.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if sys.version_info < (3, 11):  # noqa: UP036 - another `python` may be the first on the PATH
    sys.exit(
        f"error: distilldsm needs Python 3.11 or newer\n  seen: {sys.executable}\n  hint: activate its environment"
    )

from distilldsm.core.machine import complete_user, limit_threads
from distilldsm.core.privacy import switch_off_telemetry
from distilldsm.core.redaction import move_credentials
from distilldsm.core.version import __version__ as __version__

if TYPE_CHECKING:
    from distilldsm.inference.interface import Model, Segmentation, load_model, read_scan, write_mask

__all__ = ["Model", "Segmentation", "__version__", "load_model", "read_scan", "write_mask"]

# Before any library is imported, and before any child process is started.
switch_off_telemetry()
move_credentials(os.environ)
limit_threads()
complete_user()


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distilldsm.inference import interface

    return getattr(interface, name)
