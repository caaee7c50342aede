"""The model card: `README.md` of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distilldsm.models.package import ModelMetadata


def model_card(
    metadata: ModelMetadata, *, plan_spacing_mm: tuple[float, float, float], summary: Mapping[str, Mapping[str, Any]]
) -> str:
    """The card as Markdown.

    Args:
        metadata: of the model (its file hashes are not needed).
        plan_spacing_mm: (depth, height, width) that scans are resampled to.
        summary: parity per runtime, see `parity.summary`.
    """
    network, data = metadata.network, metadata.data
    options = ", ".join(f"{key} {value}" for key, value in network.options.items())
    foreground = {label: value for label, value in metadata.labels.items() if value != 0}
    scans = " ".join(f"{channel.name}.nii.gz" for channel in metadata.channels)
    lines = [
        f"# {metadata.name}",
        "",
        (
            f"Segments {', '.join(foreground)} in volumes with "
            f"{_count(len(metadata.channels), 'channel')}: {', '.join(c.name for c in metadata.channels)}."
        ),
        f"Intended use: **{metadata.intended_use}**.",
        "",
        "## Use",
        "",
        "With the Python package `distilldsm` installed (no PyTorch needed):",
        "",
        f"    distilldsm predict MODEL_DIR {scans} -o mask.nii.gz",
        "",
        (
            "The mask lies on the scan's own grid. Scans may have any size, spacing and orientation; they are "
            f"resampled to {' x '.join(f'{v:g}' for v in plan_spacing_mm)} mm (depth, height, width), and the result "
            "is brought back."
        ),
        *_options(metadata),
        "",
        "## Input and output",
        "",
        "| channel | modality | normalisation |",
        "|---|---|---|",
        *(f"| {_cell(c.name)} | {c.modality} | {c.normalisation} |" for c in metadata.channels),
        "",
        "| label | value in the mask |",
        "|---|---|",
        *(f"| {_cell(label)} | {value} |" for label, value in metadata.labels.items()),
        *_regions(metadata),
        "",
        "## Network",
        "",
        (
            f"{network.name}{f' ({options})' if options else ''}: {network.parameters:,} parameters, "
            f"{network.macs_per_voxel:,.0f} convolution multiply-accumulates per voxel. "
            f"Checkpoint `{metadata.checkpoint}`, trained without fold {metadata.fold}."
        ),
        "",
        "## Data it was trained on",
        "",
        f"- name: {data.name}",
        f"- licence: {data.licence}",
        f"- reference: {data.reference}",
        f"- source: {data.source}",
        *([f"- note: **{data.note}**"] if data.note else []),
        "",
        "The licence of the data may bind what is done with the model.",
        "",
        "## The exported models against the network",
        "",
        (
            "Worst of the compared held-out volumes; details in `parity.json`. OpenVINO stores its weights in "
            f"{metadata.openvino_weights}. `onnx` and `openvino` are held to the network's labels; `openvino-auto` "
            "(bf16 where the CPU has it) and `openvino-int8` trade some voxels for speed."
        ),
        "",
        "| runtime | largest logit difference | voxels that differ | Dice difference |",
        "|---|---|---|---|",
        *(
            f"| {name} | {row['max_logit_difference']:.2g} | {100 * row['voxel_difference']:.4f} % "
            f"| {row['dice_difference']:.2g} |"
            for name, row in summary.items()
        ),
        "",
        f"INT8 {'is shipped' if metadata.int8.shipped else 'is not shipped'}: {metadata.int8.reason}.",
        "",
        "## Limits",
        "",
        (
            "Not a medical device: no clinical decision may rest on it. It has seen one data set only; on scans of "
            "other scanners, protocols, ages or diseases it may fail without notice. Look at every mask."
        ),
        "",
    ]
    return "\n".join(lines)


def _regions(metadata: ModelMetadata) -> list[str]:
    if not metadata.regions:
        return []
    names = {value: label for label, value in metadata.labels.items()}
    return [
        "",
        "The network segments overlapping regions; masks show them as labels.",
        "",
        "| region | labels in it | shown as |",
        "|---|---|---|",
        *(
            f"| {_cell(r.name)} | {', '.join(_cell(names[v]) for v in r.values)} | {_cell(names[r.written_as])} |"
            for r in metadata.regions
        ),
    ]


def _options(metadata: ModelMetadata) -> list[str]:
    axes, labels = metadata.network.mirror_axes, metadata.postprocessing
    changed = metadata.targets.changed_with
    together = " (what is cut off is lost to all regions)" if any(len(changed[x]) > 1 for x in labels or ()) else ""
    lines = []
    if axes:
        along = ", ".join(axes)
        lines.append(f"`--mirror trained` averages over flips along {along}, in {2 ** len(axes)} times the time.")
    if labels:
        lines.append(
            f"`--postprocess` keeps only the largest connected component of {', '.join(labels)}{together}, which "
            "raised Dice on the held-out cases: no proof that it does on others."
        )
    return ["", " ".join(lines)] if lines else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
