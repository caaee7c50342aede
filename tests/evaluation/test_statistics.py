"""Intervals, paired tests and limits of agreement against SciPy and numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from distilldsm.evaluation.statistics import (
    LEVEL,
    RESAMPLES,
    SEED,
    bland_altman,
    bootstrap_mean,
    by_patient,
    holm,
    mean_of,
    spread,
    wilcoxon_p,
)


def test_one_column_is_scipys_bca_interval():
    values = np.random.default_rng(1).beta(9, 1, 40)
    rng = np.random.default_rng(SEED)
    wanted = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="BCa", rng=rng)
    assert bootstrap_mean(values[:, None]) == pytest.approx(tuple(wanted.confidence_interval), abs=1e-12)


def test_labels_of_a_case_are_drawn_together():
    # Two labels that always err in opposite directions: their mean is sure, though each is not.
    one = np.random.default_rng(2).uniform(0.5, 0.9, 30)
    low, high = bootstrap_mean(np.stack([one, 1.4 - one], axis=1))
    assert (low, high) == pytest.approx((0.7, 0.7))
    low, high = bootstrap_mean(one[:, None])
    assert high - low > 0.05


def test_the_mean_lies_within_and_more_cases_narrow_it():
    rng = np.random.default_rng(3)
    widths = []
    for cases in (20, 320):
        table = np.clip(rng.normal(0.8, 0.1, (cases, 2)), 0, 1)
        low, high = bootstrap_mean(table)
        assert low < table.mean() < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)  # a square root of 16


def test_patients_are_drawn_with_all_their_cases():
    """The same case twice tells nothing new; a slow bootstrap agrees."""
    values = np.random.default_rng(6).uniform(size=(12, 2))
    patients = [f"p{k}" for k in range(12)]
    twice = bootstrap_mean(np.repeat(values, 2, axis=0), [p for p in patients for _ in "ab"])
    assert twice == pytest.approx(bootstrap_mean(values))
    uneven = [f"p{k // 3 if k < 9 else k}" for k in range(12)]

    def slow(drawn):
        rows = np.concatenate([[k for k in range(12) if uneven[k] == names[int(d)]] for d in drawn])
        return round(values[rows, 0].mean(), 12)  # draws of the same patients are ties

    names = list(dict.fromkeys(uneven))
    wanted = stats.bootstrap(
        (np.arange(len(names)),),
        slow,
        vectorized=False,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="BCa",
        rng=np.random.default_rng(SEED),
    )
    assert bootstrap_mean(values[:, :1], uneven) == pytest.approx(tuple(wanted.confidence_interval), abs=1e-12)
    assert bootstrap_mean(values, ["one"] * 12) is None


def test_undefined_scores_do_not_count():
    values = np.random.default_rng(4).uniform(size=12)
    holes = np.full((20, 1), np.nan)
    holes[3:15, 0] = values
    assert bootstrap_mean(holes) == bootstrap_mean(values[:, None])
    # A label with one defined case: draws without that case have no mean of it, and still there is an interval.
    table = np.stack([np.linspace(0.2, 0.9, 20), np.full(20, np.nan)], axis=1)
    table[0, 1] = 0.5
    low, high = bootstrap_mean(table)
    assert low < high


@pytest.mark.parametrize("table", [[[0.5]], [[np.nan], [np.nan]], [[0.5], [np.nan]], []])
def test_too_few_cases_have_no_interval(table):
    assert bootstrap_mean(np.array(table, dtype=float).reshape(-1, 1)) is None


def test_equal_cases_have_an_interval_of_no_width():
    assert bootstrap_mean(np.full((5, 2), 1.0)) == (1.0, 1.0)


def test_spread_is_that_of_numpy_without_what_is_undefined():
    values = [0.5, np.nan, 0.9, 0.1]
    mean, sd, count = spread(values)
    assert (mean, sd, count) == (pytest.approx(0.5), pytest.approx(np.std([0.5, 0.9, 0.1], ddof=1)), 3)
    assert spread([0.25, np.nan]) == spread([None, 0.25]) == (0.25, None, 1)
    assert spread([np.nan]) == spread([]) == (None, None, 0)
    table = np.array([[1.0, np.nan], [np.nan, np.nan], [2.0, 4.0]])
    np.testing.assert_array_equal(mean_of(table, axis=1), [1.0, np.nan, 3.0])
    assert mean_of(table) == pytest.approx(7 / 3)


def test_a_patient_is_one_pair():
    assert by_patient(np.array([1.0, 5.0, 3.0, 4.0]), ["b", "a", "b", "c"]).tolist() == [2.0, 5.0, 4.0]


def test_wilcoxon_ranks_equal_differences_as_ties_in_spite_of_rounding_errors():
    a = [3, 1, 2, 2, 4, 1, 2, 1, 1, 3, 2, 1, 4, 1]
    b = [1, 5, 5, 1, 5, 1, 3, 5, 3, 4, 5, 4, 1, 3]
    true = stats.wilcoxon(np.subtract(b, a)).pvalue
    millimetres = 1.4 * np.array(b) - 1.4 * np.array(a)  # HD95 in multiples of the voxel
    assert stats.wilcoxon(millimetres).pvalue != pytest.approx(true, rel=0.1)
    assert wilcoxon_p(millimetres) == pytest.approx(true)
    three = (
        1.4 * np.repeat(b, 3) + np.tile([0.0, 1.4, 2.8], 14) - (1.4 * np.repeat(a, 3) + np.tile([0.0, 1.4, 2.8], 14))
    )
    of_patients = by_patient(three, [f"p{k // 3}" for k in range(42)])
    assert stats.wilcoxon(of_patients).pvalue != pytest.approx(true, rel=0.1)
    assert wilcoxon_p(of_patients) == pytest.approx(true)
    differences = np.random.default_rng(0).normal(0.02, 0.05, 20)
    assert wilcoxon_p(differences) == pytest.approx(stats.wilcoxon(differences).pvalue)
    greater = stats.wilcoxon(differences, alternative="greater").pvalue
    assert wilcoxon_p(differences, "greater") == pytest.approx(greater)
    assert wilcoxon_p(np.full(4, 0.1) - 0.1) == wilcoxon_p(np.array([1e-12])) == 1.0
    assert wilcoxon_p(np.array([0.1, 0.2, 0.3]), "greater") == pytest.approx(1 / 8)  # three signs out of three


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    corrected = holm(p_values)
    for alpha in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, index in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
            if (len(p_values) - rank) * p_values[index] > alpha:
                break
            rejected.add(index)
        assert {k for k, p in enumerate(corrected) if p <= alpha} == rejected


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_bland_altman_by_hand():
    found = bland_altman([10, 20, 30, 40], [11, 19, 33, 41])
    # Differences 1, -1, 3, 1: mean 1, squares of what is left 0, 4, 4, 0, so sd = sqrt(8 / 3).
    assert found.bias == 1
    assert (found.low, found.high) == pytest.approx((1 - 1.96 * (8 / 3) ** 0.5, 1 + 1.96 * (8 / 3) ** 0.5))
    assert (found.cases, found.mean_truth, found.share) == (4, 25, 1 / 25)
    assert bland_altman([1], [2]) is None
