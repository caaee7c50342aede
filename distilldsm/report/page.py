"""Pages and other texts, from the templates beside this file.

The caller collects a page's content and passes it to `render`. Jinja escapes HTML (templates named .html), `tojson`
escapes data in a script element, and the filter `markdown` escapes text in Markdown.
"""

from __future__ import annotations

import base64
import gzip
import shlex
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilldsm.core.text import markdown

if TYPE_CHECKING:
    from jinja2 import Environment

NAMED = 5
"""A sentence lists at most this many names."""


def render(template: str, **context: Any) -> str:
    """Fill a template: a page or another text.

    Args:
        template: name of a file in `templates`.
        context: the template's variables. Every page needs `title`; `notes` are shown at its top.

    Raises:
        jinja2.UndefinedError: a variable of the template is missing.
    """
    return _environment().get_template(template).render({"contents": [], "notes": (), **context})


def number(value: float | None, digits: int = 4) -> str:
    """A number with the given number of decimals; "-" if it is undefined."""
    return "-" if value is None else f"{value:.{digits}f}"


def count(many: int, what: str) -> str:
    """A number and its noun: `1 case`, `2 cases`."""
    return f"{many:,} {what}{'' if many == 1 else 's'}"


def named(names: list[str] | tuple[str, ...]) -> str:
    """The first NAMED names, and the number of the others."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("distilldsm.report"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["asset"] = _asset
    environment.filters |= {"number": number, "count": count, "named": named, "png": _png, "base64": _base64}
    environment.filters |= {"markdown": markdown, "quote": shlex.quote}
    return environment


def _asset(name: str) -> str:
    """A style sheet or script of this package (may be gzipped). It goes into the page without escaping."""
    from markupsafe import Markup

    content = (resources.files("distilldsm.report") / name).read_bytes()
    return Markup((gzip.decompress(content) if name.endswith(".gz") else content).decode())  # noqa: S704


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _png(path: Path) -> str:
    """A picture as a data URL, so that the page holds it."""
    return f"data:image/png;base64,{_base64(path.read_bytes())}"
