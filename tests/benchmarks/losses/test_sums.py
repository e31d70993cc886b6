"""benchmarks/losses/sums.py at a tiny size: who delivers log-probs, what their sums are off by, and that a bias is seen."""

import pytest
import torch

from benchmarks.losses.peers import CCE, LOGPS, NAIVE, OURS, TRL, UPCAST
from benchmarks.losses.sums import perform

TINY = dict(lengths=(16, 64), width=32, vocab=600, draws=2)
QUICK = {name: logps for name, logps in LOGPS.items() if name != CCE}  # which compiles for half a minute


def test_sums_of_16_bit_logits_are_off_and_ours_are_not():
    found = perform("bfloat16", QUICK, **TINY)
    assert set(found) == set(QUICK)
    for name, sums in found.items():
        exact = name.startswith(OURS) or name == UPCAST
        assert sums["64"] < 1e-3 if exact else sums["64"] > 1e-2, (name, sums)
    pytest.importorskip("trl")
    assert found[TRL]["64"] == pytest.approx(found[NAIVE]["64"], rel=0.2)  # both round the labels' logits to 16 bits
    assert all(max(sums.values()) < 1e-3 for sums in perform("float32", QUICK, **TINY).values())


def test_a_bias_adds_up_over_a_sequence():
    def biased(*inputs) -> torch.Tensor:
        return LOGPS[NAIVE](*inputs) + 0.25

    found = perform("float32", {"biased": biased}, **TINY)
    assert found == {"biased": {"16": pytest.approx(4.0, abs=1e-3), "64": pytest.approx(16.0, abs=1e-3)}}
