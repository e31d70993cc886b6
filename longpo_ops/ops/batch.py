"""What a sweep is told of rows and of groups of answers, and what may be wrong with it: found on the host, before any product.

A Batch is the arguments of the registered sweep; `checked` makes of it the stretches (rows.py) and the groups (sweep.py)
that are swept. Numbers of the host cost no synchronisation; those of a device are copied once.

Tests: tests/ops/test_operators.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..parallel import Shards, digest
from .checks import check_held_rows
from .objective import ROLES, Objective
from .registered import rebuild
from .rows import WINDOW, Stretch, to_device, windows
from .sweep import Groups


class Batch(NamedTuple):
    """What a sweep is told of rows and pairs: arguments of sweep_op, in its order. A list has an entry per hidden tensor.

    Where a group shares the rows of one sequence (S_0 = 1), hidden has this rank's, and everything here is of all T_0."""

    answers: list[Tensor]  # (S_i, T_i) labels of answer tokens, or (0,) for none
    segments: list[Tensor]  # (S_i, T_i) or (S_i, 1) sequence numbers
    nll: list[Tensor]  # (S_i, T_i) labels of NLL tokens, or (0,) for none
    nll_weights: list[Tensor]  # (S_i, T_i) or (S_i, 1)
    nll_total: Tensor  # () what NLL weights are divided by
    refs: Tensor | None  # (K,)
    group: Tensor  # (K,) the group of each sequence, or (R,) that of each rejected one with roles (0,)
    role: Tensor  # (K,), or (0,) for pairs: sequences 0..G-1 are chosen answers, the rest rejected ones
    count: int  # G
    objective: str
    parameters: list[float]
    preference_weight: float
    num_groups: float
    shift: bool
    ignore_index: int
    ranks: str = ""  # the name of the process group that shares the rows
    correct: bool = False  # whether answer tokens that are predicted are counted

    @property
    def length(self) -> int:
        """T_0, of all rows of a sequence that a group shares."""
        return max(self.answers[0].shape[-1], self.nll[0].shape[-1])

    @property
    def sequences(self) -> int:
        """K."""
        return self.group.shape[0] + (0 if self.role.numel() else self.count)


def stretches_of(
    hiddens: list[Tensor],  # (S_i, T_i, H)
    grads: list[Tensor | None],
    answers: list[Tensor],  # this and the next three as in Batch
    segments: list[Tensor],
    nll: list[Tensor],
    nll_weights: list[Tensor],
    shift: bool,
    ignore_index: int,
) -> list[Stretch]:
    """One stretch per sequence. With shift, hidden state t predicts label t + 1."""
    first, last = (1, -1) if shift else (0, None)

    def rows(tensor: Tensor, s: int) -> Tensor:
        return tensor[s] if tensor.shape[1] == 1 else tensor[s, first:]

    out = []
    for i, hidden in enumerate(hiddens):
        has_answers, has_nll = answers[i].numel() > 0, nll[i].numel() > 0
        labels = [t.cpu() if present else None for t, present in ((answers[i], has_answers), (nll[i], has_nll))]
        numbers = segments[i].cpu() if has_answers else None
        for s in range(hidden.shape[0]):
            out.append(
                Stretch(
                    hidden=hidden[s, :last],
                    grad=None if grads[i] is None else grads[i][s, :last],
                    answers=labels[0][s, first:] if has_answers else None,
                    segments=rows(numbers, s) if has_answers else None,
                    nll=labels[1][s, first:] if has_nll else None,
                    nll_weights=rows(nll_weights[i], s) if has_nll else None,
                    ignore_index=ignore_index,
                )
            )
    return out


def check_rows_labels(stretches: list[Stretch], vocab: int) -> None:
    """Raises ValueError for a label out of range, or two different labels for one row."""

    def place(number: int, row: int) -> str:
        if len(stretches) == 1:  # a pack of sequences, or rows that belong to none
            return f"row {row}"
        return f"sequence {number}, row {row} of its hidden states (chosen sequences count before rejected ones)"

    for number, s in enumerate(stretches):
        for start in range(0, len(s), WINDOW):
            window = slice(start, start + WINDOW)
            given = [labels[window] for labels in (s.answers, s.nll) if labels is not None]
            for labels in given:
                bad = (labels != s.ignore_index) & ((labels < 0) | (labels >= vocab))
                if bool(bad.any()):
                    at = int(bad.nonzero()[0])
                    raise ValueError(
                        f"labels: {int(labels[at])} in {place(number, start + at)}: "
                        f"expected 0 <= label < V={vocab}, or ignore_index={s.ignore_index}"
                    )
            if len(given) == 2:
                clash = (given[0] != given[1]) & (given[0] != s.ignore_index) & (given[1] != s.ignore_index)
                if bool(clash.any()):
                    at = int(clash.nonzero()[0])
                    raise ValueError(
                        f"labels: {place(number, start + at)} is answer token {int(given[0][at])} and NLL token "
                        f"{int(given[1][at])}: expected the same token where both are given"
                    )


def token_stretches(hidden: Tensor, grad: Tensor | None, labels: Tensor, weights: Tensor, ignore_index: int):
    """(N, H) rows with one label each and per-row weights (1, N), or one weight (1, 1), as a single stretch."""
    none = torch.empty(0, dtype=torch.int64)
    grads = [None if grad is None else grad[None]]
    return stretches_of([hidden[None]], grads, [none], [none], [labels[None]], [weights], False, ignore_index)


def checked(
    hiddens: list[Tensor], grads: list[Tensor | None], weight: Tensor, batch: Batch, shards: Shards | None
) -> tuple[list[Stretch], Groups | None]:
    """-> the stretches of rows that are here, and the groups. Raises ValueError for anything wrong in the whole batch."""
    group, role = _group_and_role(batch)
    nll_weights = [weights.cpu() for weights in batch.nll_weights]
    refs = _references(batch, role, weight.device)
    labels = (batch.answers, batch.segments, batch.nll, nll_weights)
    stretches = stretches_of(hiddens, grads, *labels, batch.shift, batch.ignore_index)
    check_rows_labels(stretches, weight.shape[0])
    _check_segments(stretches, batch.sequences)
    groups = None
    if batch.count:
        objective = rebuild(batch.objective, batch.parameters)
        _check_forms(objective, group, role, batch.count)
        lengths = _answer_rows(stretches, role)
        weight_of_group = batch.preference_weight / batch.num_groups
        groups = Groups(objective, refs, group, role, batch.count, lengths, weight_of_group, batch.correct)
    if shards is not None:
        check_held_rows(hiddens[0][0], shards)
        stretches = [stretch.held(shards.rows) for stretch in stretches]
    return stretches, groups


def digest_of(batch: Batch) -> int:
    """Of what all ranks of a group must hold alike. Not of references: each may have made them, in its own rounding."""
    tensors = (
        *batch.answers,
        *batch.segments,
        *batch.nll,
        *batch.nll_weights,
        batch.nll_total,
        batch.group,
        batch.role,
    )
    plain = (
        batch.count,
        batch.objective,
        batch.parameters,
        batch.preference_weight,
        batch.num_groups,
        batch.ignore_index,
        batch.correct,
    )
    return digest((tensor.cpu() for tensor in tensors), *plain)


def _group_and_role(batch: Batch) -> tuple[Tensor, Tensor]:
    """-> (K,), (K,) on the host. Raises ValueError for groups that are none of 0..G-1."""
    group, role, count = batch.group.cpu(), batch.role.cpu(), batch.count
    name = "groups" if role.numel() else "rejected_pair"
    number = "group < G" if role.numel() else "pair < B"
    if group.shape[0] and not 0 <= int(group.min()) <= int(group.max()) < count:
        raise ValueError(f"{name}: {int(group.min())} to {int(group.max())}: expected 0 <= {number}={count}")
    if role.numel():
        if not 0 <= int(role.min()) <= int(role.max()) < len(ROLES):
            known = ", ".join(f"{number} ({name})" for number, name in enumerate(ROLES))
            raise ValueError(f"roles: {int(role.min())} to {int(role.max())}: expected {known}")
        return group, role
    if torch.unique(group).shape[0] != count:
        raise ValueError(
            f"rejected_pair={group.tolist()}: expected at least one rejected sequence for each of {count} pairs"
        )
    chosen = torch.arange(count)
    return torch.cat([chosen, group]), torch.cat([torch.zeros_like(chosen), torch.ones_like(group)])


def _check_forms(objective: Objective, group: Tensor, role: Tensor, count: int) -> None:
    """Raises ValueError for a group whose roles are none of the objective's forms."""
    counts = torch.zeros(count, len(ROLES), dtype=torch.int64)
    counts.index_put_((group, role), torch.ones_like(group), accumulate=True)
    fits = torch.zeros(count, dtype=torch.bool)
    for form in objective.forms:
        wanted = torch.tensor([form.count(name) for name in ROLES])
        several = torch.tensor([name == "rejected" and name in form and not objective.one_rejected for name in ROLES])
        fits |= ((counts == wanted) | (several & (counts >= wanted))).all(1)
    if not bool(fits.all()):
        g = int((~fits).nonzero()[0])
        came = ", ".join(f"{int(n)} {name}" for n, name in zip(counts[g], ROLES, strict=True) if n)
        forms = " or ".join(" + ".join(form) for form in objective.forms)
        several = "" if objective.one_rejected else ", the rejected ones may be several"
        raise ValueError(
            f"groups: group {g} of {count} has {came or 'no sequence'}: expected {forms}{several}, as objective "
            f"{objective.name} takes"
        )


def _named_reference(batch: Batch, k: int) -> tuple[str, int]:
    """What the caller knows the reference of sequence k as."""
    if batch.role.numel():
        return "ref_logps", k
    return ("ref_chosen_logps", k) if k < batch.count else ("ref_rejected_logps", k - batch.count)


def _references(batch: Batch, role: Tensor, device: torch.device) -> Tensor | None:
    """Reference log-probs on the device, float64; a number that is not finite is NaN there, and so is its group's loss.
    Raises ValueError for such a number in a tensor on the host."""
    refs = batch.refs
    if refs is None:
        return None
    if refs.device.type == "cpu" and not bool(refs.isfinite().all()):
        k = int((~refs.isfinite()).nonzero()[0])
        name, at = _named_reference(batch, k)
        raise ValueError(f"{name}: {float(refs[k])} at {at}: expected finite log-probs, sums over answer tokens")
    refs = to_device(refs, device, torch.float64)
    return torch.where(refs.isfinite(), refs, torch.nan)


def _check_segments(stretches: list[Stretch], sequences: int) -> None:
    """Raises ValueError for a sequence number out of range."""
    for s in stretches:
        for start in range(0, len(s) if s.segments is not None else 0, WINDOW):
            numbers = s.segments[start : start + WINDOW]
            if numbers.shape[0] and not -1 <= int(numbers.min()) <= int(numbers.max()) < sequences:
                raise ValueError(
                    f"sequences: {int(numbers.min())} to {int(numbers.max())}: expected -1, or 0 <= number < {sequences}, "
                    "the chosen sequences first, then the rejected ones"
                )


def _answer_rows(stretches: list[Stretch], role: Tensor) -> Tensor:
    """(K,) int64, how many answer tokens each sequence has. Raises ValueError for one without."""
    counts = torch.zeros_like(role)
    for stretch, start in windows(stretches):
        segments = stretch.segments_at(slice(start, start + WINDOW)) + 1
        counts += torch.bincount(segments, minlength=role.shape[0] + 1)[1:]
    if not bool(counts.all()):
        k = int((counts == 0).nonzero()[0])
        before = int((role[:k] == role[k]).sum())  # sequences of a role are counted from 0
        raise ValueError(
            f"labels: {ROLES[int(role[k])]} answer {before} has no answer tokens; expected at least one label other than "
            "ignore_index"
        )
    return counts
