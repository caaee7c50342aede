"""Great Expectations' Data Docs of a validation: its own renderers, in a page frame without network and scripts.

Great Expectations' original pages load styles, scripts and pictures from other machines, and contain times and random
ids. Its templates of sections and tables are used unchanged. Replaced are the page around them, the scripts that fold
sections (`<details>` does this too), and the graphs.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np

INDEX, SUITE = "index.html", "suite.html"
_SUITE_LINK = 'href="../../../../expectations/suite.html"'


def write_data_docs(folder: Path, outcome: Any, suite: Any, *, name: str) -> None:
    """Write `index.html` (the results) and `suite.html` (the expectations) into a new folder.

    Args:
        outcome: Great Expectations' ExpectationSuiteValidationResult; its time and place are left out.
        suite: Great Expectations' ExpectationSuite.
        name: name of the data set.
    """
    from great_expectations.render.renderer.page_renderer import (
        ExpectationSuitePageRenderer,
        ValidationResultsPageRenderer,
    )

    outcome = copy.deepcopy(outcome)
    for key in ("batch_markers", "active_batch_definition"):
        outcome.meta.pop(key, None)
    for result in outcome.results:
        result.result = _plain(result.result)
    results = ValidationResultsPageRenderer(run_info_at_end=True).render(outcome)
    results.sections.pop()  # the run's name and time
    expectations = ExpectationSuitePageRenderer().render(suite)
    folder.mkdir(parents=True)
    for file, document, title in (
        (INDEX, results, f"Data Docs of {name}: results"),
        (SUITE, expectations, f"Data Docs of {name}: expectations"),
    ):
        page = _view().render(document, title=title, results=file == INDEX)
        (folder / file).write_text(page.replace(_SUITE_LINK, f'href="{SUITE}"'), encoding="utf-8")


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's numbers, which the renderers need; text escaped, because tables insert it as HTML."""
    from markupsafe import escape

    if isinstance(value, str):
        return str(escape(value))
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def _view() -> Any:
    """Great Expectations' page view with our page frame."""
    from great_expectations.render.view import DefaultJinjaPageView
    from jinja2 import ChoiceLoader, PackageLoader

    view = DefaultJinjaPageView()
    our_templates = PackageLoader("distilldsm.report", "templates/data_docs")
    view.env.loader = ChoiceLoader([our_templates, view.env.loader])
    numbers = itertools.count()
    view.env.filters["generate_html_element_uuid"] = lambda prefix=None: f"{prefix or ''}{next(numbers)}"
    return view
