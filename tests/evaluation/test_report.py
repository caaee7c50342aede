"""The page of an evaluation: whole, escaped, in order, and its numbers are those that went in."""

from __future__ import annotations

import gzip
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distilldsm.evaluation import tables
from distilldsm.evaluation.report import Picture, Report, render_report
from distilldsm.evaluation.report_contents import VIEWER_BYTES, choose_cases, fitted
from distilldsm.evaluation.report_sections import observations, scores, validation_section
from distilldsm.evaluation.tables import intervals
from distilldsm.report import figures
from distilldsm.report import old_page as page
from distilldsm.report.overlays import overlay
from tests.evaluation.test_tables import rows

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


def report(**changes) -> Report:
    given = {
        "title": "A & B",
        "notes": ["one template", ""],
        "rows": rows(),
        "summary": tables.summarise(rows(), ["one"]),
        "intervals": intervals(rows(), ["one"]),
        "plan": PLAN,
        "model": MODEL,
        "training_cost": COST,
        "prediction_cost": {"seconds_per_volume": 0.138, "cases": {"a": 1, "b": 2}},
    }
    return Report(**given | changes)


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


def test_the_page_is_whole_and_escaped(tmp_path: Path):
    figures.save_figure(figures.score_boxes(rows(), ["one"], "dice", "Dice"), tmp_path / "x.png")
    evil = [row | {"label": EVIL, "case": f"{row['case']}{EVIL}"} for row in rows()]
    picture = Picture(path=tmp_path / "x.png", caption=EVIL, alt=EVIL)
    text = render_report(
        report(
            title=EVIL,
            notes=[EVIL],
            rows=evil,
            summary=tables.summarise(evil, [EVIL]),
            intervals=intervals(evil, [EVIL]),
            distributions=[picture],
            volumes=[picture],
            training=[picture],
            overlays=[picture],
            fingerprint=FINGERPRINT,
            validation=VALIDATION,
            facts={EVIL: EVIL},
            params={EVIL: EVIL},
        )
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
    text = render_report(report())
    Tags(text)
    assert "A &amp; B" in text
    assert text.count('class="note"') == 1
    assert text.index("<td>b</td>") < text.index("<td>&lt;c&gt;</td>") < text.index("<td>a</td>")
    assert "not a medical device" in text
    assert "On 3 held-out cases, mean Dice is <b>0.700</b>" in text
    assert "The worst case is <b>b</b> (Dice 0.500). In 1 of 3 cases a structure is below Dice 0.7." in text
    low, high = intervals(rows(), ["one"])["labels"]["one"]["dice"]
    assert f"<td>0.7000<i>{low:.3f} to {high:.3f}</i></td>" in text
    assert "bootstrap over patients" in text
    assert "1,234,567 parameters" in text
    assert "No validation report" in text
    # What is not there has no heading either.
    assert "Look at the volumes" not in text
    assert 'href="#training"' not in text
    assert text.count("aria-sort='ascending'") == 1


def test_the_table_of_scores_names_the_worst_case():
    html = scores(tables.summarise(rows(), ["one"]), intervals(rows()[:1], ["one"]))
    Tags(html)
    assert "<td>0.5000<i>b</i></td>" in html
    assert " to " not in html.split("</tbody>")[0], "one case has no interval"
    single = scores(tables.summarise(rows()[:1], ["one"]), intervals(rows()[:1], ["one"]))
    assert "<td>-</td><td>0.9000</td>" in single, "nor a standard deviation"


def test_what_stands_out():
    def row(case: str, truth: float, predicted: float, dice: float) -> dict:
        return rows()[0] | {"case": case, "volume_truth_ml": truth, "volume_predicted_ml": predicted, "dice": dice}

    lost = [row("lost", 5.0, 0.0, 0.0), row("extra", 0.0, 2.0, 0.0), row("good", 5.0, 5.0, 1.0)]
    told = dict(observations(lost, tables.summarise(lost, ["one"])))
    texts = " ".join(text for _, text in observations(lost, tables.summarise(lost, ["one"])))
    assert "bad" in told
    assert "Missed altogether: one in lost." in texts
    assert "Found where there is none: one in extra." in texts
    assert "30.0% smaller" in texts  # 10 ml are 7 ml
    fine = [row(f"c{k}", 1.0 + k, 1.0 + k, 0.5 + 0.02 * k) for k in range(20)]
    texts = " ".join(text for _, text in observations(fine, tables.summarise(fine, ["one"])))
    assert "No structure is missed" in texts
    assert "Small structures score lower: one, rank correlation of Dice and volume 1.00" in texts


def test_a_label_that_is_nowhere_is_named():
    empty = {"label": "ghost", "dice": 1.0, "hd95_mm": 0.0, "volume_truth_ml": 0.0, "volume_predicted_ml": 0.0}
    given = rows() + [row | empty for row in rows()]
    texts = " ".join(text for _, text in observations(given, tables.summarise(given, ["one", "ghost"])))
    assert "In no held-out case, neither in truth nor in prediction: ghost. By the convention its Dice is 1" in texts
    once = [*given[:-1], given[-1] | {"volume_predicted_ml": 0.1}]
    texts = " ".join(text for _, text in observations(once, tables.summarise(once, ["one", "ghost"])))
    assert "In no held-out case" not in texts


def test_validation_is_counted_by_rule():
    html = validation_section(VALIDATION)
    Tags(html)
    assert "9 cases of 8 patients checked against 2 rules: 7 accepted, 2 excluded, 2 errors, 3 warnings." in html
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in re.findall(r"<tr>(.*?)</tr>", html)[1:3]]
    assert cells[0][:3] == ["readable", "error", "2"]
    assert cells[0][4] == "e0, e1"
    assert cells[1][:3] == ["spacing", "warning", "3"]


def test_only_the_worst_rows_are_shown_of_very_many(monkeypatch):
    monkeypatch.setattr(page, "ROWS_SHOWN", 2)
    html = page.cases_table(rows())
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
    assert VIEWER_BYTES < 10_000_000, "what remains of 15 MB is for figures, tables and the viewer itself"


def test_figures_repeat_byte_for_byte_and_take_any_name(tmp_path: Path):
    history = [
        {"epoch": 1, "train_loss": 1.0, "learning_rate": 0.1},
        {"epoch": 2, "train_loss": 0.1, "learning_rate": 0.2, "val_dice": {"one": 0.4}},
    ]
    image = np.random.default_rng(0).normal(size=(8, 9, 10))
    truth = np.zeros((8, 9, 10), dtype=np.uint8)
    truth[2:5, 3:6, 4:8] = 1
    labels = {"background": 0, "$\\frac$ _one": 1}
    wide = [*rows(), rows()[0] | {"volume_truth_ml": 2000.0}, rows()[0] | {"label": "_two", "volume_truth_ml": 0.0}]
    for k in range(2):
        for name, figure in {
            "box": figures.score_boxes(wide, ["one", "_two", "none of it"], "dice", "Dice"),
            "loss": figures.training_loss(history),
            "rate": figures.learning_rate(history),
            "no_validation": figures.training_dice(history[:1]),
            "dice": figures.training_dice(history),
            "volumes": figures.volume_agreement(wide, ["one", "_two", "none of it"]),
            "differences": figures.volume_differences(wide, ["one", "_two"], {"one": (-1.0, 0.5, 2.0)}),
            "by_volume": figures.dice_by_volume(wide, ["one"]),
            "overlay": overlay(image, truth, truth * 0, affine=np.diag([1.0, 2.0, 3.0, 1.0]), labels=labels),
        }.items():
            figures.save_figure(figure, tmp_path / f"{name}{k}.png")
    for path in tmp_path.glob("*0.png"):
        assert path.read_bytes() == path.with_name(path.name.replace("0.png", "1.png")).read_bytes()
