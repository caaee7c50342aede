"""One row of the case table, and the files where its values were seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Value = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Detail:
    """What was seen in one file. `file` is relative to the data set's root, with forward slashes."""

    file: str
    seen: str


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """One row of the case table: values by column (None if it could not be measured) and details by column."""

    values: dict[str, Value] = field(default_factory=dict)
    details: dict[str, list[Detail]] = field(default_factory=dict)

    def note(self, column: str, file: str, seen: str) -> None:
        self.details.setdefault(column, []).append(Detail(file=file, seen=seen))

    def worst(self, column: str, value: float, *, largest: bool = True) -> bool:
        """Keep the worst value over the files of a case. Returns True if `value` is the worst so far."""
        known = self.values.get(column)
        if known is not None and (float(known) >= value if largest else float(known) <= value):
            return False
        self.values[column] = value
        return True


def listed(values: Sequence[float] | npt.NDArray[np.floating]) -> str:
    """Numbers as `a x b x c`."""
    return " x ".join(f"{float(v):g}" for v in values)
