"""Decide which labels gain by keeping only their largest connected component: from the plan, or from held-out scores.

The plan decides for labels that are one component in nearly all cases (`plan.training.keep_largest`). For the others:

There are two tables with the same rows (case, label, scores): unchanged predictions, and predictions with only the
largest component of everything in `Targets.largest`. Removing voxels from a label, or from a region that shares no
label, changes only its own scores. Removing voxels from the region that contains all others changes all their scores;
then the mean over them decides. So one such table is enough. `inference.postprocess` removes the voxels.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
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
"""Mean Dice must rise by more than this; it is the last reported digit of Dice."""
SCHEMA_VERSION = 2

Groups = Mapping[str, Sequence[str]]
"""Each tried label or region to those with scores that change with it, see `Targets.changed_with`."""
Fold = TypeVar("Fold", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class LabelDecision:
    """Whether only the largest component of a label or region is kept, and the reason."""

    keep_largest: bool
    scores_of: tuple[str, ...]
    """All labels or regions with scores that change with it; the means are over them."""
    dice_raw: float
    """Mean over the cases, unchanged predictions."""
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
    """Number of held-out cases."""
    labels: Mapping[str, LabelDecision]
    """The tried labels or regions and their decisions."""
    not_tried: str = ""
    """The reason if nothing was tried."""
    planned: tuple[str, ...] = ()
    """Labels for which the plan decided, not these scores."""

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ConfigError("is of an unknown version", seen=self.schema_version, rule=str(SCHEMA_VERSION))

    @property
    def kept(self) -> tuple[str, ...]:
        """The labels or regions that keep only their largest component."""
        return tuple(label for label, decision in self.labels.items() if decision.keep_largest)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Each tried label or region to those with scores that change with it."""
        return {label: decision.scores_of for label, decision in self.labels.items()}


def decide(
    raw: Sequence[Row], kept: Sequence[Row], groups: Groups | None = None, planned: Collection[str] = ()
) -> Postprocessing:
    """Keep only the largest component if mean Dice rises by more than MIN_DICE_GAIN and mean HD95 does not rise.

    Args:
        raw, kept: rows of the same cases and labels: unchanged, and with only the largest components.
        groups: the tried labels or regions; by default every label by itself.
        planned: labels of which the plan says to keep only the largest component.

    Raises:
        ValueError: the rows have different cases or labels, or lack a label of `groups`.
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
        name: _decision(*(table.select(before.cases, group) for table in (before, after)), planned=name in planned)
        for name, group in groups.items()
    }
    not_tried = "" if groups else LARGEST_NOT_TRIED
    return Postprocessing(
        cases=len(before.cases), labels=decisions, not_tried=not_tried, planned=tuple(n for n in groups if n in planned)
    )


def _keys(rows: Sequence[Row]) -> set[tuple[str, str]]:
    return {(row["case"], row["label"]) for row in rows}


def _decision(before: ScoreTable, after: ScoreTable, *, planned: bool) -> LabelDecision:
    """Decide from the scores of one group of labels, unchanged and with the largest component only."""
    dice, hd95 = ([float(table.scores[name].mean()) for table in (before, after)] for name in ("dice", "hd95_mm"))
    volumes = [table.scores["volume_predicted_ml"] for table in (before, after)]
    changed = int((volumes[0] != volumes[1]).any(axis=1).sum())
    gain, further = dice[1] - dice[0], hd95[1] - hd95[0]
    keep = False
    of = f"of {', '.join(before.labels)} " if len(before.labels) > 1 else ""
    mean_dice = f"mean Dice {of}{gain:+.5f}"
    if planned:
        keep, reason = True, f"by the plan: one component in nearly all cases; {mean_dice}, HD95 {further:+.3f} mm"
    elif not changed:
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
    folds: Mapping[Fold, tuple[Sequence[Row], Sequence[Row]]],
    groups: Groups | None = None,
    planned: Collection[str] = (),
) -> dict[Fold, list[Row]]:
    """Post-processed rows of every fold. The other folds decide, so no choice depends on the reported scores.

    Args:
        folds: fold to its rows, unchanged and with only the largest component of every label.
        groups, planned: as in `decide`; labels that change together come from the same table.

    Returns:
        Fold to rows in the order of the unchanged rows, each from one of the two tables.

    Raises:
        ValueError: there are fewer than two folds, or the two tables of a fold do not fit together.
    """
    if len(folds) < 2:
        raise ValueError("nested reporting needs at least two folds")
    reported: dict[Fold, list[Row]] = {}
    for fold, (raw, kept) in folds.items():
        if _keys(raw) != _keys(kept):
            raise ValueError(f"the tables of fold {fold} hold different cases or labels")
        others = [tables for other, tables in folds.items() if other != fold]
        decided = decide([r for t in others for r in t[0]], [r for t in others for r in t[1]], groups, planned)
        changed = {label for name in decided.kept for label in decided.groups[name]}
        after = {(r["case"], r["label"]): r for r in kept}
        reported[fold] = [after[r["case"], r["label"]] if r["label"] in changed else r for r in raw]
    return reported


def write_postprocessing(
    folder: Path,
    raw: Sequence[Row],
    kept: Sequence[Row],
    groups: Groups | None = None,
    planned: Collection[str] = (),
) -> Postprocessing:
    """Decide; write the decision (POSTPROCESSING) and the scores with only the largest components (POSTPROCESSED)."""
    decided = decide(raw, kept, groups, planned)
    write_csv(folder / POSTPROCESSED, kept)
    write_json(folder / POSTPROCESSING, decided)
    return decided


def load_postprocessing(path: Path) -> Postprocessing:
    """Read `postprocessing.json`.

    Raises:
        DataError: it is missing, damaged or of an unknown version.
    """
    return read_record(Postprocessing, path, hint="evaluate the fold again")
