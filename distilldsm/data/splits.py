"""Cross-validation folds by patient: seeded, or read from a file."""

from __future__ import annotations

import os
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

from distilldsm.core.errors import ConfigError, DataError
from distilldsm.core.files import read_json, sha256_file
from distilldsm.data.dataset import DatasetIndex


def make_splits(index: DatasetIndex, *, count: int, seed: int) -> list[dict[str, list[str]]]:
    """Divide the patients into `count` folds. Their sizes differ by one patient at most.

    Returns:
        For each fold `{"train": [case ids], "held_out": [case ids]}`; every case is held out exactly once.

    Raises:
        ConfigError: fewer patients than folds.
    """
    patients = sorted({case.patient for case in index.cases})
    if len(patients) < count:
        raise ConfigError(
            "fewer patients than folds",
            where="preprocess.folds",
            seen=f"{len(patients)} patients, {count} folds",
            rule="every fold holds out at least one patient",
            hint=f"set preprocess.folds to {len(patients)} or less, or add cases",
        )
    random.Random(seed).shuffle(patients)  # noqa: S311 - no secret, a seeded split
    fold_of = {patient: k % count for k, patient in enumerate(patients)}
    return [
        {
            "train": [c.id for c in index.cases if fold_of[c.patient] != k],
            "held_out": [c.id for c in index.cases if fold_of[c.patient] == k],
        }
        for k in range(count)
    ]


def read_splits(
    path: str | os.PathLike[str], index: DatasetIndex, *, left_out: Collection[str] = ()
) -> list[dict[str, list[str]]]:
    """Folds from a file: nnU-Net's `splits_final.json`, [{"train": [case ids], "val": [...]}, ...], or a `splits.json`.

    Args:
        left_out: cases that validation has excluded; they are removed from the folds. Cases that no fold names are not
            used.

    Raises:
        UserError: the file is missing or is not valid JSON.
        DataError: the file has another form; a case is unknown or held out twice; a fold trains on a patient that it
            holds out; a fold has no training case or no held-out case.
    """
    content = read_json(path)
    folds = content.get("folds") if isinstance(content, dict) else content
    if not (isinstance(folds, list) and folds and all(_is_fold(fold) for fold in folds)):
        raise DataError(
            "holds no folds",
            where=path,
            seen=repr(folds)[:100],
            rule='[{"train": [case ids], "val": [case ids]}, ...], as nnU-Net\'s splits_final.json',
        )
    patients = {case.id: case.patient for case in index.cases}
    known, held_out_in = {*patients, *left_out}, dict[str, int]()
    read = []
    for number, fold in enumerate(folds):
        train, held_out = fold["train"], fold.get("val", fold.get("held_out"))
        unknown = [case for case in (*train, *held_out) if case not in known]
        if unknown:
            raise DataError(
                f"fold {number} names cases that the data set does not have",
                where=path,
                seen=f"{len(unknown)}, e.g. {', '.join(unknown[:3])}",
                rule=f"case ids as in dataset_index.json, e.g. {index.cases[0].id}",
            )
        train, held_out = ([c for c in dict.fromkeys(cases) if c in patients] for cases in (train, held_out))
        _require_apart(path, number, train, held_out, patients)
        for case in held_out:
            if case in held_out_in:
                raise DataError(
                    "a case is held out in two folds",
                    where=path,
                    seen=f"{case}, in folds {held_out_in[case]} and {number}",
                    rule="each case is held out once at most",
                )
            held_out_in[case] = number
        if not train or not held_out:
            raise DataError(
                f"fold {number} has no {'held-out' if train else 'training'} case",
                where=path,
                seen=f"{len(train)} to train on, {len(held_out)} held out, of those that validation accepted",
                rule="at least one of each",
            )
        read.append({"train": train, "held_out": held_out})
    return read


def _is_fold(fold: Any) -> bool:
    if not isinstance(fold, dict) or ("val" in fold) == ("held_out" in fold):
        return False
    lists = [fold.get("train"), fold.get("val", fold.get("held_out"))]
    return all(isinstance(cases, list) and all(isinstance(case, str) for case in cases) for cases in lists)


def _require_apart(path: object, number: int, train: list[str], held_out: list[str], patients: dict[str, str]) -> None:
    trained = {patients[case]: case for case in train}
    for case in held_out:
        if patients[case] in trained:
            raise DataError(
                f"fold {number} trains on a patient that it holds out",
                where=str(path),
                seen=f"{patients[case]}: trains on {trained[patients[case]]}, holds out {case}",
                rule="all scans of a patient are in training, or all are held out",
                hint="move them together; if they are different patients, set download.patient_pattern",
            )


def check_held_out(model_dir: Path, splits: Path, fold: int) -> None:
    """Check that fold `fold` of `splits` was held out when the model was trained.

    Raises:
        DataError: `model.json` names another fold or another split.
    """
    path = model_dir / "model.json"
    model = read_json(path)
    if model.get("fold") != fold:
        raise DataError(
            "is the model of another fold",
            where=path,
            seen=f"fold {model.get('fold')}",
            rule=f"fold {fold}: a model is evaluated on cases that it was not trained on",
            hint=f"give the model of fold {fold}, or train it",
        )
    if model.get("splits") != sha256_file(splits):
        raise DataError(
            "was trained on another split",
            where=path,
            seen=f"{splits} differs from the split of its training",
            rule="a model is evaluated on cases that it was not trained on",
            hint="train again (dvc repro), or give the preprocessed data of the training (--preprocessed)",
        )


def load_fold(path: object, fold: int) -> tuple[list[str], list[str]]:
    """Case ids (train, held out) of one fold from a `splits.json`.

    Raises:
        DataError: the fold does not exist, or it lacks training or held-out cases.
    """
    folds = read_json(str(path))["folds"]
    if not 0 <= fold < len(folds):
        raise DataError("has no such fold", where=str(path), seen=fold, rule=f"0 to {len(folds) - 1}")
    train, held_out = folds[fold]["train"], folds[fold]["held_out"]
    if not train or not held_out:
        raise DataError(f"fold {fold} lacks training or held-out cases", where=str(path))
    return train, held_out
