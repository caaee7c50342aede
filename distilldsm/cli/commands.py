"""What the sub-commands of `distilldsm` do. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.core.errors import DataError

if TYPE_CHECKING:
    from distilldsm.data.plan import Plan
    from distilldsm.data.targets import Targets


def info(args: argparse.Namespace) -> None:
    """Facts of a model directory, of the registry, or of the installation."""
    from distilldsm.core.mapping import to_mapping
    from distilldsm.models.registry import MODELS

    if args.model_dir is not None:
        from distilldsm.models.package import verify

        metadata = verify(args.model_dir)
        if args.json:
            _print_json(to_mapping(metadata))
        else:
            _print_model(metadata)
    elif args.models:
        if args.json:
            _print_json({name: {"summary": e.summary, "options": dict(e.options)} for name, e in MODELS.items()})
            return
        for name, entry in MODELS.items():
            options = ", ".join(f"{key}={value}" for key, value in entry.options.items())
            print(f"{name:14}{entry.summary}\n{'':14}options: {options}")
    else:
        from distilldsm.core.output_directory import package_versions

        facts = {"python": sys.version.split()[0], **package_versions()}
        if args.json:
            _print_json({"packages": facts, "models": list(MODELS)})
            return
        for name, version in facts.items():
            print(f"{name:20}{version}")


def _print_model(metadata: Any) -> None:
    network, data = metadata.network, metadata.data
    options = ", ".join(f"{key}={value}" for key, value in network.options.items())
    rows = [
        ("name", metadata.name),
        ("use", metadata.intended_use),
        ("network", f"{network.name}({options}), {network.parameters:,} parameters"),
        ("cost", f"{network.macs_per_voxel:,.0f} convolution MACs per voxel"),
        ("channels", "; ".join(f"{c.name} ({c.modality}, {c.normalisation})" for c in metadata.channels)),
        ("labels", ", ".join(f"{value} {label}" for label, value in metadata.labels.items())),
        ("regions", _regions(metadata.targets)),
        ("trained on", f"{data.name}, without fold {metadata.fold}, checkpoint {metadata.checkpoint}"),
        ("licence", data.licence),
        ("reference", data.reference),
        ("note", data.note),
        ("weights", f"float32 (ONNX), {metadata.openvino_weights} (OpenVINO)"),
        ("INT8", f"{'shipped' if metadata.int8.shipped else 'not shipped'}: {metadata.int8.reason}"),
        ("mirroring", ", ".join(network.mirror_axes) or "trained without"),
        ("postprocess", _postprocessing(metadata)),
        ("files", f"{len(metadata.files)}, unchanged since the export"),
    ]
    for key, value in rows:
        if value:
            print(f"{key:12}{value}")


def _regions(targets: Targets) -> str:
    """Each region with its labels, e.g. `whole (core, shell); inner (core)`; empty where there are none."""
    names = dict(zip(targets.class_values, targets.class_names, strict=True))
    return "; ".join(f"{region.name} ({', '.join(names[v] for v in region.values)})" for region in targets.regions)


def _postprocessing(metadata: Any) -> str:
    from distilldsm.data.targets import LARGEST_NOT_TRIED

    kept = metadata.postprocessing
    if kept is None:
        return "not decided (exported without an evaluation)"
    if not metadata.targets.largest:
        return f"none: {LARGEST_NOT_TRIED}"
    return f"largest component of {', '.join(kept)}" if kept else "none: nothing was gained by a largest component"


def plan(args: argparse.Namespace) -> None:
    """Show a plan; of a data set that has none yet, the one that preprocessing would make."""
    from distilldsm.core.mapping import to_mapping

    found = _find_plan(Path(args.directory), args.params)
    if args.json:
        _print_json(to_mapping(found))
        return

    def row(key: str, value: object, reason: str | None = None) -> None:
        print(f"{key:20}{value}" + (f"  ({reason})" if reason else ""))

    reasons = dict(found.reasons)
    row("data set", found.name)
    row("labels", ", ".join(f"{v} {n}" for n, v in zip(found.class_names, found.class_values, strict=True)))
    if found.regions:
        row("regions", _regions(found.targets))
    row("depth axis", found.depth_axis, reasons.get("depth_axis"))
    row("spacing", f"{_sizes(found.target_spacing_mm)} mm", reasons.get("target_spacing_mm"))
    row("coarse slices", "yes" if found.coarse_slices else "no", reasons.get("coarse_slices"))
    row("crop to non-zero", "yes" if found.crop_to_nonzero else "no")
    row("median shape", f"{_sizes(found.median_shape)} voxels")
    row("patch", f"{_sizes(found.patch_size)} voxels", reasons.get("patch_size"))
    row("batch", found.batch_size, reasons.get("batch_size"))
    row("training memory", f"about {found.training_memory_gb:g} GB")
    for channel, rule in zip(found.channels, found.normalisation, strict=True):
        row(f"{channel.name} ({channel.modality})", rule.scheme, reasons.get(f"normalisation.{channel.name}"))
    print("sizes and spacings are (depth, height, width)")


def _sizes(values: tuple[float, ...]) -> str:
    return " x ".join(f"{v:g}" for v in values)


def _find_plan(directory: Path, params: str) -> Plan:
    from distilldsm.data.dataset import INDEX, DatasetIndex
    from distilldsm.data.plan import Plan, make_plan

    if (directory / "plan.json").is_file():
        return Plan.load(directory / "plan.json")
    if not (directory / INDEX).is_file():
        raise DataError(
            "holds neither a plan nor a data set",
            where=directory,
            seen="no such directory" if not directory.is_dir() else None,
            rule=f"a directory with plan.json or {INDEX}",
            hint="give data/preprocessed, a model directory, or data/raw",
        )
    from distilldsm.config import PreprocessConfig, load_params
    from distilldsm.core.progress import progress
    from distilldsm.data.fingerprint import fingerprint_case

    config = load_params(params).preprocess if Path(params).is_file() else PreprocessConfig()
    if config.plan:
        return Plan.load(config.plan)
    index = DatasetIndex.load(directory)
    cases = progress(index.cases, total=len(index.cases), title="fingerprint", unit="case")
    return make_plan(index, [fingerprint_case(directory, case, index) for case in cases], config)


def params(args: argparse.Namespace) -> None:
    """The reference of the parameters."""
    from distilldsm.config.reference import as_markdown, as_text, matching

    found = matching(args.keys)
    print(as_markdown(found) if args.markdown else as_text(found))


def summary(args: argparse.Namespace) -> None:
    """The table of scores per label of evaluated folds, and over the folds where there are several."""
    from distilldsm.core.files import read_json
    from distilldsm.evaluation.tables import format_table

    directories = [Path(d) for d in args.directories] or sorted(
        path.parent for path in Path("evaluation").glob("fold*/summary.json")
    )
    if not directories:
        raise DataError("no evaluated fold", where="evaluation", hint="run dvc repro, or name the directories")
    found = {str(d): read_json(d / "summary.json") for d in directories}
    for directory, table in found.items():
        if not (isinstance(table, dict) and {"labels", "mean"} <= table.keys()):
            raise DataError("is no summary of an evaluation", where=Path(directory) / "summary.json")
    together = Path("cross_validation")
    summed_up = None if args.directories or not (together / "summary.json").is_file() else _summed_up(together)
    if args.json:
        _print_json(found if summed_up is None else {**found, str(together): summed_up})
        return
    for directory, table in found.items():
        print(format_table(table, directory))
    if summed_up is not None and len(summed_up["folds"]) > 1:
        from distilldsm.evaluation.fold_table import format_table as format_folds

        print(format_folds(summed_up, str(together)))
    elif len(found) > 1:
        print(_over_folds(list(found.values())))


def _summed_up(directory: Path) -> dict[str, Any] | None:
    """The table over the folds; None where a fold was evaluated again, or is gone, since it was made."""
    from distilldsm.core.files import read_json
    from distilldsm.core.output_directory import MANIFEST, content_hash

    table = read_json(directory / "summary.json")
    inputs = read_json(directory / MANIFEST)["inputs"]
    folds = {fold: Path(f"evaluation/fold{fold}") for fold in table["folds"]}
    same = all(path.is_dir() and inputs[f"evaluation{fold}"] == content_hash(path) for fold, path in folds.items())
    return table if same else None


def _over_folds(tables: list[dict[str, Any]]) -> str:
    """Mean and sample standard deviation of the folds' mean Dice, per label that all folds have."""
    from distilldsm.evaluation.fold_table import number, spread

    labels = [label for label in tables[0]["labels"] if all(label in table["labels"] for table in tables)]
    width = max(len(label) for label in [*labels, "label"]) + 2
    lines = [f"over {len(tables)} folds", f"{'label':{width}}{'Dice':>8}{'sd':>8}"]
    for label in labels:
        mean, sd, _ = spread(table["labels"][label]["dice"]["mean"] for table in tables)
        lines.append(f"{label:{width}}{number(mean):>8}{number(sd):>8}")
    return "\n".join(lines)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))
