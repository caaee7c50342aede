"""`scores.json`: the scores of an exported model on each held-out case. The gate compares two models with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distilldsm.core.errors import ConfigError, DataError, UserError
from distilldsm.core.files import read_json, sha256_file
from distilldsm.core.hashes import MANIFEST, content_hash
from distilldsm.core.mapping import from_mapping
from distilldsm.evaluation.metrics import main_metrics
from distilldsm.evaluation.tables import metrics_for_mlflow, read_rows

SCORES = "scores.json"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The contents of `scores.json`."""

    schema_version: int = 1
    source: Literal["evaluation", "validation"]
    """`evaluation`: whole cases in the scan's own geometry; `validation`: only the means measured during training."""
    note: str = ""
    """Why there is no evaluation."""
    fold: int | None
    """None: several folds of a cross-validation together."""
    checkpoint: str
    data_hash: str
    """Hash of the data set's directory, see `distilldsm.core.hashes.content_hash`."""
    split_hash: str
    """SHA-256 of splits.json."""
    nsd_tolerance_mm: float | None = None
    mirror: bool = False
    """Whether the scored predictions were averaged over flips."""
    labels: tuple[str, ...] = ()
    mean: Mapping[str, float] = field(default_factory=dict)
    """The run's metrics by name, e.g. `test_dice_mean`."""
    cases: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    """Case to label to main metrics (`dice` and so on); empty without an evaluation."""
    patients: Mapping[str, str] = field(default_factory=dict)
    """Case to patient. A case that is not listed is its own patient."""

    def __post_init__(self) -> None:
        if self.schema_version != 1:
            raise ConfigError("unknown version of the scores", seen=self.schema_version, rule="1")
        needed = [metric.name for metric in main_metrics()]
        for case, rows in self.cases.items():
            values = [row.get(name, math.nan) for row in rows.values() for name in needed]
            if set(rows) != set(self.labels) or not all(map(math.isfinite, values)):
                raise ConfigError(f"case '{case}' needs finite scores for every label", rule=", ".join(needed))

    def per_case(self, metric: str) -> dict[str, float]:
        """Map each case to the mean of a metric over the labels."""
        return {c: math.fsum(row[metric] for row in rows.values()) / len(rows) for c, rows in self.cases.items()}


def load_scores(path: Path) -> Scores | None:
    """Read `scores.json`; None if it is missing or of another version. Such a model cannot be compared."""
    try:
        return from_mapping(Scores, read_json(path), where=str(path))
    except UserError:
        return None


def together(parts: Sequence[Scores]) -> Scores | None:
    """The scores of several folds of one cross-validation; None if they do not belong together.

    Each case is held out in one fold, so every case counts once.
    """
    if len(parts) == 1:
        return parts[0]
    same = {
        (one.data_hash, one.split_hash, one.labels, one.mirror, one.nsd_tolerance_mm, one.checkpoint) for one in parts
    }
    cases = {case: rows for one in parts for case, rows in one.cases.items()}
    if len(same) != 1 or not all(one.cases for one in parts) or len(cases) < sum(len(one.cases) for one in parts):
        return None
    patients = {case: patient for one in parts for case, patient in one.patients.items()}
    return replace(parts[0], fold=None, cases=cases, patients=patients, mean={})


def collect_scores(
    model_dir: Path, preprocessed: Path, evaluation: Path | None, *, fold: int, checkpoint: str
) -> Scores:
    """The scores of a trained fold: from its evaluation, or else the means measured during training.

    Args:
        evaluation: the directory from the evaluate stage; None or missing: the fold was not evaluated. An evaluation
            of another model, fold or checkpoint is not used, and `note` says so.

    Raises:
        DataError: the evaluation is damaged.
    """
    facts: dict[str, Any] = {
        "fold": fold,
        "checkpoint": checkpoint,
        "data_hash": _data_hash(preprocessed),
        "split_hash": sha256_file(preprocessed / "splits.json"),
    }
    note = "this model was not evaluated"
    try:
        if evaluation is not None and (evaluation / MANIFEST).is_file():
            manifest = read_json(evaluation / MANIFEST)
            note = _not_of_this(manifest, content_hash(model_dir), fold=fold, checkpoint=checkpoint)
            if not note:
                return Scores(**facts | _evaluated(evaluation, manifest))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise DataError(
            "is not a readable evaluation",
            where=evaluation,
            seen=" ".join(f"{type(error).__name__}: {error}".split()),
            hint="evaluate the fold again (dvc repro evaluate)",
        ) from None
    return Scores(source="validation", note=note, mean=_validation(model_dir, checkpoint), **facts)


def _not_of_this(manifest: Mapping[str, Any], model_hash: str, *, fold: int, checkpoint: str) -> str:
    """Why an evaluation does not belong to the exported model; empty if it does."""
    if manifest["fold"] != fold:
        return f"the evaluation is of fold {manifest['fold']}"
    if manifest["inputs"]["model"] != model_hash:
        return "the evaluation is of another training"
    if "ensemble1" in manifest["inputs"]:
        return "the evaluation is of this network and others, averaged"
    if manifest["config"]["checkpoint"] != checkpoint:
        return f"the evaluation is of checkpoint '{manifest['config']['checkpoint']}', exported is '{checkpoint}'"
    return ""


def _evaluated(evaluation: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Read the scores from an evaluation's directory."""
    cases: dict[str, dict[str, dict[str, float]]] = {}
    rows = read_rows(evaluation / "cases.csv")
    for row in rows:
        cases.setdefault(row["case"], {})[row["label"]] = {m.name: row[m.name] for m in main_metrics()}
    return {
        "source": "evaluation",
        "data_hash": manifest["inputs"]["dataset"],
        "split_hash": manifest["inputs"]["splits"],
        "nsd_tolerance_mm": float(manifest["config"]["nsd_tolerance_mm"]),
        "mirror": bool(manifest["config"]["mirror"]),
        "labels": tuple(dict.fromkeys(row["label"] for row in rows)),
        "mean": metrics_for_mlflow(read_json(evaluation / "summary.json")),
        "cases": cases,
        "patients": {row["case"]: row["patient"] for row in rows if row.get("patient")},
    }


def _validation(model_dir: Path, checkpoint: str) -> dict[str, float]:
    """The mean Dice of the exported weights, as measured during training."""
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
