"""How fast, beside what the machine can do: ceilings, epilogues, log-probs, the whole loss, workspaces, peers.

Operations are counted, not executed: a product of (n, H) and (H, V) is 2nHV; the loss with both gradients 6NHV over the
N rows that carry weight; log-probs alone 2NHV. Ceilings are measured in the process of what is set against them:

    matmul   6nHV / the time of plain 16-bit torch.mm at the three products' shapes, the best of two chunk sizes n
    copy     bytes read and written / time of Tensor.copy_ of the logits tile

Whether results are right is correctness.py's matter.

Tests: tests/benchmarks/gpu/test_check.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import longpo_ops
from longpo_ops.ops.checks import check_workspace
from longpo_ops.ops.products import Products
from longpo_ops.ops.sweep import rows_per_chunk
from longpo_ops.ops.tiles import Divergence, LogitMap, Tiles

from .setting import NO_GPU, Setting, attempt, measure

# ---- ceilings --------------------------------------------------------------------------------------------------------


def _random(setting: Setting, *shape: int, spread: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=setting.device) * spread).to(setting.dtype)


def _head(setting: Setting, vocab: int) -> Tensor:
    return _random(setting, vocab, setting.width, spread=setting.width**-0.5)


def _rate(timing: dict, operations: float) -> dict:
    return timing | {"tflops": operations / timing["milliseconds"] / 1e9}


def _chunk_rows(setting: Setting, weight: Tensor) -> int:
    """The rows that the sweep multiplies at once with its default workspace."""
    default = check_workspace(None, weight, setting.dtype)
    return min(setting.rows, rows_per_chunk(default, weight, setting.dtype))


@functools.cache
def matmul_ceiling(setting: Setting, vocab: int) -> tuple[dict, ...]:
    """One row per chunk size: the three products by torch.mm with 16-bit results."""
    weight, rows = _head(setting, vocab), []
    for n in sorted({_chunk_rows(setting, weight), min(setting.rows, 8192)}):
        h, dz = _random(setting, n, setting.width), _random(setting, n, vocab)
        factors = ((h, weight.T), (dz, weight), (dz.T, h))
        timings = [measure(setting, functools.partial(torch.mm, *pair)) for pair in factors]
        total = sum(t["milliseconds"] for t in timings)
        row = {"what": "ceiling: matmul", "case": f"n={n} H={setting.width} V={vocab}", "status": "measured"}
        each = {name: t["milliseconds"] for name, t in zip(("logits", "hidden gradient", "head gradient"), timings)}
        rows.append(_rate(row | {"milliseconds": total, "milliseconds_each": each}, 6 * n * setting.width * vocab))
    return tuple(rows)


def _best_matmul(setting: Setting, vocab: int) -> float:
    return max(row["tflops"] for row in matmul_ceiling(setting, vocab))


def _tile(setting: Setting, vocab: int) -> Tensor:
    return torch.empty(max(1, setting.tile_bytes // (4 * vocab)), vocab, device=setting.device)


@functools.cache
def copy_ceiling(setting: Setting, vocab: int) -> dict:
    source = _tile(setting, vocab).normal_()
    timing = measure(setting, torch.empty_like(source).copy_, lambda: (source,))
    row = {"what": "ceiling: copy", "case": f"({source.shape[0]}, {vocab}) float32"}
    return row | timing | {"gigabytes_per_second": 2 * 4 * source.numel() / timing["milliseconds"] / 1e6}


def _against_matmul(setting: Setting, vocab: int, operations: float, run, prepare=lambda: None) -> dict:
    timing = _rate(measure(setting, run, prepare), operations)
    return timing | {"fraction_of_matmul": timing["tflops"] / _best_matmul(setting, vocab)}


def ceilings(setting: Setting) -> Iterator[dict]:
    """The ceilings themselves, and the sweep's own products (float32 results) beside them."""
    for vocab in setting.vocabularies:
        yield from matmul_ceiling(setting, vocab)
        yield copy_ceiling(setting, vocab)
        weight = _head(setting, vocab)
        products, n = Products(weight, setting.dtype), _chunk_rows(setting, weight)
        h = _random(setting, n, setting.width).to(products.dtype)
        dz = _random(setting, n, vocab).to(products.dtype)
        z = torch.empty(n, vocab, device=setting.device, dtype=products.tile_dtype)
        dw = torch.zeros(vocab, setting.width, device=setting.device, dtype=products.tile_dtype)
        for name, run in {
            "logits": functools.partial(products.logits_, h, z),
            "hidden gradient": functools.partial(products.hidden_gradient, dz),
            "head gradient": functools.partial(products.add_weight_gradient_, dw, dz, h),
        }.items():
            row = {"what": f"product: {name}", "case": f"n={n} H={setting.width} V={vocab}"}
            yield attempt(row, _against_matmul, setting, vocab, 2 * n * setting.width * vocab, run)


# ---- epilogues -------------------------------------------------------------------------------------------------------


def _epilogue_case(tiles: Tiles, function: str, vocab: int, setting: Setting) -> dict:
    """Bytes are the least that can move: a tile read once, 16-bit gradients written once."""
    source = _tile(setting, vocab).normal_()
    n = source.shape[0]
    z = torch.empty_like(source)
    labels = torch.randint(vocab, (n,), device=setting.device)
    g, map = torch.ones(n, device=setting.device), LogitMap()
    stats = tiles.logps(source, labels, map)[1]
    dtype = setting.dtype
    fill = lambda: (z.copy_(source),)  # noqa: E731
    if function == "logps":
        timing, moved = measure(setting, lambda: tiles.logps(source, labels, map)), 4
    elif function == "gradient_":
        timing = measure(setting, lambda z: tiles.gradient_(z, labels, stats, g, map, dtype), fill)
        moved = 4 + dtype.itemsize
    elif function == "logps_gradient_":
        timing = measure(setting, lambda z: tiles.logps_gradient_(z, labels, g, map, dtype), fill)
        moved = 4 + dtype.itemsize
    else:
        teacher = torch.empty_like(source).normal_()
        arguments = (teacher, g, Divergence("reverse"), map, map, dtype, True, False)
        timing = measure(setting, lambda z: tiles.divergence_(z, *arguments), fill)
        moved = 8 + dtype.itemsize
    rate = moved * source.numel() / timing["milliseconds"] / 1e6
    copy = copy_ceiling(setting, vocab)
    return timing | {
        "gigabytes_per_second": rate,
        "fraction_of_copy": rate / copy["gigabytes_per_second"],
        "times_a_copy_of_the_tile": timing["milliseconds"] / copy["milliseconds"],
    }


def epilogue(setting: Setting) -> Iterator[dict]:
    for vocab in setting.vocabularies:
        for backend, tiles in setting.backends():
            for function in ("logps", "gradient_", "logps_gradient_", "divergence_"):
                row = {"what": f"epilogue: {function}", "backend": backend, "case": f"V={vocab}"}
                if isinstance(tiles, str):
                    yield row | {"status": tiles}
                elif function == "divergence_" and backend == "cuda":
                    yield row | {"status": "skipped: csrc/cuda leaves divergences to triton"}
                else:
                    yield attempt(row, _epilogue_case, tiles, function, vocab, setting)


# ---- log-probs, the whole loss, workspaces ---------------------------------------------------------------------------


def logprobs(setting: Setting) -> Iterator[dict]:
    """Scoring alone, 2NHV: straight from hidden states, and through tiles of logits."""
    n = setting.rows // 4
    for vocab in setting.vocabularies:
        weight, h = _head(setting, vocab), _random(setting, n, setting.width)
        labels = torch.randint(vocab, (n,))
        on_device = labels.to(setting.device)
        operations = 2 * n * setting.width * vocab
        for backend, tiles in setting.backends():
            case = {"backend": backend, "case": f"N={n} H={setting.width} V={vocab}"}
            runs = {
                "linear_logps": functools.partial(_linear_logps, tiles, h, weight, on_device),
                "linear_logprobs, forward": functools.partial(
                    longpo_ops.linear_logprobs, h, weight, labels, backend=backend
                ),
            }
            for what, run in runs.items():
                if isinstance(tiles, str):
                    yield {"what": what, **case, "status": tiles}
                elif what == "linear_logps" and tiles.linear_logps is None:
                    yield {"what": what, **case, "status": "skipped: this back-end has no such function"}
                else:
                    yield attempt({"what": what, **case}, _against_matmul, setting, vocab, operations, run)


def _linear_logps(tiles: Tiles, h: Tensor, weight: Tensor, labels: Tensor):
    return tiles.linear_logps(h, weight, labels, LogitMap())


class Problem:
    """Hidden states, a head and labels of N weighted rows: one pair, every row of its chosen sequence in the NLL."""

    def __init__(self, setting: Setting, vocab: int):
        self.setting, self.vocab, answers = setting, vocab, setting.answers
        rows = setting.rows - answers  # the chosen sequence's; the rejected answer has the others
        self.rows = setting.rows
        self.weight = _head(setting, vocab).requires_grad_()
        self.chosen = _random(setting, 1, rows, setting.width).requires_grad_()
        self.rejected = _random(setting, 1, answers, setting.width).requires_grad_()
        self.nll_labels = torch.randint(vocab, (1, rows))
        self.rejected_labels = torch.randint(vocab, (1, answers))
        self.chosen_labels = torch.full((1, rows), -100)
        self.chosen_labels[:, -answers:] = self.nll_labels[:, -answers:]
        self.reference = torch.full((1,), -10.0 * answers)

    def forget(self) -> None:
        self.weight.grad = self.chosen.grad = self.rejected.grad = None

    def preference(self, **options) -> Tensor:
        """LongPO's loss, forward and backward."""
        out = longpo_ops.fused_preference_loss(
            self.chosen, self.rejected, self.weight, self.chosen_labels, self.rejected_labels,
            ref_chosen_logps=self.reference, ref_rejected_logps=self.reference, nll_labels=self.nll_labels,
            shift=False, **options,
        )  # fmt: skip
        out.loss.backward()
        return out.loss.detach()

    @functools.cached_property
    def flat(self) -> tuple[Tensor, Tensor]:
        """All N rows as one batch for the cross-entropies: hidden (N, H), labels (N,) on the device."""
        hidden = torch.cat([self.chosen.detach()[0], self.rejected.detach()[0]]).requires_grad_()
        return hidden, torch.cat([self.nll_labels[0], self.rejected_labels[0]]).to(self.setting.device)

    def cross_entropy(self, loss) -> Tensor:
        """loss(hidden, weight, labels), forward and backward."""
        hidden, labels = self.flat
        hidden.grad = None
        value = loss(hidden, self.weight, labels)
        value.backward()
        return value.detach()

    def time(self, run) -> dict:
        """Time and rate at 6NHV; memory beside what must be there: gradients, and the head's in float32."""
        delivered = sum(t.numel() * t.element_size() for t in (self.weight, self.chosen, self.rejected))
        sizes = {"delivered_gradient_bytes": delivered, "float32_head_gradient_bytes": 4 * self.weight.numel()}
        operations = 6 * self.rows * self.setting.width * self.vocab
        return _against_matmul(self.setting, self.vocab, operations, run, self.forget) | sizes

    @property
    def case(self) -> str:
        return f"N={self.rows} H={self.setting.width} V={self.vocab}"


def loss(setting: Setting) -> Iterator[dict]:
    for vocab in setting.vocabularies:
        problem = Problem(setting, vocab)
        for backend, tiles in setting.backends():
            runs = {
                "loss: fused_preference_loss": functools.partial(problem.preference, backend=backend),
                "loss: linear_cross_entropy": functools.partial(
                    problem.cross_entropy, functools.partial(longpo_ops.linear_cross_entropy, backend=backend)
                ),
            }
            for what, run in runs.items():
                row = {"what": what, "backend": backend, "case": problem.case}
                yield row | {"status": tiles} if isinstance(tiles, str) else attempt(row, problem.time, run)


def workspace(setting: Setting) -> Iterator[dict]:
    """The whole loss by workspace, at the middle vocabulary, on the back-end a user gets."""
    vocab = setting.vocabularies[len(setting.vocabularies) // 2]
    problem = Problem(setting, vocab)
    for size in setting.workspaces:
        row = {"what": "workspace: fused_preference_loss", "case": f"{problem.case} workspace_bytes={size}"}
        yield attempt(row, problem.time, functools.partial(problem.preference, workspace_bytes=size))


# ---- peers -----------------------------------------------------------------------------------------------------------


def _naive(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def _torch_chunked():
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("torch has no F.linear_cross_entropy: expected torch 2.13")
    return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())  # None: not chunked


def _liger():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    function = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: function(weight, hidden, labels)


def _cce():
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return functools.partial(chunked_linear_cross_entropy, reduction="mean")


PEERS = {  # name -> (how to import it, whether it needs a GPU)
    "naive": (lambda: _naive, False),
    "torch chunked": (_torch_chunked, False),
    "liger": (_liger, True),
    "cce": (_cce, True),
    "quack": (_quack, True),
}


def peers(setting: Setting) -> Iterator[dict]:
    """Mean cross-entropy of the same rows, forward and backward; ours, on the back-end a user gets, first."""
    for vocab in setting.vocabularies:
        problem, ours = Problem(setting, vocab), longpo_ops.linear_cross_entropy
        yield attempt({"what": "peer: longpo_ops", "case": problem.case}, _cross_entropy_case, problem, ours)
        for name, (load, needs_gpu) in PEERS.items():
            row = {"what": f"peer: {name}", "case": problem.case}
            if needs_gpu and not setting.on_gpu:
                yield row | {"status": NO_GPU}
                continue
            row = attempt(row, lambda problem=problem, load=load: _cross_entropy_case(problem, load()))
            # What keeps a peer from running is no failure of ours.
            yield row | {"status": row["status"].replace("failed", "skipped")}


def _cross_entropy_case(problem: Problem, function) -> dict:
    """Its time, beside the loss it computed."""
    value = float(problem.cross_entropy(function))
    return problem.time(functools.partial(problem.cross_entropy, function)) | {"loss": value}
