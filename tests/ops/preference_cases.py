"""Pairs to call preference losses with, and the same by plain PyTorch on full logits."""

from __future__ import annotations

import torch

from longpo_ops import (
    DPO,
    IPO,
    LOGO,
    ORPO,
    Hinge,
    KTOPair,
    LongPO,
    SimPO,
    fused_preference_loss,
    packed_preference_loss,
)
from longpo_ops.ops import truth
from tests.budget import check_budget

OBJECTIVES = {
    "longpo": LongPO(),
    "dpo": DPO(beta=0.3, label_smoothing=0.1, preference_weight=0.5),
    "hinge": Hinge(beta=0.2),
    "ipo": IPO(),
    "ipo average": IPO(average=True),
    "kto_pair": KTOPair(),
    "simpo": SimPO(),
    "logo": LOGO(),
    "orpo": ORPO(lam=0.5),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case:
    """B = 3 pairs with prompts of different lengths, and what to call the loss with."""

    def __init__(
        self, objective, dtype, device="cpu", *, bias=False, nll=True, pair=None, V=37, H=16, T=(11, 9), **options
    ):
        b, r = 3, 3 if pair is None else len(pair)
        tc, tr = T
        self.objective, self.options = objective, options
        self.pair = None if pair is None else torch.tensor(pair)
        draw = lambda *shape, size=1.0: (size * torch.randn(*shape)).to(device, dtype)  # noqa: E731
        self.tensors = [draw(b, tc, H), draw(r, tr, H), draw(V, H, size=H**-0.5), draw(V) if bias else None]
        self.chosen, self.rejected = torch.randint(V, (b, tc)), torch.randint(V, (r, tr))
        self.nll = self.chosen.clone() if nll else None
        for labels, width in ((self.chosen, tc), (self.rejected, tr)):
            for row in range(len(labels)):
                labels[row, : width - 2 - row % 3] = -100  # 2 to 4 answer tokens
        if nll:
            self.nll[0, :3] = -100
            self.nll[2, -2:] = -100  # answer tokens without NLL
        self.refs = {}
        if objective.needs_reference:
            self.refs = dict(ref_chosen_logps=-10 + torch.randn(b), ref_rejected_logps=-10 + torch.randn(r))

    def redraw(self):
        """New numbers of the same spread; -inf stays."""

        def again(t):
            new = torch.randn(t.shape) * t[t.isfinite()].float().std().cpu()
            return torch.where(t.isfinite(), new.to(t), t)

        self.tensors = [None if t is None else again(t) for t in self.tensors]

    def leaves(self, dtype=None):
        return [None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in self.tensors]

    def full_logits(self, dtype=None):
        """-> loss, sums of chosen and rejected, gradients, by plain PyTorch at that dtype."""
        chosen, rejected, weight, bias = leaves = self.leaves(dtype)
        place = lambda x: None if x is None else x.to(weight.device)  # noqa: E731
        loss, *sums = truth.preference_loss(
            chosen, rejected, weight, place(self.chosen), place(self.rejected), objective=self.objective, bias=bias,
            nll_labels=place(self.nll), rejected_pair=place(self.pair),
            **{name: place(x) for name, x in self.refs.items()}, **self.options,
        )  # fmt: skip
        loss.backward()
        return loss, *sums, *(t.grad for t in leaves if t is not None)

    def loss(self, leaves, **more):
        chosen, rejected, weight, bias = leaves
        return fused_preference_loss(
            chosen, rejected, weight, self.chosen, self.rejected, objective=self.objective, bias=bias,
            nll_labels=self.nll, rejected_pair=self.pair, **self.refs, **self.options | more,
        )  # fmt: skip

    def ours(self, leaves=None, **more):
        """-> loss, sums, gradients."""
        leaves = leaves or self.leaves()
        out = self.loss(leaves, **more)
        out.loss.backward()
        return out.loss, out.chosen_logps, out.rejected_logps, *(t.grad for t in leaves if t is not None)


NAMES = ("loss", "chosen_logps", "rejected_logps", "chosen_hidden", "rejected_hidden", "weight", "bias")


def check_case(case, draws=1, **more):
    """The budget of one case, or of the mean of several draws of its numbers."""
    check_draws(case, draws, NAMES, lambda: case.ours(**more), case.full_logits)


def check_draws(case, draws, names, ours, plain):
    """The budget of what ours() and plain(dtype) make of a case, by name, over draws of its numbers."""
    runs = []
    for draw in range(draws):
        if draw:
            case.redraw()
        runs.append((ours(), plain(case.tensors[0].dtype), plain(torch.float64)))
    for name, *results in zip(names, *(zip(*part) for part in zip(*runs))):
        check_budget(name, *results)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def pack(case, leaves, **more):
    """The same pairs as flat rows, shuffled, through packed_preference_loss."""
    chosen, rejected, weight, bias = leaves
    counts = (case.nll[:, 1:] != -100).sum(1)
    rows, labels, sequences, weights = [], [], [], []
    for k, (hidden, answers, nll) in enumerate(
        [(chosen[b], case.chosen[b], case.nll[b]) for b in range(len(chosen))]
        + [(rejected[r], case.rejected[r], torch.full_like(case.rejected[r], -100)) for r in range(len(rejected))]
    ):
        rows.append(hidden[:-1])
        labels.append(torch.where(answers[1:] == -100, nll[1:], answers[1:]))
        sequences.append(torch.where(answers[1:] == -100, -1, k))
        weights.append(
            (nll[1:] != -100) / counts[k].double() if k < len(chosen) else torch.zeros(len(answers) - 1).double()
        )
    order = torch.randperm(sum(map(len, rows)))
    pair = torch.arange(len(rejected)) if case.pair is None else case.pair
    return packed_preference_loss(
        torch.cat(rows)[order], weight, torch.cat(labels)[order], torch.cat(sequences)[order], num_chosen=len(chosen),
        rejected_pair=pair, nll_weights=torch.cat(weights)[order], objective=case.objective, bias=bias, **case.refs,
        **case.options | more,
    )  # fmt: skip
