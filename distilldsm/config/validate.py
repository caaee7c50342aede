"""Section `validate` of `params.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from distilldsm.core.mapping import Natural


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """What a case must fulfil before it is used."""

    on_invalid: Literal["fail", "exclude"] = "fail"
    """What to do with a case that has a finding of severity error. `fail` stops the pipeline; `exclude` leaves such
    cases out and lists them."""
    suite: str = "conf/expectations.yaml"
    """The expectation suite: rules with severities and bounds that a person can read and extend."""
    bounds: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Bounds of columns of the case table for this data set, e.g. {spacing_max_mm: [0.5, 3.0]}. null leaves a side
    open."""
    workers: Natural = 0
    """Processes. 0 takes one per core."""
