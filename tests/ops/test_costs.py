"""What fixed cases cost, exactly: operations, operators, launches and bytes; no time. A change of any shows here, as a diff.

    products    floating-point operations of all matrix products, forward and backward, over H V: 6 N in the main
    operators   those that read or write at least V numbers on a CPU, at least one on a GPU; no views, no allocations
    kernels     launches of our own kernels, on a pretended H100 (benchmarks/gpu/pretended.py)
    scratch     bytes of tensors alive at the peak, beyond inputs and delivered gradients

The numbers are no limits. Where one changes, the change is what was wanted, or it is a fault: a pass over the tile more, a
chunk that is swept twice. Products hold for every torch, the rest for the one that the numbers were written with. Bytes that
C++ allocates within an operator are not seen here, but in the allocator and the process: test_workspace.py. Registers and
shared memory of kernels: tests/kernels/test_compile.py. Bytes of a whole model's step: tests/memory/test_plan.py.
"""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch._dynamo  # torch would import it in the forked process anew
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_leaves

from longpo_ops import (
    ClippedPolicy,
    LongPO,
    fused_preference_loss,
    fused_token_loss,
    linear_cross_entropy,
    linear_kl,
    linear_logprobs,
)
from longpo_ops.memory.trace import Ledger
from longpo_ops.ops import divergence, fastest
from longpo_ops.ops.batch import Batch
from longpo_ops.ops.dispatch import choose_backend
from longpo_ops.ops.operators import run_sweep
from longpo_ops.ops.sparse import RULE, keep_columns_
from longpo_ops.ops.sweep import Options, default_workspace, workspace_of
from tests.meta import add_products_on_meta
from tests.ops.test_sparse import gradient, peaked

EXACT = torch.__version__.startswith("2.13.")
N, H, V = 96, 32, 1000
ROWS = 40  # of a chunk

PRODUCTS = {  # operator -> its left factor, its right one, and which dimension of that the result's columns are
    "aten::mm": (0, 1, 1),
    "aten::addmm": (1, 2, 1),
    "aten::addmm_": (1, 2, 1),
    "longpo_cpu::logits_": (0, 1, 0),
    "longpo_cpu::logits_by_slices_": (0, 1, 0),
    "longpo_cpu::hidden_gradient_": (0, 1, 1),
    "longpo_cpu::add_weight_gradient_": (1, 2, 1),
}
ROW_FUNCTIONS = ("logps", "gradient_", "logps_gradient_", "divergence_", "segment_sums", "keep_columns_")
NO_PRODUCTS = (*ROW_FUNCTIONS, "multiplies", "large_pages")


class Count(Ledger):
    """Of what runs within: operations of products, wide operators, and bytes of storages alive at the peak."""

    def __init__(self, known: list[Tensor], wide: Callable[[Tensor], bool]):
        super().__init__(known)
        self.products, self.operators, self.wide = 0, 0, wide

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, space = kwargs or {}, function.namespace
        if space == "longpo_ops":  # its Python body, whose own operators come here again
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
        if space == "aten" and function._can_decompose():
            with self:
                return function.decompose(*args, **kwargs)
        name = function.name().partition(".")[0]
        if name in PRODUCTS:
            left, right, dimension = PRODUCTS[name]
            self.products += 2 * args[left].numel() * args[right].shape[dimension]
        assert space != "longpo_cpu" or name in PRODUCTS or name.partition("::")[2] in NO_PRODUCTS, f"{name} is new"
        out = super().__torch_dispatch__(function, types, args, kwargs)
        if not function.is_view and "empty" not in name:
            self.operators += any(isinstance(x, Tensor) and self.wide(x) for x in tree_leaves((args, kwargs, out)))
        return out


# ---- on a CPU --------------------------------------------------------------------------------------------------------


def labels(step: int = 1) -> Tensor:
    """(N,), of each `step`th row."""
    rows = torch.arange(N)
    return torch.where(rows % step == 0, rows, -100)


def cross_entropy(hidden, weight, step=1, **options):
    return linear_cross_entropy(hidden, weight, labels(step), **options).sum()


def log_probs(hidden, weight, **options):
    return linear_logprobs(hidden, weight, labels(), **options).sum()


def entropies(hidden, weight, **options):
    return linear_logprobs(hidden, weight, labels(), outputs=("entropy",), **options).entropy.sum()


LONGPO, POLICY = LongPO(), ClippedPolicy()  # made, and so examined, before anything is counted


def longpo(hidden, weight, answers, **options):
    """A pair of two halves of the rows, `answers` answer tokens at the end of each, NLL on all of the chosen one."""
    tokens = labels().view(2, 1, -1)
    of_answers = torch.where(torch.arange(N // 2) < N // 2 - answers, -100, tokens)
    given = dict(ref_chosen_logps=torch.zeros(1), ref_rejected_logps=torch.zeros(1), nll_labels=tokens[0])
    return fused_preference_loss(*hidden, weight, *of_answers, objective=LONGPO, **given, **options).loss


def policy(hidden, weight, **options):
    numbers = {"advantages": torch.ones(N)}
    return fused_token_loss(hidden, weight, labels(), objective=POLICY, numbers=numbers, **options).loss


def kl(hidden, weight, both=False, **options):
    teacher = (hidden, weight) if both else (hidden.detach(), weight.detach())
    return linear_kl(hidden, weight, *teacher, kind="reverse", **options)


class Case(NamedTuple):
    run: Callable
    options: dict | None = None
    dtype: torch.dtype = torch.float32
    learns: str = "hidden, weight"
    tiles: int = 1  # of a chunk


CASES = {
    "cross-entropy": Case(cross_entropy),
    "cross-entropy, frozen head": Case(cross_entropy, learns="hidden"),
    "cross-entropy, frozen body": Case(cross_entropy, learns="weight"),
    "cross-entropy, no gradient": Case(cross_entropy, learns=""),
    "cross-entropy, half of the rows": Case(cross_entropy, {"step": 2}),
    "cross-entropy, smoothed, z-loss": Case(cross_entropy, {"label_smoothing": 0.1, "z_loss_weight": 1e-4}),
    "cross-entropy, each row": Case(cross_entropy, {"reduction": "none"}),
    "cross-entropy, bfloat16": Case(cross_entropy, dtype=torch.bfloat16),
    "log-probs": Case(log_probs),
    "log-probs, frozen head": Case(log_probs, learns="hidden"),
    "entropies": Case(entropies),
    "LongPO, a pair in one chunk": Case(longpo, {"answers": 16}),
    "LongPO, a pair in one chunk, frozen head": Case(longpo, {"answers": 16}, learns="hidden"),
    "LongPO, a pair in chunks": Case(longpo, {"answers": 32}),
    "LongPO, a pair in chunks, frozen head": Case(longpo, {"answers": 32}, learns="hidden"),
    "LongPO, no gradient": Case(longpo, {"answers": 16}, learns=""),
    "LongPO, float16": Case(longpo, {"answers": 16}, dtype=torch.float16),
    "policy": Case(policy),
    "policy, entropies": Case(policy, {"entropies": True}),
    "KL": Case(kl, tiles=2),
    "KL, frozen head": Case(kl, learns="hidden", tiles=2),
    "KL, both learn": Case(kl, {"both": True}, tiles=2),
}
IN_ONE, IN_CHUNKS = (
    N // 2 - 1 + 16,
    N // 2 - 1 + 32,
)  # rows with a weight: the chosen ones, shifted, and rejected answers


class Cost(NamedTuple):
    """torch, cpu: operators and scratch of each back-end."""

    products: int
    torch: tuple[int, int]
    cpu: tuple[int, int] | None = None  # None: which products it takes depends on the processor


COSTS = {
    "cross-entropy": Cost(6 * N, (46, 547844), (18, 167684)),
    "cross-entropy, frozen head": Cost(4 * N, (43, 547844), (14, 167684)),
    "cross-entropy, frozen body": Cost(4 * N, (39, 547844), (11, 163972)),
    "cross-entropy, no gradient": Cost(2 * N, (27, 547972), (7, 163972)),
    "cross-entropy, half of the rows": Cost(6 * N // 2, (33, 454308), (15, 169188)),
    "cross-entropy, smoothed, z-loss": Cost(6 * N, (79, 583548), (21, 183676)),
    "cross-entropy, each row": Cost(8 * N, (73, 548128), (25, 167968)),
    "cross-entropy, bfloat16": Cost(6 * N, (59, 615940)),
    "log-probs": Cost(8 * N, (73, 548128), (25, 167968)),
    "log-probs, frozen head": Cost(6 * N, (70, 548128), (21, 167968)),
    "entropies": Cost(8 * N, (136, 583948), (28, 183564)),
    "LongPO, a pair in one chunk": Cost(6 * IN_ONE, (35, 552294), (14, 172262)),
    "LongPO, a pair in one chunk, frozen head": Cost(4 * IN_ONE, (33, 552294), (11, 172262)),
    "LongPO, a pair in chunks": Cost(
        6 * IN_CHUNKS + 2 * 64, (51, 644764), (19, 174700)
    ),  # 64 answer rows are scored first
    "LongPO, a pair in chunks, frozen head": Cost(4 * IN_CHUNKS + 2 * 64, (49, 644764), (16, 174700)),
    "LongPO, no gradient": Cost(2 * IN_ONE, (19, 552294), (6, 168038)),
    "LongPO, float16": Cost(6 * IN_ONE + 2 * 32, (56, 616668)),  # scored first, in any chunk
    "policy": Cost(6 * N, (58, 548516), (21, 168484)),
    "policy, entropies": Cost(6 * N, (76, 549284), (21, 176804)),
    "KL": Cost(8 * N, (98, 1388412), (26, 335868)),
    "KL, frozen head": Cost(6 * N, (94, 1388412), (22, 335868)),
    "KL, both learn": Cost(12 * N, (117, 1528700), (39, 476156)),
}


def count(case: Case, backend: str) -> tuple[int, tuple[int, int]]:
    """-> products, and operators and scratch."""
    shapes = [(1, N // 2, H)] * 2 if case.run is longpo else [(N, H)]
    hidden = [torch.randn(shape).to(case.dtype).requires_grad_("hidden" in case.learns) for shape in shapes]
    weight = torch.randn(V, H).to(case.dtype).requires_grad_("weight" in case.learns)
    scratch = workspace_of(ROWS, weight, case.dtype, case.tiles)
    options = (case.options or {}) | {"backend": backend, "workspace_bytes": scratch}
    given = hidden if case.run is longpo else hidden[0]
    with Count([*hidden, weight], lambda x: x.numel() >= V) as told:
        loss = case.run(given, weight, **options)
        if case.learns:
            loss.backward()
    delivered = sum(x.grad.nbytes for x in (*hidden, weight) if x.grad is not None)
    assert told.peak - delivered <= scratch + (4 * V * H if case.dtype.itemsize == 2 else 0)
    return told.products, (told.operators, told.peak - delivered)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_costs_on_a_cpu(name, backend, monkeypatch):
    monkeypatch.setenv(fastest.VARIABLE, "blocks")  # whatever is faster here
    expected = getattr(COSTS[name], backend)
    if expected is None:
        pytest.skip("its products depend on the processor")
    choose_backend(torch.device("cpu"), torch.float32, backend)
    count(CASES[name], backend)  # what is made once in a process
    products, rest = count(CASES[name], backend)
    assert products == COSTS[name].products * H * V
    if EXACT:
        assert rest == expected, f'"{name}", {backend}: operators and scratch'


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_sparse_hidden_gradient_costs_the_columns_that_are_kept(backend):
    """And the sums of groups, which meet all of the head."""
    torch.manual_seed(0)
    states = peaked()
    hidden, weight, bias, tokens = states
    kept = keep_columns_(gradient(states)).columns.shape[0]
    choose_backend(torch.device("cpu"), torch.float32, backend)
    for leaf in (hidden, weight):
        leaf.requires_grad_()
    with Count([hidden, weight], lambda x: False) as told:
        options = {"bias": bias, "backend": backend, "sparse_hidden_gradient": True}
        linear_cross_entropy(hidden, weight, tokens, **options).backward()
    (rows, width), vocab = hidden.shape, len(weight)
    assert kept < vocab / 2 and told.products == (4 * rows * vocab + 2 * rows * kept + 2 * RULE.groups * vocab) * width


# ---- the PyTorch form on the meta device, which stands for a GPU of any memory ----------------------------------------

MANY, VOCAB, WIDTH = 4096, 128_256, 256


def cross_entropy_on_meta(hidden, weight, softcap, scratch):
    options = Options(1.0, softcap, scratch, weight.dtype, True, True, False)
    none, labels = torch.empty(0, dtype=torch.int64), torch.arange(hidden.shape[0])[None]
    nll = ([none], [none], [labels], [torch.ones(1, 1)], torch.ones(()))
    batch = Batch(*nll, None, none, none, 0, "", [], 0.0, 1.0, False, -100)
    return run_sweep([hidden[None]], [torch.empty_like(hidden)[None]], weight, None, batch, options, "torch")


def divergence_on_meta(hidden, weight, softcap, scratch, kind="jsd"):
    maps, need = ((1.0, softcap), (1.0, softcap)), [True, True, False] * 2
    heads = (hidden, weight, None) * 2
    return divergence._sweep(
        heads, None, None, torch.ones(()), kind, 0.5, *maps, scratch, weight.dtype, False, "torch", need
    )


ON_META = {  # sweep, dtype, soft-cap -> operators and scratch; products are 6 N H V, 12 where both sides of a divergence learn
    (cross_entropy_on_meta, torch.float32, 0.0): (279, 2_758_152_220),
    (cross_entropy_on_meta, torch.float32, 30.0): (391, 2_758_152_220),
    (cross_entropy_on_meta, torch.bfloat16, 0.0): (279, 2_758_152_220),
    (cross_entropy_on_meta, torch.bfloat16, 30.0): (391, 2_758_152_220),
    (cross_entropy_on_meta, torch.float64, 0.0): (540, 2_758_152_220),
    (divergence_on_meta, torch.float32, 0.0): (1_934, 2_844_374_048),
    (divergence_on_meta, torch.float32, 30.0): (2_382, 2_844_374_048),
    (divergence_on_meta, torch.bfloat16, 0.0): (1_934, 2_842_276_896),
    (divergence_on_meta, torch.bfloat16, 30.0): (2_382, 2_842_276_896),
    (divergence_on_meta, torch.float64, 0.0): (3_848, 2_836_157_472),
}


@pytest.mark.parametrize("sweep, dtype, softcap", ON_META)
def test_the_pytorch_form_takes_few_launches_and_its_workspace_on_a_gpu(sweep, dtype, softcap, monkeypatch):
    """Blocks of 1 MiB, a CPU's, would be two rows here, and 28,000 launches."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device has none
    add_products_on_meta(dtype, monkeypatch)
    hidden, weight = (torch.empty(n, WIDTH, dtype=dtype, device="meta") for n in (MANY, VOCAB))
    scratch, sides = default_workspace(weight.device), 2 if sweep is divergence_on_meta else 1
    with Count([hidden, weight], lambda x: x.is_meta) as told:
        sweep(hidden, weight, softcap, scratch)
    assert told.products == 6 * sides * MANY * WIDTH * VOCAB
    delivered = sides * (hidden.nbytes + max(4, dtype.itemsize) * weight.numel())  # dh, dW
    assert scratch / 2 < told.peak - delivered <= scratch
    if EXACT:
        assert (told.operators, told.peak - delivered) == ON_META[sweep, dtype, softcap]


# ---- Triton on a pretended H100 --------------------------------------------------------------------------------------

LARGE, WIDE = 16_384, 4096  # N: four chunks; H


def of_pair(hidden, weight, labels, answers):
    """One pair, `answers` answer tokens of each sequence, NLL on all rows of the chosen one, the prompt's too."""
    nll, of_chosen = labels[None, :-answers], labels[None, :-answers].clone()
    of_chosen[:, : LARGE - 2 * answers] = -100
    sides = (part.detach()[None].requires_grad_() for part in (hidden[:-answers], hidden[-answers:]))
    given = dict(ref_chosen_logps=torch.zeros(1), ref_rejected_logps=torch.zeros(1), nll_labels=nll, shift=False)
    return fused_preference_loss(*sides, weight, of_chosen, labels[None, -answers:], objective=LONGPO, **given).loss


def of_policy(hidden, weight, labels):
    given = {"objective": POLICY, "numbers": {"advantages": torch.ones(LARGE)}}
    return fused_token_loss(hidden, weight, labels, **given).loss


LAUNCHING = {
    "cross-entropy": linear_cross_entropy,
    "cross-entropy, frozen head": lambda h, w, y: linear_cross_entropy(h, w.detach(), y),
    "cross-entropy, smoothed": lambda h, w, y: linear_cross_entropy(h, w, y, label_smoothing=0.1),
    "log-probs": lambda h, w, y: linear_logprobs(h, w, y).sum(),
    "LongPO, a pair in one chunk": lambda h, w, y: of_pair(h, w, y, 1024),
    "LongPO, a pair in chunks": lambda h, w, y: of_pair(h, w, y, 4096),
    "policy": of_policy,
    "KL": lambda h, w, y: linear_kl(h, w, h.detach(), w.detach(), kind="reverse"),
}


class Launched(NamedTuple):
    products: float  # over H V; those within our own kernel of log-probs, too
    operators: int  # of torch, on the device
    kernels: dict[str, int]


FEW = {"partial_kernel": 2, "join_kernel": 2, "segment_kernel": 2}  # of answers scored without a tile, in two chunks
ON_H100 = {
    "cross-entropy": Launched(6 * LARGE, 144, {"row_kernel": 4}),
    "cross-entropy, frozen head": Launched(4 * LARGE, 137, {"row_kernel": 4}),
    "cross-entropy, smoothed": Launched(6 * LARGE, 177, {"row_kernel": 8}),
    "log-probs": Launched(8 * LARGE, 140, {"partial_kernel": 4, "join_kernel": 4, "row_kernel": 4}),
    "LongPO, a pair in one chunk": Launched(6 * LARGE, 236, {"row_kernel": 5, "segment_kernel": 1}),
    "LongPO, a pair in chunks": Launched(6 * LARGE + 2 * 8192, 227, FEW | {"row_kernel": 4}),
    "policy": Launched(6 * LARGE, 244, {"row_kernel": 8}),
    "KL": Launched(8 * LARGE, 125, {"divergence_kernel": 7}),
}


def launch_all() -> dict[str, Launched]:
    """All of LAUNCHING, in a process of its own: what is cached of a pretended GPU goes with it."""
    from triton.runtime.jit import JITFunction

    from benchmarks.gpu.pretended import DEVICE, GpuTensor, pretended_gpu

    kernels, told = Counter(), {}

    def launch(kernel, *arguments, grid, warmup, **options):
        kernels[kernel.fn.__name__] += 1
        if kernel.fn.__name__ == "partial_kernel":
            given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
            kernels["products"] += 2 * given["n"] * given["H"] * given["V"]

    def run(name: str) -> Launched:
        kernels.clear()
        make = lambda *shape: torch.empty(*shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()  # noqa: E731
        hidden, weight, labels = make(LARGE, WIDE), make(VOCAB, WIDE), torch.arange(LARGE)
        with Count([], lambda x: isinstance(x, GpuTensor)) as count:
            LAUNCHING[name](hidden, weight, labels).backward()
        products = (count.products + kernels.pop("products", 0)) / (WIDE * VOCAB)
        return Launched(products, count.operators, dict(kernels))

    with pretended_gpu(), mock.patch.object(JITFunction, "run", launch):
        for name in LAUNCHING:
            run(name)  # what is made once in a process
            told[name] = run(name)
    return told


@pytest.fixture(scope="module")
def launched() -> dict[str, Launched]:
    pytest.importorskip("triton")
    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("launches are counted as they would be on a GPU")
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(launch_all).result()


@pytest.mark.parametrize("name", LAUNCHING)
def test_launches_on_an_h100(name, launched):
    found, expected = launched[name], ON_H100[name]
    assert found.products == expected.products and found.kernels == expected.kernels
    if EXACT:
        assert found.operators == expected.operators
