"""Writes trained and evaluated folds as the stages leave them, without training anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distilldsm.components import cross_validate
from distilldsm.config import CrossValidationConfig, EvaluateConfig, TrainConfig
from distilldsm.core.cost import TIMING
from distilldsm.core.files import write_json
from distilldsm.core.output_directory import output_directory
from distilldsm.evaluation import tables
from distilldsm.evaluation.metrics import METRICS
from distilldsm.evaluation.postprocess import write_postprocessing

LABELS = ("shell", "core")


def random_rows(cases: Sequence[str], seed: int, labels: Sequence[str] = LABELS) -> list[dict[str, Any]]:
    """Scores of any size, a few of them undefined."""
    rng = np.random.default_rng(seed)
    rows = []
    for case in cases:
        for label in labels:
            row: dict[str, Any] = {"case": case, "label": label}
            row |= {metric: float(f"{rng.uniform(0, 1):.6g}") for metric in METRICS}
            row["volume_error_ml"] = float(f"{rng.normal(0, 3):.6g}")
            row["volume_error_abs_ml"] = abs(row["volume_error_ml"])
            if rng.random() < 0.3:
                row["sensitivity"] = None
            rows.append(row | {"volume_truth_ml": 2.0, "volume_predicted_ml": 2.5})
    return rows


def write_splits(root: Path, held_out: Sequence[Sequence[str]]) -> Path:
    everything = [case for cases in held_out for case in cases]
    folds = [{"train": [c for c in everything if c not in cases], "held_out": list(cases)} for cases in held_out]
    path = root / "splits.json"
    root.mkdir(parents=True, exist_ok=True)
    write_json(path, {"folds": folds})
    return path


def write_fold(
    root: Path,
    fold: int,
    rows: Sequence[Mapping[str, Any]],
    *,
    splits: Path,
    train: TrainConfig | None = None,
    evaluate: EvaluateConfig | None = None,
    data: str = "data",
    initial_weights: str | None = None,
    seconds: float = 2.0,
    network: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """`models/foldK` and `evaluation/foldK` below `root`; `run` becomes the model's `tracking.json`."""
    source = root / f"{data}.txt"
    source.write_text(data)
    given = {"preprocessed": source}
    if initial_weights is not None:
        given["initial_weights"] = root / "initial.safetensors"
        given["initial_weights"].write_text(initial_weights)
    config = train or TrainConfig()
    facts = {"name": config.model.name, "options": dict(config.model.options), "in_channels": 1, "out_channels": 3}
    facts |= {"parameters": 1000, "macs_per_voxel": 12.5, "fold": fold, "epochs": 2, "labels": {"background": 0}}
    training = {"parameters": 1000, "macs_per_voxel": 12.5, "seconds_per_epoch": seconds, "seconds": 2 * seconds}
    training |= {"peak_memory_gb": 0.5 + fold, "peak_gpu_memory_gb": None}
    training |= {"device": "cpu", "device_name": "a CPU", "threads": 2, "torch": "2", "precision": "float32"}
    model, evaluation = root / "models" / f"fold{fold}", root / "evaluation" / f"fold{fold}"
    with output_directory(model, stage="train", config=config, inputs=given, extra={"fold": fold}) as work:
        write_json(work / "model.json", facts | dict(network or {}))
        write_json(work / "history.json", [{"epoch": k + 1, "seconds": seconds} for k in range(2)])
        write_json(work / "cost.json", training)
        if run is not None:
            (work / "tracking.json").write_text(json.dumps(run))
    inputs = {"dataset": source, "splits": splits, "model": model}
    with output_directory(
        evaluation, stage="evaluate", config=evaluate or EvaluateConfig(), inputs=inputs, extra={"fold": fold}
    ) as work:
        tables.write_csv(work / "cases.csv", list(rows))
        write_postprocessing(work, rows, rows)
        labels = list(dict.fromkeys(row["label"] for row in rows))
        write_json(work / "summary.json", {"fold": fold, **tables.summarise(rows, labels)})
        machine = {key: training[key] for key in ("device", "device_name", "threads", "torch")}
        timing = {**machine, "seconds_per_volume": seconds / 10, "peak_memory_gb": 0.25, "training": training}
        write_json(work / TIMING, timing)


def write_folds(root: Path, count: int = 3, cases: int = 4, **options: Any) -> tuple[Path, list[list[dict[str, Any]]]]:
    """Folds of one cross-validation; returns `splits.json` and the rows of each fold."""
    held_out = [[f"case{fold}{k}" for k in range(cases + fold)] for fold in range(count)]
    splits = write_splits(root, held_out)
    rows = [random_rows(one, seed=fold) for fold, one in enumerate(held_out)]
    for fold in range(count):
        write_fold(root, fold, rows[fold], splits=splits, seconds=2.0 + fold, **options)
    return splits, rows


def cross_validated(root: Path, count: int = 3, **options: Any) -> Path:
    """The output of the stage cross_validate, of `count` folds below `root` that are written where they are not."""
    if not (root / "evaluation").exists():
        write_folds(root, count, **options)
    inputs = {"evaluation": root / "evaluation", "models": root / "models", "splits": root / "splits.json"}
    cross_validate.run(CrossValidationConfig(folds=tuple(range(count))), inputs, {"cross_validation": root / "cv"})
    return root / "cv"
