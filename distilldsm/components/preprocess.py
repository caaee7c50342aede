"""Stage preprocess: raw volumes to arrays, plan and splits."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilldsm.components._main import stage_main
from distilldsm.config import PreprocessConfig, load_params
from distilldsm.core.errors import ConfigError
from distilldsm.core.files import read_json
from distilldsm.core.output_directory import output_directory
from distilldsm.data.dataset import DatasetIndex
from distilldsm.data.preprocess import preprocess_dataset


def key(config: PreprocessConfig, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What decides the output, for `output_directory` and `is_current`.

    Raises:
        ConfigError: `preprocess.plan` or `preprocess.splits` names no file.
    """
    hashed = {"dataset": inputs["dataset"], "accepted": inputs["validation"] / "accepted.json"}
    for name, path in (("plan", config.plan), ("splits", config.splits)):
        if path and not Path(path).is_file():
            raise ConfigError(
                "names no file", where=f"preprocess.{name}", seen=path, hint="correct it, or set it to null"
            )
        if path:
            hashed[name] = Path(path)
    return {"stage": "preprocess", "config": config, "inputs": hashed}


def run(config: PreprocessConfig, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> None:
    """Preprocess the accepted cases.

    Args:
        inputs: `dataset` (from download), `validation` (its accepted.json says which cases to use).
        outputs: `preprocessed`.
    """
    root = inputs["dataset"]
    accepted = read_json(inputs["validation"] / "accepted.json")["accepted"]
    everything = DatasetIndex.load(root)
    index = everything.subset(set(accepted))
    left_out = {case.id for case in everything.cases} - {case.id for case in index.cases}

    def kept(work: Path) -> str:
        done = {name: len(list((work / name).glob("*.json"))) for name in ("cases", ".fingerprint")}
        told = f", and what was measured of {done['.fingerprint']}" if not done["cases"] else ""
        return f"{done['cases']} of {len(index.cases)} cases are kept{told}"

    with output_directory(outputs["preprocessed"], **key(config, inputs), resumable=True, kept=kept) as work:
        plan = preprocess_dataset(root, index, config, work, left_out=left_out)
        folds = read_json(work / "splits.json")["folds"]
    print(
        f"{len(index.cases)} cases; depth axis {plan.depth_axis}, spacing {plan.target_spacing_mm} mm, "
        f"patch {plan.patch_size}, batch {plan.batch_size}"
    )
    if config.splits:
        _tell_splits(config.splits, folds, len(index.cases))


def _tell_splits(path: str, folds: Sequence[Mapping[str, Sequence[str]]], cases: int) -> None:
    named = {case for fold in folds for case in (*fold["train"], *fold["held_out"])}
    held_out = sum(len(fold["held_out"]) for fold in folds)
    unused = f"; {cases - len(named)} cases are in no fold and not used" if len(named) < cases else ""
    print(f"folds from {path}: {len(folds)}, {held_out} of {cases} cases are held out{unused}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="distilldsm preprocess", description=__doc__)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. preprocess.depth_axis=z")
    parser.add_argument("--dataset", type=Path, default=Path("data/raw"))
    parser.add_argument("--validation", type=Path, default=Path("data/validation"))
    parser.add_argument("--output", type=Path, default=Path("data/preprocessed"))
    args = parser.parse_args(argv)
    return stage_main(
        lambda: run(
            load_params(args.params, args.set).preprocess,
            {"dataset": args.dataset, "validation": args.validation},
            {"preprocessed": args.output},
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
