"""What the loss is made of: tile functions beside a copy, scoring and products beside torch.mm, workspaces.

Bytes of a tile function are the least that can move: a float32 tile read once, 16-bit gradients written once. Scoring is
2NHV. Ceilings are speed.py's.

Tests: tests/benchmarks/gpu/test_speed.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

import longpo_ops
from longpo_ops.ops.products import Products
from longpo_ops.ops.tiles import Divergence, LogitMap, Tiles, empty_tile

from . import sparse
from .correctness import LOGPROB_LIMIT
from .rows import Row, unavailable
from .setting import GIB, OPT_IN, Setting, measure, measure_seconds
from .speed import (
    RATE,
    SETUP,
    Inputs,
    Size,
    against_matmul,
    chunk_rows,
    copy_rate,
    generator,
    normal,
    preference,
    tile_rows,
    timed_backends,
    truth,
    with_truth,
)

WORKSPACES = tuple(int(gibibytes * GIB) for gibibytes in (1, 2, 2.75, 4))
FUNCTIONS = ("logps", "gradient_", "logps_gradient_", "divergence_")

# ---- tile functions --------------------------------------------------------------------------------------------------


def _tile_function(tiles: Tiles, function: str, vocab: int, setting: Setting, seed: int) -> dict:
    source = torch.randn(tile_rows(setting, vocab), vocab, generator=generator(setting, seed), device=setting.device)
    n, dtype = source.shape[0], setting.dtype
    z = torch.empty_like(source)
    labels = torch.randint(vocab, (n,), generator=generator(setting, seed), device=setting.device)
    g, map = torch.ones(n, device=setting.device), LogitMap()
    moved = {"logps": 4, "divergence_": 8 + dtype.itemsize}.get(function, 4 + dtype.itemsize)
    if function == "logps":
        timing = measure(setting, lambda: tiles.logps(source, labels, map))
    else:
        timing = measure(
            setting, _overwriting(tiles, function, source, labels, g, map, dtype), lambda: (z.copy_(source),)
        )
    bandwidth, ceiling = moved * source.numel() / timing["milliseconds"] / 1e6, copy_rate(setting, vocab)
    return timing | {
        "gigabytes_per_second": bandwidth,
        "fraction_of_copy": bandwidth / ceiling["gigabytes_per_second"],
        "times_a_copy_of_the_tile": timing["milliseconds"] / ceiling["milliseconds"],
    }


def _overwriting(tiles: Tiles, function: str, source, labels, g, map, dtype) -> Callable:
    """The function of a tile that it may overwrite."""
    if function == "gradient_":
        stats = tiles.logps(source, labels, map)[1]
        return lambda z: tiles.gradient_(z, labels, stats, g, map, dtype)
    if function == "logps_gradient_":
        return lambda z: tiles.logps_gradient_(z, labels, g, map, dtype)
    teacher = source.flip(0)  # read only, as no gradient of it is asked
    return lambda z: tiles.divergence_(z, teacher, g, Divergence("reverse"), map, map, dtype, True, False)


def _tile_functions(setting: Setting, vocab: int) -> Iterator[Row]:
    about = f"({tile_rows(setting, vocab)}, {vocab})"
    for backend, tiles in timed_backends(setting):
        for function in FUNCTIONS:
            if isinstance(tiles, str):
                yield unavailable(function, backend, about, tiles)
            elif function == "divergence_" and backend == "cuda":
                yield unavailable(function, backend, about, "skipped: csrc/cuda leaves divergences to triton")
            else:
                compute = functools.partial(_tile_function, tiles, function, vocab, setting)
                seconds = SETUP + 2 * measure_seconds(setting, 2e-3)  # the copies between count as much
                yield Row(function, about, compute, backend, seconds, 6 * setting.tile_bytes)


# ---- scoring ---------------------------------------------------------------------------------------------------------


def _score(size: Size, score: Callable, seed: int) -> dict:
    """Time of score(hidden, weight, labels on the host, on the device) without gradients, if its log-probs (N,) are right."""
    inputs = Inputs(size, seed)
    arguments = inputs.hidden.detach(), inputs.weight.detach(), inputs.labels, inputs.labels.to(inputs.hidden.device)
    operations, told = 2.0 * size.rows * size.setting.width * size.vocab, {}
    if (logps := score(*arguments)).dim() == 1:
        told["logp_difference"] = difference = float((logps - truth(size, seed).logps).abs().max())
        if not difference <= LOGPROB_LIMIT:
            return told | {"status": f"failed: log-probs are up to {difference:.2g} off, allowed {LOGPROB_LIMIT}"}
    return told | against_matmul(size.setting, size.vocab, operations, functools.partial(score, *arguments))


def _straight(flatten: bool) -> Callable:
    """Triton's log-probs from hidden states, its two loops as one or nested."""

    def score(hidden, weight, labels, on_device):
        from longpo_ops.kernels.launch import capability, linear_logps_config
        from longpo_ops.kernels.linear_logps import linear_logps

        config = linear_logps_config(capability(hidden.device), hidden.dtype, False)._replace(flatten=flatten)
        return linear_logps(hidden, weight, on_device, LogitMap(), config=config)[0]

    return score


def _public(backend: str) -> Callable:
    return lambda hidden, weight, labels, on_device: longpo_ops.linear_logprobs(hidden, weight, labels, backend=backend)


def _mm(hidden, weight, labels, on_device):
    return torch.mm(hidden, weight.T)


def _scoring(size: Size) -> Iterator[Row]:
    def row(what: str, score: Callable, backend: str = "", detail: str = "") -> Row:
        seconds = size.seconds(1.3 / 3)
        logits = size.setting.dtype.itemsize * size.rows * size.vocab if score is _mm else 4 * GIB
        compute = functools.partial(_score, size, score)
        return Row(what, size.case + detail, compute, backend, seconds, size.bytes(logits))

    yield row("torch.mm", _mm)
    for backend, tiles in timed_backends(size.setting):
        if isinstance(tiles, str):
            yield unavailable("linear_logprobs, forward", backend, size.case, tiles)
            continue
        yield row("linear_logprobs, forward", _public(backend), backend)
        if tiles.linear_logps is not None:
            for flatten in (True, False):
                yield row("linear_logps", _straight(flatten), backend, f" flatten={flatten}")


# ---- products --------------------------------------------------------------------------------------------------------


def _product(setting: Setting, vocab: int, n: int, name: str, seed: int) -> dict:
    source, width = generator(setting, seed), setting.width
    products = Products(normal(setting, source, vocab, width, spread=width**-0.5), setting.dtype)
    h, dz = normal(setting, source, n, width), normal(setting, source, n, vocab)
    wide = functools.partial(torch.zeros, device=setting.device, dtype=products.tile_dtype)
    runs = {
        "logits": lambda: functools.partial(products.logits_, h, wide(n, vocab)),
        "hidden gradient": lambda: functools.partial(products.hidden_gradient, dz),
        "head gradient": lambda: functools.partial(products.add_weight_gradient_, wide(vocab, width), dz, h),
    }
    return against_matmul(setting, vocab, 2.0 * n * width * vocab, runs[name]())


def _products(setting: Setting, vocab: int) -> Iterator[Row]:
    n, width = chunk_rows(setting, vocab, setting.rows), setting.width
    taken = 4 * (n + width) * vocab + 2 * (n * vocab + width * vocab + n * width)
    for name in ("logits", "hidden gradient", "head gradient"):
        compute = functools.partial(_product, setting, vocab, n, name)
        seconds = SETUP + measure_seconds(setting, 2.6 * n * width * vocab / RATE)
        yield Row(f"product: {name}", f"n={n} H={width} V={vocab}", compute, "", seconds, taken)


# ---- exponentials in place of logits ------------------------------------------------------------------------------------


def _exps(size: Size, seed: int) -> dict:
    """The logits' product whose epilogue writes exponentials, at the rows of a chunk, if its log-probs are right."""
    setting = size.setting
    inputs, true = Inputs(size, seed), truth(size, seed)
    tiles = setting.backend(OPT_IN)
    n = chunk_rows(setting, size.vocab, size.rows)
    hidden, weight = inputs.hidden.detach()[:n], inputs.weight.detach()
    labels, room = inputs.labels[:n].to(hidden.device), empty_tile(n, size.vocab, hidden.device, torch.bfloat16)
    run = functools.partial(tiles.scaled_exps, hidden, weight, labels, LogitMap(), room)
    told = {"logp_difference": (difference := float((run().logps - true.logps[:n]).abs().max()))}
    if not difference <= LOGPROB_LIMIT:
        return told | {"status": f"failed: log-probs are up to {difference:.2g} off, allowed {LOGPROB_LIMIT}"}
    return told | against_matmul(setting, size.vocab, 2.0 * n * setting.width * size.vocab, run)


def _exponentials(size: Size) -> Iterator[Row]:
    case = f"n={chunk_rows(size.setting, size.vocab, size.rows)} H={size.setting.width} V={size.vocab}"
    if isinstance(tiles := size.setting.backend(OPT_IN), str):
        yield unavailable("scaled_exps", OPT_IN, case, tiles)
    else:
        yield Row("scaled_exps", case, functools.partial(_exps, size), OPT_IN, size.seconds(0.2), size.bytes(4 * GIB))


def rows(setting: Setting) -> Iterator[Row]:
    vocab = setting.vocabularies[0]
    some = Size(setting, vocab, setting.rows // 4)
    yield from _tile_functions(setting, vocab)
    yield from with_truth(some, (*_scoring(some), *_exponentials(some)))
    yield from _products(setting, vocab)
    yield from sparse.timed_rows(some)
    yield from (preference(some, workspace=workspace) for workspace in WORKSPACES)
