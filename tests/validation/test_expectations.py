"""The suite: what is refused, how bounds join it, and what becomes a finding."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
import yaml

from distilldsm.core.errors import ConfigError
from distilldsm.data.dataset import Case, Channel, DatasetIndex
from distilldsm.validation.case_row import CaseRow, Detail
from distilldsm.validation.case_table import CaseTable, table_columns
from distilldsm.validation.expectations import BETWEEN, Rule, check_table, load_suite
from distilldsm.validation.report import make_report, render_html

INDEX = DatasetIndex(
    name="<b>Toy & co</b>",
    channels=(Channel(name="T1", modality="MRI"),),
    labels={"background": 0, "lesion": 1},
    cases=tuple(Case(id=k, patient=k, images=(f"{k}.nii.gz",), label=f"{k}_seg.nii.gz") for k in "abc"),
)
COLUMNS = table_columns(INDEX)


def table(**columns: list) -> CaseTable:
    rows = []
    for k, case in enumerate(INDEX.cases):
        fixed = {"case": case.id, "patient": case.patient, "image": case.images[0], "label": case.label}
        rows.append(CaseRow(values=fixed | {name: values[k] for name, values in columns.items()}))
    return CaseTable(columns=COLUMNS, rows=tuple(rows))


def rule(**changes: object) -> dict:
    base = {
        "rule": "thin",
        "expectation": BETWEEN,
        "column": "spacing_max_mm",
        "kwargs": {"max_value": 3},
        "severity": "error",
        "message": "thick slices",
        "hint": "scan again",
    }
    return {k: v for k, v in (base | changes).items() if v is not None}


@pytest.fixture
def suite_file(tmp_path):
    def write(*rules: dict, **top: object):
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump({"schema_version": 1, "rules": list(rules)} | top))
        return path

    return write


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([rule(colum="x")], ["unknown parameter 'colum'", "did you mean 'column'"]),
        ([rule(hint=None)], ["'hint' is missing"]),
        ([rule(severity="fatal")], ["severity", "error, warning"]),
        ([rule(column="spacing_max")], ["unknown column", "did you mean 'spacing_max_mm'", "rule 'thin'"]),
        ([rule(expectation="expect_column_values_to_be_betwen")], ["unknown expectation", f"did you mean '{BETWEEN}'"]),
        ([rule(kwargs={"maximum": 3})], ["does not take these arguments", "maximum"]),
        ([rule(kwargs={})], ["does not take these arguments"]),
        ([rule(kwargs={"max_value": 3, "severity": "warning"})], ["'severity' is no argument"]),
        ([rule(), rule(column="anisotropy")], ["same name", "thin"]),
        ([rule(), rule(rule="slim")], ["demand the same", "thin, slim"]),
        (
            [rule(expectation="expect_column_pair_values_to_be_equal", column=None,
                  kwargs={"column_A": "shape_x", "column_B": "shape_q"})],
            ["unknown column", "shape_q"],
        ),
    ],
)  # fmt: skip
def test_a_wrong_suite_is_refused_with_its_place(suite_file, rules, expected):
    path = suite_file(*rules)
    with pytest.raises(ConfigError) as caught:
        load_suite(path, COLUMNS, {})
    for text in (str(path), *expected):
        assert text in str(caught.value)


def test_other_files_are_refused(suite_file, tmp_path):
    with pytest.raises(ConfigError, match="schema version"):
        load_suite(suite_file(rule(), schema_version=2), COLUMNS, {})
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read\n(.|\n)*hint: correct validate\.suite"):
        load_suite(tmp_path / "absent.yaml", COLUMNS, {})


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"spacing_mx_mm": (0.0, 1.0)}, "did you mean 'spacing_max_mm'"),
        ({"orientation": (0.0, 1.0)}, "numbers only"),
        ({"anisotropy": (2.0, 1.0)}, "impossible"),
    ],
)
def test_wrong_bounds_are_refused(suite_file, bounds, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        load_suite(suite_file(rule()), COLUMNS, bounds)
    assert f"validate.bounds.{next(iter(bounds))}" in str(caught.value)


def test_bounds_replace_and_add_limits(suite_file):
    path = suite_file(rule(severity="warning"))
    cases = table(spacing_max_mm=[2.0, 4.0, 7.0], **{"volume_ml[lesion]": [0.1, 5.0, None]})
    plain = check_table(cases, load_suite(path, COLUMNS, {}))
    assert [(f.case, f.severity) for f in plain] == [("b", "warning"), ("c", "warning")]
    bounds = {"spacing_max_mm": (None, 5.0), "volume_ml[lesion]": (0.5, None)}
    found = check_table(cases, load_suite(path, COLUMNS, bounds))
    assert [(f.case, f.rule, f.file, f.severity) for f in found] == [
        ("c", "bounds_spacing_max_mm", "c.nii.gz", "error"),
        ("a", "bounds_volume_ml[lesion]", "a_seg.nii.gz", "error"),
    ]
    assert (found[0].seen, found[0].allowed) == ("spacing_max_mm 7", "at most 5.0")
    assert check_table(cases, load_suite(path, COLUMNS, {"spacing_max_mm": (None, None)})) == ()


def test_findings_name_each_file_that_was_noted(suite_file):
    cases = table(finite_fraction=[1.0, 0.5, 1.0])
    details = cases.by_case["b"].details
    details["finite_fraction"] = [Detail(file="b_t1.nii.gz", seen="9 NaN"), Detail(file="b_t2.nii.gz", seen="1 NaN")]
    suite = load_suite(suite_file(rule(column="finite_fraction", kwargs={"min_value": 1})), COLUMNS, {})
    found = check_table(cases, suite)
    assert [(f.case, f.file, f.seen) for f in found] == [("b", "b_t1.nii.gz", "9 NaN"), ("b", "b_t2.nii.gz", "1 NaN")]
    assert (found[0].message, found[0].hint) == ("thick slices", "scan again")


def test_errors_come_first_then_suite_and_case_order(suite_file):
    path = suite_file(rule(rule="w", severity="warning"), rule(rule="e", column="anisotropy", kwargs={"max_value": 1}))
    cases = table(spacing_max_mm=[9.0, 1.0, 9.0], anisotropy=[1.0, 9.0, 9.0])
    found = check_table(cases, load_suite(path, COLUMNS, {}))
    assert [(f.rule, f.case) for f in found] == [("e", "b"), ("e", "c"), ("w", "a"), ("w", "c")]


def test_expectations_on_columns_pairs_and_the_table(suite_file):
    path = suite_file(
        rule(rule="median", expectation="expect_column_median_to_be_between", kwargs={"max_value": 3}),
        rule(
            rule="pair",
            expectation="expect_column_pair_values_a_to_be_greater_than_b",
            column=None,
            kwargs={"column_A": "shape_x", "column_B": "shape_y"},
        ),
        rule(
            rule="many", expectation="expect_table_row_count_to_be_between", column=None, kwargs={"min_value": 10}
        ),
        rule(rule="mostly", column="anisotropy", kwargs={"max_value": 3, "mostly": 0.6}),
        rule(rule="axes", expectation="expect_column_values_to_be_in_set", column="orientation",
             kwargs={"value_set": ["RAS"]}),
    )  # fmt: skip
    cases = table(
        spacing_max_mm=[9.0, 9.0, 1.0],
        shape_x=[5, 6, 7],
        shape_y=[4, 8, 5],
        anisotropy=[1.0, 1.0, 9.0],
        orientation=["RAS", "LPS", None],
    )
    found = {f.rule: f for f in check_table(cases, load_suite(path, COLUMNS, {}))}
    assert set(found) == {"median", "pair", "many", "axes"}
    assert (found["median"].case, found["median"].file) == (None, "dataset_index.json")
    assert "9" in found["median"].seen
    assert (found["pair"].case, found["pair"].seen) == ("b", "shape_x 6, shape_y 8")
    assert found["many"].case is None
    assert (found["axes"].case, found["axes"].allowed) == ("b", "one of RAS")


def test_limits_on_text_are_a_config_error(suite_file):
    suite = load_suite(suite_file(rule(column="orientation")), COLUMNS, {})
    with pytest.raises(ConfigError, match="cannot be evaluated") as caught:
        check_table(table(orientation=["RAS", "LPS", "RAS"]), suite)
    assert "rule 'thin'" in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"min_value": 1}, "at least 1"),
        ({"min_value": 0, "strict_min": True, "max_value": 2}, "above 0, at most 2"),
        ({"min_value": 0, "max_value": 0}, "exactly 0"),
    ],
)
def test_limits_in_words(kwargs, text):
    assert Rule(**rule(kwargs=kwargs)).allowed == text


def test_shipped_suite_loads_and_every_rule_explains_itself(repository):
    suite = load_suite(repository / "conf" / "expectations.yaml", COLUMNS, {})
    assert len(suite.rules) >= 25
    for one in suite.rules:
        assert len(one.message) > 10
        assert len(one.hint) > 10
        assert one.columns
        assert one.allowed
    assert check_table(table(), suite) == ()  # what was not measured breaks no rule but `readable`


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert "src" not in dict(attrs)
        assert dict(attrs).get("href", "#").startswith(("#", "data_docs/index.html"))  # nothing from elsewhere

    def handle_data(self, data):
        self.text += data + "\n"


def test_report_and_page(suite_file):
    path = suite_file(rule(), rule(rule="w", column="anisotropy", kwargs={"max_value": 3}, severity="warning"))
    cases = table(spacing_max_mm=[9.0, 1.0, 1.0], anisotropy=[9.0, 9.0, 1.0], label_values=["<i>", "0 1", "0 1"])
    suite = load_suite(path, COLUMNS, {})
    report = make_report(INDEX, cases, suite, check_table(cases, suite))
    assert report["accepted"] == ["b", "c"]
    assert report["excluded"] == {"a": ["thin"]}
    assert report["counts"] == {
        "cases": 3, "patients": 3, "accepted": 2, "excluded": 1, "errors": 1, "warnings": 2,
    }  # fmt: skip
    json.dumps(report, allow_nan=False)
    html = render_html(report, cases)
    assert "http" not in html
    assert html.count("<script") == 1, "the frame's own"
    assert "<b>Toy" not in html
    page = _Page()
    page.feed(html)
    for text in (
        "<b>Toy & co</b>",
        "1 error, 1 case cannot be used",
        "Warnings: 2",
        "thick slices",
        "scan again",
        "spacing_max_mm 9",
        "<i>",
    ):
        assert text in page.text
    assert render_html(make_report(INDEX, table(), suite, ()), table()).count("every case can be used") == 1
