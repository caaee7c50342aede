"""Cross-validation folds, by patient, seeded."""

from __future__ import annotations

import random

from distilldsm.data.dataset import DatasetIndex
from distilldsm.errors import ConfigError, DataError
from distilldsm.stage import read_json


def make_splits(index: DatasetIndex, *, count: int, seed: int) -> list[dict[str, list[str]]]:
    """Deal the patients into `count` folds whose sizes differ by one patient at most.

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
            mend=f"set preprocess.folds to {len(patients)} or less, or add cases",
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


def load_fold(path: object, fold: int) -> tuple[list[str], list[str]]:
    """Case ids (train, held out) of one fold from a `splits.json`.

    Raises:
        DataError: there is no such fold, or it lacks cases.
    """
    folds = read_json(str(path))["folds"]
    if not 0 <= fold < len(folds):
        raise DataError("has no such fold", where=str(path), seen=fold, rule=f"0 to {len(folds) - 1}")
    train, held_out = folds[fold]["train"], folds[fold]["held_out"]
    if not train or not held_out:
        raise DataError(f"fold {fold} lacks training or held-out cases", where=str(path))
    return train, held_out
