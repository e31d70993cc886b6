"""Trees of sequences: what shares a row, what each row says, against the separate sequences token by token."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longpo_ops.data import TokenizedPair, TokenSequence, TreeBatch, pack, pack_tree, packed_length
from tests.attention.dense import sequences as paths

X = -100
DOCUMENT = list(range(10, 30))


def sequence(*parts: list[int], answers=(-1,), nll=None) -> TokenSequence:
    """Parts of tokens one after another, those numbered in `answers` labelled; nll: how many tokens count, from the start."""
    ids, labelled = np.array([token for part in parts for token in part]), np.zeros(sum(map(len, parts)), dtype=bool)
    ends = np.cumsum([len(part) for part in parts])
    for i in answers:
        labelled[ends[i] - len(parts[i]) : ends[i]] = True
    counted = None if nll is None else np.where(np.arange(len(ids)) < nll, ids, X)
    return TokenSequence(ids, np.where(labelled, ids, X), counted)


@st.composite
def documents(draw):
    """Sequences over few tokens, which often begin alike, answers too; answers and questions in turn."""
    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=3)

    def one():
        parts = [
            [7, *draw(st.lists(st.integers(0, 1), max_size=3))],
            *(draw(tokens) for _ in range(draw(st.integers(1, 4)))),
        ]
        answers = draw(st.sets(st.integers(1, len(parts) - 1), min_size=1))
        return sequence(*parts, answers=answers, nll=draw(st.none() | st.integers(0, sum(map(len, parts)))))

    return [one() for _ in range(draw(st.integers(1, 6)))]


def said(sequences: list[TokenSequence]) -> tuple[dict, dict]:
    """What separate sequences say: (sequence, tokens before) -> answer token; (tokens before, token) -> NLL weight."""
    answers, weights = {}, {}
    for k, s in enumerate(sequences):
        for t in range(1, len(s)):
            before, token = tuple(s.ids[:t].tolist()), int(s.ids[t])
            if s.labels[t] != X:
                answers[k, before] = token
            if s.nll_labels is not None and s.nll_labels[t] != X:
                key = before, token
                weights[key] = weights.get(key, 0) + 1 / np.count_nonzero(s.nll_labels[1:] != X)
    return answers, weights


@given(st.lists(documents(), min_size=1, max_size=3))
def test_every_row_says_what_the_sequences_say_at_their_tokens(trees):
    batch, sequences = pack_tree(*trees), [each for tree in trees for each in tree]
    assert isinstance(batch, TreeBatch) and batch.layout.length <= sum(map(len, sequences))
    ids, answers, weights = batch.input_ids[0].tolist(), {}, {}
    before, token_of = {}, {}
    for rows in (rows for document in paths(batch.layout) for rows in document):
        assert [batch.position_ids[0, row] for row in rows] == list(range(len(rows)))
        for place, row in enumerate(rows):
            before[row] = tuple(ids[r] for r in rows[: place + 1])
    for row, k in enumerate(batch.segments.tolist()):
        token_of[row], weight = int(batch.labels[row]), float(batch.nll_weights[row])
        assert (token_of[row] == X) == (k < 0 and weight == 0)
        if k >= 0:
            answers[k, before[row]] = token_of[row]
        if weight:
            key = before[row], token_of[row]
            weights[key] = weights.get(key, 0) + weight
    documents_apart = len(trees) == 1  # else two documents may hold the same tokens
    expected, expected_weights = said(sequences)
    assert answers == expected
    if documents_apart:
        assert weights.keys() == expected_weights.keys()
        assert all(abs(weights[key] - expected_weights[key]) < 1e-12 for key in weights)
    assert float(batch.nll_weights.sum()) == pytest.approx(sum(expected_weights.values()))
    for ours, theirs in zip(batch.unpack(), sequences, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist() and ours.labels.tolist() == theirs.labels.tolist()
        assert ours.nll_labels is None


@pytest.mark.parametrize("order", [range(8), (5, 0, 7, 2, 4, 1, 6, 3)], ids=["in order", "mixed"])
def test_questions_and_their_answers_hold_document_and_questions_once(order):
    """Two questions with four answers each, which all begin alike."""
    answer = [[1, 1, n] for n in range(4)]
    tree = [sequence(DOCUMENT, question, answer[n]) for question in ([2, 3, 4], [2, 5]) for n in range(4)]
    batch = pack_tree([tree[i] for i in order])
    # The document, both questions' own tokens, and an answer of three for each, in seven tails that repeat a token.
    assert batch.layout.length == len(DOCUMENT) + 3 + 1 + 8 * 3 + 7
    assert packed_length(TokenizedPair("p", tree[0], tuple(tree[1:]))) == batch.layout.length
    (spans,) = batch.layout.pairs
    if order == range(8):
        assert spans.tails[0] == (21, 26) and spans.prefix_end == 21  # the questions begin alike, too
        assert spans.forks == (22, 22, 22, 20, 39, 39, 39)
    leaving = [fork for fork, _ in groupby(spans.forks)]  # the tails that leave one row are neighbours
    assert len(set(leaving)) == len(leaving) == 3


def test_a_later_turn_s_rejected_answer_shares_the_turns_before_it():
    """Chosen turns that a rejected sequence goes on from are no answers of its own: their rows are shared."""
    questions, chosen = [[2, 3], [4, 5]], [[6, 6, 6, 6], [7, 7]]
    turns = sequence(DOCUMENT, questions[0], chosen[0], questions[1], chosen[1], answers=(2, 4), nll=30)
    second = sequence(DOCUMENT, questions[0], chosen[0], questions[1], [8, 8, 8])
    first = sequence(DOCUMENT, questions[0], [9, 9])
    batch = pack([TokenizedPair("p", turns, (second, first))])
    assert batch.layout.length == len(turns) + (1 + 3) + (1 + 2)
    (spans,) = batch.layout.pairs
    assert spans.forks == (27, 21) and spans.prefix_end == 22
    assert batch.segments[len(turns) :].tolist() == [1, 1, 1, -1, 2, 2, -1]
    assert [s.ids.tolist() for s in batch.unpack()] == [s.ids.tolist() for s in (turns, second, first)]
    assert batch.unpack()[0].nll_labels[1:].tolist() == turns.nll_labels[1:].tolist()


def test_a_sequence_that_goes_on_where_another_ends_repeats_its_last_token():
    whole = sequence(DOCUMENT, [1, 2], [3])
    batch = pack_tree([whole, sequence(DOCUMENT, [1, 2], [3], [4, 4])])
    assert batch.layout.pairs[0].forks == (22,) and batch.layout.length == len(whole) + 3
    assert batch.segments.tolist() == [*[-1] * 21, 0, -1, 1, 1, -1]
    assert batch.answer_spans == (((21, 22),), ((23, 25),))


def test_weights_of_a_shared_row_are_summed():
    """The document counts in the NLL term of two sequences, at 1 / 3 and at 1 / 2 a token."""
    one, two = sequence([5, 6, 7, 8], [1], nll=4), sequence([5, 6, 7, 9], [2], nll=3)
    batch = pack_tree([one, two])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 7, 9, 2]]
    assert batch.labels.tolist() == [6, 7, 8, 1, X, X, 2, X]
    expected = [1 / 3 + 1 / 2, 1 / 3 + 1 / 2, 1 / 3, 0, 0, 0, 0, 0]
    torch.testing.assert_close(batch.nll_weights, torch.tensor(expected, dtype=torch.float64))


REFUSED = {
    "no documents": ([], "no documents came"),
    "no sequences": ([[]], "document 0: no sequences came"),
    "a sequence as a document": ([sequence([1], [2])], "documents.0.: expected a list of TokenSequences"),
    "tokens": ([[[1, 2]]], "document 0.0.: expected a TokenSequence"),
    "nothing shared": (
        [[sequence([1], [2])], [sequence([1], [2]), sequence([3], [2])]],
        "record 'document 1': its sequences",
    ),
    "an answer first": ([[sequence([1], [2]), sequence([1, 2])]], "record 'document 0': its sequences share no token"),
    "no answer": ([[sequence([1], [2], answers=())]], "record 'document 0': its sequences share no token"),
}


@pytest.mark.parametrize("given, message", REFUSED.values(), ids=REFUSED)
def test_refuses_what_is_no_tree(given, message):
    with pytest.raises(ValueError, match=message):
        pack_tree(*given)
