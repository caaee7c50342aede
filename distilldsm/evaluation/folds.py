"""Read the evaluated folds of a cross-validation and check that they belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilldsm.core.cost import TIMING
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, sha256_file
from distilldsm.core.hashes import MANIFEST, content_hash
from distilldsm.core.mapping import flatten
from distilldsm.core.output_directory import EXECUTION_PARAMETERS
from distilldsm.evaluation.postprocess import POSTPROCESSED, POSTPROCESSING, load_postprocessing
from distilldsm.evaluation.tables import Row, read_rows

CASES_POSTPROCESSED = "cases_postprocessed.csv"
"""File of a cross-validation: the scores after post-processing, as the other folds decide."""
_MAY_DIFFER = EXECUTION_PARAMETERS | {"save_masks"}
_NETWORK = ("name", "options", "in_channels", "out_channels", "parameters", "macs_per_voxel", "labels")


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One trained and evaluated fold."""

    number: int
    rows: tuple[Row, ...]
    """One row per case and label; undefined scores are None."""
    largest: tuple[Row, ...]
    """The same rows with only the largest component of every label."""
    groups: Mapping[str, tuple[str, ...]]
    """The labels that change together, see `postprocess.Groups`."""
    planned: tuple[str, ...] = ()
    """Labels of which the plan says to keep only the largest component."""
    model: Mapping[str, Any]
    """`model.json`."""
    train: Mapping[str, Any]
    """The model's manifest."""
    evaluate: Mapping[str, Any]
    """The evaluation's manifest."""
    ensemble: Mapping[str, Any]
    """1, 2 ... to name, options and training parameters of the averaged networks; empty for a single network."""
    timing: Mapping[str, Any]
    """`timing.json`."""
    model_directory: Path
    evaluation_directory: Path

    def recipe(self) -> dict[str, tuple[Path, dict[str, Any]]]:
        """Values that must be equal in all folds: the problem if they differ, to the file and the values."""
        model, evaluation = self.model_directory, self.evaluation_directory
        trained, scored = self.train["inputs"], self.evaluate["inputs"]
        networks = {number: one | {"train": recipe_of(one["train"])} for number, one in self.ensemble.items()}
        tried = {name: ", ".join(group) for name, group in self.groups.items()}
        labels = sorted({row["label"] for row in self.rows})
        return {
            "another network": (model / "model.json", {key: self.model.get(key) for key in _NETWORK}),
            "another ensemble": (evaluation / "summary.json", networks),
            "other preprocessed data": (model / MANIFEST, {"preprocessed": trained.get("preprocessed")}),
            "other initial weights": (model / MANIFEST, {"initial_weights": trained.get("initial_weights")}),
            "another data set or split": (evaluation / MANIFEST, {k: scored.get(k) for k in ("dataset", "splits")}),
            "other parameters of the training": (model / MANIFEST, recipe_of(self.train["config"])),
            "other parameters of the evaluation": (evaluation / MANIFEST, recipe_of(self.evaluate["config"])),
            "other labels": (evaluation / "cases.csv", {"labels": labels}),
            "another post-processing": (evaluation / POSTPROCESSING, {"tried": tried}),
        }


def recipe_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a stage that must be equal in all folds: those that change results, not device or workers."""
    return {key: value for key, value in config.items() if key not in _MAY_DIFFER}


def load_folds(numbers: Sequence[int], evaluation: Path, models: Path, splits: Path | None = None) -> list[Fold]:
    """Read folds and check that they are one cross-validation.

    Args:
        numbers: the folds to read; other folds are ignored.
        evaluation, models: the folders with `fold0`, `fold1` ...
        splits: `splits.json` of the preprocessed data, to check the held-out cases; None: not available.

    Raises:
        UserError: a fold is missing or damaged.
        DataError: the folds differ in recipe, data or labels, an evaluation is of another model, or a case was not
            held out exactly once.
    """
    folds = [_load(k, evaluation / f"fold{k}", models / f"fold{k}") for k in sorted(numbers)]
    for fold in folds[1:]:
        _check_recipe(fold, folds[0])
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
            raise DataError("contains another fold", where=directory, seen=f"fold {manifest.get('fold')}")
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
            rule="a model is scored on cases that were not in its training",
            hint=f"dvc repro, or distilldsm train --fold {number}",
        )
    postprocessing = load_postprocessing(evaluation / POSTPROCESSING)
    return Fold(
        number=number,
        rows=tuple(read_rows(evaluation / "cases.csv")),
        largest=tuple(read_rows(evaluation / POSTPROCESSED)),
        groups=postprocessing.groups,
        planned=postprocessing.planned,
        model=described,
        train=train,
        evaluate=evaluate,
        ensemble=read_json(evaluation / "summary.json").get("ensemble", {}),
        timing=read_json(evaluation / TIMING),
        model_directory=model,
        evaluation_directory=evaluation,
    )


def _check_recipe(fold: Fold, first: Fold) -> None:
    expected = first.recipe()
    for what, (path, values) in fold.recipe().items():
        own, theirs = flatten(values), flatten(expected[what][1])
        for key in {**theirs, **own}:
            if own.get(key) != theirs.get(key):
                raise DataError(
                    f"fold {fold.number} has {what} than fold {first.number}",
                    where=path,
                    seen=f"{key}: {own.get(key)}; in fold {first.number}: {theirs.get(key)}",
                    rule="a cross-validation is one recipe on one data set and split",
                    hint="dvc repro, or distilldsm cross-validate",
                )


def _check_cases(folds: Sequence[Fold]) -> None:
    held_out: dict[str, int] = {}
    for fold in folds:
        path = fold.evaluation_directory / "cases.csv"
        pairs: set[tuple[str, str]] = set()
        for row in fold.rows:
            pair = (row["case"], row["label"])
            if pair in pairs:
                raise DataError("a case was scored twice", where=path, seen=", ".join(pair))
            pairs.add(pair)
            other = held_out.setdefault(row["case"], fold.number)
            if other != fold.number:
                raise DataError(
                    "a case was held out in two folds",
                    where=path,
                    seen=f"{row['case']}, also in fold {other}",
                    rule="each case is held out exactly once",
                    hint="evaluate the folds of one splits.json",
                )


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
        different = sorted(set(stored[fold.number]["held_out"]) ^ {row["case"] for row in fold.rows})
        if different:
            raise DataError(
                "the scored cases are not the held-out cases",
                where=fold.evaluation_directory / "cases.csv",
                seen=f"{len(different)} differ, first {different[0]}",
                rule="each case is held out exactly once",
                hint=f"distilldsm evaluate --fold {fold.number}",
            )
