"""A step of the trainer beside LongPO's loss as published, written out on full logits of separate sequences."""

import inspect
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longpo_ops.train.checks import balance_weight

from .tiny import gradients, make_pair, make_trainer

BETA, LAMBDA = 0.1, 0.01
REFERENCE = (-3.0, -4.0)  # summed log-probs
LEAST = 1e-3  # of the largest gradient of all: a parameter whose own are smaller is measured by it


def _with_reference(pair):
    return replace(pair, ref_chosen_logp=REFERENCE[0], ref_rejected_logps=(REFERENCE[1],) * len(pair.rejected))


PAIRS = [
    _with_reference(make_pair(1, turns=2, document=9, answer=3)),
    _with_reference(make_pair(2, turns=1, rejected=2, document=16, answer=3)),
]


@dataclass(frozen=True)
class Step:
    """The numbers of one step on PAIRS."""

    loss: Tensor
    chosen: Tensor
    rejected: Tensor
    gradients: dict[str, Tensor]


def make(folder, policy, **settings):
    """-> a trainer for PAIRS. Raises ValueError where it refuses the policy."""
    settings = dict(reference="data", pack_tokens=400, gradient_checkpointing=False) | settings
    return make_trainer(folder, "longpo", PAIRS, policy, **settings)


def step_of(trainer, policy) -> Step:
    """As the trainer computes it; the policy's dropout is as its mode says."""
    (pack,) = trainer.train_dataset
    loss, metrics = trainer._loss(policy, pack, 2.0)
    loss.backward()
    return Step(loss.detach(), metrics["logps/chosen"][0], metrics["logps/rejected"][0], gradients(policy))


def plain_step(model) -> Step:
    """As the equations say it of a model that nothing of ours was attached to."""
    losses, chosen, rejected, balances, lengths = [], [], [], [], []
    for pair in PAIRS:
        sums = []
        for sequence in (pair.chosen, *pair.rejected):
            logps, balance = _alone(model, sequence)
            ids, labels = torch.from_numpy(sequence.ids)[1:], torch.from_numpy(sequence.labels)[1:]
            tokens = logps[:-1].gather(1, ids[:, None])[:, 0]
            if not sums:
                nll = -tokens[torch.from_numpy(sequence.nll_labels)[1:] != -100].mean()
            sums.append(tokens[labels != -100].sum())
            balances.append(balance)
            lengths.append(len(sequence))
        margins = [(sums[0] - REFERENCE[0]) - (each - REFERENCE[1]) for each in sums[1:]]
        losses.append(LAMBDA * -F.logsigmoid(BETA * torch.stack(margins)).mean() + nll)
        chosen.append(sums[0])
        rejected += sums[1:]
    loss = torch.stack(losses).mean()
    if isinstance(balances[0], Tensor):
        pairs = zip(balances, lengths, strict=True)
        loss = loss + balance_weight(model) * sum(balance * length for balance, length in pairs) / sum(lengths)
    loss.backward()
    return Step(loss.detach(), sum(chosen).detach(), sum(rejected).detach(), gradients(model))


def _alone(model, sequence) -> tuple[Tensor, Tensor | None]:
    """-> (T, V) log-probs and the auxiliary loss."""
    takes = inspect.signature(type(model).forward).parameters
    out = model(torch.from_numpy(sequence.ids)[None], **{"use_cache": False} if "use_cache" in takes else {})
    return F.log_softmax(out.logits[0].double(), -1), getattr(out, "aux_loss", None)


def errors(ours: Step, truth: Step) -> dict[str, float]:
    """Of each number, as a share of the largest; infinity for gradients that one of the two has not."""
    off = {name: _error(getattr(ours, name), getattr(truth, name)) for name in ("loss", "chosen", "rejected")}
    largest = max(float(g.abs().max()) for g in truth.gradients.values())
    for name in {**ours.gradients, **truth.gradients}:
        both = name in ours.gradients and name in truth.gradients
        off[name] = _error(ours.gradients[name], truth.gradients[name], LEAST * largest) if both else float("inf")
    return off


def _error(ours: Tensor, truth: Tensor, least: float = 0.0) -> float:
    error = float((ours.double() - truth.double()).abs().max()) / max(float(truth.abs().max()), least, 1e-15)
    return error if error == error else float("inf")
