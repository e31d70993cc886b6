"""The named cases: shapes and inputs of everything that is timed.

cross_entropy   hidden (N, H), weight (V, H), labels (N,): mean NLL
preference      one pair of (1, T, H) sequences, answers at their ends; with nll the NLL over the whole chosen sequence
                with states: a real model's on real texts (states.py); with frozen: the head gets no gradient
kl              hidden and teacher_hidden (N, H), weight and teacher_weight (V, H): mean KL(student || teacher)

Else weights are N(0, 1/H) and hidden states N(0, 1), so logits have the spread of a model's; memory is that of the inputs.

Tests: tests/benchmarks/losses/test_run.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import states

IGNORE = -100


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    rows: int  # N, or T of each sequence
    width: int  # H
    vocab: int  # V
    dtype: str = "float32"
    threads: tuple[int, ...] = (1, 2)  # the five-minute run takes the last
    objective: str = ""  # of a preference: longpo or dpo
    answers: int = 0  # answer tokens of each sequence
    nll: bool = False
    states: str = ""  # a kind of states.py, whose head decides width and vocab
    frozen: bool = False
    long: bool = False  # left out of the five-minute run

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def shrunk(self, factor: int) -> Case:
        return replace(self, rows=max(1, self.rows // factor), answers=max(1, self.answers // factor))


CASES = {
    case.name: case
    for case in (
        Case("ce-2k", "cross_entropy", 2048, 1024, 32000),
        Case("ce-8k", "cross_entropy", 8192, 1024, 32000, long=True),
        Case("ce-2k-bf16", "cross_entropy", 2048, 1024, 32000, "bfloat16"),
        Case("ce-8k-bf16", "cross_entropy", 8192, 1024, 32000, "bfloat16", long=True),
        *(
            Case(name, "cross_entropy", rows, 576, 49152, threads=(2,), states=kind, frozen=frozen, long=True)
            for name, rows, kind, frozen in (
                ("prose-2k", 2048, "prose", False),
                ("prose-8k", 8192, "prose", False),
                ("prose-2k-frozen", 2048, "prose", True),
                ("prose-8k-frozen", 8192, "prose", True),
                ("code-2k", 2048, "code", False),
                ("flat-2k", 2048, "flat", False),
            )
        ),
        Case("longpo", "preference", 2048, 1024, 32000, threads=(2,), objective="longpo", answers=200, nll=True),
        Case("dpo", "preference", 2048, 1024, 32000, threads=(2,), objective="dpo", answers=200),
        Case("dpo-bf16", "preference", 2048, 1024, 32000, "bfloat16", (2,), objective="dpo", answers=200, long=True),
        Case("kl", "kl", 1024, 1024, 32000, threads=(2,)),
        Case("big-vocabulary", "cross_entropy", 1024, 512, 128256, threads=(2,), long=True),
        Case("tiny", "cross_entropy", 48, 32, 500, threads=(1,), long=True),
        Case(
            "tiny-preference",
            "preference",
            32,
            32,
            500,
            threads=(1,),
            objective="longpo",
            answers=8,
            nll=True,
            long=True,
        ),
        Case("tiny-dpo", "preference", 32, 32, 500, threads=(1,), objective="dpo", answers=8, long=True),
        Case("tiny-kl", "kl", 24, 32, 500, threads=(1,), long=True),
    )
}


@dataclass(frozen=True)
class Inputs:
    """Tensors by name; `leaves` are those that get a gradient."""

    tensors: dict[str, Tensor]
    leaves: tuple[str, ...]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def gradients(self) -> dict[str, Tensor]:
        """Gradient of each leaf as rows (..., H) -> (rows, H)."""
        return {name: self[name].grad.flatten(0, -2) for name in self.leaves}

    def clear(self) -> None:
        for name in self.leaves:
            self[name].grad = None

    def gradient_bytes(self) -> int:
        return sum(self[name].nbytes for name in self.leaves)


def make(case: Case) -> Inputs:
    """The inputs of a case, the same in every process. Raises ImportError where a real model's states cannot be had."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random) * spread).to(case.torch_dtype)

    def labels(*shape: int) -> Tensor:
        return torch.randint(case.vocab, shape, generator=random)

    if case.states:
        return _real(case)
    head = (case.vocab, case.width)
    weight = normal(*head, spread=case.width**-0.5)
    if case.op == "cross_entropy":
        tensors = {"hidden": normal(case.rows, case.width), "weight": weight, "labels": labels(case.rows)}
        leaves = ("hidden", "weight")
    elif case.op == "kl":
        tensors = {"hidden": normal(case.rows, case.width), "weight": weight}
        tensors["teacher_hidden"] = tensors["hidden"] + normal(case.rows, case.width, spread=0.3)
        tensors["teacher_weight"] = weight + normal(*head, spread=0.3 * case.width**-0.5)
        leaves = ("hidden", "weight")
    else:
        shape = (1, case.rows)
        tokens = {side: labels(*shape) for side in ("chosen", "rejected")}
        tensors = {f"{side}_hidden": normal(*shape, case.width) for side in tokens} | {"weight": weight}
        for side, ids in tokens.items():
            prompt = torch.arange(case.rows) < case.rows - case.answers
            tensors[f"{side}_labels"] = ids.masked_fill(prompt, IGNORE)
            tensors[f"ref_{side}_logps"] = torch.tensor([-11.0 * case.answers])
        if case.nll:
            tensors["nll_labels"] = tokens["chosen"]
        leaves = ("chosen_hidden", "rejected_hidden", "weight")
    for name in leaves:
        tensors[name].requires_grad_()
    return Inputs(tensors, leaves)


def _real(case: Case) -> Inputs:
    hidden, weight, labels = states.load(case.states)
    tensors = {"hidden": hidden[: case.rows], "weight": weight, "labels": labels[: case.rows]}
    leaves = ("hidden",) if case.frozen else ("hidden", "weight")
    for name in leaves:
        tensors[name].requires_grad_()
    return Inputs(tensors, leaves)
