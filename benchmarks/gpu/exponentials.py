"""Are the exponentials that stand in for a tile of logits right (kernels/scaled_exps.py), against float64 by error budget?

A back-end that nobody gets who does not ask for it: these rows and those of `public` say whether it is right, those of `loss`
and `kernels` whether it is faster. At the larger spread labels lie far below their row's greatest logit, and tiles are moved to
another offset.

Tests: tests/benchmarks/gpu/test_check.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from longpo_ops.ops.tiles import TorchTiles, empty_tile

from ..budget import judge, worst
from .rows import Row
from .setting import OPT_IN, Setting

PLAIN = TorchTiles()
ROWS, WIDTH = 130, 96
SPREADS = (3.0, 100.0)  # of logits


def _case(setting: Setting, vocab: int, make_map, spread: float, seed: int) -> dict:
    """Log-probs and the gradient of a chunk."""
    device, tiles = setting.device, setting.backend(OPT_IN)
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
    h, weight = draw(ROWS, WIDTH), draw(vocab, WIDTH) * (spread / WIDTH**0.5)
    labels, g = torch.arange(ROWS, device=device) * 7919 % vocab, torch.linspace(-1, 2, ROWS, device=device)
    map = make_map(torch.linspace(-1, 1, vocab, device=device))
    exact_map = map._replace(bias=None if map.bias is None else map.bias.double())
    exact = PLAIN.logps_gradient_(h.double() @ weight.double().T, labels, g.double(), exact_map, torch.float64)
    plain = PLAIN.logps_gradient_(h.float() @ weight.float().T, labels, g, map, h.dtype)
    found = tiles.scaled_exps(h, weight, labels, map, empty_tile(ROWS, vocab, device, h.dtype))
    ours = found.logps, ((-map.scale * g / found.totals)[:, None] * found.exps).to(h.dtype)
    return worst({name: judge(*three, draws=True) for name, *three in zip(("logps", "dz"), ours, plain, exact)})


def rows(setting: Setting, maps: dict, seconds: float) -> Iterator[Row]:
    """maps: by name a LogitMap of a bias (V,)."""
    for vocab in (setting.odd_vocab, *setting.vocabularies):
        for name in maps if vocab == setting.odd_vocab else ("plain",):
            for spread in SPREADS:
                compute = partial(_case, setting, vocab, maps[name], spread)
                yield Row("scaled_exps", f"{name}, V={vocab}, spread {spread:g}", compute, OPT_IN, seconds)
