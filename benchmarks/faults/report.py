"""The table of what was tried, what survived, and what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Row:
    """One kind of fault."""

    fault: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    """What went wrong, a line each: an output half written, a result that differs, a process left behind, no error."""
    note: str = ""

    def record(self, *problems: str | None) -> None:
        """Count one trial with its problems, of which None is none."""
        self.tried += 1
        found = "; ".join(p for p in problems if p)
        if found:
            self.lost.append(found)
            print(f"  LOST {self.fault}: {found}", flush=True)

    @property
    def survived(self) -> int:
        """Trials without a problem."""
        return self.tried - len(self.lost)


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = ["| fault | tried | survived | lost | |", "|---|---|---|---|---|"]
    for row in rows:
        lost = "; ".join(dict.fromkeys(row.lost)) or "nothing"
        lines.append(f"| {row.fault} | {row.tried} | {row.survived} | {lost} | {row.note} |")
    return "\n".join(lines)
