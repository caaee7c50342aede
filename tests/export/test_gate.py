"""The gate between two models: paired, symmetric, and mute about what cannot be compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from distilldsm.config import ExportConfig
from distilldsm.core.errors import ConfigError
from distilldsm.core.mapping import from_mapping
from distilldsm.evaluation.metrics import main_metrics
from distilldsm.export.gate import Gate, decide, gate_from
from distilldsm.export.scores import Scores

METRICS = [metric.name for metric in main_metrics()]


def scored(*values: float, **facts) -> Scores:
    """Scores of cases c0, c1 ... with two labels whose mean is the value, the same for every metric."""
    cases = {
        f"c{k}": {
            "a": dict.fromkeys(METRICS, value - 0.1),
            "b": dict.fromkeys(METRICS, value + 0.1),
        }
        for k, value in enumerate(values)
    }
    known = {"fold": 0, "checkpoint": "last", "data_hash": "d", "split_hash": "s", "nsd_tolerance_mm": 1.0}
    return Scores(**{"source": "evaluation", "labels": ("a", "b"), "cases": cases, **known, **facts})


def gate_of(**values) -> Gate:
    """A gate that compares the models alone: any Dice, any number of cases."""
    return Gate(**{"min_dice": 0.0, "min_cases": 1, **values})


GOOD, BAD = (0.9,) * 5, (0.1,) * 5


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (scored(*GOOD), None),
        (scored(0.5, 0.5, 0.5, 0.5, 0.5), None),
        (scored(0.5, 0.5, 0.5, 0.5, 0.49), "mean Dice 0.4980 is below 0.5 (export.min_dice)"),
        (scored(*GOOD[:4]), "scored on 4 cases, a champion needs 5"),
        (scored(source="validation", note="it was not evaluated"), "it was not evaluated; evaluate this fold"),
        (None, "has no scores"),
    ],
)
def test_a_champion_has_enough_cases_and_a_minimal_dice(scores, words):
    """Also without a champion, and also if it is better than the champion."""
    for champion, version in ((None, None), (scored(*BAD), "3")):
        decision = decide(scores, champion, Gate(), version=version)
        expected = ("first" if version is None else "better") if words is None else "not_good_enough"
        assert (decision.outcome, decision.promoted, decision.champion) == (expected, words is None, version)
        assert (words or "") in decision.reason


def test_better_worse_and_equal():
    low, high = scored(0.5, 0.7), scored(0.6, 0.8)
    better = decide(high, low, gate_of(), version="3")
    assert (better.promoted, better.outcome, better.cases, better.champion) == (True, "better", 2, "3")
    assert better.difference == pytest.approx(0.1)
    assert "version 3" in better.reason
    assert "+0.1000 over 2 cases" in better.reason
    worse = decide(low, high, gate_of(), version="3")
    assert (worse.promoted, worse.outcome) == (False, "not_better")
    assert worse.difference == pytest.approx(-0.1)
    equal = decide(low, low, gate_of(), version="3")
    assert (equal.promoted, equal.difference, equal.p) == (False, 0.0, 1.0)


def test_less_is_better_for_a_distance():
    near, far = scored(2.0, 3.0), scored(2.5, 3.5)
    gate = gate_of(metric="hd95_mm")
    assert decide(near, far, gate, version="1").promoted
    assert decide(near, far, gate, version="1").difference == pytest.approx(0.5)
    assert "mean HD95 mm difference -0.50 over" in decide(near, far, gate, version="1").reason
    assert not decide(far, near, gate, version="1").promoted


def test_a_difference_that_is_the_margin_is_not_above_it():
    low, high = scored(0.80, 0.80), scored(0.81, 0.81)  # 0.81 - 0.80 is above 0.01 in floats
    assert not decide(high, low, gate_of(margin=0.01), version="1").promoted
    assert decide(high, low, gate_of(margin=0.0099), version="1").promoted


def test_the_p_value_counts_only_where_it_is_asked_for():
    low, high = scored(0.5, 0.6, 0.7), scored(0.51, 0.62, 0.73)
    assert decide(high, low, gate_of(), version="1").p == pytest.approx(1 / 8)  # three signs out of three
    strict = decide(high, low, gate_of(p=0.05), version="1")
    assert (strict.promoted, strict.outcome) == (False, "not_significant")
    assert decide(high, low, gate_of(p=0.125), version="1").promoted


def test_the_p_value_is_of_the_differences_above_the_margin():
    differences = np.random.default_rng(0).normal(0.02, 0.01, 12).round(4)
    decision = decide(scored(*(0.5 + differences)), scored(*[0.5] * 12), gate_of(margin=0.01), version="1")
    assert decision.p == pytest.approx(wilcoxon(differences - 0.01, alternative="greater").pvalue)
    assert decide(scored(0.6, 0.6), scored(0.5, 0.5), gate_of(margin=0.1), version="1").p == 1.0


def test_a_patient_is_one_pair():
    low, high = scored(0.5, 0.6, 0.7, 0.7, 0.8, 0.8), scored(0.51, 0.62, 0.73, 0.74, 0.85, 0.86)
    patients = {f"c{k}": f"p{k // 2}" for k in range(6)}
    assert decide(high, low, gate_of(), version="1").p == pytest.approx(1 / 64)
    mine = replace(high, patients=patients)
    for champion in (low, replace(low, patients=patients)):  # one of them may not know the patients
        decision = decide(mine, champion, gate_of(p=0.1), version="1")
        assert (decision.p, decision.cases, decision.outcome) == (pytest.approx(1 / 8), 6, "not_significant")
        assert decision.difference == pytest.approx(0.035)
        assert "over 6 cases of 3 patients, p 0.125" in decision.reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fold": 1}, "fold 1, this one 0"),
        ({"data_hash": "other"}, "data other, this one d"),
        ({"labels": ("a", "c")}, "labels a, c, this one a, b"),
        ({"cases": {}}, "has no scores per case"),
    ],
)
def test_what_cannot_be_compared_is_said_with_a_hint(change, words):
    mine = scored(0.9, 0.9)
    if "labels" in change:
        change["cases"] = {c: {"a": rows["a"], "c": rows["b"]} for c, rows in mine.cases.items()}
    decision = decide(mine, replace(scored(0.1, 0.1), **change), gate_of(), version="7")
    assert (decision.promoted, decision.outcome, decision.difference) == (False, "not_comparable", None)
    assert words in decision.reason
    assert "version 7" in decision.reason
    assert "set the alias champion by hand" in decision.reason
    assert decision.tags()["gate.p"] == "-"


def test_other_cases_are_not_comparable():
    decision = decide(scored(0.9, 0.9), scored(0.1, 0.1, 0.1), gate_of(), version="7")
    assert decision.outcome == "not_comparable"
    assert "3 cases, this one on 2, 2 of them the same" in decision.reason


def test_a_tolerance_matters_to_the_nsd_alone():
    one, two = scored(0.9), scored(0.1, nsd_tolerance_mm=2.0)
    assert decide(one, two, gate_of(metric="nsd"), version="1").outcome == "not_comparable"
    assert decide(one, two, gate_of(), version="1").promoted


def test_scores_with_mirroring_are_none_of_a_model_without():
    one, two = scored(0.9, mirror=True), scored(0.1)
    for challenger, champion, words in ((one, two, "without mirroring, this one with"), (two, one, "this one without")):
        decision = decide(challenger, champion, gate_of(), version="1")
        assert decision.outcome == "not_comparable"
        assert words in decision.reason
    assert decide(one, scored(0.1, mirror=True), gate_of(), version="1").promoted


values = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(lambda pair: (pair[0] / 1000, pair[1] / 1000)),
    min_size=1,
    max_size=6,  # of up to 13 equal sizes SciPy goes through all 2^n signs
)


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(pairs=values, metric=st.sampled_from(METRICS), margin=st.integers(0, 50), p=st.none() | st.floats(0.01, 1))
def test_the_decision_is_antisymmetric(pairs, metric, margin, p):
    a, b = scored(*(x for x, _ in pairs)), scored(*(y for _, y in pairs))
    gate = gate_of(metric=metric, margin=margin / 1000, p=p)
    forth, back = decide(a, b, gate, version="1"), decide(b, a, gate, version="1")
    assert forth.difference == -back.difference
    assert not (forth.promoted and back.promoted)
    assert forth.promoted <= (forth.difference > gate.margin)
    if margin == 0 and p is None:
        assert forth.promoted or back.promoted or forth.difference == 0


def test_the_gate_of_the_parameters():
    config = ExportConfig(gate_metric="nsd", gate_margin=0.01, gate_p=0.05, min_dice=0.3)
    assert Gate.of(config) == Gate(metric="nsd", margin=0.01, p=0.05, min_dice=0.3)
    assert gate_from({"metric": "nsd", "margin": 0.01, "p": None}) == Gate(metric="nsd", margin=0.01)
    assert gate_from({"metric": "unheard of"}) == gate_from(None) == Gate()
    for wrong in ({"gate_margin": -0.1}, {"gate_margin": float("nan")}, {"gate_p": 0.0}, {"gate_p": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            from_mapping(ExportConfig, wrong)
