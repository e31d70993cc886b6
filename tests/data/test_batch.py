"""Packs: rebuilt token by token from the separate sequences, visibility included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longpo_ops.data import TokenizedPair, TokenSequence, pack, pack_within, packed_length, spread_positions

X = -100


def sequence(prefix: list[int], parts: list[tuple[list[int], bool]]) -> TokenSequence:
    """A prefix and then (tokens, are they an answer) parts; every third prefix token and all else counts as NLL."""
    ids = np.array(prefix + [token for tokens, _ in parts for token in tokens])
    answer = np.array([False] * len(prefix) + [is_answer for tokens, is_answer in parts for _ in tokens])
    nll = answer | (np.arange(len(ids)) % 3 != 0)
    return TokenSequence(ids, np.where(answer, ids, X), np.where(nll, ids, X))


@st.composite
def pairs(draw, min_rejected=0):
    tokens = st.lists(st.integers(0, 3), min_size=1, max_size=4)  # few ids: answers often begin alike
    prefix = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    turns = draw(st.integers(1, 3))
    questions = [draw(tokens) for _ in range(turns - 1)]

    def conversation():
        parts = [(draw(tokens), True)]
        for question in questions:
            parts += [(question, False), (draw(tokens), True)]
        return sequence(prefix, parts)

    rejected = draw(st.integers(min_rejected, 3))
    return TokenizedPair(
        draw(st.text("ab", max_size=3)), conversation(), tuple(conversation() for _ in range(rejected))
    )


def sequences_of(batch_pairs) -> list[TokenSequence]:
    """In the order of their numbers: chosen ones first."""
    return [pair.chosen for pair in batch_pairs] + [s for pair in batch_pairs for s in pair.rejected]


def visible(layout, row: int) -> list[int]:
    """Rows that a row attends to, as layout.py says."""
    for spans in layout.pairs:
        for j, (start, end) in enumerate(spans.tails):
            if j == 0 and spans.start <= row < end:
                return list(range(spans.start, row + 1))
            if j > 0 and start <= row < end:
                return [*range(spans.start, spans.prefix_end - 1), *range(start, row + 1)]
    raise AssertionError(f"row {row} belongs to no tail")


@given(st.lists(pairs(), min_size=1, max_size=4))
def test_every_row_is_a_row_of_its_sequence(batch_pairs):
    """Each row sees the tokens at the positions that it sees in its own sequence, and predicts what it does there."""
    batch = pack(batch_pairs)
    n = batch.layout.length
    assert batch.input_ids.shape == batch.position_ids.shape == (1, n)
    assert batch.labels.shape == batch.segments.shape == batch.nll_weights.shape == (n,)
    ids, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    answers, nll = {}, {}
    for row in range(n):
        rows = visible(batch.layout, row)
        assert [positions[r] for r in rows] == list(range(len(rows)))
        seen, label, k = [ids[r] for r in rows], int(batch.labels[row]), int(batch.segments[row])
        if k >= 0:
            answers.setdefault(k, {})[len(seen)] = (seen, label)
        if batch.nll_weights[row] > 0:
            pair = next(i for i, spans in enumerate(batch.layout.pairs) if spans.start <= row < spans.end)
            nll.setdefault(pair, {})[len(seen)] = (seen, label, float(batch.nll_weights[row]))
        assert (label == X) == (k < 0 and batch.nll_weights[row] == 0)
    for k, s in enumerate(sequences_of(batch_pairs)):
        at = [t for t in range(1, len(s)) if s.labels[t] != X]
        assert answers[k] == {t: (s.ids[:t].tolist(), int(s.ids[t])) for t in at}
    for b, pair in enumerate(batch_pairs):
        s = pair.chosen
        at = [t for t in range(1, len(s)) if s.nll_labels[t] != X]
        weight = 1 / max(1, len(at))
        assert nll.get(b, {}) == {t: (s.ids[:t].tolist(), int(s.ids[t]), weight) for t in at}


@given(st.lists(pairs(), min_size=1, max_size=4))
def test_unpack_undoes_pack(batch_pairs):
    batch = pack(batch_pairs)
    separate = batch.unpack()
    for came, expected in zip(separate, sequences_of(batch_pairs), strict=True):
        assert came.ids.tolist() == expected.ids.tolist()
        assert came.labels.tolist() == expected.labels.tolist()
    again, rejected = [], iter(separate[len(batch_pairs) :])
    for pair, chosen in zip(batch_pairs, separate, strict=False):
        assert chosen.nll_labels[1:].tolist() == pair.chosen.nll_labels[1:].tolist()
        again.append(replace(pair, chosen=chosen, rejected=tuple(next(rejected) for _ in pair.rejected)))
    repacked = pack(again)
    assert repacked.layout == batch.layout
    for name in ("input_ids", "position_ids", "labels", "segments", "nll_weights"):
        assert torch.equal(getattr(repacked, name), getattr(batch, name))


@given(st.lists(pairs(), min_size=1, max_size=4))
def test_separate_sequences_are_whole_and_say_of_their_rows_what_packed_ones_do(batch_pairs):
    batch, packed = pack(batch_pairs, separate=True), pack(batch_pairs)
    sequences = sequences_of(batch_pairs)
    assert batch.layout.length == sum(map(len, sequences)) == sum(packed_length(pair, True) for pair in batch_pairs)
    assert (batch.ids, batch.rejected_pair, batch.num_pairs) == (packed.ids, packed.rejected_pair, len(batch_pairs))
    for k, (spans, expected) in enumerate(zip(batch.layout.pairs, sequences, strict=True)):
        ((start, end),), rows = spans.tails, slice(spans.start, spans.end)
        assert spans.start < spans.prefix_end == start < end and end - spans.start == len(expected)
        assert batch.input_ids[0, rows].tolist() == expected.ids.tolist()
        assert batch.position_ids[0, rows].tolist() == list(range(len(expected)))
        assert set(batch.segments[rows].tolist()) <= {-1, k} and (
            k < len(batch_pairs) or not batch.nll_weights[rows].any()
        )
    for name in ("labels", "segments", "nll_weights"):  # sequence by sequence, those that answer or count
        kept = [(each.segments >= 0) | (each.nll_weights > 0) for each in (batch, packed)]
        ours, theirs = (sorted(getattr(b, name)[rows].tolist()) for b, rows in zip((batch, packed), kept, strict=True))
        assert ours == theirs
    for ours, theirs in zip(batch.unpack(), packed.unpack(), strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist() and ours.labels.tolist() == theirs.labels.tolist()
        assert (ours.nll_labels is None) == (theirs.nll_labels is None)
        assert ours.nll_labels is None or ours.nll_labels.tolist() == theirs.nll_labels.tolist()
    groups = list(pack_within(batch_pairs, batch.layout.length, separate=True))
    assert groups == [batch_pairs]
    with pytest.raises(ValueError, match="target_length=999 with separate=True"):
        pack(batch_pairs, 999, separate=True)


@given(st.lists(pairs(), min_size=1, max_size=4))
def test_host_lists_agree_with_the_tensors(batch_pairs):
    batch = pack(batch_pairs)
    assert batch.layout.length == sum(packed_length(pair) for pair in batch_pairs)
    assert list(batch.rejected_pair) == [b for b, p in enumerate(batch_pairs) for _ in p.rejected]
    segments = torch.full((batch.layout.length,), -1)
    for k, spans in enumerate(batch.answer_spans):
        assert spans
        for start, end in spans:
            segments[start:end] = k
    assert torch.equal(segments, batch.segments)
    end = 0
    for spans in batch.layout.pairs:
        assert spans.start == end < spans.prefix_end == spans.tails[0][0]
        for (_, before), (after, _) in zip(spans.tails, spans.tails[1:]):
            assert before == after
        end = spans.end
    assert end == batch.layout.length


def test_the_prefix_ends_before_answers_that_begin_alike():
    chosen = sequence([7, 8, 9], [([1, 1, 2], True)])
    rejected = sequence([7, 8, 9], [([1, 1, 3], True)])
    batch = pack([TokenizedPair("p", chosen, (rejected,))])
    assert batch.input_ids.tolist() == [[7, 8, 9, 1, 1, 2, 9, 1, 1, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [8, 9, 1, 1, 2, X, 1, 1, 3, X]
    assert batch.segments.tolist() == [-1, -1, 0, 0, 0, -1, 1, 1, 1, -1]
    assert batch.answer_spans == (((2, 5),), ((6, 9),))
    assert batch.layout.pairs[0].prefix_end == 3 and batch.layout.pairs[0].tails == ((3, 6), (6, 10))


def test_prompts_that_part_early_share_what_they_can():
    chosen = sequence([7, 8, 9], [([1], True)])
    rejected = sequence([7, 5, 5, 5], [([2], True)])
    batch = pack([TokenizedPair("p", chosen, (rejected,))])
    assert batch.input_ids.tolist() == [[7, 8, 9, 1, 7, 5, 5, 5, 2]]
    assert batch.segments.tolist() == [-1, -1, 0, -1, -1, -1, -1, 1, -1]
    other = sequence([3, 8, 9], [([1], True)])
    with pytest.raises(ValueError, match="record 'p': its sequences share no token"):
        pack([TokenizedPair("p", chosen, (other,))])
    with pytest.raises(ValueError, match="no pairs came"):
        pack([])


def test_reference_log_probs_travel_in_the_order_of_sequences():
    chosen, rejected = sequence([7, 8], [([1], True)]), sequence([7, 8], [([2], True)])
    pair = TokenizedPair("p", chosen, (rejected, rejected), ref_chosen_logp=-1.0, ref_rejected_logps=(-2.0, -3.0))
    assert pack([pair, pair]).ref_logps.tolist() == [-1.0, -1.0, -2.0, -3.0, -2.0, -3.0]
    assert pack([pair, replace(pair, ref_chosen_logp=None, ref_rejected_logps=None)]).ref_logps is None


def test_batches_move_whole():
    pair = TokenizedPair("p", sequence([7, 8], [([1], True)]), (sequence([7, 8], [([2], True)]),))
    moved = pack([pair]).to("meta")
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert moved.layout == pack([pair]).layout and moved.num_pairs == 1


@given(st.lists(pairs(), max_size=12), st.integers(0, 40))
def test_greedy_packing_keeps_order_and_budget(stream, extra):
    budget = max([packed_length(pair) for pair in stream], default=1) + extra
    groups = list(pack_within(iter(stream), budget))
    assert [id(pair) for group in groups for pair in group] == [id(pair) for pair in stream]
    lengths = [sum(packed_length(pair) for pair in group) for group in groups]
    assert all(length <= budget for length in lengths)
    for length, following in zip(lengths, groups[1:]):
        assert length + packed_length(following[0]) > budget  # no group could have taken the next pair too


def test_a_pair_beyond_the_budget_is_named():
    pair = TokenizedPair("p", sequence([7, 8], [([1], True)]), (sequence([7, 8], [([2], True)]),))
    assert packed_length(pair) == 5
    with pytest.raises(ValueError, match="record 'p' packs into 5 tokens, the budget of a pack is 4"):
        list(pack_within([pair], 4))


# position synthesis


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 500), st.integers(0, 9), st.integers(0, 2**32))
def test_spread_positions_rise_to_the_end_with_contiguous_answers(length, tail, room, chunks, seed):
    target = length + tail + room
    positions = spread_positions(length, tail, target, np.random.default_rng(seed), chunks)
    assert positions.shape == (length + tail,) and np.all(np.diff(positions) >= 1)
    assert positions[0] == 0 and np.all(np.diff(positions[length - 1 :]) == 1)
    assert positions[-1] == (target if min(chunks, length) > 1 else length + tail) - 1
    again = spread_positions(length, tail, target, np.random.default_rng(seed), chunks)
    assert positions.tolist() == again.tolist()


def test_spread_positions_cover_the_long_range():
    seen = np.zeros(512, dtype=bool)
    for seed in range(400):
        seen[spread_positions(56, 8, 512, np.random.default_rng(seed))] = True
    assert seen.all()
    with pytest.raises(ValueError, match="target_length 63"):
        spread_positions(56, 8, 63, np.random.default_rng(0))


def test_packing_with_spread_positions():
    prompt = list(range(10, 50))
    chosen = sequence(prompt, [([1, 2], True), ([5], False), ([6], True)])
    rejected = sequence(prompt, [([1], True), ([5], False), ([3, 4, 4], True)])
    pair = TokenizedPair("p", chosen, (rejected,))
    plain, spread = pack([pair, pair]), pack([pair, pair], target_length=1000, seed=3)
    assert torch.equal(plain.input_ids, spread.input_ids) and plain.layout == spread.layout
    positions = spread.position_ids[0]
    for spans in spread.layout.pairs:
        last = int(positions[spans.prefix_end - 1])
        (start, end), (other, other_end) = spans.tails
        assert positions[start:end].tolist() == list(range(last + 1, last + 1 + end - start))
        assert positions[other:other_end].tolist() == list(range(last, last + other_end - other))
        assert max(positions[spans.start : spans.end]) == 999
    assert torch.equal(positions, pack([pair, pair], target_length=1000, seed=3).position_ids[0])
    assert not torch.equal(positions, pack([pair, pair], target_length=1000, seed=4).position_ids[0])
    with pytest.raises(ValueError, match="record 'p'"):
        pack([pair], target_length=20)
