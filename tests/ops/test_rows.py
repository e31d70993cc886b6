"""Chunks of rows: every selected row once, in order, never more than the limit, over windows and stretches."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longpo_ops.ops import rows
from longpo_ops.ops.rows import Stretch, chunks, windows


def stretch(length, seed, hidden=None):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 9, (length,), generator=generator)
    answers = labels.where(torch.rand(length, generator=generator) < 0.4, -100)
    nll = labels.where(torch.rand(length, generator=generator) < 0.6, -100)
    hidden = torch.arange(length, dtype=torch.float64)[:, None] + 1000 * seed if hidden is None else hidden
    weights = torch.randint(0, 3, (length,), generator=generator).double() if seed % 2 else torch.ones(1)
    return Stretch(hidden, torch.zeros_like(hidden), answers, torch.tensor([seed]), nll, weights, -100)


def used(stretch, window):
    return stretch.nll_mask(window) | (stretch.segments_at(window) >= 0)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 70), max_size=4), st.integers(1, 90), st.integers(1, 40))
def test_every_row_once_in_order_and_back_to_its_place(lengths, limit, window):
    before, rows.WINDOW = rows.WINDOW, window
    try:
        stretches = [stretch(n, seed) for seed, n in enumerate(lengths)]
        seen = []
        for chunk in chunks(windows(stretches), used, limit):
            hidden = chunk.hidden(torch.float64)
            assert 0 < len(hidden) <= limit
            seen.append(hidden)
            places = [(p.stretch, int(i)) for p in chunk.pieces for i in p.index]
            labels = [s.nll[i] if s.answers[i] == -100 else s.answers[i] for s, i in places]
            numbers = [-1 if s.answers[i] == -100 else s.segments[0] for s, i in places]
            weights = [0 if s.nll[i] == -100 else s.nll_weights[i if len(s.nll_weights) > 1 else 0] for s, i in places]
            assert chunk.labels().tolist() == [int(x) for x in labels]
            assert chunk.segments().tolist() == [int(x) for x in numbers]
            assert chunk.nll_weights(torch.device("cpu"), torch.float64).tolist() == [float(x) for x in weights]
            chunk.write(hidden + 0.5)
        if seen:
            assert [len(h) for h in seen] == list(rows.sizes(sum(map(len, seen)), limit))
            together = torch.cat(seen)
            expected = torch.cat([s.hidden[used(s, slice(0, len(s)))] for s in stretches])
            assert torch.equal(together, expected)
        for s in stretches:
            mask = used(s, slice(0, len(s)))
            assert torch.equal(s.grad[mask], s.hidden[mask] + 0.5) and not s.grad[~mask].any()
    finally:
        rows.WINDOW = before


@given(st.integers(0, 3000), st.integers(1, 700), st.integers(1, 200))
def test_sizes_are_few_and_alike(total, limit, unit):
    found = list(rows.sizes(total, limit, unit))
    unit = 1 if limit % unit else unit
    assert sum(found) == total and len(found) == -(-total // limit)
    assert all(0 < size <= limit for size in found) and all(size % unit == 0 for size in found[:-1])
    assert not found or max(found) - min(found) < 2 * unit


def test_contiguous_rows_are_views_and_others_copies():
    s = stretch(20, 0)
    (whole,) = chunks(windows([s]), lambda s, window: torch.ones(len(range(20)[window]), dtype=torch.bool), 20)
    assert whole.hidden(torch.float64).data_ptr() == s.hidden.data_ptr()
    (every_other,) = chunks(windows([s]), lambda s, window: torch.arange(20)[window] % 2 == 0, 20)
    assert every_other.hidden(torch.float64).tolist() == s.hidden[::2].tolist()
    assert every_other.hidden(torch.float32).dtype == torch.float32
