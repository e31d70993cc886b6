"""Intervals against exact coverage, closed forms and simulated runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from longpo_ops.evaluate.intervals import (
    chance,
    of_difference,
    of_numbers,
    of_scores,
    paired,
    spread,
    student,
    unpaired,
)


def interval(values):
    return of_scores([(float(np.mean(values)), len(values), spread(values))])


@pytest.mark.parametrize("n", [2, 5, 20, 60])
def test_the_interval_of_right_and_wrong_holds_the_truth_as_often_as_it_says(n):
    found = [interval([1.0] * k + [0.0] * (n - k)) for k in range(n + 1)]
    covered = []
    for p in np.linspace(0.01, 0.99, 99):
        chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        covered.append(sum(chance for chance, (low, high) in zip(chances, found) if low <= p <= high))
    assert min(covered) > 0.915 and 0.95 < np.mean(covered) < 0.99
    assert all(low <= k / n <= high and 0 <= low < high <= 1 for k, (low, high) in enumerate(found))


def test_the_interval_of_scores_is_agresti_and_coulls_and_graded_scores_have_their_own_variance():
    n, k = 1000, 300
    p = (k + 2) / (n + 4)
    half = 1.959964 * math.sqrt(p * (1 - p) / (n + 4))
    assert interval([1.0] * k + [0.0] * (n - k)) == pytest.approx((p - half, p + half), abs=2e-5)
    graded = np.random.default_rng(0).binomial(5, 0.3, n) / 5
    (low, high), wide = interval(graded), interval([1.0] * k + [0.0] * (n - k))
    assert (high - low) / (wide[1] - wide[0]) == pytest.approx(1 / math.sqrt(5), rel=0.1)
    low, high = interval([0.5] * 10)  # all alike: it still says that ten are few
    assert low < 0.4 and high > 0.6
    assert interval([1.0]) is None and of_scores([]) is None and of_scores([(0.5, 9, None)]) is None


def test_the_interval_of_a_mean_over_tasks_is_that_of_its_samples_within_their_tasks():
    one = (0.0, 50, 0.0), (1.0, 50, 0.0)
    narrow, wide = of_scores(one), of_scores([(0.5, 100, 0.5)])
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 2 and narrow[0] < 0.5 < narrow[1]
    same = of_scores([(0.5, 25, 0.5)] * 4)
    assert same == pytest.approx(of_scores([(0.5, 100, 0.5)]))
    assert of_scores([(0.5, 25, 0.5), (1.0, 1, None)]) is None
    uneven = of_scores([(0.5, 10, 0.5), (0.5, 1000, 0.5)])  # the small task decides
    assert uneven[1] - uneven[0] == pytest.approx(2 * 1.96 * 0.5 * math.sqrt((1 / 10 + 1 / 1000) / 4), rel=0.15)


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (8, 2.3060), (29, 2.0452), (5000, 1.96)]
)
def test_student(freedom, value):
    assert student(freedom) == pytest.approx(value, abs=5e-4)
    assert chance(value, freedom) == chance(-value, freedom) == pytest.approx(0.05, abs=1e-4)


def test_the_chance_of_a_far_t():
    """By the tables: two degrees of freedom 31.599, four 8.610, ten 4.587, each 1 in 1,000."""
    for freedom, t in ((1, 636.619), (2, 31.599), (4, 8.610), (10, 4.587)):
        assert chance(t, freedom) == pytest.approx(1e-3, rel=2e-3)
    assert chance(0.0, 3) == 1.0 and 0 <= chance(1e9, 50) < 1e-12


def test_numbers_without_bounds():
    assert of_numbers([1.0, 3.0]) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3) and of_numbers([1.0]) is None


def covered(make, truth: float, trials: int) -> float:
    """The share of trials whose interval holds the truth."""
    random, held = np.random.default_rng(5), 0
    for seed in range(trials):
        low, high = of_difference(make(random), seed, draws=400)[1]
        held += low <= truth <= high
    return held / trials


def scores(random, n: int, first: float, second: float) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong of two runs that are asked the same: half of what is hard for one is hard for both."""
    hard = random.random(n)
    return (hard < first).astype(float), (np.where(random.random(n) < 0.5, hard, random.random(n)) < second).astype(
        float
    )


@pytest.mark.parametrize("tasks", [1, 4])
@pytest.mark.parametrize("pairs", [True, False])
def test_intervals_of_a_difference_hold_it_in_simulated_runs(tasks, pairs):
    def make(random):
        found = [scores(random, 30, 0.8, 0.6) for _ in range(tasks)]
        return [paired(b - a) if pairs else unpaired(a, b) for a, b in found]

    assert 0.92 <= covered(make, -0.2, 200) <= 1.0


def test_intervals_of_a_difference_of_nats_hold_it():
    assert 0.91 <= covered(lambda random: [paired(random.normal(0.3, 1.0, 6), bounded=False)], 0.3, 300) <= 0.98


def test_a_bootstrap_is_as_wide_as_the_closed_form_and_pairs_are_narrower():
    random = np.random.default_rng(1)
    values = random.normal(0.2, 1.0, 400)
    found, told = of_difference([paired(values, bounded=False)])[1], of_numbers(values)
    assert np.allclose(found, told, atol=0.01)
    a, b = scores(random, 400, 0.7, 0.7)
    (low, high), (least, most) = (of_difference([task])[1] for task in (paired(b - a), unpaired(a, b)))
    assert high - low < 0.8 * (most - least)


def test_few_pairs_show_nothing_however_alike_they_are():
    for n, shows in ((2, False), (5, False), (6, False), (7, True), (30, True)):
        difference, (low, high) = of_difference([paired([1.0] * n)])
        assert difference == 1.0 and (low > 0) == shows and high == 1.0, n
    assert of_difference([paired([1.0])]) == (1.0, None)
    assert of_difference([paired([0.0] * 9)])[1][0] < 0 < of_difference([paired([0.0] * 9)])[1][1]


def test_the_seed_decides():
    values = [np.random.default_rng(2).normal(0, 1, 20)]
    tasks = [paired(values[0])]
    assert of_difference(tasks, 3) == of_difference(tasks, 3) != of_difference(tasks, 4)
