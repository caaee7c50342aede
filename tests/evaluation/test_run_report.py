"""The page of an evaluation: its numbers against other people's and the obvious ones, and that it is whole."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilldsm.data.dataset import Case
from distilldsm.evaluation import figures, tables
from distilldsm.evaluation.assemble import choose
from distilldsm.evaluation.overlays import overlay, shown_slices
from distilldsm.evaluation.report import cases_table
from distilldsm.evaluation.run_report import RunReport, intervals, render_run_report
from distilldsm.evaluation.statistics import agreement, mean_interval
from tests.evaluation.test_tables_and_report import rows

FINGERPRINT = {
    "cases": 3,
    "axes": ["x", "y", "z"],
    "shape": {"min": [1, 2, 3], "median": [2, 3, 4], "max": [5, 6, 77]},
    "spacing_mm": {"min": [1, 1, 2.5], "median": [1, 1, 2.5], "max": [1, 1, 2.5]},
    "percentiles": [0.5, 50, 99.5],
    "foreground_intensity": {"T1": {"mean": 10.0, "sd": 2.0, "percentiles": [1, 10, 123.4]}},
    "label_volumes_ml": {"one": {"min": [1], "median": [2], "max": [3]}},
}
VALIDATION = {
    "counts": {"cases": 9, "patients": 8, "errors": 2, "warnings": 1, "excluded": 2},
    "suite": [{}] * 29,
    "findings": [
        {"severity": "error", "rule": "readable", "case": "x1"},
        {"severity": "error", "rule": "readable", "case": "<x2>"},
        {"severity": "warning", "rule": "sound_header", "case": "x3"},
    ],
}
TIMING = {
    "device_name": "A CPU",
    "threads": 2,
    "seconds": 12.0,
    "seconds_per_volume": 0.25,
    "peak_memory_gb": 0.5,
    "training": {"parameters": 1216283, "macs_per_voxel": 42384.0, "seconds": 1000.0, "seconds_per_epoch": 20.5},
}


def report(tmp_path: Path, **more) -> str:
    figures.save_figure(figures.dice_boxes(rows(), ["one"]), tmp_path / "x.png")
    made = RunReport(
        title="A & B",
        summary=tables.summarise(rows(), ["one"]),
        rows=rows(),
        scores=[("Dice <per> label", tmp_path / "x.png")],
        facts={"network": "<script>alert(1)</script>"},
        **more,
    )
    return render_run_report(made)


def test_the_interval_is_that_of_an_obvious_bootstrap():
    values = np.random.default_rng(3).beta(8, 2, 40)
    rng = np.random.default_rng(1)
    means = [rng.choice(values, len(values)).mean() for _ in range(20_000)]
    low, high = mean_interval(values.tolist())
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=2e-3)
    assert mean_interval(values.tolist()) == (low, high), "the same values, the same interval"


def test_intervals_without_enough_cases():
    assert mean_interval([0.5]) is None
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert intervals(rows()[:1], "dice") == {"one": None, "mean": None}


def test_the_mean_over_labels_counts_a_case_once():
    two = [row | {"label": label, "dice": dice} for row, dice in zip(rows(), (0.9, 0.5, 0.7), strict=True)
           for label in ("one", "two")]  # fmt: skip
    assert intervals(two, "dice")["mean"] == intervals(two, "dice")["one"]


def test_limits_of_agreement():
    """Against the definition, on numbers that can be done by hand: differences 1, 2, 3."""
    found = agreement([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (found.bias, found.sd) == (2.0, 1.0)
    assert (found.low, found.high) == pytest.approx((0.04, 3.96))
    assert agreement([1.0], [2.0]) is None


class Whole(HTMLParser):
    """Fails on elements that are not closed in order."""

    void = {"meta", "img", "input", "br", "link"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.targets = [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.targets += [values["href"]] if "href" in values else []
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_the_page_is_whole_and_escaped(tmp_path):
    page = report(tmp_path, notes=["one template", ""], fingerprint=FINGERPRINT, validation=VALIDATION, timing=TIMING)
    parser = Whole()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert {target.removeprefix("#") for target in parser.targets} <= set(parser.ids), "the contents lead somewhere"
    assert "A &amp; B" in page
    assert "alert(1)</script>" not in page
    assert "&lt;c&gt;" in page
    assert "&lt;x2&gt;" in page
    assert page.count('class="note"') == 1
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]+", "", page)
    assert "not a medical device" in page


def test_what_it_says(tmp_path):
    page = report(
        tmp_path, fingerprint=FINGERPRINT, validation=VALIDATION, timing=TIMING, parameters={"train": {"a": 1}}
    )
    low, high = mean_interval([0.9, 0.5, 0.7])
    assert f"Mean Dice 0.700 (95% CI {low:.3f} to {high:.3f}) over 3 cases." in page
    assert "Worst: one of case b, Dice 0.500." in page
    assert "1 of 3 structures are below a Dice of 0.7." in page
    assert "+0.500" in page, "the bias of the volumes"
    assert "9 cases of 8 patients checked by 29 rules: 2 errors, 1 warnings, 2 cases left out." in page
    assert "readable</td><td>error</td><td>2</td><td>x1, &lt;x2&gt;" in page
    assert "5 x 6 x 77" in page
    assert "123.4" in page
    assert "1,216,283" in page
    assert "20.50</td><td>0.25" in page
    assert "&quot;a&quot;: 1" in page


def test_what_is_not_known_is_left_out(tmp_path):
    page = report(tmp_path)
    for title in ("Viewer", "Validation", "Data", "Cost", "Training"):
        assert f">{title}</h2>" not in page
    assert "Parameters" not in page


def test_cases_come_worst_first_and_can_be_chosen():
    table = cases_table([*rows(), rows()[0] | {"label": 'two"'}])
    assert table.index("<td data-text>b<") < table.index("&lt;c&gt;</td>") < table.index("<td data-text>a<")
    assert 'value="two&quot;"' in table
    assert 'data-label="two&quot;"' in table


def test_which_cases_are_shown():
    def chosen(count):
        cases = [Case(id=f"c{k}", patient=f"c{k}", images=("i",), label="l") for k in range(count)]
        scored = [{"case": c.id, "label": "one", "dice": k / 10} for k, c in enumerate(cases)]
        return {kind: case.id for kind, (case, _) in choose(cases, scored).items()}

    assert chosen(9) == {"worst": "c0", "worst2": "c1", "worst3": "c2", "median": "c4", "best": "c8"}
    assert list(chosen(9)) == ["worst", "worst2", "worst3", "median", "best"]
    assert chosen(2) == {"worst": "c0", "median": "c1", "best": "c1"}
    assert chosen(1) == {"worst": "c0", "median": "c0", "best": "c0"}


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(0, 7)] * 3), st.permutations([0, 1, 2]), st.tuples(*[st.booleans()] * 3))
def test_the_captions_tell_the_place_of_the_error(place, order, flips):
    """One wrong voxel: whatever the orientation of the array, the three slices go through its place in the scanner."""
    affine = np.zeros((4, 4))
    spacing = (1.0, 2.0, 3.0)
    for axis, (world, flip) in enumerate(zip(order, flips, strict=True)):
        affine[world, axis] = -spacing[axis] if flip else spacing[axis]
    affine[:3, 3], affine[3, 3] = (10.0, -20.0, 30.0), 1
    truth = np.zeros((8, 8, 8), dtype=np.uint8)
    mask = truth.copy()
    mask[place] = 1
    where_mm = affine[:3, :3] @ place + affine[:3, 3]
    picture = overlay(
        np.random.default_rng(0).normal(size=truth.shape), truth, mask, affine,
        labels={"background": 0, "one": 1}, title="t", at_error=True,
    )  # fmt: skip
    captions = [axis.get_title() for axis in picture.axes]
    expected = [f"{letter} = {value:.0f} mm" for letter, value in zip("xyz", where_mm, strict=True)]
    assert [caption.split(", ")[1] for caption in captions] == expected


def test_shown_slices():
    truth = np.zeros((9, 9, 9), dtype=np.uint8)
    truth[2:7, 2:7, 2:7] = 1
    wrong = truth.copy()
    wrong[3, 2:6, 2:6] = 0
    assert shown_slices(truth, wrong, at_error=False).tolist() == [4, 4, 4]
    assert shown_slices(truth, wrong, at_error=True)[0] == 3
    assert shown_slices(truth, truth, at_error=True).tolist() == [4, 4, 4], "no error: the middle"
    assert shown_slices(truth * 0, truth * 0, at_error=True).tolist() == [4, 4, 4], "nothing at all: the middle"
