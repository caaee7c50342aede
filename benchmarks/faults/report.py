"""The table of faults, with the trials, the survived ones and the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Row:
    """The trials of one kind of fault."""

    fault: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    """Problems, one per failed trial: half-written output, different result, process left behind, missing error."""
    note: str = ""

    def record(self, *problems: str | None) -> None:
        """Count one trial with its problems. None means no problem."""
        self.tried += 1
        text = "; ".join(p for p in problems if p)
        if text:
            self.lost.append(text)
            print(f"  LOST {self.fault}: {text}", flush=True)

    @property
    def survived(self) -> int:
        """Number of trials without a problem."""
        return self.tried - len(self.lost)


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = ["| fault | tried | survived | lost | |", "|---|---|---|---|---|"]
    for row in rows:
        lost = "; ".join(dict.fromkeys(row.lost)) or "nothing"
        lines.append(f"| {row.fault} | {row.tried} | {row.survived} | {lost} | {row.note} |")
    return "\n".join(lines)
