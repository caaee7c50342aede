"""Stage export: a trained fold to ONNX and OpenVINO IR, compared with the network on real volumes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from components._main import stage_main
from distilldsm.config import ExportConfig, TrackingConfig, load_params
from distilldsm.stage import output_directory


def run(
    config: ExportConfig,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    *,
    fold: int,
    tracking: TrackingConfig | None = None,
) -> None:
    """Export one fold's model; nothing is written where it disagrees with the network.

    Args:
        inputs: `model` (from train), `preprocessed` (its held-out volumes are what is compared on).
        outputs: `export`: the model directory, see distilldsm/export/package.py.
        fold: the fold that was held out.
        tracking: attaches to the training run; None leaves MLflow out.
    """
    from distilldsm.export.build import build_package

    with output_directory(
        outputs["export"],
        stage="export",
        config=config,
        inputs={"model": inputs["model"], "preprocessed": inputs["preprocessed"]},
        extra={"fold": fold},
    ) as work:
        built = build_package(
            inputs["model"],
            inputs["preprocessed"],
            work,
            fold=fold,
            checkpoint=config.checkpoint,
            parity_cases=config.parity_cases,
            max_voxel_difference=config.max_voxel_difference,
        )
    for name, row in built.summary.items():
        print(
            f"{name}: {100 * row['voxel_difference']:.4f} % of the voxels differ from the network, logits by up to "
            f"{row['max_logit_difference']:.2g}; {row['seconds_per_mvoxel']:.2f} s per million voxels "
            f"(network {row['seconds_per_mvoxel_network']:.2f} s)"
        )
    if tracking is not None and tracking.enabled:
        from distilldsm import tracking as tracking_module

        metrics = {f"export_{runtime}_{key}": v for runtime, row in built.summary.items() for key, v in row.items()}
        with tracking_module.attach(inputs["model"], tracking) as mlflow_run:
            mlflow_run.log_metrics(metrics)
            mlflow_run.log_exported_model(
                outputs["export"],
                name="model",
                registered_name=built.metadata.name if config.register_model else None,
                metadata={
                    "intended_use": built.metadata.intended_use,
                    "labels": built.metadata.labels,
                    "data_licence": built.metadata.data.licence,
                },
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="distilldsm export", description=__doc__)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--model", type=Path, default=None, help="default: models/fold<FOLD>")
    parser.add_argument("--preprocessed", type=Path, default=Path("data/preprocessed"))
    parser.add_argument("--output", type=Path, default=None, help="default: export/fold<FOLD>")
    args = parser.parse_args(argv)

    def stage() -> None:
        params = load_params(args.params)
        run(
            params.export,
            {"model": args.model or Path(f"models/fold{args.fold}"), "preprocessed": args.preprocessed},
            {"export": args.output or Path(f"export/fold{args.fold}")},
            fold=args.fold,
            tracking=params.tracking,
        )

    return stage_main(stage)


if __name__ == "__main__":
    raise SystemExit(main())
