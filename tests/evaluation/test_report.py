"""The page of an evaluation: whole, escaped, in order, and its numbers are those that went in."""

from __future__ import annotations

import gzip
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.evaluation import report_sections as sections
from distilldsm.evaluation import tables
from distilldsm.evaluation.metrics import METRICS
from distilldsm.evaluation.postprocess import LabelDecision, Postprocessing
from distilldsm.evaluation.report import VIEWER_BYTES, choose_cases, fitted
from distilldsm.evaluation.report_sections import observations
from distilldsm.report.page import render
from tests.evaluation.test_tables import rows, two_labels

EVIL = "<script>alert(1)</script>&\"'"
VOID = {"meta", "img", "br", "input"}
PLAN = {
    "depth_axis": "y",
    "target_spacing_mm": [1.0, 0.5, 0.5],
    "patch_size": [48, 64, 64],
    "batch_size": 2,
    "channels": [{"name": EVIL, "modality": "CT"}],
    "normalisation": [{"scheme": "zscore"}],
}
MODEL = {"parameters": 1234567, "macs_per_voxel": 42384.0}
COST = {"seconds": 2912.1, "seconds_per_epoch": 47.04, "epochs": 40, "peak_memory_gb": 1.14, "device_name": EVIL}
SPREAD = {k: [v] * 3 for k, v in (("min", 10.0), ("median", 20.0), ("max", 30.0))}
FINGERPRINT = {
    "cases": 9,
    "shape": SPREAD,
    "spacing_mm": SPREAD,
    "nonzero_fraction": {k: [0.5] for k in SPREAD},
    "label_volumes_ml": {EVIL: {k: [7.125] for k in SPREAD}},
    "percentiles": [0.5, 50.0],
    "foreground_intensity": {EVIL: {"mean": 12345.6, "sd": 3.25, "percentiles": [1.0, 2.0]}},
}
VALIDATION = {
    "counts": {"cases": 9, "patients": 8, "accepted": 7, "excluded": 2, "errors": 2, "warnings": 3},
    "suite": [{"rule": "spacing", "message": f"too coarse {EVIL}"}, {"rule": "readable", "message": "broken"}],
    "findings": [{"rule": "spacing", "severity": "warning", "case": f"w{k}{EVIL}"} for k in range(3)]
    + [{"rule": "readable", "severity": "error", "case": case} for case in ("e0", "e1")],
    "excluded": {"e0": ["readable"], "e1": ["readable"]},
}


FIGURES = ("dice", "hd95", "nsd", "volume_differences", "volumes", "dice_by_volume", "training_loss",
           "training_dice", "learning_rate")  # fmt: skip


def page(given: list[dict], **changes) -> str:
    """The page of these scores; `changes` are contents of the page that are missing otherwise."""
    picture = Path(__file__)  # any file will do
    labels = list(dict.fromkeys(row["label"] for row in given))
    summary, intervals = tables.summarise(given, labels), tables.intervals(given, labels)
    contents = {
        "title": "A & B",
        "notes": ["one template", ""],
        "overview": sections.overview(given, summary, intervals),
        "scores": sections.score_lines(summary, intervals),
        "largest": None,
        "figures": dict.fromkeys(FIGURES, picture),
        "distributions": {"dice": "Dice", "hd95": "HD95 mm", "nsd": "NSD"},
        "tolerance_mm": 1.0,
        "overlays": [],
        "viewer": None,
        "cases": sections.case_lines(given),
        "agreement": sections.agreement_lines(given, labels),
        "data": None,
        "plan": sections.plan_facts(PLAN),
        "validation": None,
        "next_steps": sections.next_steps([]),
        "model": MODEL,
        "cost": sections.cost_lines({"seconds_per_volume": 0.138, "cases": {"a": 1, "b": 2}}, COST),
        "provenance": {},
        "params": {},
    }
    return render("evaluation.html", **contents | changes)


def words(text: str) -> str:
    """With single spaces: how a template breaks its lines does not matter."""
    return " ".join(text.split())


class Tags(HTMLParser):
    """Fails where an element is not closed, or closed twice; collects ids, and attributes that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts = 0
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[key] for key in ("href", "src") if key in values]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_escaped():
    evil = [row | {"label": EVIL, "case": f"{row['case']}{EVIL}"} for row in rows()]
    decision = LabelDecision(
        keep_largest=True,
        scores_of=(EVIL,),
        dice_raw=0.5,
        dice_kept=0.6,
        hd95_raw=2,
        hd95_kept=1,
        cases_changed=1,
        reason=EVIL,
    )
    text = page(
        evil,
        title=EVIL,
        notes=[EVIL],
        overlays=[(Path(__file__), EVIL, EVIL)],
        largest=sections.largest_component(Postprocessing(cases=3, labels={EVIL: decision})),
        data=sections.data_lines(FINGERPRINT),
        validation=sections.validation_lines(VALIDATION),
        provenance={EVIL: EVIL},
        params={EVIL: EVIL},
    )
    tags = Tags(text)
    assert tags.scripts == 1
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert len(tags.ids) == len(set(tags.ids))
    inner = {link[1:] for link in tags.links if link.startswith("#")}
    assert inner <= set(tags.ids)
    assert {"overview", "scores", "pictures", "cases", "volumes", "training", "data", "validation", "cost"} <= inner
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in tags.links)
    assert "http" not in re.sub(r"data:image[^\"]*", "", text)


def test_numbers_order_and_notes():
    text = page(rows())
    Tags(text)
    assert "A &amp; B" in text
    assert text.count('class="note"') == 1
    assert text.index("<td>b</td>") < text.index("<td>&lt;c&gt;</td>") < text.index("<td>a</td>")
    assert "not a medical device" in text
    low, high = tables.intervals(rows(), ["one"])["labels"]["one"]["dice"]
    assert f"On 3 held-out cases, mean Dice is <b>0.700</b> (95 % interval {low:.3f} to {high:.3f})." in words(text)
    assert "The worst case is <b>b</b> (Dice 0.500). In 1 of 3 cases a structure is below Dice 0.7." in words(text)
    assert f"<td>0.7000<i>{low:.3f} to {high:.3f}</i></td>" in text
    assert "bootstrap over patients" in text
    assert "1,234,567 parameters, 42,384 multiply-accumulate operations" in text
    assert "had no validation report" in text
    # What is not there has no heading either.
    assert "Look at the volumes" not in text
    assert 'href="#viewer"' not in text
    assert text.count('aria-sort="ascending"') == 1


def test_the_best_and_the_weakest_label_are_named():
    text = words(page(two_labels()))
    assert "mean Dice is <b>0.525</b>" in text
    assert "it is highest for one (0.700) and lowest for <b>two</b> (0.350). The worst case is <b>b</b>" in text
    cards = re.findall(r"<span>(.*?)</span><b>(.*?)</b><span>(.*?)</span>", text)
    assert [card[:2] for card in cards] == [
        ("mean Dice", "0.525"),
        ("mean HD95", "3.00 mm"),
        ("mean NSD", "0.500"),
        ("lowest label: two", "0.350"),
        ("cases below Dice 0.7", "3 of 3"),
    ]
    assert cards[4][2] == "b, &lt;c&gt;, a", "the lowest first"


def test_the_table_of_scores_names_the_worst_case_and_holds_every_metric():
    lines = sections.score_lines(tables.summarise(rows(), ["one"]), tables.intervals(rows()[:1], ["one"]))
    (line,) = lines["rows"]
    cells = dict(zip(lines["head"], line, strict=True))
    assert lines["head"][1:-4] == [metric.heading for metric in METRICS.values()]
    assert cells["Dice"] == ("0.7000", ""), "one case has no interval"
    assert cells["HD95 mm"] == ("3.00", "")
    assert (cells["sd of Dice"], cells["median"], cells["worst"], cells["cases"]) == (
        "0.200", "0.7000", ("0.5000", "b"), 3,
    )  # fmt: skip
    assert len(lines["mean"]) == len(lines["head"])
    single = sections.score_lines(tables.summarise(rows()[:1], ["one"]), tables.intervals(rows()[:1], ["one"]))
    assert single["rows"][0][-4] == "-", "nor a standard deviation"


def test_a_label_that_is_nowhere_is_named():
    empty = {"label": "ghost", "dice": 1.0, "hd95_mm": 0.0, "volume_truth_ml": 0.0, "volume_predicted_ml": 0.0}
    given = rows() + [row | empty for row in rows()]
    texts = " ".join(text for _, text in observations(given, tables.summarise(given, ["one", "ghost"])))
    assert "In no held-out case, neither in truth nor in prediction: ghost. By the convention its Dice is 1" in texts
    once = [*given[:-1], given[-1] | {"volume_predicted_ml": 0.1}]
    texts = " ".join(text for _, text in observations(once, tables.summarise(once, ["one", "ghost"])))
    assert "In no held-out case" not in texts


def test_validation_is_counted_by_rule():
    lines = sections.validation_lines(VALIDATION)
    text = "9 cases of 8 patients checked against 2 rules: 7 accepted, 2 excluded, 2 errors, 3 warnings."
    assert lines["text"] == text
    assert text in page(rows(), validation=lines)
    readable, spacing = lines["rows"]
    assert readable == ("readable", "error", 2, "broken", "e0, e1")
    assert spacing[:3] == ("spacing", "warning", 3)
    assert lines["excluded"] == {"e0": "readable", "e1": "readable"}


def test_data_and_cost_are_those_measured():
    data = sections.data_lines(FINGERPRINT)
    times = sections.TIMES
    assert data["spread"][0] == ("shape, voxels", *(times.join([value] * 3) for value in ("10", "20", "30")))
    assert data["spread"][2][1] == "50.0%"
    assert data["intensity"] == [(EVIL, "12,346", "3.25", "1", "2")]
    cost = {title: cells for title, *cells in sections.cost_lines({"seconds": 4.0, "peak_memory_gb": 2.0}, COST)}
    assert cost["seconds"] == ["2,912", "4.0"]
    assert cost["peak memory"] == ["1.14 GB", "2.00 GB"]
    assert cost["peak GPU memory"] == ["-", "-"]


def test_only_the_worst_rows_are_shown_of_very_many(monkeypatch):
    monkeypatch.setattr(sections, "ROWS_SHOWN", 2)
    html = page(rows())
    assert "The worst 2 of 3 rows" in html
    assert "<td>b</td>" in html
    assert "<td>a</td>" not in html


@pytest.mark.parametrize(
    ("cases", "kinds"),
    [
        (1, {"worst": "c0"}),
        (2, {"worst": "c0", "best": "c1"}),
        (3, {"worst": "c0", "median": "c1", "best": "c2"}),
        (9, {"worst": "c0", "second worst": "c1", "third worst": "c2", "median": "c4", "best": "c8"}),
    ],
)
def test_cases_worth_a_look(cases, kinds):
    given = [rows()[0] | {"case": f"c{k}", "dice": 0.1 * k} for k in range(cases)]
    assert choose_cases(given[::-1]) == kinds


def test_large_volumes_fit_into_the_page():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 4000, (60, 60, 50)).astype(np.float32)  # noise: nothing packs worse
    mask = (image > 2000).astype(np.uint8)
    made = fitted(image, mask, 1 - mask, np.eye(4), 40_000)
    assert 15_000 < sum(len(one) for one in made) * 4 / 3 <= 40_000
    shapes = {nib.Nifti1Image.from_bytes(gzip.decompress(one)).shape for one in made}
    assert len(shapes) == 1
    assert np.prod(shapes.pop()) < image.size / 5
    whole = fitted(image, mask, mask, np.eye(4), 10_000_000)
    assert nib.Nifti1Image.from_bytes(gzip.decompress(whole[0])).shape == image.shape
    for labels in whole[1:]:
        np.testing.assert_array_equal(nib.Nifti1Image.from_bytes(gzip.decompress(labels)).get_fdata(), mask)
    assert VIEWER_BYTES < 10_000_000, "what remains of 15 MB is for figures, tables and the viewer itself"


def test_what_stands_out_is_marked():
    def row(case: str, truth: float, predicted: float, dice: float) -> dict:
        volumes = {"volume_truth_ml": truth, "volume_predicted_ml": predicted}
        return {"case": case, "label": "one", "dice": dice, "hd95_mm": 10 * (1 - dice), **volumes}

    rows = [row("lost", 5.0, 0.0, 0.0), row("extra", 0.0, 2.0, 0.0), row("good", 5.0, 5.0, 1.0)]
    # Errors -5, 2 and 0 ml of 10/3 ml: bias -1, standard deviation sqrt(13).
    volumes = (
        "Volumes: one is on average predicted 30.0% smaller than it is (-1.00 ml); "
        "95 % of the errors are expected within -8.07 to +6.07 ml."
    )
    assert observations(rows, {"labels": ["one"]}) == [
        ("bad", "Missed altogether: one in lost."),
        ("bad", "Found where there is none: one in extra."),
        ("bad", "Largest HD95: 10.0 mm, one in lost."),
        ("bad", volumes),
    ]
    fine = [row("a", 10.0, 10.5, 0.7), row("b", 10.0, 10.5, 0.9)]
    close = [one | {"label": "two", "volume_predicted_ml": 10.1} for one in fine]
    volumes = (
        "Volumes: one is on average predicted 5.0% larger than it is (+0.50 ml); "
        "95 % of the errors are expected within +0.50 to +0.50 ml."
    )
    assert observations(close + fine, {"labels": ["two", "one"]}) == [
        ("good", "No structure is missed altogether, and none is found where there is none."),
        ("", "Largest HD95: 3.0 mm, two in a."),
        ("", volumes),
    ]
    small = [row(f"c{k}", 1.0 + k, 1.0 + k, 0.5 + 0.02 * k) for k in range(10)]
    text = "Small structures score lower: one, rank correlation of Dice and volume 1.00."
    assert ("bad", text) in observations(small, {"labels": ["one"]})
    assert text not in dict(map(reversed, observations(small[:9], {"labels": ["one"]}))), "too few to tell"


def curve(*dice: float, train: float | None = None) -> list[dict]:
    """A training of ten epochs for each score, validated at the end of each ten."""
    history = [{"epoch": k + 1, "train_loss": 0.1} for k in range(10 * len(dice))]
    for k, value in enumerate(dice, start=1):
        history[10 * k - 1] |= {"val_dice": {"a": value}, "val_dice_mean": value}
    if train is not None:
        history[-1] |= {"train_dice": {"a": train}, "train_dice_mean": train}
    return history


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (curve(0.5, 0.6, 0.70, 0.71, train=0.9), ["changed by +0.010", "train longer", "gain up to about 0.010"]),
        (curve(0.5, 0.6, 0.70, 0.702, train=0.9), ["training cases score 0.198 better", "more training cases"]),
        (curve(0.5, 0.6, 0.70, 0.702, train=0.71), ["larger network", "finer spacing"]),
        (curve(0.5, 0.6, 0.70, 0.69, train=0.70), ["changed by -0.010", "larger network"]),
        (curve(0.5, 0.6, 0.70, 0.70), ["longer gains little"]),
    ],
)
def test_what_to_do_next(history, words):
    found = sections.next_steps(history)
    assert all(word in found["advice"] for word in words)
    shown = html.unescape(page(two_labels(), next_steps=found))
    assert found["advice"] in shown
    if "train_dice" in history[-1]:
        trained, held_out = history[-1]["train_dice"]["a"], history[-1]["val_dice"]["a"]
        assert found["rows"] == [["a", f"{trained:.3f}", f"{held_out:.3f}", f"{trained - held_out:.3f}"]]


def test_a_single_validation_advises_nothing():
    assert sections.next_steps(curve(0.5)) == sections.next_steps([]) == {"rows": [], "advice": ""}
