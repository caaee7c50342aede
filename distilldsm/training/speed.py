"""How many voxels this machine sees in a given time, measured with training steps on made-up scans."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

import numpy as np

from distilldsm.config import TrainConfig
from distilldsm.core.files import write_json
from distilldsm.data.dataset import Channel
from distilldsm.data.plan import Normalisation, Plan
from distilldsm.data.plan_rules import Size
from distilldsm.training.loading import batches
from distilldsm.training.loop import Trainer

CASES, PATCH = 4, (20, 56, 56)
"""Four patches of this size are about the plan's voxels a step."""
WARM_UP = 2
"""Steps that are not counted: the first ones choose kernels and fill caches."""
TRAINING_SHARE = 0.9
"""The share of the time that is left for steps: validations and checkpoints take the rest."""


def voxels_in(config: TrainConfig, seconds: float, *, measured_s: float = 20.0) -> float:
    """Voxels that a training with this network and these settings sees in a time.

    Args:
        seconds: the time that the training may take.
        measured_s: seconds to measure for.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "preprocessed"
        _write_made_up(data)
        # One epoch that is long enough; speed does not depend on what the patches show.
        steps = TrainConfig(**{**vars(config), "epochs": 1, "samples_per_case": 10_000, "initial_weights": None})
        trainer = Trainer(steps, preprocessed=data, work=Path(folder), fold=0)
        return voxels_per_second(trainer, measured_s) * seconds * TRAINING_SHARE


def voxels_per_second(trainer: Trainer, measured_s: float) -> float:
    """Voxels per second of optimizer steps: reading, augmentation, forward, backward and averaging."""
    trainer.network.train()
    voxels, begun = 0, math.inf
    each = batches(trainer.sampler, 0, trainer.config.workers, trainer.processes)
    for number, (images, labels, size, step) in enumerate(each):
        trainer.step(images, labels, size, 0, step)
        trainer.average.update(trainer.network, step + 1)
        if number + 1 == WARM_UP:
            begun = time.perf_counter()
        elif number + 1 > WARM_UP:
            voxels += trainer.sampler.batch_size * math.prod(size)
            if time.perf_counter() - begun >= measured_s:
                break
    return voxels / (time.perf_counter() - begun)


def _write_made_up(data: Path) -> None:
    """A preprocessed data set of noise around a ball, as large as a patch."""
    size: Size = PATCH
    plan = Plan(
        name="made up",
        channels=(Channel(name="c", modality="MRI"),),
        normalisation=(Normalisation(scheme="none"),),
        class_names=("background", "ball"),
        class_values=(0, 1),
        depth_axis="z",
        target_spacing_mm=(1.0, 1.0, 1.0),
        crop_to_nonzero=False,
        coarse_slices=False,
        patch_size=size,
        batch_size=CASES,
        median_shape=size,
        training_memory_gb=0.0,
        reasons={},
    )
    for name in ("images", "labels", "locations", "cases"):
        (data / name).mkdir(parents=True)
    grid = np.indices(size) - np.array(size)[:, None, None, None] / 2
    label = ((grid**2).sum(axis=0) < 80).astype(np.uint8)
    locations = np.column_stack([np.ones(int(label.sum()), dtype=np.int64), np.argwhere(label)]).astype(np.int32)
    names = [f"c{k}" for k in range(CASES + 1)]
    for k, name in enumerate(names):
        noise = np.random.default_rng(k).normal(size=(1, *size))
        np.save(data / "images" / f"{name}.npy", (noise + label).astype(np.float16))
        np.save(data / "labels" / f"{name}.npy", label)
        np.save(data / "locations" / f"{name}.npy", locations)
        write_json(data / "cases" / f"{name}.json", {"geometry": {"resampled": size}})
    write_json(data / "splits.json", {"folds": [{"train": names[:-1], "held_out": names[-1:]}]})
    plan.save(data / "plan.json")
