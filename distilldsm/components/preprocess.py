"""Stage preprocess: converts raw volumes to arrays, and writes the plan and the splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.core.files import read_json
from distilldsm.core.output_directory import output_directory
from distilldsm.core.stage import Input, Output, Stage

if TYPE_CHECKING:
    from distilldsm.config import PreprocessConfig


def run(
    config: PreprocessConfig,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    *,
    budget: float | None = None,
) -> None:
    """Preprocess the accepted cases.

    Args:
        inputs: `dataset` (from download), `validation` (its accepted.json lists the cases to use).
        outputs: `preprocessed`.
        budget: `train.budget`, for which the plan is made; None: its default.
    """
    from distilldsm.config import TrainConfig
    from distilldsm.data.dataset import DatasetIndex
    from distilldsm.data.preprocess import preprocess_dataset

    root = inputs["dataset"]
    accepted = read_json(inputs["validation"] / "accepted.json")["accepted"]
    full_index = DatasetIndex.load(root)
    index = full_index.subset(set(accepted))
    left_out = {case.id for case in full_index.cases} - {case.id for case in index.cases}

    def kept(work: Path) -> str:
        done = {name: len(list((work / name).glob("*.json"))) for name in ("cases", ".fingerprint")}
        measured = f", and the measurements of {done['.fingerprint']}" if not done["cases"] else ""
        return f"{done['cases']} of {len(index.cases)} cases are kept{measured}"

    budget = budget or TrainConfig().budget
    key = STAGE.key(config, inputs, also={"budget": budget})
    with output_directory(outputs["preprocessed"], **key, resumable=True, kept=kept) as work:
        plan = preprocess_dataset(root, index, config, work, budget=budget, left_out=left_out)
        folds = read_json(work / "splits.json")["folds"]
    print(
        f"{len(index.cases)} cases; depth axis {plan.depth_axis}, spacing {plan.target_spacing_mm} mm, "
        f"patch {plan.patch_size}, batch {plan.batch_size}, {plan.training.patches:,} patches"
    )
    if config.splits:
        _print_splits(config.splits, folds, len(index.cases))


def _print_splits(path: str, folds: Sequence[Mapping[str, Sequence[str]]], cases: int) -> None:
    named = {case for fold in folds for case in (*fold["train"], *fold["held_out"])}
    held_out = sum(len(fold["held_out"]) for fold in folds)
    unused = f"; {cases - len(named)} cases are in no fold and not used" if len(named) < cases else ""
    print(f"folds from {path}: {len(folds)}, {held_out} of {cases} cases are held out{unused}")


def facts(inputs: Mapping[str, Path], output: Path) -> dict[str, Any]:
    """The main decisions of the plan."""
    from distilldsm.data.plan import Plan

    plan = Plan.load(output / "plan.json")
    return {
        "name": plan.name,
        "depth_axis": plan.depth_axis,
        "target_spacing_mm": list(plan.target_spacing_mm),
        "patch_size": list(plan.patch_size),
        "labels": dict(zip(plan.class_names, plan.class_values, strict=True)),
    }


STAGE = Stage(
    name="preprocess",
    help="write fingerprint, plan, arrays in network space, and splits by patient",
    section="preprocess",
    also=("train.budget",),
    inputs=(
        Input(name="dataset", path="data/raw"),
        Input(name="validation", path="data/validation", files={"accepted": "accepted.json"}),
    ),
    outputs=(Output(name="preprocessed", path="data/preprocessed", kind="Dataset"),),
    scope="data",
    image="data",
    run=run,
    code=("data", "io"),
    files=("plan", "splits"),
    facts=facts,
)


if __name__ == "__main__":
    from distilldsm.components.command import main

    raise SystemExit(main(STAGE))
