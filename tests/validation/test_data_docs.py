"""Great Expectations' pages: complete, the same in every run, nothing loaded from anywhere, and what users add."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from distilldsm.validation.expectations import load_suite, run_suite
from tests.validation.test_expectations import COLUMNS, rule, table

HOSTILE = '<img src=x onerror="alert(1)">'


class Page(HTMLParser):
    """What a browser would load or run, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert tag not in ("script", "link", "iframe", "img", "object"), tag
        assert not [key for key in values if key.startswith("on")], values
        self.loaded += [values[key] for key in ("href", "src") if key in values]
        self.ids += [values["id"]] if "id" in values else []

    def handle_data(self, data):
        self.text += data


def suite_of(tmp_path: Path, *rules: dict):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"schema_version": 1, "rules": list(rules)}))
    return load_suite(path, COLUMNS, {})


ADDED = {
    "pair": rule(
        rule="thick_is_thick", expectation="expect_column_pair_values_a_to_be_greater_than_b", column=None,
        kwargs={"column_A": "spacing_max_mm", "column_B": "spacing_min_mm", "or_equal": True},
    ),
    "regex": rule(
        rule="axes", expectation="expect_column_values_to_match_regex", column="orientation", kwargs={"regex": "^[RL]"}
    ),
    "share": rule(
        rule="mostly_thin", expectation="expect_column_values_to_be_between", column="anisotropy",
        kwargs={"max_value": 2, "mostly": 0.5}, severity="warning",
    ),
    "table": rule(
        rule="enough", expectation="expect_table_row_count_to_be_between", column=None, kwargs={"min_value": 50},
        severity="warning",
    ),
    "mean": rule(
        rule="mean_volume", expectation="expect_column_mean_to_be_between", column="volume_ml[lesion]",
        kwargs={"min_value": 10}, severity="warning",
    ),
}  # fmt: skip
"""Rules as a user may write them."""


@pytest.fixture
def checked(tmp_path):
    cases = table(
        spacing_max_mm=[2.0, 4.0, 7.0],
        spacing_min_mm=[1.0, 5.0, 1.0],
        orientation=["RAS", "LPS", HOSTILE],
        anisotropy=[1.0, 1.0, 3.0],
        **{"volume_ml[lesion]": [1.0, 2.0, 3.0]},
    )
    return run_suite(cases, suite_of(tmp_path, rule(message=f"thick {HOSTILE}"), *ADDED.values()))


def test_any_expectation_can_be_added_in_yaml(checked):
    found = {(f.rule, f.case) for f in checked.findings}
    assert found == {
        ("thin", "b"), ("thin", "c"), ("thick_is_thick", "b"), ("axes", "c"), ("enough", None), ("mean_volume", None)
    }  # fmt: skip


def test_the_pages_load_and_run_nothing_and_their_links_lead_somewhere(checked, tmp_path):
    checked.write_data_docs(tmp_path / "v" / "data_docs", name=f"Toy {HOSTILE}")
    (tmp_path / "v" / "report.html").touch()
    folder = tmp_path / "v" / "data_docs"
    assert sorted(p.name for p in folder.iterdir()) == ["index.html", "suite.html"]
    for path in folder.iterdir():
        page = Page(path)
        for target in page.loaded:
            assert target[1:] in page.ids if target.startswith("#") else (folder / target).is_file(), target
        assert "url(" not in path.read_text()
    results, suite = Page(folder / "index.html").text, Page(folder / "suite.html").text
    words = " ".join(results.split())
    assert "2 unexpected values found" in words
    assert "spacing_max_mm" in words
    assert "Hint: scan again" in suite
    assert HOSTILE in results  # as text


def test_two_runs_write_the_same_pages_without_times(checked, tmp_path):
    for name in ("a", "b"):
        checked.write_data_docs(tmp_path / name, name="Toy")
    for page in ("index.html", "suite.html"):
        text = (tmp_path / "a" / page).read_text()
        assert text == (tmp_path / "b" / page).read_text()
        assert not re.search(r"20\d\d-?\d\d-?\d\d", text)
