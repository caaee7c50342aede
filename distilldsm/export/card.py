"""The model card: `README.md` of an exported model, from the template model_card.md."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from distilldsm.core.text import markdown
from distilldsm.evaluation.metrics import main_metrics
from distilldsm.export.scores import Scores
from distilldsm.models.package import ModelMetadata
from distilldsm.report.page import render


def model_card(
    metadata: ModelMetadata,
    *,
    plan_spacing_mm: tuple[float, float, float],
    summary: Mapping[str, Mapping[str, Any]],
    scores: Scores | None = None,
) -> str:
    """The card as Markdown.

    Args:
        metadata: the model's metadata (file hashes are not needed).
        plan_spacing_mm: the plan's voxel size (depth, height, width); scans are resampled to it.
        summary: parity per runtime, see `parity.summary`.
        scores: of the held-out cases; None, or without an evaluation: the card says that there are none.
    """
    cases = scores.cases.values() if scores else ()
    network = metadata.network
    options = ", ".join(f"{key} {value}" for key, value in network.options.items())
    return render(
        "model_card.md",
        model=metadata,
        foreground=[label for label, value in metadata.labels.items() if value],
        names={value: label for label, value in metadata.labels.items()},
        network=f"{network.name} ({options})" if options else network.name,
        spacing=" x ".join(f"{v:g}" for v in plan_spacing_mm),
        options=_options(metadata),
        summary=summary,
        metrics=main_metrics(),
        cases=len(cases),
        held_out={
            label: {m.name: fmean(case[label][m.name] for case in cases) for m in main_metrics()}
            for label in (scores.labels if scores and cases else ())
        },
    )


def _options(metadata: ModelMetadata) -> str:
    """Further options of `distilldsm predict` for this model; empty if there are none."""
    axes, labels = metadata.network.mirror_axes, metadata.postprocessing
    changed = metadata.targets.changed_with
    together = " (removed voxels leave all regions)" if any(len(changed[x]) > 1 for x in labels or ()) else ""
    sentences = []
    if axes:
        along = ", ".join(axes)
        sentences.append(f"`--mirror trained` averages over flips along {along}, in {2 ** len(axes)} times the time.")
    if labels:
        names = markdown(", ".join(labels))
        sentences.append(
            f"`--postprocess` keeps only the largest connected component of {names}{together}. This "
            "raised Dice on the held-out cases. It may not raise Dice on other cases."
        )
    return " ".join(sentences)
