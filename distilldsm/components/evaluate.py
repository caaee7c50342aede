"""Stage evaluate: scores a trained fold, or an ensemble, on its held-out cases, in the scans' own geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.core.files import read_json, sha256_json
from distilldsm.core.hashes import content_hash
from distilldsm.core.output_directory import output_directory, result_config
from distilldsm.core.stage import Input, Option, Output, Plot, Stage

if TYPE_CHECKING:
    from distilldsm.config import EvaluateConfig, TrackingConfig
    from distilldsm.evaluation.report import Evaluation


def run(
    config: EvaluateConfig,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    *,
    fold: int,
    ensemble: Sequence[Path] = (),
    tracking: TrackingConfig | None = None,
) -> None:
    """Predict and score every held-out case. An interrupted run resumes after the last finished case.

    Args:
        inputs: `dataset` (scans and labels), `preprocessed` (splits, fingerprint), `model` (of this fold), optionally
            `validation` (its findings are shown on the page).
        outputs: `evaluation`: `cases.csv`, `summary.json`, `metrics.json`, `timing.json`, `report.html`, `figures/`,
            `plots/`, `predictions/`: the predictions without postprocessing; `postprocessed.csv` and
            `postprocessing.json`: the effect of keeping only the largest component of each label or region.
        ensemble: further models of this fold. The mean of all networks' probabilities is scored.
        tracking: adds the metrics to the model's training run. An ensemble gets its own run.

    Raises:
        DataError: a model belongs to another fold or split, is listed twice or does not match the first one; or
            held-out cases are missing.
    """
    from distilldsm.data.dataset import DatasetIndex
    from distilldsm.evaluation.postprocess import POSTPROCESSING
    from distilldsm.evaluation.scoring import check_all_differ, held_out_cases, score_fold
    from distilldsm.evaluation.tables import format_table
    from distilldsm.tracking import send

    index = DatasetIndex.load(inputs["dataset"])
    cases = held_out_cases(index, inputs, fold, ensemble)
    check_all_differ([inputs["model"], *ensemble])

    def kept(work: Path) -> str:
        predicted, scored = (len(list((work / name).glob("[!.]*"))) for name in ("predictions", "scores"))
        return f"{predicted} of {len(cases)} cases are kept, {scored} of them scored"

    key = STAGE.key(config, inputs, fold, ensemble=ensemble)
    with output_directory(outputs["evaluation"], **key, resumable=True, kept=kept) as work:
        evaluation = score_fold(config, inputs, work, index, cases, fold=fold, ensemble=ensemble)
        _describe(tracking, evaluation, work)
    print(format_table(evaluation.summary, f"{index.name}, fold {fold}, {len(cases)} held-out cases"))
    if evaluation.postprocessing is not None:
        for label in evaluation.postprocessing.kept:
            reason = evaluation.postprocessing.labels[label].reason
            print(f"{label}, largest component only: {reason} ({POSTPROCESSING})")
    send(outputs["evaluation"], inputs["model"], *ensemble)


def _describe(tracking: TrackingConfig | None, evaluation: Evaluation, work: Path) -> None:
    """Write the tracking record. It adds to the training's run; an ensemble of several trainings gets its own run."""
    from distilldsm.evaluation.postprocess import POSTPROCESSING
    from distilldsm.evaluation.scoring import recipes
    from distilldsm.evaluation.tables import metrics_for_mlflow
    from distilldsm.tracking import describe, run_key_of

    models = [evaluation.inputs["model"], *evaluation.ensemble]
    validation = evaluation.inputs.get("validation", evaluation.inputs["dataset"].parent / "validation")
    run_options: dict[str, Any] = {"run_of": models[0]}
    if evaluation.ensemble:
        # The same trainings with the same evaluation give the same run.
        config, fold = evaluation.config, evaluation.fold
        trainings = [run_key_of(model) or content_hash(model) for model in models]
        experiment = None if tracking is None else tracking.experiment
        run_options = {
            "run_key": sha256_json([experiment, result_config(config), fold, trainings])[:32],
            "name": f"{(tracking and tracking.run_name) or 'ensemble'}-fold{fold}",
            "tags": {"fold": fold},
            "params": {"evaluate": asdict(config), "fold": fold, "ensemble": recipes(models)},
        }
    describe(
        tracking,
        work,
        **run_options,
        metrics=metrics_for_mlflow(evaluation.summary, evaluation.intervals),
        files={
            "evaluation": [work / "report.html", work / POSTPROCESSING],
            "evaluation/figures": [work / "figures"],
            "validation": [validation / "report.html"],
            "validation/data_docs": [validation / "data_docs"],
        },
        tables={"evaluation/cases.json": work / "cases.csv"},
    )


def facts(inputs: Mapping[str, Path], output: Path) -> dict[str, Any]:
    """The fold and its mean Dice."""
    summary = read_json(output / "summary.json")
    return {"fold": summary["fold"], "dice": summary["mean"]["dice"]}


PLACE = "evaluation/fold{fold}"
STAGE = Stage(
    name="evaluate",
    help="score one fold in the scans' own geometry",
    section="evaluate",
    inputs=(
        Input(name="dataset", path="data/raw"),
        Input(
            name="preprocessed",
            path="data/preprocessed",
            files={"fingerprint": "fingerprint.json", "splits": "splits.json"},
        ),
        Input(name="model", path="models/fold{fold}"),
        Input(name="validation", path="data/validation", files={"validation": "report.json"}, optional=True),
    ),
    options=(
        Option(
            name="ensemble",
            metavar="MODEL",
            help="another model of this fold, e.g. with another train.seed; repeatable. Averages the probabilities",
        ),
    ),
    outputs=(
        Output(
            name="evaluation",
            path=PLACE,
            kind="Dataset",
            parts=(
                "cases.csv",
                "figures",
                "manifest.json",
                "postprocessed.csv",
                "postprocessing.json",
                "predictions",
                "report.html",
                "summary.json",
                "timing.json",
                "tracking.json",
            ),
        ),
        Output(name="report", path=f"{PLACE}/report.html", kind="HTML"),
        Output(name="metrics", path=f"{PLACE}/metrics.json", kind="Metrics", metric=True),
        Output(
            name="history",
            path=f"{PLACE}/plots/history.csv",
            kind=None,
            plot=Plot(
                template="curve",
                x="epoch",
                y="train_loss",
                x_label="epoch",
                y_label="loss",
                title="Fold {fold}: training loss",
            ),
        ),
        Output(
            name="dice_by_epoch",
            path=f"{PLACE}/plots/dice_by_epoch.csv",
            kind=None,
            plot=Plot(
                template="curves_by_label",
                x="epoch",
                y="dice",
                x_label="epoch",
                y_label="Dice on network-space volumes",
                title="Fold {fold}: Dice of held-out cases while training",
            ),
        ),
        Output(
            name="dice_by_case",
            path=f"{PLACE}/plots/dice_by_case.csv",
            kind=None,
            plot=Plot(
                template="scatter_by_label",
                x="volume_truth_ml",
                y="dice",
                x_label="true volume, ml",
                y_label="Dice",
                title="Fold {fold}: Dice by volume of the structure",
            ),
        ),
        Output(
            name="confusion",
            path=f"{PLACE}/plots/confusion.csv",
            kind="ClassificationMetrics",
            plot=Plot(
                template="confusion_normalized",
                x="actual",
                y="predicted",
                title="Fold {fold}: share of each label's voxels",
            ),
        ),
    ),
    scope="fold",
    image="train",
    run=run,
    code=("data", "evaluation", "inference", "io", "models", "report"),
    facts=facts,
)


if __name__ == "__main__":
    from distilldsm.components.command import main

    raise SystemExit(main(STAGE))
