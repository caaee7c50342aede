"""Stage cross_validate: summarises the evaluated folds in one table and groups their runs below one MLflow run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.core.files import sha256_json, write_json
from distilldsm.core.hashes import content_hash
from distilldsm.core.output_directory import output_directory
from distilldsm.core.stage import Input, Output, Stage

if TYPE_CHECKING:
    from distilldsm.config import CrossValidationConfig, TrackingConfig
    from distilldsm.evaluation.folds import Fold


def run(
    config: CrossValidationConfig,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    *,
    tracking: TrackingConfig | None = None,
) -> None:
    """Summarise the folds that `config` lists. Other folds in the same folders are ignored.

    Args:
        inputs: `evaluation` and `models`, the folders that hold `fold0` ...; optionally `splits` (of the preprocessed
            data).
        outputs: `cross_validation`: `summary.json`, `table.csv`, `cases.csv`, `metrics.json`, `dice.png`,
            `report.html`, `cases_postprocessed.csv` (empty for a single fold); `tracking.json`.
        tracking: with two or more folds, creates a run with the folds' runs as its children.

    Raises:
        UserError: a fold is missing.
        DataError: the folds do not belong together; see `load_folds`.
    """
    from distilldsm.evaluation import fold_report as report
    from distilldsm.evaluation import fold_table as table
    from distilldsm.evaluation.folds import CASES_POSTPROCESSED, load_folds
    from distilldsm.evaluation.tables import write_csv
    from distilldsm.tracking import send

    folds = load_folds(config.folds, inputs["evaluation"], inputs["models"], inputs.get("splits"))
    with output_directory(outputs["cross_validation"], **STAGE.key(config, inputs)) as work:
        summary = table.summarise(folds)
        write_json(work / "summary.json", summary)
        write_json(work / "metrics.json", table.metrics_for_dvc(summary))
        write_csv(work / "table.csv", table.table_rows(summary))
        rows = _rows({fold.number: fold.rows for fold in folds})
        write_csv(work / "cases.csv", rows)
        # DVC expects this file always. With a single fold no other fold can decide: only the header is written.
        processed = _rows(table.postprocessed_rows(folds))
        if processed:
            write_csv(work / CASES_POSTPROCESSED, processed)
        else:
            (work / CASES_POSTPROCESSED).write_text(",".join(rows[0]) + "\n", encoding="utf-8")
        report.draw(folds, work / "dice.png")
        (work / "report.html").write_text(report.render(folds, summary, work / "dice.png"), encoding="utf-8")
        _describe(tracking if len(folds) > 1 else None, folds, summary, work)
    send(outputs["cross_validation"], *(p for f in folds for p in (f.model_directory, f.evaluation_directory)))
    print(table.format_table(summary, "cross-validation"))


def _rows(by_fold: Mapping[int, Sequence[Mapping]]) -> list[dict[str, Any]]:
    return [{"fold": number, **row} for number, rows in by_fold.items() for row in rows]


def _places(folds: Sequence[Fold]) -> list[Path]:
    """The outputs with the child runs: trainings, or the evaluations of an ensemble (a run has only one parent)."""
    return [fold.evaluation_directory if fold.ensemble else fold.model_directory for fold in folds]


def _describe(tracking: TrackingConfig | None, folds: Sequence[Fold], summary: Mapping[str, Any], work: Path) -> None:
    from distilldsm.evaluation import fold_table as table
    from distilldsm.tracking import describe, run_key_of

    train, evaluate = folds[0].train["config"], folds[0].evaluate["config"]
    places = _places(folds)
    # The same trainings with the same evaluation give the same run, wherever and however often they are summarised.
    parts = [tracking and tracking.experiment, evaluate, [run_key_of(one) or content_hash(one) for one in places]]
    network = "ensemble" if folds[0].ensemble else summary["network"]["name"]
    size = {key: round(summary["cost"][key] or folds[0].model[key]) for key in ("parameters", "macs_per_voxel")}
    trained = {"ensemble": folds[0].ensemble} if folds[0].ensemble else {"train": train}
    describe(
        tracking,
        work,
        run_key=sha256_json(parts)[:32],
        name=f"{(tracking and tracking.run_name) or network}-cv{len(folds)}",
        tags={"cv_folds": ",".join(str(fold.number) for fold in folds)},
        params={**trained, "evaluate": evaluate, "folds": summary["folds"], "model": size},
        metrics=table.metrics_for_mlflow(summary),
        files={"cross_validation": [work / name for name in ("report.html", "summary.json", "table.csv", "dice.png")]},
        tables={"cross_validation/table.json": work / "table.csv", "cross_validation/cases.json": work / "cases.csv"},
        children={f"{network}-fold{fold.number}": place for fold, place in zip(folds, places, strict=True)},
    )


STAGE = Stage(
    name="cross_validate",
    help="summarise the evaluated folds in one table and group their MLflow runs",
    section="cv",
    inputs=(
        Input(name="evaluation", path="evaluation", per_fold=True),
        Input(name="models", path="models", per_fold=True),
        Input(name="splits", path="data/preprocessed/splits.json", optional=True),
    ),
    outputs=(
        Output(
            name="cross_validation",
            path="cross_validation",
            kind="Dataset",
            parts=(
                "cases.csv",
                "cases_postprocessed.csv",
                "dice.png",
                "manifest.json",
                "report.html",
                "summary.json",
                "table.csv",
                "tracking.json",
            ),
        ),
        Output(name="report", path="cross_validation/report.html", kind="HTML"),
        Output(name="metrics", path="cross_validation/metrics.json", kind="Metrics", metric=True),
    ),
    scope="folds",
    image="train",
    run=run,
    code=("data", "evaluation", "report"),
)


if __name__ == "__main__":
    from distilldsm.components.command import main

    raise SystemExit(main(STAGE))
