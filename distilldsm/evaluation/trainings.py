"""Read the scores of trainings from their evaluations or cross-validations."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilldsm.core.cost import TIMING
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json
from distilldsm.core.hashes import MANIFEST
from distilldsm.core.mapping import load_yaml
from distilldsm.evaluation.costs import costs_of_fold
from distilldsm.evaluation.folds import CASES_POSTPROCESSED, recipe_of
from distilldsm.evaluation.tables import ScoreTable, read_rows


@dataclass(frozen=True, kw_only=True)
class Training:
    """The evaluated folds of one training."""

    name: str
    scores: ScoreTable
    """The scores of the cases of all folds."""
    fold_of: Mapping[str, int]
    """Case to the index of its fold."""
    costs: tuple[Mapping[str, Any], ...]
    """The known costs of each fold, see `costs.costs_of_fold`."""
    folders: tuple[Path, ...]
    """The directories that were read."""
    settings: tuple[Mapping[str, Any], ...]
    """The known settings of the evaluations (section `evaluate`), each listed once."""


def load_training(name: str, directories: Sequence[Path], *, postprocessed: bool = False) -> Training:
    """Read `cases.csv` of evaluated folds.

    Args:
        directories: each is a cross-validation, an evaluated fold, or a folder with `fold0`, `fold1` ...
        postprocessed: read the scores after post-processing; only cross-validations of at least two folds have them.

    Raises:
        DataError: a table is missing or damaged, a case was scored in two folds, or the folds have different splits.
    """
    rows: list[dict[str, Any]] = []
    costs: list[Mapping[str, Any]] = []
    settings: list[Mapping[str, Any]] = []
    folds: dict[tuple[int, str], int] = {}
    seen: dict[str, tuple[int, Path]] = {}
    splits: dict[str, Path] = {}
    for number, directory in enumerate(_tables(directories)):
        path = directory / (CASES_POSTPROCESSED if postprocessed else "cases.csv")
        if postprocessed and (not path.is_file() or len(path.read_text(encoding="utf-8").splitlines()) < 2):
            raise DataError(
                "has no scores after post-processing",
                where=directory,
                seen=f"no {path.name}, or an empty one",
                rule="a cross-validation of at least two folds, because the other folds decide",
                hint="distilldsm cross-validate",
            )
        for row in read_rows(path):
            fold = folds.setdefault((number, row.get("fold", "")), len(folds))
            other, place = seen.setdefault(row["case"], (fold, path))
            if other != fold:
                raise DataError("a case was scored in two folds", where=path, seen=f"{row['case']}, also in {place}")
            rows.append(row)
        summary, manifest, timing = (_optional(directory / file) for file in ("summary.json", MANIFEST, TIMING))
        costs += [costs_of_fold(timing)] if timing else summary.get("cost", {}).get("folds", [])
        # The settings are in the summary of a cross-validation, or in the manifest of an evaluated fold.
        setting = recipe_of(summary.get("evaluate") or manifest.get("config", {}))
        settings += [setting] if setting and setting not in settings else []
        if split := manifest.get("inputs", {}).get("splits"):
            splits.setdefault(split, directory)
    if len(splits) > 1:
        raise DataError(
            "are folds of different splits",
            where=", ".join(map(str, splits.values())),
            seen=f"one of them was evaluated with another splits.json, in {name}",
            rule="the folds of one cross-validation",
            hint="give folds that belong together, e.g. NAME=evaluation/fold0,evaluation/fold1, or evaluate again",
        )
    return Training(
        name=name,
        scores=ScoreTable.of(rows),
        fold_of={case: fold for case, (fold, _) in seen.items()},
        costs=tuple(costs),
        folders=tuple(directories),
        settings=tuple(settings),
    )


def folds_in(folder: Path, file: str) -> list[Path]:
    """The folds in a folder that hold `file`.

    If there is a `params.yaml` beside the folder, folds that neither its cv.folds nor the cross-validation beside it
    names are left over from earlier parameters: they are left out, and a line on stderr names them.
    """
    found = sorted(path.parent for path in folder.glob(f"fold*/{file}"))
    params = folder.parent / "params.yaml"
    known = (load_yaml(params).get("cv") or {}).get("folds") if params.is_file() else None
    if not isinstance(known, list):
        return found
    together = _optional(folder.parent / "cross_validation" / "summary.json").get("folds", [])
    old = [path for path in found if path.name not in {f"fold{fold}" for fold in [*known, *together]}]
    if old:
        print(f"not in cv.folds, left out: {', '.join(map(str, old))}", file=sys.stderr)
    return [path for path in found if path not in old]


def _tables(directories: Sequence[Path]) -> list[Path]:
    """The directories with a `cases.csv`; for a folder of folds, its folds."""
    found: list[Path] = []
    for directory in directories:
        inner = folds_in(directory, "cases.csv")
        if not (directory / "cases.csv").is_file() and not inner:
            raise DataError("is not an evaluated fold", where=directory, seen="no cases.csv", hint="dvc repro evaluate")
        found += [directory] if (directory / "cases.csv").is_file() else inner
    return found


def _optional(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}
