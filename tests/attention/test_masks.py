"""What a mask function shows is read off it, and nothing else is taken for it."""

import pytest
import torch
from transformers import masking_utils as theirs

from longpo_ops.attention.masks import Seen, read_mask

NONE = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("rows", [1, 2, 128, 4096, 131_072])
def test_windows(rows):
    assert read_mask(theirs.sliding_window_causal_mask_function(rows)) == Seen(window=rows)


@pytest.mark.parametrize("rows", [2, 3, 128, 8192])
def test_chunks(rows):
    assert read_mask(theirs.chunked_causal_mask_function(rows, NONE)) == Seen(chunk=rows)


def test_all_of_the_past():
    assert read_mask(theirs.causal_mask_function) == Seen()


@pytest.mark.parametrize(
    "other",
    [
        theirs.bidirectional_mask_function,
        theirs.sliding_window_bidirectional_mask_function(5),
        lambda batch, head, row, key: (key <= row) & (key != row - 3),  # a gap
        lambda batch, head, row, key: (key <= row) & (key > row - 5 - row % 2),  # windows of two sizes
        lambda batch, head, row, key: key < row,
    ],
    ids=["bidirectional", "around", "gap", "two windows", "not itself"],
)
def test_what_is_none_of_them(other):
    assert read_mask(other) is None


@pytest.mark.parametrize("seen", [Seen(), Seen(window=3), Seen(chunk=3)], ids=str)
def test_first_keys_are_those_of_the_mask(seen):
    function = {
        "full": theirs.causal_mask_function,
        "window 3": theirs.sliding_window_causal_mask_function(3),
        "chunk 3": theirs.chunked_causal_mask_function(3, NONE),
    }[str(seen)]
    for row in range(10):
        shown = [key for key in range(10) if function(0, 0, torch.tensor(row), torch.tensor(key))]
        assert shown == list(range(seen.first_key(row), row + 1))
