"""Statistics of replicates against scipy, simulation and hand-made numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mixflow.tables.statistics import (
    Summary,
    detectable,
    differs,
    error_of_mean,
    holm,
    sampling_error,
    summary,
)


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_intervals_and_p_values_are_scipy_s(n: int) -> None:
    values = np.random.default_rng(n).normal(0.7, 2.0, n)
    found = summary(list(values))
    test = stats.ttest_1samp(values, 0.0)
    assert found.interval == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-9)
    assert found.p_value == pytest.approx(test.pvalue, rel=1e-9)
    assert found.standard_deviation == pytest.approx(values.std(ddof=1))


def test_a_paired_difference_is_scipy_s_paired_test() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(0, 10, 4)  # what replicates share cancels
    a, b = common + rng.normal(0, 1, 4), common + rng.normal(1, 1, 4)
    found = summary(list(a - b))
    assert found.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    assert found.p_value is not None
    assert found.p_value < stats.ttest_ind(a, b).pvalue


@pytest.mark.parametrize("n", [3, 5])
def test_an_interval_covers_the_truth_in_19_of_20_cases(n: int) -> None:
    draws = np.random.default_rng(1).normal(1.5, 3.0, (4000, n))
    intervals = [summary(list(values)).interval for values in draws]
    covered = np.mean([low <= 1.5 <= high for low, high in intervals if low is not None])
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_an_effect_of_the_detectable_size_is_found_in_four_cases_of_five(n: int) -> None:
    deviation = 2.0
    effect = detectable(deviation, n)
    draws = np.random.default_rng(2).normal(effect, deviation, (40_000, n))
    statistic = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(n))
    assert np.mean(abs(statistic) > stats.t.ppf(0.975, n - 1)) == pytest.approx(0.8, abs=0.008)


def test_the_detectable_effect_nears_that_of_the_normal_distribution() -> None:
    assert detectable(1.0, 10_000) * 100 == pytest.approx(stats.norm.ppf(0.975) + stats.norm.ppf(0.8), rel=1e-3)
    assert detectable(1.0, 3) == pytest.approx(3.26, abs=0.01)  # as tables of power have it: d = 3.26 for three pairs
    assert detectable(4.0, 3) == pytest.approx(4 * detectable(1.0, 3))


def test_one_value_has_no_interval() -> None:
    assert summary([3.0]) == Summary(3.0, None, None, None)
    assert differs(summary([3.0]), None) is False


def test_no_spread() -> None:
    same = summary([0.0, 0.0, 0.0])
    assert (same.interval, same.p_value) == ((0, 0), None)
    assert differs(same, None) is None
    constant = summary([0.25, 0.25])
    assert constant.p_value == 0
    assert differs(constant, None) is True
    assert differs(constant, 0.2) is False  # a lucky spread: sampling alone moves it more


@pytest.mark.parametrize(
    ("values", "noise", "wanted"),
    [
        ([1.0, 1.1, 0.9], None, True),
        ([-1.0, -1.1, -0.9], 0.1, True),
        ([1.0, 1.1, 0.9], 0.6, False),
        ([1.0, -1.1, 0.9], None, False),
        ([1.0, 1.2], None, False),  # t(0.975, 1) = 12.7: two replicates must agree to a sixth
        ([1.0, 1.1], None, True),
    ],
)
def test_what_counts_as_a_difference(values: list[float], noise: float | None, wanted: bool) -> None:
    assert differs(summary(values), noise) is wanted


def test_what_two_sets_of_samples_share_is_no_noise_of_their_difference() -> None:
    rng = np.random.default_rng(3)
    shared, own = rng.normal(0, 1, 20), rng.normal(0, 0.1, (2, 20))
    a, b = shared + own
    wanted = math.sqrt(20 / 19 * ((a - b) ** 2).sum())
    assert sampling_error(list(a), list(b), (9.0, 9.0)) == pytest.approx(wanted)
    assert sampling_error(list(a), list(a), (1.0, 1.0)) == 0
    assert sampling_error(None, list(b), (3.0, 4.0)) == 5  # without groups: as if independent
    assert sampling_error(list(a), list(b[:10]), (3.0, 4.0)) == 5
    assert sampling_error(None, None, (3.0, None)) is None


def test_the_error_of_a_mean() -> None:
    assert error_of_mean([3.0, 4.0]) == 2.5
    assert error_of_mean([3.0, None]) is None
    assert error_of_mean([]) is None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_false_calls_below_one_in_twenty() -> None:
    p_values = np.random.default_rng(4).uniform(size=(4000, 20))
    assert np.mean([min(holm(list(row))) < 0.05 for row in p_values]) < 0.05 + 0.011
    assert np.mean(p_values.min(axis=1) < 0.05) > 0.5
