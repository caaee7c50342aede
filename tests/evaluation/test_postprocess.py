"""The decision to keep the largest component only, and that nested reporting never looks at its own fold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilldsm.core.errors import DataError, UserError
from distilldsm.core.files import read_json, write_json
from distilldsm.evaluation.postprocess import decide, load_postprocessing, nested, write_postprocessing


def row(case: str, label: str, dice: float, hd95: float = 2.0, volume: float = 1.0) -> dict:
    return {"case": case, "label": label, "dice": dice, "hd95_mm": hd95, "volume_predicted_ml": volume}


def rows(label: str, *dice: float, hd95: float = 2.0, volume: float = 1.0, prefix: str = "c") -> list[dict]:
    return [row(f"{prefix}{k}", label, value, hd95, volume) for k, value in enumerate(dice)]


@pytest.mark.parametrize(
    ("dice", "hd95", "volume", "keep", "words"),
    [
        ((0.8, 0.9), 1.0, 0.9, True, "mean Dice \\+0.05000, HD95 -1.000 mm"),
        ((0.8, 0.8002), 2.0, 0.9, False, "not more than 0.0001 better"),
        ((0.8, 0.8003), 2.0, 0.9, True, "HD95 \\+0.000 mm"),
        ((0.8, 0.9), 2.001, 0.9, False, "but HD95 \\+0.001 mm"),
        ((0.7, 0.9), 1.0, 0.9, True, "mean Dice"),
        ((0.7, 0.8), 1.0, 0.9, False, "mean Dice \\+0.00000"),
        ((0.8, 0.8), 2.0, 1.0, False, "no case has a second component"),
    ],
)
def test_what_is_decided_and_why(dice, hd95, volume, keep, words):
    raw = rows("a", 0.7 if dice[0] == 0.7 else 0.8, 0.8) + rows("b", 0.5, 0.5)
    found = decide(raw, rows("a", *dice, hd95=hd95, volume=volume) + rows("b", 0.5, 0.5))
    assert found.kept == (("a",) if keep else ())
    assert found.cases == 2
    decision = found.labels["a"]
    assert decision.cases_changed == (0 if volume == 1.0 else 2)
    assert decision.dice_kept == pytest.approx(sum(dice) / 2)
    assert (decision.hd95_raw, decision.hd95_kept) == (2.0, pytest.approx(hd95))
    import re

    assert re.search(words, decision.reason)


GROUPS = {"WT": ("WT", "TC")}


@pytest.mark.parametrize(
    ("inner", "inner_hd95", "keep", "words"),
    [
        (0.79, 2.0, True, "mean Dice of WT, TC +0.02000, HD95 -0.500 mm"),
        (0.75, 2.0, False, "mean Dice of WT, TC +0.00000: not more"),
        (0.79, 3.1, False, "mean Dice of WT, TC +0.02000, but HD95 +0.050 mm"),
    ],
)
def test_of_nested_regions_the_mean_over_all_decides(inner, inner_hd95, keep, words):
    raw = rows("WT", 0.8, 0.8) + rows("TC", 0.8, 0.8)
    kept = rows("WT", 0.85, 0.85, hd95=1.0, volume=0.9) + rows("TC", inner, inner, hd95=inner_hd95)
    found = decide(raw, kept, GROUPS)
    assert list(found.labels) == ["WT"]
    assert found.kept == (("WT",) if keep else ())
    assert (found.labels["WT"].cases_changed, found.groups, found.not_tried) == (2, GROUPS, "")
    assert words in found.labels["WT"].reason
    with pytest.raises(ValueError, match="lack ET"):
        decide(raw, kept, {"WT": ("WT", "ET")})


def test_nothing_tried_is_not_nothing_found(tmp_path):
    found = write_postprocessing(tmp_path, rows("a", 0.8), rows("a", 0.8), {})
    assert (found.kept, found.labels) == ((), {})
    assert read_json(tmp_path / "postprocessing.json")["not_tried"].startswith("not tried, as regions overlap")


def test_nested_regions_change_together():
    folds = {
        k: (raw + [r | {"label": "b"} for r in raw], kept + [r | {"label": "b"} for r in kept])
        for k, (raw, kept) in {0: fold("x", -0.1), 1: fold("y", 0.1)}.items()
    }
    reported = nested(folds, {"a": ("a", "b")})
    assert reported[0] == folds[0][1]
    assert reported[1] == folds[1][0]


def test_tables_that_do_not_fit():
    raw, kept = rows("a", 0.8, 0.8), rows("a", 0.9, 0.9, volume=0.5)
    assert decide(raw, kept[::-1]) == decide(raw, kept), "in whatever order"
    with pytest.raises(ValueError, match="different cases"):
        decide(raw, kept[:1])


def fold(name: str, gain: float) -> tuple[list[dict], list[dict]]:
    return rows("a", 0.5, 0.7, prefix=name), rows("a", 0.5 + gain, 0.7 + gain, volume=0.9, prefix=name)


def test_each_fold_is_reported_as_the_others_decide():
    # Fold 0 alone would keep, folds 1 and 2 alone would not; only for fold 1 and 2 do the others gain on average.
    folds = {0: fold("x", 0.1), 1: fold("y", -0.01), 2: fold("z", -0.02)}
    reported = nested(folds)
    assert [r["dice"] for r in reported[0]] == [0.5, 0.7], "its own gain must not count"
    assert reported[1] == folds[1][1]
    assert reported[2] == folds[2][1]


@given(gains=st.lists(st.floats(-0.2, 0.2), min_size=2, max_size=5), own=st.floats(-0.2, 0.2))
def test_what_a_fold_scores_does_not_change_what_is_chosen_for_it(gains, own):
    folds = {k: fold(f"f{k}_", gain) for k, gain in enumerate(gains)}

    def chosen(tables):
        return [r["volume_predicted_ml"] for r in nested(tables)[0]]

    assert chosen(folds) == chosen(folds | {0: fold("f0_", own)})


def test_nested_needs_folds_that_fit():
    with pytest.raises(ValueError, match="at least two folds"):
        nested({0: fold("x", 0.1)})
    raw, kept = fold("x", 0.1)
    with pytest.raises(ValueError, match="tables of fold 0"):
        nested({0: (raw, kept[:1]), 1: fold("y", 0.1)})


def test_files(tmp_path):
    raw, kept = fold("x", 0.1)
    decided = write_postprocessing(tmp_path, raw, kept)
    path = tmp_path / "postprocessing.json"
    assert load_postprocessing(path) == decided
    written = read_json(path)
    assert (written["schema_version"], written["cases"]) == (2, 2)
    assert written["labels"]["a"] == {
        "keep_largest": True,
        "scores_of": ["a"],
        "dice_raw": 0.6,
        "dice_kept": pytest.approx(0.7),
        "hd95_raw": 2.0,
        "hd95_kept": 2.0,
        "cases_changed": 2,
        "reason": "mean Dice +0.10000, HD95 +0.000 mm",
    }
    assert (tmp_path / "postprocessed.csv").read_text().splitlines()[0] == ",".join(raw[0])
    for change in ({"schema_version": 1}, {"labels": []}, {"more": 1}):
        write_json(path, written | change)
        with pytest.raises(DataError, match="evaluate the fold again"):
            load_postprocessing(path)
    with pytest.raises(UserError, match="is missing"):
        load_postprocessing(tmp_path / "none.json")


def test_what_the_plan_says_is_kept_whatever_the_scores_say():
    """In every fold, and it does not decide for other labels."""
    raw, kept = rows("heart", 0.9, 0.9) + rows("ring", 0.5, 0.5), rows("heart", 0.89, 0.9) + rows("ring", 0.5, 0.4)
    decided = decide(raw, kept, planned=("heart", "absent"))
    assert decided.kept == decided.planned == ("heart",)
    assert decided.labels["heart"].reason.startswith(
        "by the plan: one component in nearly all cases; mean Dice -0.00500"
    )
    assert decide(raw, kept).kept == ()
    reported = nested({1: (raw, kept), 2: (raw, kept)}, planned=("heart",))
    assert reported[1] == reported[2] == kept[:2] + raw[2:]
