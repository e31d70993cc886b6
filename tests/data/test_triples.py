"""Packs of triples: every sequence is found in its rows again, turn by turn, and no row of a rejected answer at length."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longpo_ops.data import TokenizedPair, TokenSequence, pack
from longpo_ops.data.triples import pack_triples, with_short

X = -100


def conversation(document: list[int], turns: list[tuple[list[int], list[int]]]) -> TokenSequence:
    """A document, then questions and answers; all of it counts as NLL."""
    parts = [(document, False)] + [part for q, a in turns for part in ((q, False), (a, True))]
    ids = np.array([token for tokens, _ in parts for token in tokens])
    answer = np.array([is_answer for tokens, is_answer in parts for _ in tokens])
    return TokenSequence(ids, np.where(answer, ids, X), ids)


@st.composite
def pairs(draw) -> TokenizedPair:
    tokens = st.lists(st.integers(0, 3), min_size=1, max_size=4)  # few ids: answers often begin alike
    document, count = draw(st.lists(st.integers(0, 9), min_size=2, max_size=8)), draw(st.integers(1, 3))
    questions, chunks = ([draw(tokens) for _ in range(count)] for _ in range(2))
    answers = [[draw(tokens) for _ in range(count)] for _ in range(1 + draw(st.integers(1, 2)))]
    long = [conversation(document, list(zip(questions, each, strict=True))) for each in answers]
    short = [tuple(conversation(*x) for x in zip(chunks, [[t] for t in zip(questions, each)])) for each in answers]
    return TokenizedPair(draw(st.text("ab", max_size=3)), long[0], tuple(long[1:]), short[0], tuple(short[1:]))


def expected(pair: TokenizedPair):
    """(role, ids, labels) of its sequences, turn by turn."""
    rows, past = np.cumsum(pair.chosen.labels != X), 0
    for i, chosen in enumerate(pair.ref_chosen):
        for role, s in [("chosen", chosen), *(("rejected", turns[i]) for turns in pair.ref_rejected)]:
            yield role, s.ids, s.labels
        until = past + len(chosen.answer_ids)
        yield "anchor", pair.chosen.ids, np.where((past < rows) & (rows <= until), pair.chosen.labels, X)
        past = until


@pytest.mark.parametrize("separate", [False, True])
@given(batch_pairs=st.lists(pairs(), min_size=1, max_size=3))
def test_every_sequence_is_found_in_its_rows(separate, batch_pairs):
    batch = pack_triples(batch_pairs, separate=separate)
    found = zip(batch.roles, batch.unpack(), strict=True)
    wanted = [each for pair in batch_pairs for each in expected(pair)]
    assert len(wanted) == len(batch.groups) == len(batch.answer_spans)
    for (role, sequence), (theirs, ids, labels) in zip(found, wanted, strict=True):
        assert role == theirs and np.array_equal(sequence.ids, ids) and np.array_equal(sequence.labels, labels)
    turns = [len(pair.ref_rejected) + 2 for pair in batch_pairs for _ in pair.ref_chosen]
    assert batch.groups == tuple(g for g, size in enumerate(turns) for _ in range(size))
    assert batch.num_pairs == len(turns) and batch.ids == tuple(pair.id for pair in batch_pairs)
    assert not batch.nll_weights.any()
    for k, spans in enumerate(batch.answer_spans):
        assert [row for span in spans for row in range(*span)] == (batch.segments == k).nonzero().squeeze(-1).tolist()


@given(pairs())
def test_rows_are_those_of_the_long_document_once_and_of_short_pairs(pair):
    parts = with_short(pair)
    assert parts[0].rejected == () and all(len(part.rejected) == len(pair.rejected) for part in parts[1:])
    rows = pack_triples([pair]).layout.length
    assert rows == len(pair.chosen) + sum(pack([part]).layout.length for part in parts[1:])
    shorter = replace(pair, rejected=())  # what is never read need not be there
    assert torch.equal(pack_triples([shorter]).input_ids, pack_triples([pair]).input_ids)


PAIR = TokenizedPair(
    "a",
    conversation([1, 2], [([3], [4, 5])]),
    (conversation([1, 2], [([3], [6])]),),
    (conversation([2], [([3], [4, 5])]),),
    ((conversation([2], [([3], [6])]),),),
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ref_chosen": (), "ref_rejected": ()}, "record 'a': no short inputs with both answers"),
        ({"ref_rejected": ()}, "record 'a': no short inputs with both answers"),
        ({"ref_chosen": (conversation([2], [([3], [4])]),)}, "2 answer tokens in the long input, 1 in the short ones"),
        ({"ref_chosen": (conversation([2], [([3], [4, 6])]),)}, "expected the same answers in both"),
    ],
)
def test_what_makes_no_triple_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pack_triples([replace(PAIR, **change)])
