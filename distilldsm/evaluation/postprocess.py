"""Which labels gain by keeping only their largest connected component: decided on scores of held-out cases.

Two tables of the same rows (case, label, scores): the predictions as they are, and with only the largest component of
everything in `Targets.largest`. What is cut off a label, or off a region that shares none of its labels, changes its
own scores only; what is cut off the region that contains all others changes theirs too, and the mean over them decides.
So one such table serves for all decisions.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.files import read_json, write_json
from distilldsm.core.mapping import from_mapping
from distilldsm.data.targets import LARGEST_NOT_TRIED

POSTPROCESSING = "postprocessing.json"
POSTPROCESSED = "postprocessed.csv"
MIN_DICE_GAIN = 1e-4
"""Mean Dice must rise by more than this: the last digit in which Dice is reported."""
SCHEMA_VERSION = 2

Row = Mapping[str, Any]
"""`case`, `label`, `dice`, `hd95_mm`, `volume_predicted_ml` and more; numbers, or text as csv gives them."""
Groups = Mapping[str, Sequence[str]]
"""Of each label or region that is tried those whose scores change with it, see `Targets.changed_with`."""
Fold = TypeVar("Fold", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class LabelDecision:
    """Whether only the largest component of a label or region is kept, and what that rests on."""

    keep_largest: bool
    scores_of: tuple[str, ...] = ()
    """All whose scores change with it: the means are over them. Empty before version 2: its own."""
    dice_raw: float
    """Mean over the cases, as predicted."""
    dice_kept: float
    """The same with only the largest component."""
    hd95_raw: float
    """mm."""
    hd95_kept: float
    cases_changed: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Postprocessing:
    """The contents of `postprocessing.json`."""

    schema_version: int = SCHEMA_VERSION
    """1: regions were not tried, whatever the reasons say."""
    cases: int
    """Held-out cases it was decided on."""
    labels: Mapping[str, LabelDecision]
    """Labels or regions that were tried."""
    not_tried: str = ""
    """Why, where none was."""

    def __post_init__(self) -> None:
        if self.schema_version not in (1, SCHEMA_VERSION):
            raise ConfigError("unknown version of the post-processing", seen=self.schema_version, rule="1 or 2")

    @property
    def kept(self) -> tuple[str, ...]:
        """The labels or regions of which only the largest component is kept."""
        return tuple(label for label, decision in self.labels.items() if decision.keep_largest)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Of each that was tried those whose scores change with it."""
        return {label: decision.scores_of or (label,) for label, decision in self.labels.items()}


def decide(raw: Sequence[Row], kept: Sequence[Row], groups: Groups | None = None) -> Postprocessing:
    """Keep only the largest component where mean Dice rises by more than MIN_DICE_GAIN and mean HD95 does not rise.

    Args:
        raw, kept: rows of the same cases and labels.
        groups: what was tried; by default every label by itself.

    Raises:
        ValueError: they are not, or lack a label of `groups`.
    """
    before, after = ({(r["case"], r["label"]): r for r in rows} for rows in (raw, kept))
    if before.keys() != after.keys():
        raise ValueError("the tables hold different cases or labels")
    groups = _by_itself(raw) if groups is None else groups
    unknown = {label for group in groups.values() for label in group} - {label for _, label in before}
    if unknown:
        raise ValueError(f"the tables lack {', '.join(sorted(unknown))}")
    decisions = {}
    for name, group in groups.items():
        keys = [key for key in before if key[1] in group]

        def mean(rows: Mapping[Any, Row], metric: str, keys: Sequence[Any] = keys) -> float:
            return math.fsum(float(rows[key][metric]) for key in keys) / len(keys)

        decisions[name] = _decision(
            tuple(group),
            dice=(mean(before, "dice"), mean(after, "dice")),
            hd95=(mean(before, "hd95_mm"), mean(after, "hd95_mm")),
            changed=len({key[0] for key in keys if _volume(before[key]) != _volume(after[key])}),
        )
    not_tried = "" if groups else LARGEST_NOT_TRIED
    return Postprocessing(cases=len({case for case, _ in before}), labels=decisions, not_tried=not_tried)


def _by_itself(rows: Sequence[Row]) -> Groups:
    return {label: (label,) for label in dict.fromkeys(row["label"] for row in rows)}


def _volume(row: Row) -> float:
    return float(row["volume_predicted_ml"])


def _decision(
    scores_of: tuple[str, ...], *, dice: tuple[float, float], hd95: tuple[float, float], changed: int
) -> LabelDecision:
    gain, further = dice[1] - dice[0], hd95[1] - hd95[0]
    keep = False
    of = f"of {', '.join(scores_of)} " if len(scores_of) > 1 else ""
    mean_dice = f"mean Dice {of}{gain:+.5f}"
    if not changed:
        reason = "no case has a second component"
    elif not gain > MIN_DICE_GAIN:
        reason = f"{mean_dice}: not more than {MIN_DICE_GAIN:g} better"
    elif further > 0:
        reason = f"{mean_dice}, but HD95 {further:+.3f} mm"
    else:
        keep, reason = True, f"{mean_dice}, HD95 {further:+.3f} mm"
    return LabelDecision(
        keep_largest=keep,
        scores_of=scores_of,
        dice_raw=dice[0],
        dice_kept=dice[1],
        hd95_raw=hd95[0],
        hd95_kept=hd95[1],
        cases_changed=changed,
        reason=reason,
    )


def nested(
    folds: Mapping[Fold, tuple[Sequence[Row], Sequence[Row]]], groups: Groups | None = None
) -> dict[Fold, list[Row]]:
    """Post-processed rows of every fold, decided for each by the other folds: nothing is chosen on what is reported.

    Args:
        folds: fold to its rows as predicted and with only the largest component of every label.
        groups: as in `decide`; those that change together are taken from one table.

    Returns:
        Fold to rows in the order of the predicted ones, each from one of the two tables.

    Raises:
        ValueError: fewer than two folds, or tables of a fold that do not fit together.
    """
    if len(folds) < 2:
        raise ValueError("nothing is left to decide on: nested reporting needs two folds at least")
    reported: dict[Fold, list[Row]] = {}
    for fold, (raw, kept) in folds.items():
        others = [tables for other, tables in folds.items() if other != fold]
        found = decide([r for t in others for r in t[0]], [r for t in others for r in t[1]], groups)
        changed = {label for name in found.kept for label in found.groups[name]}
        after = {(r["case"], r["label"]): r for r in kept}
        if after.keys() != {(r["case"], r["label"]) for r in raw}:
            raise ValueError(f"the tables of fold {fold} hold different cases or labels")
        reported[fold] = [after[r["case"], r["label"]] if r["label"] in changed else r for r in raw]
    return reported


def write_postprocessing(
    folder: Path, raw: Sequence[Row], kept: Sequence[Row], groups: Groups | None = None
) -> Postprocessing:
    """Decide, and write POSTPROCESSING and the table POSTPROCESSED: the scores with the largest components only."""
    from distilldsm.evaluation.tables import write_csv

    found = decide(raw, kept, groups)
    write_csv(folder / POSTPROCESSED, kept)
    write_json(folder / POSTPROCESSING, found)
    return found


def load_postprocessing(path: Path) -> Postprocessing | None:
    """Read `postprocessing.json`; None where there is none, as in evaluations from before it was written.

    Raises:
        DataError: it is damaged or of an unknown version.
    """
    if not path.is_file():
        return None
    try:
        return from_mapping(Postprocessing, read_json(path), where=str(path))
    except ConfigError as error:
        raise DataError(
            error.problem, where=error.where, seen=error.seen, rule=error.rule, hint="evaluate the fold again"
        ) from None
