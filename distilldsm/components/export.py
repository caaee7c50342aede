"""Stage export: converts a trained fold to ONNX and OpenVINO IR, and compares both with the network on real volumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.core.files import read_json, sha256_json, write_json
from distilldsm.core.hashes import MANIFEST, files_of
from distilldsm.core.output_directory import output_directory
from distilldsm.core.stage import Input, Output, Stage

if TYPE_CHECKING:
    from distilldsm.config import ExportConfig, TrackingConfig
    from distilldsm.export.build import Built
    from distilldsm.export.scores import Scores


def run(
    config: ExportConfig,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    *,
    fold: int,
    tracking: TrackingConfig | None = None,
) -> None:
    """Export one fold's model. If it disagrees with the network, nothing is written.

    Args:
        inputs: `model` (from train), `preprocessed` (its held-out volumes are used for the comparison), and optionally
            `evaluation` (its scores per case are stored with the model, see distilldsm/export/scores.py) and
            `cross_validation` (its folds become champion together).
        outputs: `export`: the model directory, see distilldsm/models/package.py.
        fold: the fold that was held out.
        tracking: adds the model to the training's MLflow run. None: no tracking.
    """
    from distilldsm.evaluation.postprocess import POSTPROCESSING, load_postprocessing
    from distilldsm.export.build import build_package
    from distilldsm.export.scores import SCORES, collect_scores
    from distilldsm.tracking import send

    with output_directory(outputs["export"], **STAGE.key(config, inputs, fold)) as work:
        scores = collect_scores(
            inputs["model"], inputs["preprocessed"], inputs.get("evaluation"), fold=fold, checkpoint=config.checkpoint
        )
        # Postprocessing is decided only by an evaluation of exactly this model.
        is_evaluated = scores.source == "evaluation"
        postprocessing = load_postprocessing(inputs["evaluation"] / POSTPROCESSING).kept if is_evaluated else None
        built = build_package(
            inputs["model"],
            inputs["preprocessed"],
            work,
            fold=fold,
            checkpoint=config.checkpoint,
            parity_cases=config.parity_cases,
            max_voxel_difference=config.max_voxel_difference,
            int8=config.int8,
            postprocessing=postprocessing,
            scores=scores,
        )
        write_json(work / SCORES, scores)
        facts = {"fold": fold, **_cross_validation(inputs, fold)}
        _describe(config, built, scores, facts, inputs["model"], work, tracking)
    for name, row in built.summary.items():
        print(
            f"{name}: {100 * row['voxel_difference']:.4f} % of the voxels differ from the network, logits by up to "
            f"{row['max_logit_difference']:.2g}; {row['seconds_per_mvoxel']:.2f} s per million voxels "
            f"(network {row['seconds_per_mvoxel_network']:.2f} s)"
        )
    print(f"INT8 {'shipped' if built.metadata.int8.shipped else 'not shipped'}: {built.metadata.int8.reason}")
    send(outputs["export"], *(inputs[name] for name in ("model", "evaluation") if name in inputs))


def _cross_validation(inputs: Mapping[str, Path], fold: int) -> dict[str, Any]:
    """Id and folds of the cross-validation that this fold's evaluation is part of; empty if there is none."""
    path = inputs["cross_validation"] / MANIFEST if "cross_validation" in inputs else None
    if path is None or not path.is_file() or "evaluation" not in inputs:
        return {}
    used = read_json(path)["inputs"]
    # The evaluation's manifest, not its files: on Kubeflow only those files are here that the export reads.
    evaluated = inputs["evaluation"] / MANIFEST
    if not evaluated.is_file() or used.get(f"evaluation{fold}") != sha256_json(files_of(inputs["evaluation"])):
        print("the cross-validation is of another evaluation: this model is registered for itself")
        return {}
    folds = sorted(int(name.removeprefix("evaluation")) for name in used if name.startswith("evaluation"))
    return {"cross_validation": sha256_json(used)[:32], "folds": folds} if len(folds) > 1 else {}


def _describe(
    config: ExportConfig,
    built: Built,
    scores: Scores,
    place: Mapping[str, Any],
    trained: Path,
    work: Path,
    tracking: TrackingConfig | None,
) -> None:
    """Write the tracking record: it adds the model to its training's run."""
    from distilldsm.export.gate import Gate
    from distilldsm.tracking import describe

    facts = {
        **place,
        "data_hash": scores.data_hash,
        "split_hash": scores.split_hash,
        "scores": scores.source,
        "voxel_difference": {runtime: row["voxel_difference"] for runtime, row in built.summary.items()},
    }
    metrics = {f"export_{runtime}_{key}": v for runtime, row in built.summary.items() for key, v in row.items()}
    model = {
        "registered_name": built.metadata.name if config.register_model else None,
        "gate": Gate.of(config),
        "metrics": {**metrics, **scores.mean},
        "version_tags": facts,
        "metadata": {
            **facts,
            "intended_use": built.metadata.intended_use,
            "labels": built.metadata.labels,
            "data_licence": built.metadata.data.licence,
        },
    }
    describe(tracking, work, run_of=trained, metrics=metrics, model=model)


def facts(inputs: Mapping[str, Path], output: Path) -> dict[str, Any]:
    """Framework, name, fold and labels of the exported model."""
    metadata = read_json(output / "metadata.json")
    return {"framework": "openvino", **{key: metadata[key] for key in ("name", "fold", "labels")}}


STAGE = Stage(
    name="export",
    help="export one fold to ONNX and OpenVINO IR, and compare both with the network",
    section="export",
    inputs=(
        Input(name="model", path="models/fold{fold}"),
        Input(name="preprocessed", path="data/preprocessed"),
        Input(
            name="evaluation",
            path="evaluation/fold{fold}",
            files={
                "cases": "cases.csv",
                "evaluation": "manifest.json",
                "postprocessing": "postprocessing.json",
                "summary": "summary.json",
            },
            optional=True,
        ),
        Input(
            name="cross_validation",
            path="cross_validation",
            files={"cross_validation": "manifest.json"},
            optional=True,
        ),
    ),
    outputs=(
        Output(
            name="export",
            path="export/fold{fold}",
            kind="Model",
            parts=(
                "README.md",
                "inference_service.yaml",
                "int8",
                "manifest.json",
                "metadata.json",
                "model.bin",
                "model.onnx",
                "model.safetensors",
                "model.xml",
                "monai_bundle",
                "parity.json",
                "plan.json",
                "scores.json",
                "tracking.json",
                "training_distribution.json",
            ),
        ),
        Output(name="card", path="export/fold{fold}/README.md", kind="Markdown"),
        Output(name="metrics", path="export/fold{fold}/metrics.json", kind="Metrics", metric=True),
    ),
    scope="model",
    image="export",
    run=run,
    code=("data", "evaluation", "export", "inference", "io", "models", "report", "training"),
    facts=facts,
)


if __name__ == "__main__":
    from distilldsm.components.command import main

    raise SystemExit(main(STAGE))
