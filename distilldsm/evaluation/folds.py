"""The evaluated folds of a cross-validation, read and checked: do they belong into one table?"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilldsm.core.cost import TIMING, training_cost
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, sha256_file
from distilldsm.core.mapping import flatten
from distilldsm.core.output_directory import EXECUTION_PARAMETERS, MANIFEST, content_hash
from distilldsm.evaluation.metrics import METRICS
from distilldsm.evaluation.postprocess import POSTPROCESSED, POSTPROCESSING, load_postprocessing

Row = dict[str, Any]
CASES_POSTPROCESSED = "cases_postprocessed.csv"
"""Of a cross-validation: the cases after the post-processing that the other folds decide on."""
NUMBERS = (*METRICS, "volume_truth_ml", "volume_predicted_ml")
ALIKE = EXECUTION_PARAMETERS | {"save_masks"}
"""Parameters that may differ from fold to fold: where and how it was computed, not what."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One trained and evaluated fold."""

    number: int
    rows: tuple[Row, ...]
    """One per case and label; undefined scores are None."""
    largest: tuple[Row, ...] | None = None
    """The same with only the largest component of every label; None where it was not scored."""
    groups: Mapping[str, tuple[str, ...]] | None = None
    """Which of their labels change together, see `postprocess.Groups`; None where it is not told: each by itself."""
    model: Mapping[str, Any]
    """`model.json`."""
    train: Mapping[str, Any]
    """The manifest of the model."""
    evaluate: Mapping[str, Any]
    """The manifest of the evaluation."""
    ensemble: Mapping[str, Any] = field(default_factory=dict)
    """1, 2 ... to name, options and parameters of the training of the networks that were averaged; empty for one."""
    costs: Mapping[str, Any]
    """`timing.json`; without it, as far as the model tells."""
    model_directory: Path
    evaluation_directory: Path


def read_rows(path: Path) -> list[Row]:
    """The rows of a `cases.csv`, numbers as float, undefined ones as None.

    Raises:
        DataError: the file is missing or no table of scores.
    """
    if not path.is_file():
        raise DataError("is missing", where=path, hint="dvc repro, or distilldsm evaluate")
    with open(path, newline="", encoding="utf-8") as stream:
        rows: list[Row] = [dict(row) for row in csv.DictReader(stream)]
    needed = {"case", "label", *NUMBERS}
    if not rows or not needed <= rows[0].keys():
        absent = ", ".join(sorted(needed - rows[0].keys())) if rows else "all rows"
        raise DataError("is no table of scores", where=path, seen=f"lacks {absent}", hint="dvc repro")
    try:
        return [row | {name: float(row[name]) if row[name] else None for name in NUMBERS} for row in rows]
    except ValueError as error:
        raise DataError("a score is no number", where=path, seen=str(error)) from None


def load_folds(numbers: Sequence[int], evaluation: Path, models: Path, splits: Path | None = None) -> list[Fold]:
    """Read folds and check that they are one cross-validation.

    Args:
        numbers: which folds; others that lie there are not looked at.
        evaluation, models: the folders that hold `fold0`, `fold1` ...
        splits: `splits.json` of the preprocessed data, to check what was held out; None where it is not at hand.

    Raises:
        UserError: a fold is missing or damaged.
        DataError: the folds differ in recipe, data or labels, an evaluation is of another model, or a case was not
            held out exactly once.
    """
    folds = [_load(k, evaluation / f"fold{k}", models / f"fold{k}") for k in sorted(numbers)]
    _check_recipe(folds)
    _check_cases(folds)
    if splits is not None:
        _check_splits(folds, splits)
    return folds


def _load(number: int, evaluation: Path, model: Path) -> Fold:
    for directory, stage in ((model, "train"), (evaluation, "evaluate")):
        if not (directory / MANIFEST).is_file():
            raise DataError(
                f"fold {number} is missing",
                where=directory,
                seen="no manifest.json" if directory.is_dir() else "no such directory",
                hint=f"distilldsm {stage} --fold {number}, or leave it out of cv.folds",
            )
    train, evaluate = read_json(model / MANIFEST), read_json(evaluation / MANIFEST)
    for directory, manifest in ((model, train), (evaluation, evaluate)):
        if manifest.get("fold") != number:
            raise DataError("holds another fold", where=directory, seen=f"fold {manifest.get('fold')}")
    if evaluate["inputs"].get("model") != content_hash(model):
        raise DataError(
            "was evaluated with another model",
            where=evaluation,
            seen=f"the model in {model} has changed since",
            hint=f"dvc repro, or distilldsm evaluate --fold {number}",
        )
    described = read_json(model / "model.json")
    if described.get("splits") not in (None, evaluate["inputs"].get("splits")):
        raise DataError(
            "was evaluated with another split than its model was trained on",
            where=evaluation,
            seen=f"{model / 'model.json'} names another",
            rule="a model is scored on the cases that it has not seen",
            hint=f"dvc repro, or distilldsm train --fold {number}",
        )
    timing, largest = evaluation / TIMING, evaluation / POSTPROCESSED
    decided = load_postprocessing(evaluation / POSTPROCESSING)
    return Fold(
        number=number,
        rows=tuple(read_rows(evaluation / "cases.csv")),
        largest=tuple(read_rows(largest)) if largest.is_file() else None,
        groups=None if decided is None else decided.groups,
        model=described,
        train=train,
        evaluate=evaluate,
        ensemble=read_json(evaluation / "summary.json").get("ensemble", {}),
        costs=read_json(timing) if timing.is_file() else {"training": training_cost(model)},
        model_directory=model,
        evaluation_directory=evaluation,
    )


def _check_recipe(folds: Sequence[Fold]) -> None:
    network = ("name", "options", "in_channels", "out_channels", "parameters", "macs_per_voxel", "labels")
    of_network: Callable[[Fold], Mapping] = lambda fold: {key: fold.model.get(key) for key in network}  # noqa: E731
    _same(folds, "another network", of_network, lambda fold: fold.model_directory / "model.json")
    _same(
        folds,
        "another ensemble",
        lambda fold: {number: one | {"train": _result(one["train"])} for number, one in fold.ensemble.items()},
        lambda fold: fold.evaluation_directory / "summary.json",
    )
    _same(
        folds,
        "other preprocessed data",
        lambda fold: {"preprocessed": fold.train["inputs"].get("preprocessed")},
        lambda fold: fold.model_directory / MANIFEST,
    )
    _same(
        folds,
        "other initial weights",
        lambda fold: {"initial_weights": fold.train["inputs"].get("initial_weights")},
        lambda fold: fold.model_directory / MANIFEST,
    )
    _same(
        folds,
        "another data set or split",
        lambda fold: {key: fold.evaluate["inputs"].get(key) for key in ("dataset", "splits")},
        lambda fold: fold.evaluation_directory / MANIFEST,
    )
    _same(
        folds,
        "other parameters of the training",
        lambda fold: _settings(fold.train),
        lambda fold: fold.model_directory / MANIFEST,
    )
    _same(
        folds,
        "other parameters of the evaluation",
        lambda fold: _settings(fold.evaluate),
        lambda fold: fold.evaluation_directory / MANIFEST,
    )
    _same(
        [fold for fold in folds if fold.groups is not None] or folds,
        "another post-processing",
        lambda fold: {"tried": {name: ", ".join(group) for name, group in (fold.groups or {}).items()}},
        lambda fold: fold.evaluation_directory / POSTPROCESSING,
    )
    _same(
        folds,
        "other labels",
        lambda fold: {"labels": sorted({row["label"] for row in fold.rows})},
        lambda fold: fold.evaluation_directory / "cases.csv",
    )


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return _result(manifest["config"])


def _result(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ALIKE}


def _same(folds: Sequence[Fold], what: str, value: Callable[[Fold], Mapping], where: Callable[[Fold], Path]) -> None:
    """Every fold must have the first one's values."""
    first = flatten(value(folds[0]))
    for fold in folds[1:]:
        own = flatten(value(fold))
        for key in {**first, **own}:
            if own.get(key) != first.get(key):
                raise DataError(
                    f"fold {fold.number} has {what} than fold {folds[0].number}",
                    where=where(fold),
                    seen=f"{key}: {own.get(key)}; in fold {folds[0].number}: {first.get(key)}",
                    rule="a cross-validation is one recipe on one data set and split",
                    hint="dvc repro, or distilldsm cross-validate",
                )


def _check_cases(folds: Sequence[Fold]) -> None:
    held_out: dict[str, int] = {}
    for fold in folds:
        pairs = [(row["case"], row["label"]) for row in fold.rows]
        twice = [pair for pair in dict.fromkeys(pairs) if pairs.count(pair) > 1] if len(set(pairs)) < len(pairs) else []
        if twice:
            raise DataError(
                "a case was scored twice", where=fold.evaluation_directory / "cases.csv", seen=", ".join(twice[0])
            )
        for case in dict.fromkeys(case for case, _ in pairs):
            if case in held_out:
                raise DataError(
                    "a case was held out in two folds",
                    where=fold.evaluation_directory / "cases.csv",
                    seen=f"{case}, in fold {held_out[case]} too",
                    rule="each case is held out exactly once",
                    hint="evaluate the folds of one splits.json",
                )
            held_out[case] = fold.number


def _check_splits(folds: Sequence[Fold], splits: Path) -> None:
    stored = read_json(splits)["folds"]
    digest = sha256_file(splits)
    for fold in folds:
        if fold.evaluate["inputs"].get("splits") != digest or fold.number >= len(stored):
            raise DataError(
                f"fold {fold.number} was evaluated with another split",
                where=fold.evaluation_directory,
                seen=f"{splits} has changed since",
                hint="dvc repro, or distilldsm cross-validate",
            )
        wanted, scored = set(stored[fold.number]["held_out"]), {row["case"] for row in fold.rows}
        if wanted != scored:
            different = sorted(wanted ^ scored)
            raise DataError(
                "the cases scored are not those held out",
                where=fold.evaluation_directory / "cases.csv",
                seen=f"{len(different)} differ, first {different[0]}",
                rule="each case is held out exactly once",
                hint=f"distilldsm evaluate --fold {fold.number}",
            )
