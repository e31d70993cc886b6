"""Packs that read the long document with its chosen answers alone, and beside it the short inputs with both answers.

    rows   [C_L I_1 w_1 I_2 w_2 ..] [C_1 I_1 w_1] [l_1] [C_2 I_2 w_2] [l_2] ..    of a record with one rejected answer a turn

Turn i is a triple: its chosen and rejected answers w_i, l_i on the short input (C_i, I_i), and its chosen answer on the long
one, after the turns before it, which is the anchor. The rejected answer is never read at length. A record of n turns with R
rejected answers has K = n (2 + R) sequences, numbered turn by turn: chosen, rejected ones, anchor. The n anchors are rows of
one long sequence:

    rows = T + sum_i rows of short pair i,      T tokens of the long sequence

What a pack shares and how its rows are laid out is data/batch.py's: a span without rejected tails, then the short pairs. With
separate=True each sequence is a span of its own. No NLL term: nll_weights are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from .batch import PairBatch, _answer_spans, pack
from .tokenized import TokenizedPair


@dataclass(frozen=True, eq=False)
class TripleBatch(PairBatch):
    """A pack whose pairs are turns. ids are the records'; rejected_pair is (), as groups and roles say more."""

    groups: tuple[int, ...] = ()  # (K,) the turn of each sequence, counted through the pack
    roles: tuple[str, ...] = ()  # (K,) "chosen" | "rejected" | "anchor"

    @property
    def num_pairs(self) -> int:
        return self.groups[-1] + 1

    def _alone_in_nll(self, k: int) -> bool:
        return False


def with_short(pair: TokenizedPair) -> tuple[TokenizedPair, ...]:
    """-> the long document with the chosen answers alone, then the short inputs with both answers, turn by turn.

    Raises ValueError naming a record without short inputs or rejected answers, or whose chosen answers in them are others
    than in the long input, token by token.
    """
    short = pair.short_pairs()
    if not short or not pair.ref_rejected:
        raise ValueError(
            f"record {pair.id!r}: no short inputs with both answers (ref_chosen, ref_rejected); expected one per turn"
        )
    answers = np.concatenate([sequence.answer_ids for sequence in pair.ref_chosen])
    if not np.array_equal(answers, pair.chosen.answer_ids):
        raise ValueError(
            f"record {pair.id!r}: {len(pair.chosen.answer_ids)} answer tokens in the long input, {len(answers)} in the short "
            "ones; a turn's reward on the one is compared with that on the other, so expected the same answers in both"
        )
    parts = replace(pair, rejected=()), *short
    return tuple(replace(part, chosen=replace(part.chosen, nll_labels=None)) for part in parts)


def pack_triples(pairs: Sequence[TokenizedPair], *, separate: bool = False) -> TripleBatch:
    """Pack records into one row, each with its short inputs. Raises ValueError as `with_short` and `pack` do."""
    parts = [with_short(pair) for pair in pairs]
    batch = pack([part for of_pair in parts for part in of_pair], separate=separate)
    chosen = iter(range(len(batch.ids)))  # as pack numbers them
    rejected = iter(range(len(batch.ids), len(batch.answer_spans)))
    numbers: dict[int, np.ndarray] = {}  # of pack's sequence k: the number that each of its answer tokens has here
    groups: list[int] = []
    roles: list[str] = []
    for _, *short in parts:
        document, anchors = next(chosen), []
        for part in short:
            members = [next(chosen), *(next(rejected) for _ in part.rejected)]
            numbers |= {k: np.array(len(roles) + j) for j, k in enumerate(members)}
            anchors.append(len(roles) + len(members))
            groups += [groups[-1] + 1 if groups else 0] * (len(members) + 1)
            roles += ["chosen", *["rejected"] * len(part.rejected), "anchor"]
        numbers[document] = np.repeat(anchors, [len(part.chosen.answer_ids) for part in short])
    segments = batch.segments.numpy().copy()
    for k, spans in enumerate(batch.answer_spans):
        segments[np.concatenate([np.arange(*span) for span in spans])] = numbers[k]
    given = {f.name: getattr(batch, f.name) for f in fields(batch)}
    given |= {"segments": torch.from_numpy(segments), "answer_spans": _answer_spans(segments, len(roles))}
    given |= {"ids": tuple(pair.id for pair in pairs), "rejected_pair": (), "ref_logps": None}
    return TripleBatch(**given, groups=tuple(groups), roles=tuple(roles))
