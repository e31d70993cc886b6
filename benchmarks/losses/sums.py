"""How far the summed log-prob of a sequence is off, which is what a preference is made of.

    mean over sequences of |sum_t logp_t - truth|, in nats; sums and truth in float64

    python -m benchmarks.losses.sums '["bfloat16", ["naive", "TRL"], [512, 8192], 2]'    prints one line of JSON

Hidden states are N(0, 1) and weights N(0, 9/H), so logits have a standard deviation of 3; each label is one of its row's three
likeliest, as trained answers are: the rounding of a large logit to 16 bits is what adds up. DRAWS sequences of 8,192 tokens,
cut into 16 times as many of 512. Memory: a tile of 8,192 rows in float64 and what candidates take. Not covered: gradients,
which measurement.py judges, and torch's chunked form, whose 16-bit products would take minutes on a CPU without them.

Tests: tests/benchmarks/losses/test_sums.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..measure import fresh
from .peers import LOGPS, Logps

LENGTHS = (512, 8192)  # tokens; the last is a multiple of the others
DRAWS = 4
SPREAD = 3.0  # of logits
LIKELY = 3


def measure(dtype: str, names: Iterable[str], lengths: Sequence[int], threads: int) -> dict[str, dict[str, float]]:
    """candidate -> tokens of a sequence -> nats, of those among names that deliver log-probs; made in a fresh process."""
    known = [name for name in LOGPS if name in set(names)]
    return fresh("benchmarks.losses.sums", json.dumps([dtype, known, lengths, threads])) if known else {}


@torch.no_grad()
def perform(
    dtype: str,
    candidates: dict[str, Logps],
    lengths: Sequence[int] = LENGTHS,
    width: int = 128,
    vocab: int = 8192,
    draws: int = DRAWS,
) -> dict[str, dict[str, float]]:
    """The measurement, in this process."""
    errors: dict[str, list[Tensor]] = {name: [] for name in candidates}
    for draw in range(draws):
        hidden, weight, labels, truth = _draw(draw, max(lengths), width, vocab, getattr(torch, dtype))
        for name, logps in candidates.items():
            errors[name].append(logps(hidden, weight, labels).double() - truth)
    return {name: {str(n): _off(torch.stack(found), n) for n in lengths} for name, found in errors.items()}


def _draw(seed: int, rows: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """hidden (N, H), weight (V, H), labels (N,) and their log-probs (N,) in float64."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=random).to(dtype)
    weight = (torch.randn(vocab, width, generator=random) * (SPREAD / width**0.5)).to(dtype)
    logits = hidden.double() @ weight.double().T
    likely = logits.topk(LIKELY, -1)
    chosen = torch.randint(LIKELY, (rows, 1), generator=random)
    truth = likely.values.gather(1, chosen)[:, 0] - logits.logsumexp(-1)
    return hidden, weight, likely.indices.gather(1, chosen)[:, 0], truth


def _off(errors: Tensor, length: int) -> float:
    """(draws, N) of tokens -> mean size of the sums of `length` in a row."""
    return float(errors.unflatten(1, (-1, length)).sum(-1).abs().mean())


if __name__ == "__main__":
    dtype, names, lengths, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    print(json.dumps(perform(dtype, {name: LOGPS[name] for name in names}, lengths)))
