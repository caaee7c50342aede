"""Stage evaluate: a trained fold, or the mean of several, on its held-out cases, in the scans' own geometry."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distilldsm.components._main import stage_main
from distilldsm.config import EvaluateConfig, TrackingConfig, load_params
from distilldsm.core import cost
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json, sha256_json, write_json
from distilldsm.core.output_directory import MANIFEST, content_hash, output_directory, result_config
from distilldsm.core.progress import progress
from distilldsm.core.workers import worker_count, worker_pool
from distilldsm.data.dataset import Case, DatasetIndex
from distilldsm.data.plan import Plan
from distilldsm.data.splits import check_held_out, load_fold
from distilldsm.data.targets import Targets
from distilldsm.evaluation import tables
from distilldsm.evaluation.metrics import confusion, score_case
from distilldsm.evaluation.postprocess import POSTPROCESSING, write_postprocessing
from distilldsm.evaluation.report_contents import Evaluation, optional_inputs, write_report
from distilldsm.inference.postprocess import keep_largest
from distilldsm.io import read_labels, read_scan, write_mask
from distilldsm.models.inserted import trust_builder

if TYPE_CHECKING:
    from distilldsm.tracking import Run


def key(config: EvaluateConfig, inputs: Mapping[str, Path], fold: int, ensemble: Sequence[Path] = ()) -> dict[str, Any]:
    """What decides the output, for `output_directory` and `is_current`."""
    hashed = {
        "dataset": inputs["dataset"],
        "splits": inputs["preprocessed"] / "splits.json",
        "model": inputs["model"],
        **{f"ensemble{number}": model for number, model in enumerate(ensemble, start=1)},
        **optional_inputs(inputs),
    }
    return {"stage": "evaluate", "config": config, "inputs": hashed, "extra": {"fold": fold}}


def run(
    config: EvaluateConfig,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    *,
    fold: int,
    ensemble: Sequence[Path] = (),
    tracking: TrackingConfig | None = None,
) -> None:
    """Predict and score every held-out case; resumable per case.

    Args:
        inputs: `dataset` (scans and truth), `preprocessed` (splits, fingerprint), `model` (of this fold), and, for
            a page that tells what was found in the data, `validation`.
        outputs: `evaluation`: `cases.csv`, `summary.json`, `metrics.json`, `timing.json`, `report.html`, `figures/`,
            `plots/`, `predictions/`: all of the predictions as they are; `postprocessed.csv` and
            `postprocessing.json`: what keeping the largest component of each label or region would change.
        ensemble: further models of this fold: what is scored is the mean of all networks' scores.
        tracking: the scores are added to the model's training run; those of an ensemble are a run of their own.

    Raises:
        DataError: a model is of another fold or split, is given twice, does not fit to the first one, or held-out cases
            are missing.
    """
    index = DatasetIndex.load(inputs["dataset"])
    splits = inputs["preprocessed"] / "splits.json"
    _, held_out = load_fold(splits, fold)
    models = [inputs["model"], *ensemble]
    for model in models:
        check_held_out(model, splits, fold)
    check_all_differ(models)
    wanted = set(held_out)
    cases = [case for case in index.cases if case.id in wanted]
    if absent := sorted(wanted - {case.id for case in cases}):
        raise DataError(
            f"lacks {len(absent)} of the {len(wanted)} cases that fold {fold} holds out",
            where=inputs["dataset"],
            seen=f"no {absent[0]}",
            rule="every held-out case is scored",
            hint="preprocess this data set again, or give the one that was preprocessed",
        )

    def kept(work: Path) -> str:
        predicted, scored = (len(list((work / name).glob("[!.]*"))) for name in ("predictions", "scores"))
        return f"{predicted} of {len(cases)} cases are kept, {scored} of them scored"

    with output_directory(
        outputs["evaluation"], **key(config, inputs, fold, ensemble), resumable=True, kept=kept
    ) as work:
        targets = Plan.load(inputs["model"] / "plan.json").targets
        for name in ("scores", "timing", "predictions", "plots", "figures"):
            (work / name).mkdir(exist_ok=True)
        score_all(config, models, inputs["dataset"], work, cases, index, targets)
        scores = {case.id: read_json(work / "scores" / f"{case.id}.json") for case in cases}
        rows = _with_names(cases, scores, "rows")
        summary = tables.summarise(rows, targets.structures)
        tables.write_csv(work / "cases.csv", rows)
        largest = _with_names(cases, scores, "largest")
        decided = write_postprocessing(work, rows, largest, targets.changed_with)
        confidence_intervals = tables.intervals(rows, list(targets.structures))
        ensemble_info = {"ensemble": recipes(models)} if ensemble else {}
        facts = {"fold": fold, "checkpoint": config.checkpoint, **summary, "intervals": confidence_intervals}
        write_json(work / "summary.json", facts | ensemble_info)
        write_json(work / "metrics.json", tables.metrics_for_dvc(summary))
        history = read_json(inputs["model"] / "history.json")
        _write_plots(work / "plots", rows, history, scores, index)
        taken = cost.prediction_cost(work / "timing")
        training = cost.ensemble_cost(models) if ensemble else cost.training_cost(inputs["model"])
        write_json(work / cost.TIMING, {**taken, "training": training})
        given = Evaluation(
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
            postprocessing=decided,
            prediction_cost=taken,
            training_cost=training,
        )
        write_report(work, given)
        for name in ("scores", "timing"):
            shutil.rmtree(work / name)
        if not config.save_masks:
            shutil.rmtree(work / "predictions")
            (work / "predictions").mkdir()
        if ensemble and tracking is not None:
            _track_ensemble(tracking, given, work)
    print(tables.format_table(summary, f"{index.name}, fold {fold}, {len(cases)} held-out cases"))
    for label in decided.kept:
        print(f"{label}, largest component only: {decided.labels[label].reason} ({POSTPROCESSING})")
    if tracking is not None and not ensemble:
        from distilldsm.tracking import attach

        with attach(inputs["model"], tracking) as mlflow_run:
            _track(mlflow_run, given, outputs["evaluation"])


def _with_names(cases: Sequence[Case], scores: Mapping[str, Mapping], table: str) -> list[dict[str, Any]]:
    """The rows of all cases. The patient, too: several cases of one are not independent of each other."""
    return [{"case": case.id, "patient": case.patient, **row} for case in cases for row in scores[case.id][table]]


def check_all_differ(models: Sequence[Path]) -> None:
    """DataError where two models of an ensemble are the same: their mean is that of a smaller one."""
    seen: dict[str, Path] = {}
    for model in models:
        weights = content_hash(model)
        if weights in seen:
            raise DataError(
                "is in the ensemble twice",
                where=model,
                seen=f"the same content as {seen[weights]}",
                rule="the networks of an ensemble differ, e.g. in train.seed",
                hint="leave it out, or train another one (distilldsm train --set train.seed=1 --output DIR)",
            )
        seen[weights] = model


def recipes(models: Sequence[Path]) -> dict[str, Any]:
    """1, 2 ... to name, options and parameters of the training of each model."""
    found = {}
    for number, model in enumerate(models, start=1):
        described, manifest = read_json(model / "model.json"), read_json(model / MANIFEST)
        found[str(number)] = {
            **{key: described[key] for key in ("name", "options", "parameters")},
            "train": manifest["config"],
        }
    return found


def _predictor(models: Sequence[Path], config: EvaluateConfig) -> Any:
    from distilldsm.inference.predict import Predictor

    first, *others = models
    mirror: Literal["trained"] | tuple[()] = "trained" if config.mirror else ()
    return Predictor.from_training(first, config.checkpoint, ensemble=others, mirror=mirror)


def score_all(
    config: EvaluateConfig,
    models: Sequence[Path],
    dataset: Path,
    work: Path,
    cases: Sequence[Case],
    index: DatasetIndex,
    targets: Targets,
) -> None:
    """Predict here, score in worker processes; a case whose scores are there is done."""
    todo = [case for case in cases if not (work / "scores" / f"{case.id}.json").exists()]
    if not todo:
        return
    predictor = _predictor(models, config)
    workers = worker_count(config.workers, len(todo))
    with worker_pool(workers, setting="evaluate.workers") as pool:
        running: set[Future[None]] = set()
        for case in progress(todo, total=len(todo), title="evaluate", unit="case"):
            path = work / "predictions" / f"{case.id}.nii.gz"
            taken = work / "timing" / f"{case.id}.json"
            if not (path.exists() and taken.exists()):  # an interruption may have come between mask and scores
                scan = read_scan([dataset / p for p in case.images], len(index.channels)).load()
                with cost.measured(taken):
                    mask = predictor.predict(scan.volume())
                write_mask(path, mask, scan)
            task = (
                dataset / case.label,
                path,
                targets,
                config.nsd_tolerance_mm,
                work / "scores" / f"{case.id}.json",
            )
            running.add(pool.submit(score_file, *task))
            if len(running) > 2 * workers:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
        for future in running:
            future.result()


def score_file(truth_path: Path, mask_path: Path, targets: Targets, tolerance_mm: float, output: Path) -> None:
    """Score one predicted mask file, as it is and with only the largest components; written as JSON."""
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


def _write_plots(
    folder: Path, rows: Sequence[Mapping], history: Sequence[Mapping], scores: Mapping, index: DatasetIndex
) -> None:
    tables.write_csv(
        folder / "history.csv",
        [{k: h.get(k, "") for k in ("epoch", "train_loss", "val_dice_mean", "learning_rate")} for h in history],
    )
    by_epoch = [
        {"epoch": h["epoch"], "label": label, "dice": dice}
        for h in history
        for label, dice in h.get("val_dice", {}).items()
    ]
    tables.write_csv(folder / "dice_by_epoch.csv", by_epoch)
    tables.write_csv(
        folder / "dice_by_case.csv",
        [{k: row[k] for k in ("case", "label", "dice", "hd95_mm", "volume_truth_ml")} for row in rows],
    )
    total = np.sum([one["confusion"] for one in scores.values()], axis=0)
    # DVC's confusion plot counts rows: each true label is given about a thousand of them.
    shares = np.rint(1000 * total / np.maximum(total.sum(axis=1, keepdims=True), 1)).astype(int)
    pairs = [
        {"actual": a, "predicted": b}
        for i, a in enumerate(index.class_names)
        for j, b in enumerate(index.class_names)
        for _ in range(shares[i, j])
    ]
    tables.write_csv(folder / "confusion.csv", pairs)


def _track(mlflow_run: Run, given: Evaluation, evaluation: Path) -> None:
    mlflow_run.log_metrics(tables.metrics_for_mlflow(given.summary, given.intervals))
    mlflow_run.log_artifacts(evaluation / "figures", "evaluation/figures")
    mlflow_run.log_artifact(evaluation / "report.html", "evaluation")
    mlflow_run.log_artifact(evaluation / POSTPROCESSING, "evaluation")
    mlflow_run.log_table([dict(row) for row in given.rows], "evaluation/cases.json")
    validation = given.inputs.get("validation", given.inputs["dataset"].parent / "validation") / "report.html"
    if validation.exists():
        mlflow_run.log_artifact(validation, "validation")
        if (docs := validation.with_name("data_docs")).is_dir():
            mlflow_run.log_artifacts(docs, "validation/data_docs")


def _track_ensemble(tracking: TrackingConfig, given: Evaluation, work: Path) -> None:
    """A run of its own: the scores are none of a single training's."""
    from distilldsm.tracking import run_key_of, start_run

    models = [given.inputs["model"], *given.ensemble]
    trainings = [run_key_of(model) or content_hash(model) for model in models]
    # The same trainings, evaluated alike, are the same run.
    run_key = sha256_json([tracking.experiment, result_config(given.config), given.fold, trainings])[:32]
    name = f"{tracking.run_name or 'ensemble'}-fold{given.fold}"
    with start_run(
        tracking, directory=work, name=name, tags={"fold": str(given.fold)}, run_key=run_key, with_system=False
    ) as mlflow_run:
        mlflow_run.log_params({"evaluate": asdict(given.config), "fold": given.fold, "ensemble": recipes(models)})
        _track(mlflow_run, given, work)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="distilldsm evaluate", description=__doc__)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. evaluate.checkpoint=best")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--dataset", type=Path, default=Path("data/raw"))
    parser.add_argument("--preprocessed", type=Path, default=Path("data/preprocessed"))
    parser.add_argument("--model", type=Path, default=None, help="default: models/fold<FOLD>")
    parser.add_argument(
        "--ensemble",
        type=Path,
        action="append",
        default=[],
        metavar="MODEL",
        help="a further model of this fold, e.g. of another train.seed; repeatable. Scores are averaged",
    )
    parser.add_argument(
        "--validation", type=Path, default=Path("data/validation"), help="for the page, where there is a report.json"
    )
    parser.add_argument("--output", type=Path, default=None, help="default: evaluation/fold<FOLD>")
    args = parser.parse_args(argv)

    def stage() -> None:
        params = load_params(args.params, args.set)
        trust_builder(params.train.model.options)
        run(
            params.evaluate,
            {
                "dataset": args.dataset,
                "preprocessed": args.preprocessed,
                "model": args.model or Path(f"models/fold{args.fold}"),
                "validation": args.validation,
            },
            {"evaluation": args.output or Path(f"evaluation/fold{args.fold}")},
            fold=args.fold,
            ensemble=args.ensemble,
            tracking=params.tracking,
        )

    return stage_main(stage)


if __name__ == "__main__":
    raise SystemExit(main())
