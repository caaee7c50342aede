"""Stage train: trains one fold of a preprocessed data set and tracks the training in MLflow."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.core.files import read_json, sha256_file, write_json
from distilldsm.core.hashes import content_hash
from distilldsm.core.output_directory import output_directory
from distilldsm.core.stage import Input, Output, Stage

if TYPE_CHECKING:
    from distilldsm.config import TrackingConfig, TrainConfig
    from distilldsm.training.continuation import Continuation


def run(
    config: TrainConfig,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    *,
    fold: int,
    tracking: TrackingConfig | None = None,
    continue_for: float | None = None,
) -> None:
    """Train one fold. An interrupted training resumes after the last epoch for which a state was saved.

    Args:
        inputs: `preprocessed`.
        outputs: `model`: `last.safetensors`, `best.safetensors`, `model.json`, `plan.json`, `history.json`,
            `cost.json`, `tracking.json`.
        fold: the fold that is held out.
        tracking: how the run is tracked; None: no tracking.
        continue_for: seconds for which the finished training in `model` goes on, see `Continuation`; None: train anew.

    Under torchrun every process calls this function; only the first one writes.
    """
    from distilldsm.config import TrackingConfig
    from distilldsm.training.continuation import Continuation
    from distilldsm.training.distributed import training_processes
    from distilldsm.training.loop import RESUME
    from distilldsm.training.setup import choose_device, require_compiler

    device = choose_device(config.device, 0).type
    if config.compile:
        require_compiler(device)
    continued = Continuation.for_time(outputs["model"], continue_for) if continue_for else None
    with training_processes(device) as processes:
        if not processes.is_main:
            _train_as_peer(config, inputs, outputs, fold, processes, continued)
            return
        weights = config.initial_weights
        STAGE.keep_apart(outputs["model"], initial_weights=Path(weights) if weights else None)
        also = {"continued": {"from": content_hash(continued.model), "epochs": continued.epochs}} if continued else {}
        key = STAGE.key(config, inputs, fold, also=also)
        with output_directory(outputs["model"], **key, resumable=True, until_done=[RESUME]) as work:
            tracking = tracking or TrackingConfig(enabled=False)
            _train_as_main(config, inputs, work, fold, processes, tracking, continued)


def _train_as_peer(
    config: TrainConfig, inputs: Mapping, outputs: Mapping, fold: int, processes: Any, continued: Continuation | None
) -> None:
    from distilldsm.training.loop import Trainer

    processes.barrier()  # the main process has prepared the directory
    work = outputs["model"].with_name(f".{outputs['model'].name}.partial")
    preprocessed = inputs["preprocessed"]
    Trainer(config, preprocessed=preprocessed, work=work, fold=fold, processes=processes, continued=continued).run()


def _announce(config: TrainConfig, trainer: Any, source: str) -> None:
    """Print the network, the device and the number of steps. Warn if the training is short."""
    from distilldsm.data.dataset import SAMPLE_SOURCE
    from distilldsm.data.plan_rules import remark_on_few_steps

    sampler, planned = trainer.sampler, trainer.plan.batch_size
    print(
        f"{config.model.name}: {trainer.cost}; {trainer.device}, {'bf16' if trainer.bf16 else 'float32'}; "
        f"{trainer.total_steps:,} steps, {sampler.steps_per_epoch:,} an epoch"
        + (f", {sampler.batch_size} patches a step (plan: {planned})" if sampler.batch_size != planned else ""),
        flush=True,
    )
    remark = remark_on_few_steps(
        steps=trainer.total_steps,
        patches=trainer.total_steps * sampler.batch_size,
        cases=len(sampler.case_ids),
        patch_voxels=math.prod(sampler.patch_size),
        budget=trainer.plan.training.budget,
        by_plan=config.epochs is None,
    )
    if remark and source != SAMPLE_SOURCE:  # the sample is one deformed head: 190 steps suffice
        print(remark, file=sys.stderr, flush=True)


def _train_as_main(
    config: TrainConfig,
    inputs: Mapping,
    work: Path,
    fold: int,
    processes: Any,
    tracking: TrackingConfig,
    continued: Continuation | None,
) -> None:
    from distilldsm.core.cost import TrainingCost, machine
    from distilldsm.core.mapping import to_mapping
    from distilldsm.data.dataset import DatasetIndex
    from distilldsm.tracking import followed, key_in_pipeline
    from distilldsm.training.loop import BEST, HISTORY, Trainer

    preprocessed = inputs["preprocessed"]
    processes.barrier()
    trainer = Trainer(
        config,
        preprocessed=preprocessed,
        work=work,
        fold=fold,
        processes=processes,
        continued=continued,
        on_epoch=lambda _: spent.write(trainer.state.history),  # after each epoch: a killed training has a cost, too
    )
    size = {"parameters": trainer.cost.parameters, "macs_per_voxel": trainer.cost.macs_per_voxel}
    facts = {
        **size,
        **machine(trainer.device.type),
        "processes": processes.world,
        "precision": "bf16" if trainer.bf16 else "float32",
    }
    spent = TrainingCost(work, facts)
    index = DatasetIndex.load(preprocessed)
    _announce(config, trainer, index.source)
    with followed(
        tracking,
        work,
        name=tracking.run_name or f"{config.model.name}-fold{fold}",
        run_key=key_in_pipeline("train", fold),
        tags={"fold": fold},
        params={
            "train": to_mapping(trainer.config),
            "fold": fold,
            "model": {name: round(value) for name, value in size.items()},
            "plan.patch_size": trainer.sampler.patch_size,
            "plan.batch_size": trainer.sampler.batch_size,
            "plan.target_spacing_mm": trainer.plan.target_spacing_mm,
            "plan.depth_axis": trainer.plan.depth_axis,
        },
        dataset={
            "name": index.name,
            "digest": content_hash(preprocessed),
            "source": index.source,
            "profile": {"cases": len(index.cases), "held_out": len(trainer.held_out)},
        },
        history=HISTORY,
        files={"plan": [preprocessed / "plan.json", preprocessed / "fingerprint.json"]},
        at_end={"checkpoints": [work / BEST]},  # the last weights stay in the stage's output
    ):
        state = trainer.run()
        spent.write(state.history)
        trainer.plan.save(work / "plan.json")
        write_json(work / "model.json", _model(config, trainer, state, preprocessed, fold))


def _model(config: TrainConfig, trainer: Any, state: Any, preprocessed: Path, fold: int) -> dict[str, Any]:
    """The contents of `model.json`: the network and its training."""
    return {
        "schema_version": 1,
        "name": config.model.name,
        "options": dict(config.model.options),
        "in_channels": trainer.network.in_channels,
        "out_channels": trainer.network.out_channels,
        "stride": trainer.network.stride,
        "depth_halo": trainer.network.depth_halo,
        "mirror_axes": config.augment.mirror_axes,
        "parameters": trainer.cost.parameters,
        "macs_per_voxel": trainer.cost.macs_per_voxel,
        "fold": fold,
        "splits": sha256_file(preprocessed / "splits.json"),
        "epochs": state.epoch,
        "best_val_dice": state.best_dice,
        "labels": dict(zip(trainer.plan.class_names, trainer.plan.class_values, strict=True)),
    }


def facts(inputs: Mapping[str, Path], output: Path) -> dict[str, Any]:
    """Main facts about the network and its training."""
    described = read_json(output / "model.json")
    keys = ("name", "options", "parameters", "macs_per_voxel", "fold", "epochs")
    return {"framework": "pytorch", "format": "safetensors", **{key: described[key] for key in keys}}


STAGE = Stage(
    name="train",
    help="train one fold",
    section="train",
    inputs=(Input(name="preprocessed", path="data/preprocessed"),),
    outputs=(
        Output(name="model", path="models/fold{fold}", kind="Model"),
        Output(
            name="metrics",
            path="models/fold{fold}/model.json",
            kind="Metrics",
            keys=("parameters", "macs_per_voxel", "best_val_dice"),
        ),
    ),
    scope="fold",
    image="train",
    run=run,
    code=("data", "inference", "models", "training"),
    files=("initial_weights",),
    facts=facts,
    distributed=True,
)


if __name__ == "__main__":
    from distilldsm.components.command import main

    raise SystemExit(main(STAGE))
