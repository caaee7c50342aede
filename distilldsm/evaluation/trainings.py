"""The scores of trainings, read from where they were evaluated or cross-validated."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilldsm.core.cost import TIMING
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json
from distilldsm.core.output_directory import MANIFEST
from distilldsm.evaluation.fold_table import costs_of_fold
from distilldsm.evaluation.folds import ALIKE, CASES_POSTPROCESSED

COMPARED = ("dice", "hd95_mm", "nsd", "sensitivity", "specificity", "volume_error_abs_ml")
"""The scores that are compared; the last is the size of `volume_error_ml`."""
READ = (*COMPARED[:-1], "volume_error_ml", "volume_truth_ml")
Scores = Mapping[tuple[str, str], Mapping[str, float]]
"""(case, label) to metric to value; undefined values are missing."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The evaluated folds of one training."""

    name: str
    folds: tuple[Scores, ...]
    costs: tuple[Mapping[str, Any], ...] = ()
    """Of each fold, as far as they are known, see `crossval.table.costs_of_fold`."""
    patients: Mapping[str, str] = field(default_factory=dict)
    """Case to patient; cases that are missing are taken for patients of their own."""
    folders: tuple[Path, ...] = ()
    """What it was read from."""
    settings: tuple[Mapping[str, Any], ...] = ()
    """Of the evaluation (the `evaluate` section), one after another, each once, as far as they are known."""

    @property
    def scores(self) -> dict[tuple[str, str], Mapping[str, float]]:
        """Of all folds."""
        return {key: values for fold in self.folds for key, values in fold.items()}

    @property
    def tolerances_mm(self) -> set[float]:
        """Of the NSD, as far as they are known."""
        return {float(one["nsd_tolerance_mm"]) for one in self.settings if "nsd_tolerance_mm" in one}


def load_training(name: str, directories: Sequence[Path], *, postprocessed: bool = False) -> Training:
    """Read `cases.csv` of evaluated folds.

    Args:
        directories: each a cross-validation, an evaluated fold, or a folder that holds `fold0`, `fold1` ...
        postprocessed: read the scores after post-processing, which cross-validations of two folds or more hold.

    Raises:
        DataError: a table is missing or damaged, a case was scored in two folds, or the folds are of different splits.
    """
    folds: list[Scores] = []
    taken: list[dict[str, Any]] = []
    seen: dict[str, Path] = {}
    patients: dict[str, str] = {}
    settings: list[Mapping[str, Any]] = []
    splits: dict[str, Path] = {}
    for directory in _tables(directories):
        path = directory / (CASES_POSTPROCESSED if postprocessed else "cases.csv")
        if postprocessed and (not path.is_file() or len(path.read_text(encoding="utf-8").splitlines()) < 2):
            raise DataError(
                "holds no scores after post-processing",
                where=directory,
                seen=f"no {path.name}, or an empty one",
                rule="a cross-validation of two folds or more: for each fold the others decide",
                hint="distilldsm cross-validate; of an older one remove its folder first",
            )
        rows = _read(path)
        patients |= {row["case"]: row["patient"] for row in rows if row.get("patient")}
        by_fold: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            by_fold.setdefault(row.get("fold", ""), []).append(row)
        for of_fold in by_fold.values():
            for case in {row["case"] for row in of_fold}:
                if case in seen:
                    raise DataError("a case was scored in two folds", where=path, seen=f"{case}, also in {seen[case]}")
                seen[case] = path
            folds.append(_scores(of_fold, path))
        taken += _costs(directory)
        settings += [one for one in [_settings(directory)] if one and one not in settings]
        splits.setdefault(_split(directory), directory)
    splits.pop("", None)
    if len(splits) > 1:
        raise DataError(
            "are folds of different splits",
            where=", ".join(map(str, splits.values())),
            seen=f"one of them was evaluated with another splits.json, given as {name}",
            rule="the folds of one cross-validation",
            hint="name the folds that belong together, e.g. NAME=evaluation/fold0,evaluation/fold1, or evaluate again",
        )
    return Training(
        name=name,
        folds=tuple(folds),
        costs=tuple(taken),
        patients=patients,
        folders=tuple(directories),
        settings=tuple(settings),
    )


def _tables(directories: Sequence[Path]) -> list[Path]:
    """The directories that hold a `cases.csv`; of a folder of folds its folds."""
    found: list[Path] = []
    for directory in directories:
        inner = sorted(path.parent for path in directory.glob("fold*/cases.csv"))
        if not (directory / "cases.csv").is_file() and not inner:
            raise DataError("is no evaluated fold", where=directory, seen="no cases.csv", hint="dvc repro evaluate")
        found += [directory] if (directory / "cases.csv").is_file() else inner
    return found


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or not {"case", "label", *READ} <= rows[0].keys():
        raise DataError("is no table of scores", where=path, rule=f"columns case, label, {', '.join(READ)}")
    return rows


def _scores(rows: Sequence[Mapping[str, str]], path: Path) -> Scores:
    try:
        found = {(r["case"], r["label"]): {m: float(r[m]) for m in READ if r[m]} for r in rows}
    except ValueError as error:
        raise DataError("a score is no number", where=path, seen=str(error)) from None
    for values in found.values():
        if "volume_error_ml" in values:
            values["volume_error_abs_ml"] = abs(values["volume_error_ml"])
    return found


def _costs(directory: Path) -> list[dict[str, Any]]:
    """What the folds of a directory took, as far as it tells."""
    if (directory / TIMING).is_file():
        return [costs_of_fold(read_json(directory / TIMING))]
    if (directory / "summary.json").is_file():
        cost = read_json(directory / "summary.json").get("cost")
        return list(cost["folds"]) if cost else []
    return []


def _settings(directory: Path) -> dict[str, Any]:
    """How it was evaluated: of a cross-validation its summary tells it, of an evaluated fold its manifest."""
    for name, section in (("summary.json", "evaluate"), (MANIFEST, "config")):
        told = read_json(directory / name).get(section, {}) if (directory / name).is_file() else {}
        if told:
            return {key: value for key, value in told.items() if key not in ALIKE}
    return {}


def _split(directory: Path) -> str:
    """The hash of `splits.json` that a fold was evaluated with; empty where it is not known."""
    path = directory / MANIFEST
    return str(read_json(path).get("inputs", {}).get("splits", "")) if path.is_file() else ""
