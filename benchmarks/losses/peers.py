"""Who is compared: for each op, functions of a case and its inputs that return the loss.

Ours is called through its public functions, once per back-end that this machine can run. A peer that is not installed
raises ImportError, which the table reports. LOGPS has those that deliver log-probs. Peers on a GPU are in gpu/peers.py.

Tests: tests/benchmarks/losses/test_run.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import longpo_ops

from ..gpu.peers import trl_head
from .cases import IGNORE, Case, Inputs

Candidate = Callable[[Case, Inputs], Tensor]
Logps = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, H), weight (V, H), labels (N,) -> log-probs (N,)
NAIVE = "naive"
TRL = "TRL"
CCE = "CCE torch_compile"
OURS = "longpo_ops"
SPARSE = f"{OURS} (cpu, sparse)"


def candidates(case: Case) -> dict[str, Candidate]:
    """By name, plain PyTorch first: the others are judged by its errors."""
    absent = {UPCAST} if case.torch_dtype.itemsize > 2 else set()
    if case.nll:  # TRL's trainer scores one sequence of labels: no NLL over more of them beside the preference
        absent.add(TRL)
    if not case.states:  # random states are no trained model's, whose columns differ
        absent.add(SPARSE)
    return {name: candidate for name, candidate in TABLE[case.op].items() if name not in absent}


def ours(name: str) -> bool:
    return name.startswith(OURS)


# -- cross-entropy ---------------------------------------------------------------------------------------------------


def naive(case: Case, x: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(x["hidden"], x["weight"]), x["labels"])


def upcast(case: Case, x: Inputs) -> Tensor:
    """What runs well on a CPU without 16-bit products: the inputs in float32, then the naive form."""
    return F.cross_entropy(F.linear(x["hidden"].float(), x["weight"].float()), x["labels"])


def torch_chunked(case: Case, x: Inputs) -> Tensor:
    """torch >= 2.13; its own choice of chunks and accumulation for the device and dtype."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("torch has no F.linear_cross_entropy: expected torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x["hidden"], x["weight"], x["labels"], options=options)


def cce(case: Case, x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x["hidden"], x["weight"], x["labels"], impl="torch_compile")


def trl(case: Case, x: Inputs) -> Tensor:
    """The loss of its SFTTrainer behind the model's body."""
    return -trl_head()(x["hidden"], x["weight"], x["labels"]).mean()


def our_cross_entropy(backend: str, sparse: bool = False) -> Candidate:
    return lambda case, x: longpo_ops.linear_cross_entropy(
        x["hidden"], x["weight"], x["labels"], backend=backend, sparse_hidden_gradient=sparse
    )


# -- preference ------------------------------------------------------------------------------------------------------


def naive_preference(case: Case, x: Inputs) -> Tensor:
    """Full logits of both sequences, log-softmax, gather."""
    logps = [
        _gathered(F.linear(x[f"{side}_hidden"][:, :-1], x["weight"]), token_labels(x, side))
        for side in ("chosen", "rejected")
    ]
    return preference_formula(case, x, *logps)


def _gathered(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)


def token_labels(x: Inputs, side: str) -> Tensor:
    """(1, T - 1) labels of every row that counts for anything."""
    if side == "chosen" and "nll_labels" in x.tensors:
        return x["nll_labels"][:, 1:]
    return x[f"{side}_labels"][:, 1:]


def preference_formula(case: Case, x: Inputs, chosen: Tensor, rejected: Tensor) -> Tensor:
    """(1, T - 1) log-probs of each side -> -log sigmoid(0.1 (d_chosen - d_rejected)), d = sum logp - reference;
    for LongPO 0.01 times that plus the mean NLL of the chosen sequence."""
    advantage = 0.0
    for side, logps, sign in (("chosen", chosen, 1), ("rejected", rejected, -1)):
        answers = x[f"{side}_labels"][:, 1:] != IGNORE
        advantage = advantage + sign * (logps.where(answers, 0.0).sum(1) - x[f"ref_{side}_logps"].to(logps.dtype))
    loss = -F.logsigmoid(0.1 * advantage).mean()
    if case.nll:
        labelled = x["nll_labels"][:, 1:] != IGNORE
        loss = 0.01 * loss - (chosen.where(labelled, 0.0).sum(1) / labelled.sum(1)).mean()
    return loss


def trl_preference(case: Case, x: Inputs) -> Tensor:
    """As its DPOTrainer: both sequences as one batch through the head it gives to models, which on a CPU scores every
    position and then drops the prompts'. Without the entropies and other numbers that the trainer logs."""
    from trl.trainer import add_fused_lm_head

    sides = ("chosen", "rejected")
    model = _Scored(torch.cat([x[f"{side}_hidden"] for side in sides]), x["weight"])
    add_fused_lm_head(model)
    labels = torch.cat([x[f"{side}_labels"] for side in sides])
    return preference_formula(case, x, *model.forward(labels=labels, fused_lm_head=True).log_probs.chunk(2))


class _Scored:
    """What TRL's head asks of a model whose body has delivered hidden (B, T, H)."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.config = SimpleNamespace()
        self.config.get_text_config = lambda: self.config
        self.base_model = lambda **options: SimpleNamespace(last_hidden_state=hidden)
        self.get_output_embeddings = lambda: SimpleNamespace(weight=weight, bias=None)

    def forward(self): ...


def our_preference(backend: str) -> Candidate:
    def run(case: Case, x: Inputs) -> Tensor:
        objective = {
            "longpo": longpo_ops.LongPO(beta=0.1, preference_weight=0.01),
            "dpo": longpo_ops.DPO(beta=0.1),
        }[case.objective]
        return longpo_ops.fused_preference_loss(
            x["chosen_hidden"],
            x["rejected_hidden"],
            x["weight"],
            x["chosen_labels"],
            x["rejected_labels"],
            ref_chosen_logps=x["ref_chosen_logps"],
            ref_rejected_logps=x["ref_rejected_logps"],
            nll_labels=x.tensors.get("nll_labels"),
            objective=objective,
            backend=backend,
        ).loss

    return run


# -- divergence ------------------------------------------------------------------------------------------------------


def naive_kl(case: Case, x: Inputs) -> Tensor:
    student = F.linear(x["hidden"], x["weight"]).log_softmax(-1)
    teacher = F.linear(x["teacher_hidden"], x["teacher_weight"]).log_softmax(-1)
    return F.kl_div(teacher, student, log_target=True, reduction="batchmean")


def our_kl(backend: str) -> Candidate:
    return lambda case, x: longpo_ops.linear_kl(
        x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"], kind="reverse", backend=backend
    )


UPCAST = "naive, inputs upcast"
BACKENDS = ("torch", "cpu")
TABLE: dict[str, dict[str, Candidate]] = {
    op: plain
    | {f"{OURS} ({backend})": call(backend) for backend in BACKENDS}
    | ({SPARSE: our_cross_entropy("cpu", sparse=True)} if op == "cross_entropy" else {})
    for op, plain, call in (
        (
            "cross_entropy",
            {NAIVE: naive, UPCAST: upcast, "torch chunked": torch_chunked, TRL: trl, CCE: cce},
            our_cross_entropy,
        ),
        ("preference", {NAIVE: naive_preference, TRL: trl_preference}, our_preference),
        ("kl", {NAIVE: naive_kl}, our_kl),
    )
}


# -- log-probs ---------------------------------------------------------------------------------------------------------


def _naive_logps(upcast: bool) -> Logps:
    up = (lambda x: x.float()) if upcast else (lambda x: x)
    return lambda hidden, weight, labels: _gathered(F.linear(up(hidden), up(weight)), labels)


def _cce_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile")


LOGPS: dict[str, Logps] = {
    NAIVE: _naive_logps(False),
    UPCAST: _naive_logps(True),
    TRL: lambda hidden, weight, labels: trl_head()(hidden, weight, labels),
    CCE: _cce_logps,
} | {f"{OURS} ({backend})": partial(longpo_ops.linear_logprobs, backend=backend) for backend in BACKENDS}
