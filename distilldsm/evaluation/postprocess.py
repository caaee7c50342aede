"""Which labels gain by keeping only their largest connected component: decided on scores of held-out cases.

Two tables of the same rows (case, label, scores): the predictions as they are, and with only the largest component of
everything in `Targets.largest`. What is cut off a label, or off a region that shares none of its labels, changes its
own scores only; what is cut off the region that contains all others changes theirs too, and the mean over them decides.
So one such table serves for all decisions. `inference.postprocess` is what cuts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from distilldsm.core.errors import ConfigError
from distilldsm.core.files import read_record, write_json
from distilldsm.data.targets import LARGEST_NOT_TRIED
from distilldsm.evaluation.tables import Row, ScoreTable, write_csv

POSTPROCESSING = "postprocessing.json"
POSTPROCESSED = "postprocessed.csv"
MIN_DICE_GAIN = 1e-4
"""Mean Dice must rise by more than this: the last digit in which Dice is reported."""
SCHEMA_VERSION = 2

Groups = Mapping[str, Sequence[str]]
"""Of each label or region that is tried those whose scores change with it, see `Targets.changed_with`."""
Fold = TypeVar("Fold", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class LabelDecision:
    """Whether only the largest component of a label or region is kept, and what that rests on."""

    keep_largest: bool
    scores_of: tuple[str, ...]
    """All whose scores change with it: the means are over them."""
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
    cases: int
    """Held-out cases it was decided on."""
    labels: Mapping[str, LabelDecision]
    """Labels or regions that were tried."""
    not_tried: str = ""
    """Why, where none was."""

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ConfigError("is of an unknown version", seen=self.schema_version, rule=str(SCHEMA_VERSION))

    @property
    def kept(self) -> tuple[str, ...]:
        """The labels or regions of which only the largest component is kept."""
        return tuple(label for label, decision in self.labels.items() if decision.keep_largest)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Of each that was tried those whose scores change with it."""
        return {label: decision.scores_of for label, decision in self.labels.items()}


def decide(raw: Sequence[Row], kept: Sequence[Row], groups: Groups | None = None) -> Postprocessing:
    """Keep only the largest component where mean Dice rises by more than MIN_DICE_GAIN and mean HD95 does not rise.

    Args:
        raw, kept: rows of the same cases and labels.
        groups: what was tried; by default every label by itself.

    Raises:
        ValueError: they are not, or lack a label of `groups`.
    """
    if _keys(raw) != _keys(kept):
        raise ValueError("the tables hold different cases or labels")
    before = ScoreTable.of(raw)
    groups = {label: (label,) for label in before.labels} if groups is None else groups
    unknown = {label for group in groups.values() for label in group} - set(before.labels)
    if unknown:
        raise ValueError(f"the tables lack {', '.join(sorted(unknown))}")
    after = ScoreTable.of(kept).select(before.cases, before.labels)
    decisions = {
        name: _decision(*(table.select(before.cases, group) for table in (before, after)))
        for name, group in groups.items()
    }
    not_tried = "" if groups else LARGEST_NOT_TRIED
    return Postprocessing(cases=len(before.cases), labels=decisions, not_tried=not_tried)


def _keys(rows: Sequence[Row]) -> set[tuple[str, str]]:
    return {(row["case"], row["label"]) for row in rows}


def _decision(before: ScoreTable, after: ScoreTable) -> LabelDecision:
    """Of the scores of one group of labels, as predicted and with the largest component only."""
    dice, hd95 = ([float(table.scores[name].mean()) for table in (before, after)] for name in ("dice", "hd95_mm"))
    volumes = [table.scores["volume_predicted_ml"] for table in (before, after)]
    changed = int((volumes[0] != volumes[1]).any(axis=1).sum())
    gain, further = dice[1] - dice[0], hd95[1] - hd95[0]
    keep = False
    of = f"of {', '.join(before.labels)} " if len(before.labels) > 1 else ""
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
        scores_of=before.labels,
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
        if _keys(raw) != _keys(kept):
            raise ValueError(f"the tables of fold {fold} hold different cases or labels")
        others = [tables for other, tables in folds.items() if other != fold]
        decided = decide([r for t in others for r in t[0]], [r for t in others for r in t[1]], groups)
        changed = {label for name in decided.kept for label in decided.groups[name]}
        after = {(r["case"], r["label"]): r for r in kept}
        reported[fold] = [after[r["case"], r["label"]] if r["label"] in changed else r for r in raw]
    return reported


def write_postprocessing(
    folder: Path, raw: Sequence[Row], kept: Sequence[Row], groups: Groups | None = None
) -> Postprocessing:
    """Decide, and write POSTPROCESSING and the table POSTPROCESSED: the scores with the largest components only."""
    decided = decide(raw, kept, groups)
    write_csv(folder / POSTPROCESSED, kept)
    write_json(folder / POSTPROCESSING, decided)
    return decided


def load_postprocessing(path: Path) -> Postprocessing:
    """Read `postprocessing.json`.

    Raises:
        DataError: it is missing, damaged or of an unknown version.
    """
    return read_record(Postprocessing, path, hint="evaluate the fold again")
