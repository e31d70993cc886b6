"""Is the hidden gradient from the columns that matter (longpo_ops/ops/sparse.py) right, and what does it save on a GPU?

Right (`tiles`): of each row of dh its distance from float64's over that one's norm; the 99th percentile over rows may be what
the dense product of that dtype has and rounding dz to bfloat16 together. "peaked" states leave columns out, "flat" ones none;
in "half" every other row is flat; "gaps" has rows without a gradient. Twice the same must be the same bits.

Saved (`kernels`): at a chunk's rows, with a quarter of the columns kept, its time beside the dense product's.

Tests: tests/benchmarks/gpu/test_sparse.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from longpo_ops.ops.products import Products
from longpo_ops.ops.sweep import hidden_gradient
from longpo_ops.ops.tiles import LogitMap, Tiles, TorchTiles, _narrow, empty_tile

from .rows import Row, unavailable
from .setting import GIB, Setting, measure
from .speed import Size, chunk_rows, generator, normal

KINDS = ("peaked", "flat", "half", "gaps")
ROWS, WIDTH = 130, 96
QUANTILE = 0.99
SMALL = 2.0**-14  # of the columns that are left out, beside the others
LEAST_DIGITS = 1e-2  # of a row's norm that a timed result may be off


def _gradient(kind: str, vocab: int, setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    """dz (ROWS, V) and a head (V, WIDTH), float64."""
    source = generator(setting, seed)
    draw = partial(torch.randn, generator=source, device=setting.device, dtype=torch.float64)
    weight, hidden = draw(vocab, WIDTH) * WIDTH**-0.5, 1.5 * draw(ROWS, WIDTH)
    places = torch.randperm(vocab, generator=source, device=setting.device)
    bias = -2.0 * (1 + places).double().log()  # a Zipf law, as tokens have
    number = torch.arange(ROWS, device=setting.device)
    likely = {"flat": 0.0 * number, "half": (number % 2).double()}.get(kind, 0.0 * number + 1)[:, None]
    z = likely * (hidden @ weight.T + bias)
    g = torch.where(number % 3 == 0, 0.0, 1.0) if kind == "gaps" else torch.ones(ROWS, device=setting.device)
    labels = z.argsort(1, descending=True)[number, number % 5]
    return TorchTiles().logps_gradient_(z, labels, g.double(), LogitMap(), torch.float64)[1], weight


def _off(found: Tensor, true: Tensor) -> float:
    """The 99th percentile over rows; of a row of zeros, what is there instead."""
    norm = true.norm(dim=1)
    return float(((found.double() - true).norm(dim=1) / torch.where(norm > 0, norm, 1.0)).quantile(QUANTILE))


def _case(tiles: Tiles, kind: str, vocab: int, dtype: torch.dtype, setting: Setting, seed: int) -> dict:
    dz, weight = _gradient(kind, vocab, setting, seed)
    weight = weight.to(dtype)
    products, true = Products(weight, dtype), dz @ weight.double()

    def found(sparse: bool) -> Tensor:
        tile = _narrow(empty_tile(ROWS, vocab, setting.device, torch.float32), products.dtype)
        return hidden_gradient(tile.copy_(dz), products, tiles, sparse)

    ours = found(True)
    if not torch.equal(ours, found(True)):
        return {"status": "failed: two runs differ"}
    rounded = dz.bfloat16().double() @ weight.double()
    error, allowed = _off(ours, true), _off(found(False), true) + _off(rounded, true)
    status = "passed" if error <= allowed else f"failed: rows are off by {error:.1e}, allowed {allowed:.1e}"
    return {"status": status, "error": error, "allowed": allowed}


def rows(
    tiles: Tiles, backend: str, setting: Setting, dtypes: tuple[torch.dtype, ...], seconds: float
) -> Iterator[Row]:
    """Of one back-end, all of one dtype before the next."""
    for dtype in dtypes:
        for vocab in (setting.odd_vocab, *setting.vocabularies):
            for kind in KINDS if vocab == setting.odd_vocab else KINDS[:1]:
                case = f"{kind}, V={vocab} {str(dtype).removeprefix('torch.')}"
                yield Row("sparse_gradient", case, partial(_case, tiles, kind, vocab, dtype, setting), backend, seconds)


# ---- time ------------------------------------------------------------------------------------------------------------


def timed(size: Size, tiles: Tiles, seed: int) -> dict:
    """A chunk's hidden gradient both ways, if they are alike."""
    setting = size.setting
    n, source = chunk_rows(setting, size.vocab, size.rows), generator(setting, seed)
    products = Products(normal(setting, source, size.vocab, setting.width, spread=setting.width**-0.5), setting.dtype)
    large = torch.arange(size.vocab, device=setting.device) % 4 == 0
    given = normal(setting, source, n, size.vocab).mul_(torch.where(large, 1.0, SMALL).to(setting.dtype))
    tile = _narrow(empty_tile(n, size.vocab, setting.device, torch.float32), products.dtype)
    runs = [partial(hidden_gradient, products=products, tiles=tiles, sparse=sparse) for sparse in (True, False)]
    ours, dense = (run(tile.copy_(given)) for run in runs)
    if not (error := float((ours - dense).float().norm() / dense.float().norm())) <= LEAST_DIGITS:
        return {"status": f"failed: off by {error:.1e} of the dense one, allowed {LEAST_DIGITS}"}
    timing, beside = (measure(setting, run, lambda: (tile.copy_(given),)) for run in runs)
    more = {"dense_milliseconds": beside["milliseconds"]}
    return (
        timing | more | {"times_the_dense_one": timing["milliseconds"] / beside["milliseconds"], "dense_error": error}
    )


def timed_rows(size: Size) -> Iterator[Row]:
    case = f"n={chunk_rows(size.setting, size.vocab, size.rows)} H={size.setting.width} V={size.vocab}, a quarter kept"
    tiles = size.setting.backend("triton")
    if isinstance(tiles, str):
        yield unavailable("sparse_gradient", "triton", case, tiles)
    else:
        yield Row(
            "sparse_gradient", case, partial(timed, size, tiles), "triton", size.seconds(1.0), size.bytes(4 * GIB)
        )
