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
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import longpo_ops
from longpo_ops.ops import truth
from longpo_ops.ops.objective import PAIR, ROLES, Answers
from longpo_ops.ops.objectives import OBJECTIVES
from longpo_ops.ops.sweep import workspace_of
from longpo_ops.ops.tiles import LOG_SUM, MEAN, PREDICTED, TOTAL, Beside, Divergence, LogitMap, Tiles, TorchTiles

from ..budget import judge, worst
from . import exponentials, sparse
from .rows import Row, unavailable
from .setting import OPT_IN, Setting

PLAIN = TorchTiles()
DTYPES = (torch.bfloat16, torch.float32, torch.float16)  # the first is worth most
MAPS = {
    "plain": lambda bias: LogitMap(),
    "bias": lambda bias: LogitMap(bias),
    "scale": lambda bias: LogitMap(None, 0.25),
    "softcap": lambda bias: LogitMap(None, 1.5, 5.0),
    "bias scale softcap": lambda bias: LogitMap(bias.bfloat16(), 1.5, 8.0),
}
ROWS = 32  # of a tile, each of them a draw
SECONDS, PUBLIC_SECONDS = 0.1, 0.3  # of a case, its kernels compiled
SEEDS = 1 << 20  # between the generators of one seed and the next
TOKENS, WIDTH = 150, 64  # of the public functions' inputs
LOGPROB_LIMIT = 2e-3  # nats per token, whatever plain PyTorch's own error at 16 bits is
NARROW = ("longpo", "ipo", "kto_pair", "simpo", "kto")  # objectives in 16 bits, too: one of each way through a sweep
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


def _beside_functions(tiles: Tiles, z: Tensor, labels: Tensor, map: LogitMap, classes: Tensor | None, dtype) -> dict:
    """Verdicts on stats beside the log-prob and on affine gradients of one tile, of rows that have a log-prob."""
    exact, wide = _exact(map), None if classes is None else classes.double()
    asked, exact_asked = (Beside(True, True, True, c) for c in (classes, wide))
    g = torch.linspace(-1, 2, 4 * len(z), device=z.device).view(-1, 4)
    forms = ((PLAIN, z.double(), exact, exact_asked), (PLAIN, z, map, asked), (tiles, z, map, asked))
    (_, true), (_, plain), (_, ours) = (form.logps(tile, labels, m, a) for form, tile, m, a in forms)
    true_dz = PLAIN.gradient_(z.double(), labels, true, g.double(), exact, torch.float64, wide)
    plain_dz = PLAIN.gradient_(z.clone(), labels, plain, g, map, dtype, classes)
    dz = tiles.gradient_(z, labels, ours, g, map, dtype, classes)

    def numbers(stats: Tensor, column: int) -> Tensor:
        """Of rows that have a log-prob; a row without one has no agreed columns."""
        return torch.where(stats[:, LOG_SUM] >= 0, stats[:, column], math.nan)

    verdicts = {
        name: judge(*(numbers(stats, column) for stats in (ours, plain, true)), draws=True)
        for name, column in (("mean", MEAN), ("total", TOTAL))
    }
    wrong = int((ours[:, PREDICTED].double() != true[:, PREDICTED]).sum())
    verdicts["predicted"] = {
        "status": f"failed: {wrong} rows" if wrong else "passed", "error": float(wrong), "allowed": 0.0
    }  # fmt: skip
    return verdicts | {"affine dz": judge(dz, plain_dz, true_dz, draws=True)}


def _beside_case(tiles: Tiles, n, vocab, pitch, map_name, dtype, extreme, device, seed) -> dict:
    z = make_tile(n, vocab, pitch, device, vocab + n + SEEDS * seed)
    labels = (torch.arange(n, device=device) * 7919 + 5) % vocab
    if extreme:
        EXTREMES[extreme](z[: (n + 1) // 2])
    map = MAPS[map_name](torch.linspace(-1, 1, vocab, device=device))
    classes = torch.linspace(0, 2, vocab, device=device) if n % 2 else None
    return worst(_beside_functions(tiles, z, labels, map, classes, dtype))


def _rows_case(tiles: Tiles, n, vocab, pitch, map_name, dtype, extreme, device, seed) -> dict:
    z = make_tile(n, vocab, pitch, device, vocab + n + SEEDS * seed)
    labels = (torch.arange(n, device=device) * 7919 + 5) % vocab
    if extreme:
        EXTREMES[extreme](z[: (n + 1) // 2])  # the other rows must not notice
    g = torch.linspace(-1, 2, n, device=device)
    map = MAPS[map_name](torch.linspace(-1, 1, vocab, device=device))
    return worst(_row_functions(tiles, z, labels, g, map, dtype))


def _divergence_case(tiles: Tiles, n, vocab, pitch, divergence, map_name, dtype, need, device, seed) -> dict:
    student, teacher = (make_tile(n, vocab, pitch, device, side + SEEDS * seed) for side in (1, 2))
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


def _segments_case(tiles: Tiles, n: int, count: int, device, seed) -> dict:
    values = torch.randn(n, generator=torch.Generator(device).manual_seed(n + SEEDS * seed), device=device)
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


def _linear_case(tiles: Tiles, n, vocab, width, map_name, dtype, device, seed) -> dict:
    generator = torch.Generator(device).manual_seed(width + SEEDS * seed)
    h = torch.randn(n, width, generator=generator, device=device).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator, device=device) * 3 / width**0.5).to(dtype)
    labels = torch.arange(n, device=device) * 7919 % vocab
    map = MAPS[map_name](torch.linspace(-1, 1, vocab, device=device))
    logps = tiles.linear_logps(h, weight, labels, map)[0]
    expected = PLAIN.logps(h.double() @ weight.double().T, labels, _exact(map))[0]
    plain = PLAIN.logps(h.float() @ weight.float().T, labels, map)[0]
    return judge(logps, plain, expected, draws=True)


def tile_rows(tiles: Tiles, setting: Setting) -> Iterator[Row]:
    """One row of the report per case of one back-end, all of one dtype before the next."""
    vocab = setting.odd_vocab

    def row(function: str, case: str, compute, *arguments) -> Row:
        return Row(function, case, partial(compute, tiles, *arguments, setting.device), tiles.name, SECONDS)

    shapes = [(1, 1), (vocab, vocab), (vocab, vocab + 7), (vocab + 1, vocab + 5)]
    for dtype in DTYPES:
        short = _short(dtype)
        for v, pitch in shapes + [(v, v) for v in setting.vocabularies]:
            yield row("rows", f"V={v} pitch={pitch} {short}", _rows_case, ROWS, v, pitch, "plain", dtype, None)
        for name in MAPS:
            yield row("rows", f"{name}, {short}", _rows_case, ROWS, vocab, vocab + 3, name, dtype, None)
        for v in (vocab, *setting.vocabularies):
            yield row("beside", f"V={v} {short}", _beside_case, ROWS, v, v, "plain", dtype, None)
        for name in MAPS if dtype == DTYPES[0] else ():
            arguments = (ROWS + 1, vocab, vocab + 3, name, dtype, None)
            yield row("beside", f"class weights, {name}, {short}", _beside_case, *arguments)
        for divergence in DIVERGENCES:
            for need in ((True, False), (True, True), (False, False)):
                case = f"{divergence.kind} {short} student={need[0]} teacher={need[1]}"
                shape = ROWS, vocab, vocab + 3
                yield row("divergence_", case, _divergence_case, *shape, divergence, "plain", dtype, need)
        if tiles.linear_logps is not None:
            for name in MAPS:
                yield row("linear_logps", f"{name}, {short}", _linear_case, 130, vocab, 96, name, dtype)
    for name in EXTREMES:
        yield row("rows", f"extreme: {name}", _rows_case, ROWS, vocab, vocab, "plain", DTYPES[0], name)
        yield row("beside", f"extreme: {name}", _beside_case, ROWS, vocab, vocab, "plain", DTYPES[1], name)
    for divergence in DIVERGENCES:
        for name in MAPS:
            arguments = (ROWS, vocab, vocab, divergence, name, torch.float32, (True, True))
            yield row("divergence_", f"{divergence.kind} {name}", _divergence_case, *arguments)
    for n, count in ((1, 1), (1000, 3), (100_003, 17)):
        yield row("segment_sums", f"n={n} K={count}", _segments_case, n, count)


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


def _inputs(setting: Setting, dtype: torch.dtype, seed: int, **shapes_and_spreads) -> list[dict[str, Tensor]]:
    """Draws of the same tensors, by name their shape and spread."""

    def draw(number: int) -> dict[str, Tensor]:
        generator = torch.Generator(setting.device).manual_seed(number)
        return {
            name: (torch.randn(*shape, generator=generator, device=setting.device) * spread).to(dtype)
            for name, (shape, spread) in shapes_and_spreads.items()
        }

    return [draw(7 + number + SEEDS * seed) for number in range(setting.draws)]


class _Public(NamedTuple):
    """The public functions on one back-end in one dtype, in few rows per chunk, so that several chunks are visited."""

    setting: Setting
    backend: str
    dtype: torch.dtype

    def _options(self, tensors: list[dict[str, Tensor]], tiles: int = 1) -> dict:
        scratch = workspace_of(40, tensors[0]["weight"], self.dtype, tiles=tiles)
        return {"backend": self.backend, "workspace_bytes": scratch}

    def _head(self, seed: int) -> tuple[list[dict[str, Tensor]], Tensor, Tensor, dict]:
        """Draws of hidden states, head and bias; labels, weights and options."""
        vocab, device = self.setting.odd_vocab, self.setting.device
        shapes = {"hidden": ((TOKENS, WIDTH), 1.0), "weight": ((vocab, WIDTH), 0.3), "bias": ((vocab,), 0.5)}
        tensors = _inputs(self.setting, self.dtype, seed, **shapes)
        labels = torch.arange(TOKENS, device=device) * 7919 % vocab
        labels[::9] = -100
        return tensors, labels, torch.linspace(0, 2, TOKENS, device=device), self._options(tensors)

    def logprobs(self, map: dict, seed: int) -> dict:
        tensors, labels, weights, options = self._head(seed)

        def ours(hidden, weight, bias):
            return longpo_ops.linear_logprobs(hidden, weight, labels, bias=bias, **map, **options)

        def plain(hidden, weight, bias):
            return truth.logprobs(hidden, weight, labels, bias=bias, **map)

        return _compare(ours, plain, tensors, weights - 1, LOGPROB_LIMIT)

    def outputs(self, name: str, seed: int) -> dict:
        """Of linear_logprobs, through whose entropy or logsumexp alone gradients come."""
        tensors, labels, weights, options = self._head(seed)
        place = ("logps", "entropy", "logsumexp").index(name)

        def ours(hidden, weight, bias):
            asked = ("entropy", "logsumexp", "predicted")
            return longpo_ops.linear_logprobs(hidden, weight, labels, bias=bias, outputs=asked, **options)[place]

        def plain(hidden, weight, bias):
            return truth.row_outputs(hidden, weight, labels, bias=bias)[place]

        return _compare(ours, plain, tensors, weights - 1)

    def cross_entropy(self, reduction: str, seed: int) -> dict:
        return self._cross_entropy(seed, reduction=reduction)

    def affine(self, reduction: str, seed: int) -> dict:
        classes = torch.linspace(0, 2, self.setting.odd_vocab, device=self.setting.device)
        more = {"class_weights": classes, "label_smoothing": 0.1, "z_loss_weight": 1e-3}
        return self._cross_entropy(seed, reduction=reduction, **more)

    def _cross_entropy(self, seed: int, *, reduction: str, **more) -> dict:
        tensors, labels, weights, options = self._head(seed)
        common = {"row_weights": weights, "reduction": reduction} | more

        def ours(hidden, weight, bias):
            return longpo_ops.linear_cross_entropy(hidden, weight, labels, bias=bias, **common, **options)

        def plain(hidden, weight, bias):
            return truth.cross_entropy(hidden, weight, labels, bias=bias, **common)

        return _compare(ours, plain, tensors, None if reduction == "mean" else weights - 1)

    def kl(self, kind: str, seed: int) -> dict:
        vocab = self.setting.odd_vocab
        student = {"hidden": ((TOKENS, WIDTH), 1.0), "weight": ((vocab, WIDTH), 0.3)}
        teacher = {"teacher_hidden": ((TOKENS, WIDTH // 2), 1.0), "teacher_weight": ((vocab, WIDTH // 2), 0.4)}
        tensors = _inputs(self.setting, self.dtype, seed, **student, **teacher)
        options = self._options(tensors, tiles=2)

        def log_p(hidden, weight):
            z = truth.logits(hidden, weight)
            return (z if z.dtype == torch.float64 else z.float()).log_softmax(-1)

        def plain(hidden, weight, teacher_hidden, teacher_weight):
            return truth.divergence(log_p(hidden, weight), log_p(teacher_hidden, teacher_weight), kind, 0.3).mean()

        return _compare(lambda **t: longpo_ops.linear_kl(**t, kind=kind, beta=0.3, **options), plain, tensors)

    def preference(self, name: str, seed: int) -> dict:
        pairs, tokens, vocab, device = 2, 60, self.setting.odd_vocab, self.setting.device
        hidden = ((pairs, tokens, WIDTH), 1.0)
        shapes = {"chosen_hidden": hidden, "rejected_hidden": hidden, "weight": ((vocab, WIDTH), 0.3)}
        tensors = _inputs(self.setting, self.dtype, seed, **shapes)
        options, objective = self._options(tensors), OBJECTIVES[name]
        ids = torch.arange(2 * pairs * tokens, device=device).view(2, pairs, tokens) * 7919 % vocab
        answers = torch.where(torch.arange(tokens, device=device) >= 40, ids, -100)
        common = {
            "chosen_labels": answers[0],
            "rejected_labels": answers[1],
            "nll_labels": ids[0],
            "rejected_pair": torch.arange(pairs, device=device),
            "objective": objective(),
        }
        if objective.needs_reference:
            references = torch.tensor([-150.0, -160.0], dtype=torch.float64, device=device)
            common |= {"ref_chosen_logps": references, "ref_rejected_logps": references - 3}
        return _compare(
            lambda **t: longpo_ops.fused_preference_loss(**t, **common, **options).loss,
            lambda **t: truth.preference_loss(**t, **common)[0],
            tensors,
        )

    def groups(self, name: str, seed: int) -> dict:
        """Answers in groups that are no pairs: alone, or in threes."""
        count, tokens, vocab, device = 6, 20, self.setting.odd_vocab, self.setting.device
        shapes = {"hidden": ((count * tokens, WIDTH), 1.0), "weight": ((vocab, WIDTH), 0.3)}
        tensors = _inputs(self.setting, self.dtype, seed, **shapes)
        options, objective = self._options(tensors), OBJECTIVES[name]()
        rows, forms = torch.arange(count * tokens), objective.forms
        labels, sequences = rows * 7919 % vocab, torch.where(rows % tokens < 10, -1, rows // tokens)
        size = len(forms[0])
        group = torch.arange(count) // size
        role = torch.tensor([ROLES.index(r) for g in range(count // size) for r in forms[g % len(forms)]])
        refs = torch.linspace(-80, -60, count, dtype=torch.float64, device=device)
        refs = refs if objective.needs_reference else None

        def ours(hidden, weight):
            given = {
                "groups": group,
                "roles": role,
                "num_groups": count // size,
                "objective": objective,
                "ref_logps": refs,
            }
            return longpo_ops.packed_objective_loss(hidden, weight, labels, sequences, **given, **options).loss

        def plain(hidden, weight):
            logps = truth.logprobs(hidden, weight, labels.to(device)).double()
            member = (sequences == torch.arange(count)[:, None]).to(device)
            sums, lengths = torch.where(member, logps, 0.0).sum(1), member.sum(1).double()
            answers = Answers.of(sums, lengths, refs, group, role, count // size)
            return objective.losses(answers).mean()

        return _compare(ours, plain, tensors)

    def policy(self, case: str, seed: int) -> dict:
        """The clipped policy gradient, with a KL or in the first step after sampling."""
        vocab, device = self.setting.odd_vocab, self.setting.device
        tensors = _inputs(self.setting, self.dtype, seed, hidden=((TOKENS, WIDTH), 1.0), weight=((vocab, WIDTH), 0.3))
        options, rows = self._options(tensors), torch.arange(TOKENS)
        labels = torch.where(rows % 5 == 2, -100, rows * 7919 % vocab)
        numbers = {"advantages": torch.cos(rows.double())}
        if case == "kl":
            numbers |= {name: -6 + torch.sin(k + rows.double()) for k, name in enumerate(("old_logps", "ref_logps"))}
        objective = longpo_ops.ClippedPolicy(beta=0.04)

        def ours(hidden, weight):
            return longpo_ops.fused_token_loss(
                hidden, weight, labels, objective=objective, numbers=numbers, **options
            ).loss

        def plain(hidden, weight):
            logps = truth.logprobs(hidden, weight, labels.to(device)).double()
            losses = objective.losses(logps, **{name: x.to(device) for name, x in numbers.items()})
            return torch.where(labels.to(device) == -100, 0.0, losses).sum() / int((labels != -100).sum())

        return _compare(ours, plain, tensors)

    def rows(self) -> Iterator[Row]:
        def row(function: str, case: str, compute, argument) -> Row:
            about = f"{case}, {_short(self.dtype)}"
            return Row(function, about, partial(compute, argument), self.backend, PUBLIC_SECONDS)

        for name, objective in OBJECTIVES.items():
            if self.dtype != torch.float32 and name not in NARROW:
                continue
            if PAIR in objective.forms:
                yield row("fused_preference_loss", name, self.preference, name)
            else:
                yield row("packed_objective_loss", name, self.groups, name)
        for case in ("first step", "kl"):
            yield row("fused_policy_loss", case, self.policy, case)
        for reduction in ("mean", "none"):
            yield row("linear_cross_entropy", reduction, self.cross_entropy, reduction)
            yield row("linear_cross_entropy", f"smoothed, z-loss, {reduction}", self.affine, reduction)
        for case, map in {"plain": {}, "softcap scale": {"softcap": 5.0, "scale": 1.5}}.items():
            yield row("linear_logprobs", case, self.logprobs, map)
        for name in ("entropy", "logsumexp"):
            yield row("linear_logprobs", name, self.outputs, name)
        for kind in ("forward", "reverse", "jsd"):
            yield row("linear_kl", kind, self.kl, kind)


# ---- the questions ---------------------------------------------------------------------------------------------------


def tiles(setting: Setting) -> Iterator[Row]:
    for backend, found in setting.backends():
        if isinstance(found, str):
            yield unavailable("tiles", backend, "all", found)
        else:
            yield from tile_rows(found, setting)
            if backend != "cuda":  # csrc/cuda has none of its own
                yield from sparse.rows(found, backend, setting, DTYPES, SECONDS)
            if backend == "triton":
                yield from exponentials.rows(setting, MAPS, SECONDS)


def public(setting: Setting) -> Iterator[Row]:
    found = dict(setting.backends())
    for backend, reason in found.items():
        if isinstance(reason, str):
            yield unavailable("public functions", backend, "all", reason)
    for dtype in DTYPES:
        for backend, tiles in found.items():
            if not isinstance(tiles, str):
                yield from _Public(setting, backend, dtype).rows()
                if backend == "triton" and dtype == torch.bfloat16:
                    ours = _Public(
                        setting, OPT_IN, dtype
                    ).rows()  # without a bias that takes a gradient, which needs logits
                    yield from (row for row in ours if row.what in ("fused_preference_loss", "fused_policy_loss"))
