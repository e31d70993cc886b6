"""Where the sequences of a pack lie: host integers, no tensors.

A pack of N tokens holds pairs one after another. With one rejected answer a pair looks like this:

    rows        start ............ prefix_end-1 | tails[0] ............. | tails[1] .............
    content     p_0  p_1  ...  p_{P-1}          | c_0  c_1  ...  c_{C-1} | p_{P-1}  r_0  ... r_{R-1}
    position    0    1    ...  P-1              | P    P+1  ...          | P-1      P    ...

Prefix p (P tokens) is what chosen and rejected share, c and r are what follows it in each of them. A rejected tail
opens with a repeat of the last prefix token, at that token's own position: row prefix_end-1 predicts c_0, the repeat
predicts r_0, and so every row has exactly one label. Hence, with keys and queries given as row numbers of the
pack:

    prefix row t         attends to [start, t]
    tails[0] row t       attends to [start, t]: prefix and chosen tail are one plain causal sequence
    tails[j] row t, j>0  attends to [start, prefix_end - 1) and to [tails[j][0], t]

A rejected tail therefore leaves out row prefix_end-1, whose token and position its own first row repeats, and never
sees the chosen tail, another rejected tail or another pair.

Tests: tests/data/test_batch.py.
"""

from dataclasses import dataclass

from ..kinds import check_each, check_whole, refusal


@dataclass(frozen=True)
class PairSpans:
    """One pair inside a pack, as half-open row ranges.

    start: first row of the prefix. prefix_end: one past its last row, at least start + 1.
    tails: (start, end) of each tail; tails[0] is the chosen one, directly after the prefix (it starts at prefix_end);
    every further one is a rejected tail, directly after the tail before it. A pair without rejected tails is a
    plain causal sequence.
    """

    start: int
    prefix_end: int
    tails: tuple[tuple[int, int], ...]

    def __post_init__(self):
        check_whole("PairSpans: start", self.start)
        check_whole("PairSpans: prefix_end", self.prefix_end)
        for tail in check_each("PairSpans: tails", self.tails, tuple, "(start, end)", (tuple, list)):
            if len(tail) != 2:
                raise refusal("PairSpans: tails", self.tails, "(start, end) each")
            for row in tail:
                check_whole("PairSpans: tails", row)

    @property
    def end(self) -> int:
        """One past the pair's last row."""
        return self.tails[-1][1]


@dataclass(frozen=True)
class SharedPrefixLayout:
    """All pairs of a pack of `length` rows: contiguous, in order, the first one starts at row 0."""

    pairs: tuple[PairSpans, ...]
    length: int

    def __post_init__(self):
        tuple(check_each("SharedPrefixLayout: pairs", self.pairs, PairSpans, "a PairSpans", (tuple, list)))
        check_whole("SharedPrefixLayout: length", self.length)
