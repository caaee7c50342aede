"""`scores.json`: what an exported model scored on the held-out cases, each by itself, so that two can be compared."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distilldsm.core.errors import ConfigError, DataError, UserError
from distilldsm.core.files import read_json, sha256_file
from distilldsm.core.mapping import from_mapping
from distilldsm.core.output_directory import MANIFEST, content_hash

SCORES = "scores.json"
METRICS = ("dice", "nsd", "hd95_mm")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The contents of `scores.json`."""

    schema_version: int = 1
    source: Literal["evaluation", "validation"]
    """`evaluation`: whole cases in the scan's own geometry; `validation`: only the means seen while training."""
    note: str = ""
    """Why there is no evaluation."""
    fold: int
    checkpoint: str
    data_hash: str
    """Of the data set's directory, see `distilldsm.core.output_directory.content_hash`."""
    split_hash: str
    """SHA-256 of splits.json."""
    nsd_tolerance_mm: float | None = None
    mirror: bool = False
    """Whether the predictions that were scored were averaged over flips."""
    labels: tuple[str, ...] = ()
    mean: Mapping[str, float] = field(default_factory=dict)
    """Under the names of the run's metrics, e.g. `test_dice_mean`."""
    cases: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    """Case to label to `dice`, `nsd`, `hd95_mm`; empty without an evaluation."""
    patients: Mapping[str, str] = field(default_factory=dict)
    """Case to patient; older files tell none, and cases that are missing are taken for patients of their own."""

    def __post_init__(self) -> None:
        if self.schema_version != 1:
            raise ConfigError("unknown version of the scores", seen=self.schema_version, rule="1")
        for case, rows in self.cases.items():
            if set(rows) != set(self.labels) or not all(
                math.isfinite(row.get(metric, math.nan)) for row in rows.values() for metric in METRICS
            ):
                raise ConfigError(f"case '{case}' lacks finite scores of every label", rule=", ".join(METRICS))

    def per_case(self, metric: str) -> dict[str, float]:
        """Case to the mean of a metric over the labels."""
        return {c: math.fsum(row[metric] for row in rows.values()) / len(rows) for c, rows in self.cases.items()}


def load_scores(path: Path) -> Scores | None:
    """Read `scores.json`; None where it is missing or not what this version knows: such a model is not comparable."""
    try:
        return from_mapping(Scores, read_json(path), where=str(path))
    except UserError:
        return None


def collect_scores(
    model_dir: Path, preprocessed: Path, evaluation: Path | None, *, fold: int, checkpoint: str
) -> Scores:
    """The scores of a trained fold: of its evaluation, else what was seen while training.

    Args:
        evaluation: what the evaluate stage wrote; None or missing: the fold was not evaluated. One of another model,
            fold or checkpoint is not used; `note` says so.

    Raises:
        DataError: the evaluation is damaged.
    """
    facts: dict[str, Any] = {
        "fold": fold,
        "checkpoint": checkpoint,
        "data_hash": _data_hash(preprocessed),
        "split_hash": sha256_file(preprocessed / "splits.json"),
    }
    if evaluation is None or not (evaluation / MANIFEST).is_file():
        return Scores(
            source="validation", note="it was not evaluated", mean=_validation(model_dir, checkpoint), **facts
        )
    manifest = read_json(evaluation / MANIFEST)
    try:
        settings, of = manifest["config"], manifest["inputs"]
        note = ""
        if manifest["fold"] != fold:
            note = f"the evaluation is of fold {manifest['fold']}"
        elif of["model"] != content_hash(model_dir):
            note = "the evaluation is of another training"
        elif "ensemble1" in of:
            note = "the evaluation is of this network and others, averaged"
        elif settings["checkpoint"] != checkpoint:
            note = f"the evaluation is of checkpoint '{settings['checkpoint']}', exported is '{checkpoint}'"
        if note:
            return Scores(source="validation", note=note, mean=_validation(model_dir, checkpoint), **facts)
        facts |= {"data_hash": of["dataset"], "split_hash": of["splits"]}
        cases, patients = _cases(evaluation / "cases.csv")
        return Scores(
            source="evaluation",
            nsd_tolerance_mm=float(settings["nsd_tolerance_mm"]),
            mirror=bool(settings.get("mirror", False)),
            labels=tuple(next(iter(cases.values()), {})),
            mean=_means(read_json(evaluation / "summary.json")),
            cases=cases,
            patients=patients,
            **facts,
        )
    except (KeyError, TypeError, ValueError, OSError, ConfigError) as error:
        raise DataError(
            "is no evaluation that can be read",
            where=evaluation,
            seen=" ".join(f"{type(error).__name__}: {error}".split()),
            hint="evaluate the fold again (dvc repro evaluate)",
        ) from None


def _cases(path: Path) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, str]]:
    """Case to label to scores, and case to patient where the table tells it."""
    cases: dict[str, dict[str, dict[str, float]]] = {}
    patients: dict[str, str] = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            cases.setdefault(row["case"], {})[row["label"]] = {metric: float(row[metric]) for metric in METRICS}
            if row.get("patient"):
                patients[row["case"]] = row["patient"]
    return cases, patients


def _means(summary: Mapping[str, Any]) -> dict[str, float]:
    means = {f"test_{metric}_mean": summary["mean"][metric] for metric in METRICS}
    for label, of_label in summary["labels"].items():
        means |= {f"test_{metric}_{label}": of_label[metric]["mean"] for metric in METRICS}
    return {name: float(value) for name, value in means.items() if value is not None}


def _validation(model_dir: Path, checkpoint: str) -> dict[str, float]:
    """The mean Dice seen in training of the weights that are exported."""
    if checkpoint == "best":
        best = read_json(model_dir / "model.json").get("best_val_dice")
        return {} if best is None else {"val_dice_mean": float(best)}
    path = model_dir / "history.json"
    seen = [row["val_dice_mean"] for row in (read_json(path) if path.is_file() else []) if "val_dice_mean" in row]
    return {"val_dice_mean": float(seen[-1])} if seen else {}


def _data_hash(preprocessed: Path) -> str:
    path = preprocessed / MANIFEST
    inputs = read_json(path).get("inputs", {}) if path.is_file() else {}
    return str(inputs.get("dataset") or content_hash(preprocessed))
