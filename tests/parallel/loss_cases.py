"""Rows to call packed_preference_loss with, whole or a rank's part of them, and the same by plain PyTorch on full logits."""

from __future__ import annotations

import torch
from torch import Tensor

from longpo_ops import linear_cross_entropy, packed_preference_loss
from longpo_ops.ops import truth
from longpo_ops.ops.objective import Answers

N, H, V = 61, 16, 37
FIRST = 42  # where answers begin that no rank but the last has, of two or of three


class Row:
    """Three pairs in one row of N tokens in any order, answers of 2 to 4 tokens, NLL on most other rows.

    late: answers in the last rows alone. nll: "all" rows that are no answers and some that are, "early" ones alone, or "".
    """

    def __init__(
        self, objective, dtype=torch.float64, *, seed=0, rejected=(0, 1, 2), late=False, nll="all", bias=False, frozen=(),
        **options,
    ):  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        self.objective, self.pair, self.frozen, self.options = objective, torch.tensor(rejected), frozen, options
        lengths = [2 + k % 3 for k in range(3 + len(rejected))]
        places = torch.randperm(N - FIRST, generator=draw) + FIRST if late else torch.randperm(N, generator=draw)
        answers = places[: sum(lengths)]
        self.sequences = torch.full((N,), -1)
        self.sequences[answers] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        self.weights = torch.rand(N, generator=draw, dtype=torch.float64) / N if nll else None
        if nll:
            self.weights[torch.rand(N, generator=draw) < 0.2] = 0
        if nll == "early":
            self.weights[20:] = 0
        read = (self.sequences >= 0) | (self.weights != 0 if nll else False)
        self.labels = torch.where(read, torch.randint(V, (N,), generator=draw), -100)
        sizes = {"hidden": (N, H, 1.0), "weight": (V, H, H**-0.5)} | ({"bias": (V, 1, 1.0)} if bias else {})
        self.tensors = {
            name: (size * torch.randn(*shape, generator=draw, dtype=torch.float64)).squeeze(-1).to(dtype)
            for name, (*shape, size) in sizes.items()
        }
        self.refs = {}
        if objective.needs_reference:
            refs = -10 + torch.randn(len(lengths), generator=draw, dtype=torch.float64)
            self.refs = {"ref_chosen_logps": refs[:3], "ref_rejected_logps": refs[3:]}

    def leaves(self, rows=slice(None), dtype=None) -> dict[str, Tensor]:
        cut = self.tensors | {"hidden": self.tensors["hidden"][rows]}
        return {n: t.detach().clone().to(dtype or t.dtype).requires_grad_(n not in self.frozen) for n, t in cut.items()}

    def outputs(self, leaves: dict[str, Tensor], **more):
        return packed_preference_loss(
            **leaves, labels=self.labels, sequences=self.sequences, num_chosen=3, rejected_pair=self.pair,
            nll_weights=self.weights, objective=self.objective, num_pairs=5.0, **self.refs, **self.options | more,
        )  # fmt: skip

    def ours(self, shards=None, **more) -> dict[str, Tensor]:
        """Every output, and the gradients, of the whole row or of a rank's part of it."""
        leaves = self.leaves(slice(None) if shards is None else shards.rows)
        out = self.outputs(leaves, shards=shards, **more)
        return out._asdict() | gradients(out.loss, leaves)

    def plain(self, dtype=None) -> dict[str, Tensor]:
        """Loss, summed log-probs and gradients from full logits."""
        leaves = self.leaves(dtype=dtype)
        map = {name: value for name, value in self.options.items() if name in ("softcap", "scale")}
        logps = truth.logprobs(leaves["hidden"], leaves["weight"], self.labels, bias=leaves.get("bias"), **map).double()
        member = self.sequences == torch.arange(3 + len(self.pair))[:, None]
        sums, lengths = torch.where(member, logps, 0.0).sum(1), member.sum(1).double()
        refs = torch.cat(list(self.refs.values())) if self.refs else None
        group, role = torch.cat([torch.arange(3), self.pair]), (torch.arange(3 + len(self.pair)) >= 3).long()
        losses = self.objective.losses(Answers.of(sums, lengths, refs, group, role, 3))
        loss = self.objective.preference_weight * losses.sum() / 5.0
        if self.weights is not None:
            loss = loss - (logps * self.weights).sum() / 5.0
        return {"loss": loss.detach(), "chosen_logps": sums[:3], "rejected_logps": sums[3:]} | gradients(loss, leaves)

    def _affine(self, affine: bool) -> dict:
        """Smoothing, a z-loss and class weights."""
        classes = torch.linspace(0, 2, V, dtype=torch.float64)
        return dict(label_smoothing=0.2, z_loss_weight=1e-2, class_weights=classes) if affine else {}

    def cross_entropy(self, reduction: str, weighted: bool, affine: bool, shards=None, **more) -> dict[str, Tensor]:
        leaves = self.leaves(slice(None) if shards is None else shards.rows)
        loss = linear_cross_entropy(
            **leaves,
            labels=self.labels,
            row_weights=self.weights if weighted else None,
            reduction=reduction,
            shards=shards,
            **self._affine(affine) | more,
        )
        return {"loss": loss} | gradients(loss, leaves)

    def plain_cross_entropy(self, reduction: str, weighted: bool, affine: bool, dtype=None) -> dict[str, Tensor]:
        leaves = self.leaves(dtype=dtype)
        weights = self.weights if weighted else None
        more = dict(row_weights=weights, reduction=reduction, **self._affine(affine))
        loss = truth.cross_entropy(**leaves, labels=self.labels, **more)
        return {"loss": loss} | gradients(loss, leaves)


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    if loss.requires_grad:
        loss.backward()
    return {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def gathered(results: list[dict[str, Tensor]], rowwise: tuple[str, ...] = ("d hidden",)) -> dict[str, Tensor]:
    """What ranks found -> that of the whole row: gradients of rows one after the other, those of the head summed; the other
    numbers, which must be the same on every rank to the last bit."""
    whole = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        if name in rowwise:
            whole[name] = torch.cat(parts)
        elif name.startswith("d "):
            whole[name] = torch.stack(parts).double().sum(0).to(parts[0].dtype)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), name
            whole[name] = parts[0].detach()
    return whole
