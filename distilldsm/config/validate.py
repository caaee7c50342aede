"""Section `validate` of `params.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from distilldsm.core.mapping import Natural


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """The checks of each case before it is used."""

    on_invalid: Literal["fail", "exclude"] = "fail"
    """What to do with a case that has an error. `fail` stops the pipeline; `exclude` leaves such cases out and lists
    them."""
    suite: str = "conf/expectations.yaml"
    """The file with the expectations: rules with severities and bounds. You can read and extend it."""
    bounds: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Lower and upper bounds of columns of the case table, e.g. {spacing_max_mm: [0.5, 3.0]}. null: no bound on that
    side."""
    workers: Natural = 0
    """Processes. 0: one per core."""
