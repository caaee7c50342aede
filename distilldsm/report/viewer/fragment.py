"""The viewer as HTML: style, controls, data and script in one piece that needs nothing else, not even the network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from distilldsm.report.figures import COLOURS

SCRIPT = "niivue.js.gz"


@dataclass(frozen=True, kw_only=True)
class ViewedCase:
    """A volume and the masks that lie on its grid; each is .nii.gz, see `packed`."""

    name: str
    """Shown in the choice."""
    caption: str = ""
    """What to know about it, e.g. "worst case, mean Dice 0.8123"."""
    image: bytes
    truth: bytes | None = None
    prediction: bytes | None = None


def viewer_fragment(
    cases: Sequence[ViewedCase], labels: Mapping[str, int], *, colours: Sequence[str] | None = None
) -> str:
    """HTML for the body of a page, once: it loads nothing, and a case's data are unpacked when it is chosen.

    It takes its colours from the page around it and works in a sandbox that allows scripts only.

    Args:
        cases: one or more, in the order of the choice.
        labels: name to value in the masks; background (0) may be among them.
        colours: #rrggbb for each label but background; default: those of the report's figures, again from the first
            where there are more labels.

    Raises:
        ValueError: no case, or too few colours.
    """
    if not cases:
        raise ValueError("there is no case to view")
    named = [(name, value) for name, value in labels.items() if value]
    # The same as in distilldsm.report.figures.label_colour.
    chosen = [COLOURS[(k + 1) % len(COLOURS)] for k in range(len(named))] if colours is None else list(colours)
    if len(chosen) < len(named):
        raise ValueError(f"{len(named)} labels need as many colours, not {len(chosen)}")
    volumes: dict[str, bytes] = {}

    def stored(content: bytes | None) -> str | None:
        # Several masks of one scan share its image.
        if content is None:
            return None
        key = hashlib.sha256(content).hexdigest()[:16]
        volumes[key] = content
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
            for (name, value), colour in zip(named, chosen, strict=False)
        ],
    }
    data = "".join(_blob(key, content) for key, content in volumes.items())
    return (
        f"<style>{_text('viewer.css')}</style>{_text('viewer.html')}"
        f'<script type="application/json" id="dsm-viewer-cases">{_json(description)}</script>'
        f"{data}{_blob('script', _bytes(SCRIPT))}<script>{_text('viewer.js')}</script>"
    )


def viewer_page(title: str, cases: Sequence[ViewedCase], labels: Mapping[str, int]) -> str:
    """A whole page that holds the viewer only; in the dark where the reader's system is.

    Raises:
        ValueError: see `viewer_fragment`.
    """
    style = (
        ":root{color-scheme:light dark}"
        "body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1400px;padding:1rem}"
        "h1{font-size:1.4rem;margin:0 0 .6rem;overflow-wrap:anywhere}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><h1>{escape(title)}</h1>"
        f"{viewer_fragment(cases, labels)}<p>Research software, not a medical device.</p></body></html>\n"
    )


def _blob(key: str, content: bytes) -> str:
    return (
        f'<script type="application/octet-stream" id="dsm-viewer-{key}">{base64.b64encode(content).decode()}</script>\n'
    )


def _json(value: Any) -> str:
    """JSON that no name in it can end the script element of."""
    return json.dumps(value).replace("<", "\\u003c")


def _bytes(name: str) -> bytes:
    return (resources.files(__package__) / name).read_bytes()


def _text(name: str) -> str:
    return _bytes(name).decode()
