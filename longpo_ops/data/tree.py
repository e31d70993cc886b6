"""What the sequences of one document share: a trie of their tokens, cut so that every row has one label.

Row t of a sequence says which token follows its token t. A sequence s whose first n tokens are those of another, and whose
first answer token has place a, leaves the other's path at

    f = min(n, a) - 1        rows 0 .. f - 1 are shared; row f is its own, with the token and the position of the path's row f

because there another token follows (f = n - 1), or its own answer begins (f = a - 1): a row of two answers' first tokens
would need two labels. Of the rows before f it says nothing, but for those of its NLL term, where the token that follows is the
same. Each sequence leaves the path that it shares most with; the first one is the trunk and shares with none before it:

    rows = T_0 + sum_s (T_s - f_s)

Cost: T_0 comparisons for each sequence, and its length for each other branch that its path passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .tokenized import IGNORE, TokenSequence


class Branch(NamedTuple):
    """A sequence's own rows: its tokens from place `first` on. parent: the branch, by its place in the order of branches, whose
    row of token `first` the first one repeats; -1 for the trunk, whose `first` is 0."""

    sequence: int
    first: int
    parent: int


@dataclass(eq=False)
class _Node:
    sequence: int
    first: int
    parent: _Node | None
    children: list[_Node] = field(default_factory=list)


def grow(name: str, sequences: Sequence[TokenSequence]) -> tuple[Branch, ...]:
    """The branches of K >= 1 sequences in the order of their rows: each is followed by those that leave it, the ones that leave
    it last first, so that all that leave one row are neighbours.

    Raises ValueError, naming the record, for a sequence that begins with its answer or has none, or shares no token
    with the first.
    """
    trunk = _Node(0, 0, None)
    for number, sequence in enumerate(sequences):
        answer = int(np.argmax(sequence.labels != IGNORE))
        shared, node = (answer, None) if number == 0 else _longest(trunk, sequences, sequence.ids[:answer])
        if shared < 1:
            raise ValueError(
                f"record {name!r}: its sequences share no token before their first answer token; expected the same "
                "prompt in all, and answer labels in each"
            )
        if node is not None:
            while node.parent is not None and shared - 1 <= node.first:
                node = node.parent
            node.children.append(_Node(number, shared - 1, node))
    return _in_order(trunk)


def shared_by_all(sequences: Sequence[TokenSequence], branches: Sequence[Branch]) -> int:
    """Tokens that all sequences begin with, before any of them answers."""
    answer = int(np.argmax(sequences[0].labels != IGNORE))
    return min([answer, *(branch.first + 1 for branch in branches[1:])])


def _longest(trunk: _Node, sequences: Sequence[TokenSequence], ids: np.ndarray) -> tuple[int, _Node]:
    """How many of these tokens a path begins with, at most, and the branch that has them first."""
    best, waiting = (0, trunk), [trunk]
    while waiting:
        node = waiting.pop()
        theirs, ours = sequences[node.sequence].ids[node.first : len(ids)], ids[node.first :]
        differs = np.flatnonzero(theirs != ours[: len(theirs)])
        shared = node.first + (int(differs[0]) if len(differs) else len(theirs))
        if shared > best[0]:
            best = shared, node
        waiting += [child for child in reversed(node.children) if child.first < shared]
    return best


def _in_order(trunk: _Node) -> tuple[Branch, ...]:
    branches, waiting = [], [(trunk, -1)]
    while waiting:
        node, parent = waiting.pop()
        leaving = sorted(node.children, key=lambda child: -child.first)
        waiting += [(child, len(branches)) for child in leaving[::-1]]
        branches.append(Branch(node.sequence, node.first, parent))
    return tuple(branches)
