"""Predict and score the held-out cases of a fold, and write the tables that DVC plots."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distilldsm.config import EvaluateConfig
from distilldsm.core import cost
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, write_json
from distilldsm.core.hashes import MANIFEST, content_hash, finish, is_finished
from distilldsm.core.progress import progress
from distilldsm.core.text import csv_cell
from distilldsm.core.workers import worker_count, worker_pool
from distilldsm.data.dataset import Case, DatasetIndex
from distilldsm.data.plan import Plan
from distilldsm.data.splits import check_held_out, load_fold
from distilldsm.data.targets import Targets
from distilldsm.evaluation import tables
from distilldsm.evaluation.metrics import confusion, score_case
from distilldsm.evaluation.postprocess import write_postprocessing
from distilldsm.evaluation.report import Evaluation, write_report
from distilldsm.inference.postprocess import keep_largest
from distilldsm.io import read_labels, read_scan, write_mask


def held_out_cases(
    index: DatasetIndex, inputs: Mapping[str, Path], fold: int, ensemble: Sequence[Path] = ()
) -> list[Case]:
    """The cases that the fold holds out.

    Raises:
        DataError: a model belongs to another fold or split, or the data set lacks a case.
    """
    splits = inputs["preprocessed"] / "splits.json"
    _, held_out = load_fold(splits, fold)
    for model in (inputs["model"], *ensemble):
        check_held_out(model, splits, fold)
    expected = set(held_out)
    cases = [case for case in index.cases if case.id in expected]
    if absent := sorted(expected - {case.id for case in cases}):
        raise DataError(
            f"lacks {len(absent)} of the {len(expected)} held-out cases of fold {fold}",
            where=inputs["dataset"],
            seen=f"no {absent[0]}",
            rule="every held-out case is scored",
            hint="preprocess this data set again, or give the data set that was preprocessed",
        )
    return cases


def score_fold(
    config: EvaluateConfig,
    inputs: Mapping[str, Path],
    work: Path,
    index: DatasetIndex,
    cases: Sequence[Case],
    *,
    fold: int,
    ensemble: Sequence[Path] = (),
) -> Evaluation:
    """Predict and score the cases, and write all files of an evaluation to `work`. Finished cases are not repeated."""
    models = [inputs["model"], *ensemble]
    plan = Plan.load(inputs["model"] / "plan.json")
    targets = plan.targets
    for name in ("scores", "timing", "predictions", "plots", "figures"):
        (work / name).mkdir(exist_ok=True)
    score_all(config, models, inputs["dataset"], work, cases, index, targets)
    scores = {case.id: read_json(work / "scores" / f"{case.id}.json") for case in cases}
    rows = with_names(cases, scores, "rows")
    summary = tables.summarise(rows, targets.structures)
    tables.write_csv(work / "cases.csv", rows)
    largest = with_names(cases, scores, "largest")
    postprocessing = write_postprocessing(work, rows, largest, targets.changed_with, plan.training.keep_largest)
    confidence_intervals = tables.intervals(rows, list(targets.structures))
    described = {"fold": fold, "checkpoint": config.checkpoint, **summary, "intervals": confidence_intervals}
    write_json(work / "summary.json", described | ({"ensemble": recipes(models)} if ensemble else {}))
    write_json(work / "metrics.json", tables.metrics_for_dvc(summary))
    write_plots(work / "plots", rows, read_json(inputs["model"] / "history.json"), scores, index)
    prediction_cost = cost.prediction_cost(work / "timing")
    training_cost = cost.ensemble_cost(models) if ensemble else cost.training_cost(inputs["model"])
    write_json(work / cost.TIMING, {**prediction_cost, "training": training_cost})
    found = Evaluation(
        config=config,
        inputs=inputs,
        ensemble=ensemble,
        index=index,
        cases=cases,
        fold=fold,
        labels=list(targets.structures),
        rows=rows,
        summary=summary,
        intervals=confidence_intervals,
        postprocessing=postprocessing,
        prediction_cost=prediction_cost,
        training_cost=training_cost,
    )
    write_report(work, found)
    for name in ("scores", "timing"):
        shutil.rmtree(work / name)
    if not config.save_masks:
        shutil.rmtree(work / "predictions")
        (work / "predictions").mkdir()
    return found


def with_names(cases: Sequence[Case], scores: Mapping[str, Mapping], table: str) -> list[dict[str, Any]]:
    """The rows of all cases, with the patient, because several cases of a patient are not independent."""
    return [{"case": case.id, "patient": case.patient, **row} for case in cases for row in scores[case.id][table]]


def check_all_differ(models: Sequence[Path]) -> None:
    """Raise DataError if a model is twice in an ensemble, because its mean would be that of a smaller ensemble."""
    seen: dict[str, Path] = {}
    for model in models:
        weights = content_hash(model)
        if weights in seen:
            raise DataError(
                "is in the ensemble twice",
                where=model,
                seen=f"the same content as {seen[weights]}",
                rule="the networks of an ensemble must differ, e.g. in train.seed",
                hint="leave it out, or train another network (distilldsm train --set train.seed=1 --output DIR)",
            )
        seen[weights] = model


def recipes(models: Sequence[Path]) -> dict[str, Any]:
    """1, 2 ... to name, options and training parameters of each model."""
    found = {}
    for number, model in enumerate(models, start=1):
        described, manifest = read_json(model / "model.json"), read_json(model / MANIFEST)
        found[str(number)] = {
            **{key: described[key] for key in ("name", "options", "parameters")},
            "train": manifest["config"],
        }
    return found


def _predictor(models: Sequence[Path], config: EvaluateConfig) -> Any:
    from distilldsm.inference.loading import load_trained

    first, *others = models
    mirror: Literal["trained"] | tuple[()] = "trained" if config.mirror else ()
    return load_trained(first, config.checkpoint, ensemble=others, mirror=mirror)


def score_all(
    config: EvaluateConfig,
    models: Sequence[Path],
    dataset: Path,
    work: Path,
    cases: Sequence[Case],
    index: DatasetIndex,
    targets: Targets,
) -> None:
    """Predict in this process and score in worker processes. Cases that have scores are skipped."""
    todo = [case for case in cases if not is_finished(work, f"scores/{case.id}")]
    if not todo:
        return
    predictor = _predictor(models, config)
    workers = worker_count(config.workers, len(todo))
    with worker_pool(workers, setting="evaluate.workers") as pool:
        running: set[Future[None]] = set()
        for case in progress(todo, total=len(todo), title="evaluate", unit="case"):
            path = work / "predictions" / f"{case.id}.nii.gz"
            timing = work / "timing" / f"{case.id}.json"
            if not is_finished(work, f"predictions/{case.id}"):  # an interruption may come between mask and scores
                scan = read_scan([dataset / p for p in case.images], len(index.channels)).load()
                with cost.measured(timing):
                    mask = predictor.predict(scan).mask
                write_mask(path, mask, scan)
                finish(work, f"predictions/{case.id}", path, timing)
            running.add(pool.submit(_score, work, case.id, dataset / case.label, targets, config.nsd_tolerance_mm))
            if len(running) > 2 * workers:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
        for future in running:
            future.result()


def _score(work: Path, case: str, truth: Path, targets: Targets, tolerance_mm: float) -> None:
    output = work / "scores" / f"{case}.json"
    score_file(truth, work / "predictions" / f"{case}.nii.gz", targets, tolerance_mm, output)
    finish(work, f"scores/{case}", output)


def score_file(truth_path: Path, mask_path: Path, targets: Targets, tolerance_mm: float, output: Path) -> None:
    """Score one predicted mask file, unchanged and with only the largest components; write the scores as JSON."""
    reference = read_labels(truth_path)
    truth, mask = reference.values, read_labels(mask_path).values
    score = partial(score_case, truth, spacing_mm=reference.spacing_mm, tolerance_mm=tolerance_mm)
    scores = score(mask, labels=targets.structures)
    table = confusion(truth, mask, targets.class_values)
    cut = [name for name, values in targets.largest.items() if keep_largest(mask, values)]
    changed = {other for name in cut for other in targets.changed_with[name]}
    labels = {name: values for name, values in targets.structures.items() if name in changed}
    again = {row["label"]: row for row in score(mask, labels=labels)}
    largest = [again.get(row["label"], row) for row in scores]
    write_json(output, {"rows": scores, "largest": largest, "confusion": table.tolist()})


def _plot_cell(value: Any) -> Any:
    return csv_cell(value.replace("<", "\u2039") if isinstance(value, str) else value)


def write_plots(
    folder: Path, rows: Sequence[Mapping], history: Sequence[Mapping], scores: Mapping, index: DatasetIndex
) -> None:
    # DVC puts these files into a script of its page as they are.
    write_csv = partial(tables.write_csv, text=_plot_cell)
    write_csv(
        folder / "history.csv",
        [{k: h.get(k, "") for k in ("epoch", "train_loss", "val_dice_mean", "learning_rate")} for h in history],
    )
    by_epoch = [
        {"epoch": h["epoch"], "label": label, "dice": dice}
        for h in history
        for label, dice in h.get("val_dice", {}).items()
    ]
    write_csv(folder / "dice_by_epoch.csv", by_epoch, ("epoch", "label", "dice"))
    write_csv(
        folder / "dice_by_case.csv",
        [{k: row[k] for k in ("case", "label", "dice", "hd95_mm", "volume_truth_ml")} for row in rows],
    )
    total = np.sum([one["confusion"] for one in scores.values()], axis=0)
    # DVC's confusion plot counts rows. Each true label gets about a thousand rows.
    shares = np.rint(1000 * total / np.maximum(total.sum(axis=1, keepdims=True), 1)).astype(int)
    pairs = [
        {"actual": a, "predicted": b}
        for i, a in enumerate(index.class_names)
        for j, b in enumerate(index.class_names)
        for _ in range(shares[i, j])
    ]
    write_csv(folder / "confusion.csv", pairs)
