"""The viewer as HTML: style, controls, data and script in one piece. It works without a network connection."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from distilldsm.report.figures import label_colour
from distilldsm.report.page import render

SCRIPT = "niivue.js.gz"


@dataclass(frozen=True, kw_only=True)
class ViewedCase:
    """A volume and masks on the same grid, each as .nii.gz bytes (see `packed`)."""

    name: str
    """The name in the list of cases."""
    caption: str = ""
    """A remark, e.g. "worst case, mean Dice 0.8123"."""
    image: bytes
    truth: bytes | None = None
    prediction: bytes | None = None


def viewer_fragment(
    cases: Sequence[ViewedCase], labels: Mapping[str, int], *, colours: Sequence[str] | None = None
) -> str:
    """HTML for the body of a page; use it once per page. It loads nothing, and unpacks a case when it is selected.

    It takes its colours from the page around it and works in a sandbox that allows scripts only.

    Args:
        cases: at least one; the list in the viewer has the same order.
        labels: name to value in the masks; background (0) may be among them.
        colours: #rrggbb for each label except background; default: the colours of the report's figures, repeated
            if there are more labels.

    Raises:
        ValueError: there is no case, or there are too few colours.
    """
    return render("viewer_fragment.html", viewer=viewer_contents(cases, labels, colours=colours))


def viewer_page(title: str, cases: Sequence[ViewedCase], labels: Mapping[str, int]) -> str:
    """A complete page with only the viewer. It is dark if the reader's system is set to dark.

    Raises:
        ValueError: see `viewer_fragment`.
    """
    return render("viewer.html", title=title, viewer=viewer_contents(cases, labels))


def viewer_contents(
    cases: Sequence[ViewedCase], labels: Mapping[str, int], *, colours: Sequence[str] | None = None
) -> dict[str, Any]:
    """The value of `viewer` in the template viewer_fragment.html; arguments as for `viewer_fragment`."""
    if not cases:
        raise ValueError("there is no case to view")
    shown = {name: value for name, value in labels.items() if value}
    chosen = [label_colour(k) for k in range(len(shown))] if colours is None else colours
    if len(chosen) < len(shown):
        raise ValueError(f"{len(shown)} labels need {len(shown)} colours, not {len(chosen)}")
    contents: dict[str, bytes] = {}

    def stored(content: bytes | None) -> str | None:
        # Several masks of one scan share its image.
        if content is None:
            return None
        key = hashlib.sha256(content).hexdigest()[:16]
        contents[key] = content
        return key

    description = {
        "cases": [
            {
                "name": case.name,
                "caption": case.caption,
                "image": stored(case.image),
                "truth": stored(case.truth),
                "prediction": stored(case.prediction),
            }
            for case in cases
        ],
        "labels": [
            {"name": name, "value": value, "colour": colour}
            for (name, value), colour in zip(shown.items(), chosen, strict=False)
        ],
    }
    contents["script"] = (resources.files(__package__) / SCRIPT).read_bytes()
    return {"description": description, "contents": contents}
