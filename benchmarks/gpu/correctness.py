"""Every tile function of every back-end, and the public functions, against float64 by error budget (budget.py).

The truth of a tile is the PyTorch form on a float64 tile; of a public function, ops/truth.py on float64 tensors. Inputs
are exact in both: drawn in the dtype under test and upcast. Tiles are small beside those of training, but for their
width: each vocabulary that matters is among them. Not covered: speed (speed.py), attention (attention.py) and whole
models.

Tests: tests/benchmarks/gpu/test_check.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import longpo_ops
from longpo_ops.ops import truth
from longpo_ops.ops.objectives import OBJECTIVES
from longpo_ops.ops.sweep import workspace_of
from longpo_ops.ops.tiles import Divergence, LogitMap, Tiles, TorchTiles

from ..budget import judge, worst
from .setting import Setting, attempt

PLAIN = TorchTiles()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAPS = {
    "plain": lambda bias: LogitMap(),
    "bias": lambda bias: LogitMap(bias),
    "scale": lambda bias: LogitMap(None, 0.25),
    "softcap": lambda bias: LogitMap(None, 1.5, 5.0),
    "bias scale softcap": lambda bias: LogitMap(bias.bfloat16(), 1.5, 8.0),
}
ROWS = 32  # of a tile, each of them a draw
LOGPROB_LIMIT = 2e-3  # nats per token, whatever plain PyTorch's own error at 16 bits is
DIVERGENCES = (Divergence("forward"), Divergence("reverse"), Divergence("jsd", 0.3))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _exact(map: LogitMap) -> LogitMap:
    return map._replace(bias=None if map.bias is None else map.bias.double())


# ---- tile functions --------------------------------------------------------------------------------------------------


def make_tile(n: int, vocab: int, pitch: int, device: torch.device, seed: int) -> Tensor:
    """(n, V) float32, rows `pitch` apart in a buffer of NaN, starting one row of 4 floats in."""
    generator = torch.Generator(device).manual_seed(seed)
    buffer = torch.full((n * pitch + 8,), float("nan"), device=device)
    z = buffer[4 : 4 + n * pitch].as_strided((n, vocab), (pitch, 1), 4)
    return z.copy_(torch.randn(n, vocab, generator=generator, device=device) * 4)


EXTREMES = {
    "large": lambda z: z.mul_(2500.0),
    "one wins": lambda z: z.fill_(-1e4).index_fill_(1, torch.tensor([5], device=z.device), 1e4),
    "-inf": lambda z: z.masked_fill_(torch.arange(z.shape[1], device=z.device) % 7 != 0, float("-inf")),
    "NaN": lambda z: z.index_fill_(1, torch.tensor([z.shape[1] - 1], device=z.device), float("nan")),
    "+inf": lambda z: z.index_fill_(1, torch.tensor([11], device=z.device), float("inf")),
}


def _row_functions(tiles: Tiles, z: Tensor, labels: Tensor, g: Tensor, map: LogitMap, dtype: torch.dtype) -> dict:
    """Verdicts on logps, gradient_ and logps_gradient_ of one tile."""
    truth_logps, truth_dz = PLAIN.logps_gradient_(z.double(), labels, g.double(), _exact(map), torch.float64)
    plain_logps, plain_dz = PLAIN.logps_gradient_(z.clone(), labels, g, map, dtype)
    logps, stats = tiles.logps(z, labels, map)
    copy = torch.full((z.shape[0], z.stride(0)), float("nan"), device=z.device)[:, : z.shape[1]].copy_(z)
    dz = tiles.gradient_(copy, labels, stats, g, map, dtype)
    both_logps, both_dz = tiles.logps_gradient_(z, labels, g, map, dtype)
    return {
        "logps": judge(logps, plain_logps, truth_logps, draws=True),
        "gradient_": judge(dz, plain_dz, truth_dz, draws=True),
        "logps_gradient_ logps": judge(both_logps, plain_logps, truth_logps, draws=True),
        "logps_gradient_ dz": judge(both_dz, plain_dz, truth_dz, draws=True),
    }


def _rows_case(tiles: Tiles, n, vocab, pitch, map_name, dtype, device, extreme=None) -> dict:
    z = make_tile(n, vocab, pitch, device, seed=vocab + n)
    labels = (torch.arange(n, device=device) * 7919 + 5) % vocab
    if extreme:
        EXTREMES[extreme](z[: (n + 1) // 2])  # the other rows must not notice
    g = torch.linspace(-1, 2, n, device=device)
    map = MAPS[map_name](torch.linspace(-1, 1, vocab, device=device))
    return worst(_row_functions(tiles, z, labels, g, map, dtype))


def _divergence_case(tiles: Tiles, n, vocab, pitch, divergence, map_name, dtype, need, device) -> dict:
    student, teacher = (make_tile(n, vocab, pitch, device, seed) for seed in (1, 2))
    kappa = torch.linspace(-1, 2, n, device=device)
    maps = MAPS[map_name](torch.linspace(-1, 1, vocab, device=device)), LogitMap(None, 0.5)
    exact_maps = tuple(_exact(m) for m in maps)
    expected = PLAIN.divergence_(
        student.double(), teacher.double(), kappa.double(), divergence, *exact_maps, torch.float64, *need
    )
    plain = PLAIN.divergence_(student.clone(), teacher.clone(), kappa, divergence, *maps, dtype, *need)
    ours = tiles.divergence_(student, teacher, kappa, divergence, *maps, dtype, *need)
    names = ("values", "dz", "dz_teacher")
    missing = [name for name, a, b in zip(names, ours, expected) if (a is None) != (b is None)]
    if missing:
        return {"status": f"failed: {', '.join(missing)} given or left out against the request"}
    return worst({m: judge(a, b, c, draws=True) for m, a, b, c in zip(names, ours, plain, expected) if c is not None})


def _segments_case(tiles: Tiles, n: int, count: int, device) -> dict:
    values = torch.randn(n, generator=torch.Generator(device).manual_seed(n), device=device)
    segments = torch.arange(n, device=device) * 7919 % (count + 1) - 1
    start = torch.arange(count, device=device, dtype=torch.float64)
    results = [start.clone() for _ in range(3)]
    for out, form in zip(results, (tiles, tiles, PLAIN)):
        form.segment_sums(values, segments, out)
    first, again, plain = results
    if not torch.equal(first, again):
        return {"status": "failed: two runs differ"}
    member = segments[None, :] == torch.arange(count, device=device)[:, None]
    exact = torch.where(member, values.double(), 0.0)
    error, allowed = float((first - plain).abs().max()), float(exact.abs().sum(1).max() + count) * 2.0**-45
    status = "passed" if error <= allowed else f"failed: error {error:.3e}, allowed {allowed:.3e}"
    return {"status": status, "error": error, "allowed": allowed}


def _linear_case(tiles: Tiles, n, vocab, width, map_name, dtype, device) -> dict:
    generator = torch.Generator(device).manual_seed(width)
    h = torch.randn(n, width, generator=generator, device=device).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator, device=device) * 3 / width**0.5).to(dtype)
    labels = torch.arange(n, device=device) * 7919 % vocab
    map = MAPS[map_name](torch.linspace(-1, 1, vocab, device=device))
    logps = tiles.linear_logps(h, weight, labels, map)[0]
    expected = PLAIN.logps(h.double() @ weight.double().T, labels, _exact(map))[0]
    plain = PLAIN.logps(h.float() @ weight.float().T, labels, map)[0]
    return judge(logps, plain, expected, draws=True)


def tile_rows(tiles: Tiles, setting: Setting) -> Iterator[dict]:
    """One row of the report per case of one back-end."""
    device, vocab = setting.device, setting.odd_vocab

    def row(function: str, case: str, compute, *arguments) -> dict:
        return attempt({"what": function, "backend": tiles.name, "case": case}, compute, tiles, *arguments, device)

    shapes = [(1, 1), (vocab, vocab), (vocab, vocab + 7), (vocab + 1, vocab + 5)]
    for v, pitch in shapes + [(v, v) for v in setting.vocabularies]:
        for dtype in DTYPES:
            yield row("rows", f"V={v} pitch={pitch} {_short(dtype)}", _rows_case, ROWS, v, pitch, "plain", dtype)
    for name in MAPS:
        for dtype in DTYPES:
            yield row("rows", f"{name}, {_short(dtype)}", _rows_case, ROWS, vocab, vocab + 3, name, dtype)
    for name in EXTREMES:
        compute = lambda *a, name=name: _rows_case(*a, extreme=name)  # noqa: E731
        yield row("rows", f"extreme: {name}", compute, ROWS, vocab, vocab, "plain", torch.bfloat16)

    for divergence in DIVERGENCES:
        for dtype in DTYPES:
            for need in ((True, False), (True, True), (False, False)):
                case = f"{divergence.kind} {_short(dtype)} student={need[0]} teacher={need[1]}"
                yield row(
                    "divergence_", case, _divergence_case, ROWS, vocab, vocab + 3, divergence, "plain", dtype, need
                )
        for name in MAPS:
            arguments = (ROWS, vocab, vocab, divergence, name, torch.float32, (True, True))
            yield row("divergence_", f"{divergence.kind} {name}", _divergence_case, *arguments)
    for n, count in ((1, 1), (1000, 3), (100_003, 17)):
        yield row("segment_sums", f"n={n} K={count}", _segments_case, n, count)
    if tiles.linear_logps is not None:
        for dtype in DTYPES:
            for name in MAPS:
                yield row("linear_logps", f"{name}, {_short(dtype)}", _linear_case, 130, vocab, 96, name, dtype)


# ---- public functions ------------------------------------------------------------------------------------------------


def _public(function, tensors: dict[str, Tensor], upstream: Tensor | None) -> dict[str, Tensor]:
    """function(**tensors) -> its value and the gradient of every tensor."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    value = function(**leaves)
    value.backward(None if upstream is None else upstream.to(value))
    return {"value": value.detach()} | {f"d {name}": t.grad for name, t in leaves.items()}


def _compare(
    ours, plain, draws: list[dict[str, Tensor]], upstream: Tensor | None = None, limit: float = math.inf
) -> dict:
    """A verdict on the value, none of whose errors may exceed `limit`, and on every gradient."""
    exact = [{name: t.double() for name, t in tensors.items()} for tensors in draws]
    runs = [[_public(f, t, upstream) for t in given] for f, given in ((ours, draws), (plain, draws), (plain, exact))]
    results = {name: [torch.stack([one[name] for one in run]) for run in runs] for name in runs[0][0]}
    verdicts = {name: judge(*three, draws=True) for name, three in results.items()}
    value, _, true = results["value"]
    if (error := float((value.double() - true).abs().max())) > limit:
        verdicts["value"]["status"] = f"failed: error {error:.3e}, allowed {limit:.3e}"
    return worst(verdicts)


def _inputs(setting: Setting, dtype: torch.dtype, *names_and_shapes) -> list[dict[str, Tensor]]:
    """Draws of the same tensors."""

    def draw(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(setting.device).manual_seed(seed)
        return {
            name: (torch.randn(*shape, generator=generator, device=setting.device) * spread).to(dtype)
            for name, shape, spread in names_and_shapes
        }

    return [draw(7 + number) for number in range(setting.draws)]


def _public_cases(setting: Setting, backend: str, dtype: torch.dtype) -> Iterator[tuple[str, str, object]]:
    """-> (function, case, a call that gives a verdict); few rows per chunk, so that several chunks are visited."""
    n, width, vocab, device = 150, 64, setting.odd_vocab, setting.device
    head = (("weight", (vocab, width), 0.3), ("bias", (vocab,), 0.5))
    tensors = _inputs(setting, dtype, ("hidden", (n, width), 1.0), *head)
    labels = torch.arange(n, device=device) * 7919 % vocab
    labels[::9] = -100
    options = {"backend": backend, "workspace_bytes": workspace_of(40, tensors[0]["weight"], dtype)}
    weights = torch.linspace(0, 2, n, device=device)

    for case, map in {"plain": {}, "softcap scale": {"softcap": 5.0, "scale": 1.5}}.items():
        yield (
            "linear_logprobs",
            case,
            lambda map=map: _compare(
                lambda hidden, weight, bias: longpo_ops.linear_logprobs(
                    hidden, weight, labels, bias=bias, **map, **options
                ),
                lambda hidden, weight, bias: truth.logprobs(hidden, weight, labels, bias=bias, **map),
                tensors,
                weights - 1,
                LOGPROB_LIMIT,
            ),
        )
    for reduction in ("mean", "none"):
        yield (
            "linear_cross_entropy",
            reduction,
            lambda reduction=reduction: _compare(
                lambda hidden, weight, bias: longpo_ops.linear_cross_entropy(
                    hidden, weight, labels, bias=bias, row_weights=weights, reduction=reduction, **options
                ),
                lambda hidden, weight, bias: truth.cross_entropy(
                    hidden, weight, labels, bias=bias, row_weights=weights, reduction=reduction
                ),
                tensors,
                None if reduction == "mean" else weights - 1,
            ),
        )

    two_heads = _inputs(
        setting,
        dtype,
        ("hidden", (n, width), 1.0),
        ("weight", (vocab, width), 0.3),
        ("teacher_hidden", (n, width // 2), 1.0),
        ("teacher_weight", (vocab, width // 2), 0.4),
    )
    two_tiles = {"backend": backend, "workspace_bytes": workspace_of(40, tensors[0]["weight"], dtype, tiles=2)}

    def plain_kl(kind, hidden, weight, teacher_hidden, teacher_weight):
        def log_p(h, w):
            z = truth.logits(h, w)
            return (z if z.dtype == torch.float64 else z.float()).log_softmax(-1)

        return truth.divergence(log_p(hidden, weight), log_p(teacher_hidden, teacher_weight), kind, 0.3).mean()

    for kind in ("forward", "reverse", "jsd"):
        yield (
            "linear_kl",
            kind,
            lambda kind=kind: _compare(
                lambda **t: longpo_ops.linear_kl(**t, kind=kind, beta=0.3, **two_tiles),
                lambda **t: plain_kl(kind, **t),
                two_heads,
            ),
        )

    pairs, tokens = 2, 60
    sequences = _inputs(
        setting,
        dtype,
        ("chosen_hidden", (pairs, tokens, width), 1.0),
        ("rejected_hidden", (pairs, tokens, width), 1.0),
        ("weight", (vocab, width), 0.3),
    )
    ids = torch.arange(2 * pairs * tokens, device=device).view(2, pairs, tokens) * 7919 % vocab
    answers = torch.where(torch.arange(tokens, device=device) >= 40, ids, -100)
    for name, objective in OBJECTIVES.items():
        references = torch.tensor([-150.0, -160.0], dtype=torch.float64, device=device)
        given = (
            {"ref_chosen_logps": references, "ref_rejected_logps": references - 3} if objective.needs_reference else {}
        )
        common = {
            "chosen_labels": answers[0],
            "rejected_labels": answers[1],
            "nll_labels": ids[0],
            "rejected_pair": torch.arange(pairs, device=device),
            "objective": objective(),
        } | (given if objective.needs_reference else {})
        yield (
            "fused_preference_loss",
            name,
            lambda common=common: _compare(
                lambda **t: longpo_ops.fused_preference_loss(**t, **common, **options).loss,
                lambda **t: truth.preference_loss(**t, **common)[0],
                sequences,
            ),
        )


# ---- the pieces ------------------------------------------------------------------------------------------------------


def correctness(setting: Setting) -> Iterator[dict]:
    for backend, tiles in setting.backends():
        if isinstance(tiles, str):
            yield {"what": "tiles", "backend": backend, "case": "all", "status": tiles}
        else:
            yield from tile_rows(tiles, setting)


def public(setting: Setting) -> Iterator[dict]:
    for backend, tiles in setting.backends():
        if isinstance(tiles, str):
            yield {"what": "public functions", "backend": backend, "case": "all", "status": tiles}
            continue
        for dtype in DTYPES:
            for function, case, compute in _public_cases(setting, backend, dtype):
                yield attempt({"what": function, "backend": backend, "case": f"{case}, {_short(dtype)}"}, compute)
