"""The kit: one frame for all pages, what is escaped, and small texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from distilldsm.report import page
from distilldsm.report.viewer import ViewedCase, viewer_page

NASTY = "</script><b>&'"


def test_every_page_has_the_one_frame(repository):
    """A page is a template that extends the frame; all others are parts, or a text without HTML."""
    folder = repository / "distilldsm" / "report" / "templates"
    pages = {path.name for path in folder.glob("*.html") if '{% extends "page.html" %}' in path.read_text()}
    assert pages == {
        f"{name}.html" for name in ("cross_validation", "drift", "evaluation", "plots", "validation", "viewer")
    }
    (frame,) = (path for path in folder.rglob("*.html") if "<html" in path.read_text())
    assert frame.name == "page.html"


def test_no_python_file_holds_html(repository):
    tags = ("<div", "<td", "<p>", "<html")
    assert not [p for p in (repository / "distilldsm").rglob("*.py") if any(tag in p.read_text() for tag in tags)]


def test_text_is_escaped_and_empty_notes_are_left_out():
    made = page.render("plots.html", title=NASTY, notes=[NASTY, ""])
    assert NASTY not in made
    assert made.count("&lt;/script&gt;&lt;b&gt;&amp;&#39;") == 3, "title, heading and note"
    assert made.count('class="note"') == 1
    assert "<nav" not in made, "no sections, no contents"


def test_no_name_ends_the_script_that_holds_it():
    case = ViewedCase(name=NASTY, caption=NASTY, image=b"an image")
    made = viewer_page("title", [case], {NASTY: 1})
    assert NASTY not in made
    assert made.count("<script") == made.count("</script")


def test_what_a_template_needs_and_does_not_get_is_an_error():
    with pytest.raises(UndefinedError, match="title"):
        page.render("plots.html")


def test_pictures_are_within_the_page(tmp_path: Path):
    (tmp_path / "x.png").write_bytes(b"picture")
    empty = {"head": [], "rows": []}
    cases = empty | {"total": 0}
    contents = {"summary": {"cases": 1}, "scores": empty, "largest": {}, "cost": {}, "costs": empty, "cases": cases}
    made = page.render(
        "cross_validation.html", title="t", picture=tmp_path / "x.png", provenance={"hash": "<1>"}, **contents
    )
    assert '<img alt="Dice per fold and label; each point is a case." src="data:image/png;base64,cGljdHVyZQ==">' in made
    assert '<th>hash</th><td class="text">&lt;1&gt;</td>' in made
    assert "1 case, each held out once" in made
    assert "Largest component" not in made


@pytest.mark.parametrize(("value", "digits", "text"), [(None, 2, "-"), (0.12345, 2, "0.12"), (3, 1, "3.0")])
def test_numbers(value, digits, text):
    assert page.number(value, digits) == text


def test_counts_and_names():
    assert [page.count(n, "case") for n in (0, 1, 2, 1234)] == ["0 cases", "1 case", "2 cases", "1,234 cases"]
    assert page.named(["a", "b"]) == "a, b"
    assert page.named([*"abcdefg"]) == "a, b, c, d, e and 2 more"
