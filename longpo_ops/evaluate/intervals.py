"""95 % intervals of means of scores, and of the difference of two runs' means.

A mean of scores in [0, 1]. n samples x_i of mean m and variance v (by n - 1), two zeros and two ones beside them:

    p = (n m + 2) / (n + 4)        w = (n (v + (m - p)^2) + 2 p^2 + 2 (1 - p)^2) / (n + 4)
    interval = p -+ z sqrt(w / (n + 4)), cut to [0, 1]

For scores of 0 and 1 that is Agresti and Coull (The American Statistician 52, 1998), with the variance by n - 1; graded scores
take their own variance in place of p (1 - p). It holds m, and has a width where all samples are alike, which a bootstrap or
a standard error has not. Of a mean over T tasks (mean of means m_t): the same with n = T^2 / sum 1 / n_t and
v = n / T^2 sum v_t / n_t, so tasks are fixed and only their samples are drawn. One sample has no interval: nothing is
known of its spread.

A mean without bounds (a window's nats): m -+ t sqrt(v / n), by Student's t of n - 1.

A difference of two runs: a bootstrap whose weights are drawn from Dirichlet distributions (Rubin, The Annals of Statistics 9,
1981), samples of a task with one another, in pairs where both runs were asked the same:

    d* = mean over tasks of sum_i w_i d_i,   w ~ Dirichlet(1, .., 1)   [, 1 / T, 1 / T for a difference of +1 and of -1]
    interval = quantiles of d*, their distance from its centre stretched by Student's t over z

a task's distances by sqrt((A + 1) / (A - 1)), too, with A the sum of its parameters. The two further differences, for scores,
which lie in [0, 1], are to pairs what zeros and ones are to samples: six pairs that all differ alike show nothing yet, seven
do (a sign test: five and six).

Not covered: samples that hang together (windows of one text, questions about one document) make intervals too narrow; of
twenty intervals that hold no difference one shows one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
DRAWS, AT_ONCE = 10_000, 4_000_000  # of a bootstrap; numbers held at a time
Interval = tuple[float, float]


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation by n - 1; None of a single value."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def of_scores(parts: Sequence[tuple[float, int, float | None]]) -> Interval | None:
    """Of the mean over tasks of their means. parts: a task's mean, samples and `spread`, of scores in [0, 1]; None where a task
    has a single sample, or its spread is not known."""
    if not parts or any(deviation is None or n < 2 for _, n, deviation in parts):
        return None
    tasks = len(parts)
    n = tasks**2 / math.fsum(1 / count for _, count, _ in parts)
    mean = math.fsum(value for value, _, _ in parts) / tasks
    variance = n / tasks**2 * math.fsum(deviation**2 / count for _, count, deviation in parts)
    p = (n * mean + 2) / (n + 4)
    wide = (n * (variance + (mean - p) ** 2) + 2 * p**2 + 2 * (1 - p) ** 2) / (n + 4)
    half = Z * math.sqrt(wide / (n + 4))
    return min(mean, max(0.0, p - half)), max(mean, min(1.0, p + half))


def of_numbers(values: Sequence[float]) -> Interval | None:
    """Of the mean of numbers without bounds; None of a single one."""
    deviation = spread(values)
    if deviation is None:
        return None
    mean, half = math.fsum(values) / len(values), student(len(values) - 1) * deviation / math.sqrt(len(values))
    return mean - half, mean + half


def student(freedom: int) -> float:
    """The number that Student's t of so many degrees of freedom stays below, in absolute value, with 95 %."""
    if freedom > 2000:  # 0.06 % from it
        return Z
    low, high = 0.0, math.pi / 2  # the angle whose tangent is t / sqrt(freedom)
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < LEVEL else (low, angle)
    return math.tan(low) * math.sqrt(freedom)


def chance(t: float, freedom: int) -> float:
    """That Student's t of so many degrees of freedom is as far from 0 as t, on either side."""
    return max(0.0, 1 - _within(math.atan(abs(t) / math.sqrt(freedom)), freedom))


def _within(angle: float, freedom: int) -> float:
    """The share between -t and t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    odd, cosine = freedom % 2, math.cos(angle)
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * ((k - 1) / k)
        total += term
    total = 0.0 if freedom == 1 else total * math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


# -- the difference of two runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """Of a task: values (n,) whose mean is a part of the difference, with `sign`; bounds: the least and the greatest that a
    value can be, None without."""

    values: np.ndarray
    sign: int = 1
    bounds: Interval | None = None


def paired(differences: Sequence[float], bounded: bool = True) -> list[Side]:
    """A task whose samples both runs were asked. differences: second less first, of scores if bounded."""
    return [Side(np.asarray(differences, dtype=np.float64), 1, (-1.0, 1.0) if bounded else None)]


def unpaired(first: Sequence[float], second: Sequence[float]) -> list[Side]:
    """A task of which the runs were asked different samples; scores of both."""
    bounds = (0.0, 1.0)
    return [
        Side(np.asarray(second, dtype=np.float64), 1, bounds),
        Side(np.asarray(first, dtype=np.float64), -1, bounds),
    ]


def of_difference(tasks: Sequence[Sequence[Side]], seed: int = 0, draws: int = DRAWS) -> tuple[float, Interval | None]:
    """-> the mean over tasks of the difference, and its interval, None where a task has a single sample."""
    sides = [side for task in tasks for side in task]
    difference = math.fsum(side.sign * float(np.mean(side.values)) for side in sides) / len(tasks)
    freedom = sum(len(side.values) - 1 for side in sides)
    if any(len(side.values) < 2 for side in sides):
        return difference, None
    random, centre, moved = np.random.default_rng(seed), 0.0, np.zeros(draws)
    for side in sides:
        about, drawn = _drawn(random, side, 1 / len(tasks), draws)
        centre += side.sign * about / len(tasks)
        moved += side.sign * drawn / len(tasks)
    low, high = centre + np.quantile(moved, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) * student(freedom) / Z
    least, most = (-1.0, 1.0) if all(side.bounds for side in sides) else (-math.inf, math.inf)
    return difference, (min(difference, max(least, float(low))), max(difference, min(most, float(high))))


def _drawn(random: np.random.Generator, side: Side, extra: float, draws: int) -> tuple[float, np.ndarray]:
    """A task's weighted mean, and how far drawn ones lie from it, (draws,) float64. Equal values share a parameter."""
    values, counts = np.unique(side.values, return_counts=True)
    values, counts = values.astype(np.float64), counts.astype(np.float64)
    if side.bounds is not None:
        values, counts = np.append(values, side.bounds), np.append(counts, (extra, extra))
    total, rows = counts.sum(), max(1, AT_ONCE // len(values))
    centre, found = float(values @ counts / total), []
    for at in range(0, draws, rows):
        weights = random.standard_gamma(counts, size=(min(rows, draws - at), len(values)))
        found.append(weights @ (values - centre) / weights.sum(axis=1))
    return centre, np.concatenate(found) * math.sqrt((total + 1) / (total - 1))
