"""benchmarks/losses/own_objective.py on rows of no account: every line is timed beside its own, and what they time is equal."""

import torch

from benchmarks.losses.own_objective import RATIOS, Own, measure
from longpo_ops import Answers, LongPO
from longpo_ops.ops.objective import decide


def test_every_line_is_timed_beside_another():
    found = measure(rows=12, width=8, vocab=50, repeats=1)
    assert {name for name in found if found[name][1] != 1} <= set(RATIOS)
    assert all(milliseconds > 0 and multiple > 0 for milliseconds, multiple in found.values())


def test_the_own_objective_is_longpo():
    answers = Answers.of(
        torch.tensor([-3.0, -4.0]).double(),
        torch.ones(2),
        torch.tensor([-5.0, -1.0]),
        torch.zeros(2).long(),
        torch.arange(2),
        1,
    )
    for a, b in zip(decide(Own(), answers), decide(LongPO(), answers)):
        torch.testing.assert_close(a, b)
