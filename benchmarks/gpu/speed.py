"""How fast is the loss beside the ceiling, plain PyTorch and other libraries?

Operations are counted, not executed: a product of (n, H) and (H, V) is 2nHV; a loss with both gradients 6NHV over the N
rows that carry weight. Ceilings are measured once, in the process of what is set against them:

    matmul   6nHV / the time of plain torch.mm at the three products' shapes, the best of a few chunk sizes n
    copy     bytes read and written / time of Tensor.copy_ of a float32 tile of logits

A time alone is no comparison: before it is timed, a loss and parts of its gradients are held against plain PyTorch in
float32. One that computes something else gets no time; of another library it is "skipped".

Tests: tests/benchmarks/gpu/test_speed.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import longpo_ops
from longpo_ops.ops.checks import check_workspace
from longpo_ops.ops.dispatch import choose_backend
from longpo_ops.ops.rows import sizes
from longpo_ops.ops.sweep import row_unit, rows_per_chunk

from .peers import PEERS, Peer, Run, backwards
from .rows import Row, perform, unavailable
from .setting import GIB, OPT_IN, Setting, measure, measure_seconds
from .tables import failed

RATE = 600e12  # operations a second that are planned with
RATE_FLOAT32 = 40e12
TIMES = 1.0  # what the products take at that rate, for all of a loss of ours
SETUP = 0.1  # seconds in which a row makes its inputs
LOSS_LIMIT = 0.1  # nats per token that it may be off: bfloat16 rounds a loss of 12 to multiples of 0.06
GRADIENT_LIMIT = 0.05  # of the gradient's norm
BLOCK = 1024  # rows that the truth looks at at once
PART = 64  # rows whose hidden gradients, and labels whose rows of the head's gradient, are compared
OTHER_WORKSPACE = 2 * GIB


# ---- ceilings --------------------------------------------------------------------------------------------------------


def normal(setting: Setting, source: torch.Generator, *shape: int, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=source, device=setting.device, dtype=setting.dtype).mul_(spread)


def generator(setting: Setting, seed: int = 0) -> torch.Generator:
    return torch.Generator(setting.device).manual_seed(seed)


def planned_head(setting: Setting, vocab: int) -> Tensor:
    """A head (V, H) to plan with: its device and shape, and no memory."""
    device = "meta" if setting.elsewhere else setting.device
    return torch.empty(1, 1, device=device, dtype=setting.dtype).expand(vocab, setting.width)


def chunk_rows(setting: Setting, vocab: int, rows: int) -> int:
    """The rows that a sweep over so many multiplies at once with its default workspace."""
    weight, dtype = planned_head(setting, vocab), setting.dtype
    limit = min(rows, rows_per_chunk(check_workspace(None, weight, dtype), weight, dtype))
    return max(sizes(rows, limit, row_unit(weight.device)))


def ceiling_sizes(setting: Setting, vocab: int) -> list[int]:
    """Chunk sizes n: those of the sweep, and for the first vocabulary one more, which may suit the vendor's library."""
    if vocab != setting.vocabularies[0]:
        return [chunk_rows(setting, vocab, setting.few_rows)]
    swept = {chunk_rows(setting, vocab, rows) for rows in (setting.few_rows, setting.rows)}
    return sorted(swept | {min(setting.rows, 8192)})


@functools.cache
def matmul_rate(setting: Setting, vocab: int, n: int) -> dict:
    """The three products by torch.mm, results in the operands' dtype."""
    source, width = generator(setting), setting.width
    weight = normal(setting, source, vocab, width, spread=width**-0.5)
    h, dz = normal(setting, source, n, width), normal(setting, source, n, vocab)
    factors = {"logits": (h, weight.T), "hidden gradient": (dz, weight), "head gradient": (dz.T, h)}
    timings = {name: measure(setting, functools.partial(torch.mm, *pair)) for name, pair in factors.items()}
    each = {name: timing["milliseconds"] for name, timing in timings.items()}
    total = {"status": "measured", "milliseconds": sum(each.values()), "milliseconds_each": each}
    return rate(total, 6 * n * width * vocab)


@functools.cache
def copy_rate(setting: Setting, vocab: int) -> dict:
    source = torch.empty(tile_rows(setting, vocab), vocab, device=setting.device).normal_()
    timing = measure(setting, torch.empty_like(source).copy_, lambda: (source,))
    return timing | {"gigabytes_per_second": 2 * 4 * source.numel() / timing["milliseconds"] / 1e6}


def tile_rows(setting: Setting, vocab: int) -> int:
    return max(1, setting.tile_bytes // (4 * vocab))


def rate(timing: dict, operations: float) -> dict:
    return timing | {"tflops": operations / timing["milliseconds"] / 1e9}


def against_matmul(setting: Setting, vocab: int, operations: float, run: Callable, prepare=lambda: None) -> dict:
    """The time of run(*prepare()), its rate, and that over the best ceiling's."""
    timing = rate(measure(setting, run, prepare), operations)
    best = max(matmul_rate(setting, vocab, n)["tflops"] for n in ceiling_sizes(setting, vocab))
    return timing | {"fraction_of_matmul": timing["tflops"] / best}


def ceilings(setting: Setting, vocab: int) -> Iterator[Row]:
    width, size = setting.width, setting.dtype.itemsize
    for n in ceiling_sizes(setting, vocab):
        seconds = SETUP + 3 * measure_seconds(setting, 2 * n * width * vocab / RATE)
        taken = size * (vocab * width * 2 + n * width * 2 + n * vocab * 2)
        about = f"n={n} H={width} V={vocab}"
        yield Row("ceiling: matmul", about, lambda seed, n=n: matmul_rate(setting, vocab, n), "", seconds, taken)


def copy_ceiling(setting: Setting, vocab: int) -> Row:
    about = f"({tile_rows(setting, vocab)}, {vocab}) float32"
    seconds = SETUP + measure_seconds(setting, 1e-3)
    return Row("ceiling: copy", about, lambda seed: copy_rate(setting, vocab), "", seconds, 2 * setting.tile_bytes)


# ---- what is asked of all -------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """N rows of H hidden units over V tokens."""

    setting: Setting
    vocab: int
    rows: int

    @property
    def case(self) -> str:
        return f"N={self.rows} H={self.setting.width} V={self.vocab}"

    @property
    def operations(self) -> float:
        return 6.0 * self.rows * self.setting.width * self.vocab

    @property
    def gradient_bytes(self) -> int:
        """Of the hidden states' and the head's gradient, as they are delivered."""
        return self.setting.dtype.itemsize * (self.rows + self.vocab) * self.setting.width

    def bytes(self, scratch: int) -> int:
        """On the device at most: inputs, gradients, the head in float32 (its gradient, or the truth's) and scratch."""
        truth = 3 * 4 * min(BLOCK, self.rows) * self.vocab
        return 2 * self.gradient_bytes + 4 * self.vocab * self.setting.width + max(scratch, truth)

    def seconds(self, times: float, each: float = 0.0, compiles: float = 0.0) -> float:
        """Of a row whose run takes `times` the planned rate's time and `each` seconds beside: one to judge, then measured."""
        one = times * self.operations / RATE + each
        return SETUP + compiles + one + measure_seconds(self.setting, one)

    def time(self, run: Callable, prepare: Callable = lambda: None) -> dict:
        timing = against_matmul(self.setting, self.vocab, self.operations, run, prepare)
        return timing | {"delivered_gradient_bytes": self.gradient_bytes}


class Inputs:
    """Hidden states (N, H), a head (V, H) whose logits are spread like a model's, and labels (N,) on the host."""

    def __init__(self, size: Size, seed: int):
        setting, source = size.setting, generator(size.setting, seed)
        self.weight = normal(setting, source, size.vocab, setting.width, spread=setting.width**-0.5).requires_grad_()
        self.hidden = normal(setting, source, size.rows, setting.width).requires_grad_()
        self.labels = torch.randint(size.vocab, (size.rows,), generator=torch.Generator().manual_seed(seed))

    def forget(self) -> None:
        self.weight.grad = self.hidden.grad = None


# ---- losses: what they must be, and how long they take ---------------------------------------------------------------


class Truth(NamedTuple):
    """Plain PyTorch in float32: log-probs, and of their mean's negative parts of both gradients: of the first PART rows, and
    of these rows' labels."""

    logps: Tensor  # (N,)
    hidden: Tensor  # (PART, H)
    head: Tensor  # (PART, H)


@functools.cache
def truth(size: Size, seed: int) -> Truth:
    inputs = Inputs(size, seed)
    labels, weight = inputs.labels.to(inputs.hidden.device), inputs.weight.detach().float()
    found, hidden, head = [], weight[:0], torch.zeros_like(weight[: len(labels[:PART])])
    for start in range(0, size.rows, BLOCK):
        h, y = inputs.hidden.detach()[start : start + BLOCK].float(), labels[start : start + BLOCK, None]
        logps = (h @ weight.T).log_softmax(1)
        found.append(logps.gather(1, y)[:, 0])
        dz = logps.exp_().scatter_add_(1, y, logps.new_full(y.shape, -1.0)).div_(size.rows)
        hidden = dz[:PART] @ weight if start == 0 else hidden
        head += dz[:, labels[:PART]].T @ h
    return Truth(torch.cat(found), hidden, head)


def compare(loss: Tensor, true_loss: Tensor, **gradients: tuple[Tensor | None, Tensor]) -> dict:
    """The loss and how far it and parts of its gradients are off; with a status where that is too far."""
    off = {"loss_difference": (float(loss.double() - true_loss), LOSS_LIMIT)}
    for name, (found, true) in gradients.items():
        error = 1.0 if found is None else float((found.float() - true).norm() / true.norm())
        off[f"{name}_gradient_error"] = error, GRADIENT_LIMIT
    numbers = {"loss": float(loss)} | {name: value for name, (value, _) in off.items()}
    other = [f"{name.replace('_', ' ')} {value:.2g}" for name, (value, limit) in off.items() if not abs(value) <= limit]
    return numbers | ({"status": f"failed: it computes something else: {', '.join(other)}"} if other else {})


def _cross_entropy(size: Size, load: Callable[[], Run], seed: int) -> dict:
    """Time of a run's forward and backward, if it is the cross-entropy."""
    true, run = truth(size, seed), load()
    inputs = Inputs(size, seed)
    hidden, weight, labels = inputs.hidden, inputs.weight, inputs.labels.to(inputs.hidden.device)
    loss = run(hidden, weight, labels)
    told = compare(
        loss, -true.logps.double().mean(),
        hidden=(None if hidden.grad is None else hidden.grad[:PART], true.hidden),
        head=(None if weight.grad is None else weight.grad[labels[:PART]], true.head),
    )  # fmt: skip
    return told if "status" in told else told | size.time(lambda: run(hidden, weight, labels), inputs.forget)


def _preference(size: Size, options: dict, seed: int) -> dict:
    """LongPO's loss, forward and backward, of one pair, if it is that: every row of the chosen sequence is in the NLL,
    `answers` of each sequence in the preference."""
    true = truth(size, seed)
    inputs, answers, prompt = Inputs(size, seed), size.setting.answers, size.rows - 2 * size.setting.answers
    chosen = inputs.hidden.detach()[None, :-answers].requires_grad_()
    rejected = inputs.hidden.detach()[None, -answers:].requires_grad_()
    nll_labels, rejected_labels = inputs.labels[None, :-answers], inputs.labels[None, -answers:]
    chosen_labels = nll_labels.clone()
    chosen_labels[:, :prompt] = -100
    reference = torch.full((1,), -12.0 * answers)  # of both: it cancels

    def run() -> Tensor:
        out = longpo_ops.fused_preference_loss(
            chosen, rejected, inputs.weight, chosen_labels, rejected_labels, ref_chosen_logps=reference,
            ref_rejected_logps=reference, nll_labels=nll_labels, shift=False, **options,
        )  # fmt: skip
        out.loss.backward()
        return out.loss.detach()

    def forget() -> None:
        inputs.weight.grad = chosen.grad = rejected.grad = None

    logps, longpo = true.logps.double(), longpo_ops.LongPO()
    advantage = longpo.beta * (logps[prompt:-answers].sum() - logps[-answers:].sum())
    expected = -longpo.preference_weight * F.logsigmoid(advantage) - logps[:-answers].mean()
    part = min(PART, prompt)  # rows that only the NLL reads, a mean over fewer rows than the truth's
    loss, true_hidden = run(), true.hidden[:part] * (size.rows / (size.rows - answers))
    told = compare(loss, expected, hidden=(chosen.grad[0, :part], true_hidden))
    return told if "status" in told else told | size.time(run, forget)


# ---- rows ------------------------------------------------------------------------------------------------------------


def preference(size: Size, backend: str | None = None, workspace: int | None = None) -> Row:
    """Ours, on a back-end or on the one that a user gets, with the default workspace or another."""
    compute = functools.partial(_preference, size, {"backend": backend, "workspace_bytes": workspace})
    return _our_row("fused_preference_loss", size, compute, backend, workspace)


def cross_entropy(size: Size, workspace: int | None = None, backend: str | None = None) -> Row:
    """Ours, on a back-end or on the one that a user gets, with the default workspace or another."""
    loss = functools.partial(longpo_ops.linear_cross_entropy, workspace_bytes=workspace, backend=backend)
    compute = functools.partial(_cross_entropy, size, lambda: backwards(loss))
    return _our_row("linear_cross_entropy", size, compute, backend, workspace)


def _our_row(what: str, size: Size, compute: Callable, backend: str | None, workspace: int | None) -> Row:
    setting, about = size.setting, size.case + (f" workspace={workspace / GIB:g} GiB" if workspace else "")
    scratch = check_workspace(workspace, planned_head(setting, size.vocab), setting.dtype)

    def with_choice(seed: int) -> dict:
        return compute(seed) | {"chosen_backend": choose_backend(setting.device, setting.dtype, backend).name}

    return Row(what, about, with_choice, backend or "", size.seconds(TIMES), size.bytes(scratch))


def _peer(size: Size, peer: Peer, compiled: bool) -> Row:
    if (reason := peer.absence(size.setting)) is not None:
        return unavailable(peer.name, "", size.case, reason)
    row = Row(
        peer.name, size.case, functools.partial(_cross_entropy, size, peer.load),
        seconds=size.seconds(peer.times, peer.each, 0.0 if compiled else peer.compiles),
        device_bytes=size.bytes(peer.scratch(size.rows, size.vocab)),
    )  # fmt: skip
    return row._replace(compute=functools.partial(_excused, row, peer))


def _excused(row: Row, peer: Peer, seed: int) -> dict:
    """What keeps another library from its result is no failure of ours."""
    result = perform(row, seed) | {"version": peer.version}
    return result | {"status": result["status"].replace("failed", "skipped", 1)} if failed(result) else result


def timed_backends(setting: Setting) -> Iterator[tuple[str, object]]:
    """The back-ends to time, or why not: on a GPU nobody should choose PyTorch's for speed."""
    return ((name, tiles) for name, tiles in setting.backends() if not (name == "torch" and setting.on_gpu))


def _ours(size: Size) -> Iterator[Row]:
    """On every back-end."""
    for backend, tiles in timed_backends(size.setting):
        if isinstance(tiles, str):
            yield unavailable("fused_preference_loss", backend, size.case, tiles)
        else:
            yield preference(size, backend)
    yield cross_entropy(size)
    tiles = size.setting.backend(OPT_IN)
    if isinstance(tiles, str):
        yield unavailable("linear_cross_entropy", OPT_IN, size.case, tiles)
    else:
        yield cross_entropy(size, backend=OPT_IN)


def with_truth(size: Size, rows: Iterable[Row]) -> Iterator[Row]:
    """Rows of a size, the first that is computed with the truth's time."""
    owed = size.operations / 3 / RATE_FLOAT32
    for row in rows:
        yield row._replace(seconds=row.seconds + owed) if row.seconds else row
        owed = 0.0 if row.seconds else owed


def rows(setting: Setting) -> Iterator[Row]:
    first, *others = setting.vocabularies
    yield from ceilings(setting, first)
    yield copy_ceiling(setting, first)
    few, many = (Size(setting, first, n) for n in (setting.few_rows, setting.rows))
    for size, peers in ((few, PEERS), (many, [peer for peer in PEERS if peer.long])):
        yield from with_truth(size, _ours(size))
        yield cross_entropy(size, OTHER_WORKSPACE)
        yield from (_peer(size, peer, compiled=size is many) for peer in peers)
    for vocab in others:
        size = Size(setting, vocab, setting.few_rows)
        yield from ceilings(setting, vocab)
        yield from with_truth(size, _ours(size))
        yield from (_peer(size, peer, compiled=True) for peer in PEERS if not peer.needs_gpu)
