"""Great Expectations' Data Docs of a validation: its own renderers, in a page frame without network and script.

What Great Expectations writes by itself loads styles, scripts and pictures from other machines, and holds times and
random ids. Its templates of sections and tables are used as they are; replaced are the page around them, what folds by
script (`<details>` does it too), and graphs.
"""

from __future__ import annotations

import copy
import itertools
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

INDEX, SUITE = "index.html", "suite.html"
_SUITE_LINK = 'href="../../../../expectations/suite.html"'
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title | e }}</title>
<style>{{ style }}</style>
</head>
<body>
<header><h1>{{ title | e }}</h1>
<nav><a href="index.html">results</a> <a href="suite.html">expectations</a> <a href="../report.html">report by case</a>
{% if results %}<label><input type="checkbox" id="failed-only"> failed only</label>{% endif %}</nav></header>
<div class="columns">
<nav class="contents"><ul>
{% for section in sections %}<li><a href="#section-{{ loop.index }}">{{ section["section_name"] | e }}</a></li>
{% endfor %}</ul></nav>
<main>
{% for section in sections %}{% set section_loop = loop -%}{% include 'section.j2' %}{% endfor %}
</main>
</div>
<footer>Data Docs of Great Expectations {{ ge_version }}</footer>
</body>
</html>
"""
_COLLAPSE = """{% set link = content_block.get("collapse_toggle_link") %}
<details{% if link is not string %} open{% endif %}><summary>{{ link if link is string else "meaning" }}</summary>
{% for block in content_block["collapse"] %}{% set content_block_id = content_block_id ~ "-item-" ~ loop.index %}
{{ block | render_content_block(content_block_id=content_block_id) }}{% endfor %}
</details>
"""
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #1b7f3b; --error: #c02626; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 84rem; padding: 0 1rem 2rem; }
h1 { font-size: 1.4rem; margin: 1rem 0 .3rem; } h2, h3, h4, h5, h6 { font-size: 1rem; margin: .8rem 0 .3rem; }
header nav { display: flex; gap: 1.2rem; padding-bottom: .6rem; border-bottom: 1px solid var(--line); }
.columns { display: grid; grid-template-columns: 15rem 1fr; gap: 2rem; align-items: start; }
.contents { position: sticky; top: 0; max-height: 100vh; overflow: auto; font-size: .85rem; }
.contents ul { list-style: none; padding: 0; } .contents li { overflow-wrap: anywhere; padding: .1rem 0; }
main { min-width: 0; } .ge-section { margin-bottom: 1.4rem; scroll-margin-top: .5rem; }
.alert { background: var(--soft); padding: .3rem .7rem; border-radius: .3rem; } .alert h5 { margin: 0; }
.table-responsive, .show-scrollbars { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.badge { background: var(--soft); border: 1px solid var(--line); border-radius: .3rem; padding: 0 .35rem; }
.fa-check-circle::before { content: "\\2713"; color: var(--good); font-weight: 700; }
.fa-times::before, .fa-times-circle::before { content: "\\2717"; color: var(--error); font-weight: 700; }
.fa-exclamation-triangle::before { content: "!"; color: var(--error); font-weight: 700; }
.text-success { color: var(--good); } .text-danger { color: var(--error); } i { font-style: normal; }
.cooltip .top { display: none; } details { margin: .3rem 0; } summary { cursor: pointer; }
footer { opacity: .7; font-size: .85rem; border-top: 1px solid var(--line); padding-top: .5rem; }
body:has(#failed-only:checked) .ge-section:has(.fa-check-circle):not(:has(.fa-times, .fa-exclamation-triangle)),
body:has(#failed-only:checked) tr:has(> td .fa-check-circle) { display: none; }
@media (max-width: 50rem) { .columns { grid-template-columns: 1fr; } .contents { position: static; } }
"""


def write_data_docs(folder: Path, outcome: Any, suite: Any, *, name: str) -> None:
    """Write `index.html` (the results) and `suite.html` (the expectations) into a new folder.

    Args:
        outcome: Great Expectations' ExpectationSuiteValidationResult; what tells time and place is left out.
        suite: its ExpectationSuite.
        name: of the data set.
    """
    from great_expectations.render.renderer.page_renderer import (
        ExpectationSuitePageRenderer,
        ValidationResultsPageRenderer,
    )

    outcome = copy.deepcopy(outcome)
    for key in ("batch_markers", "active_batch_definition"):
        outcome.meta.pop(key, None)
    for one in outcome.results:
        one.result = _plain(one.result)
    results = ValidationResultsPageRenderer(run_info_at_end=True).render(outcome)
    results.sections.pop()  # the run's name and time
    expectations = ExpectationSuitePageRenderer().render(suite)
    folder.mkdir(parents=True)
    for file, document, title in (
        (INDEX, results, f"Data Docs of {name}: results"),
        (SUITE, expectations, f"Data Docs of {name}: expectations"),
    ):
        page = _view().render(document, title=title, style=_STYLE, results=file == INDEX)
        (folder / file).write_text(page.replace(_SUITE_LINK, f'href="{SUITE}"'), encoding="utf-8")


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, which is what the renderers take; text escaped, as tables take it for HTML."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def _view() -> Any:
    """Great Expectations' view with our frame."""
    from great_expectations.render.view import DefaultJinjaPageView
    from jinja2 import ChoiceLoader, DictLoader

    view = DefaultJinjaPageView()
    ours = {"page.j2": _PAGE, "collapse.j2": _COLLAPSE, "graph.j2": ""}
    view.env.loader = ChoiceLoader([DictLoader(ours), view.env.loader])
    numbers = itertools.count()
    view.env.filters["generate_html_element_uuid"] = lambda prefix=None: f"{prefix or ''}{next(numbers)}"
    return view
