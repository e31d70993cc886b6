"""Where the sequences of a pack lie: host integers, no tensors.

A pack of N tokens holds documents one after another, each with the sequences that begin with it: a pair, or a tree. With one
rejected answer a pair looks like this:

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

In a tree a tail may leave any row f = forks[j-1] of its document that comes before it, and not the last prefix row alone: its
first row repeats row f, and its rows see themselves and what row f sees, but for f itself. Two questions q, u about one
document p, with answers a, b and c, d:

    rows        [p q a]   [q_last b]   [p_last u c]   [u_last d]          forks    q_last, p_last, u_last
    row of d    attends to p without its last row, to p_last u without u_last, and to d's own rows up to itself

Tests: tests/data/test_batch.py, tests/data/test_tree.py.
"""

from bisect import bisect_right
from dataclasses import dataclass

from ..kinds import check_each, check_whole, refusal


@dataclass(frozen=True)
class PairSpans:
    """One document and its sequences inside a pack, as half-open row ranges: a pair, or a tree.

    start: first row of the prefix. prefix_end: one past its last row, at least start + 1.
    tails: (start, end) of each tail; tails[0] is the chosen one, directly after the prefix (it starts at prefix_end);
    every further one is a rejected tail, directly after the tail before it. A pair without rejected tails is a
    plain causal sequence.
    forks: of each tail but tails[0] the row that its first row repeats: one from prefix_end - 1 on and before the tail. None,
    the default, is prefix_end - 1 for all: a pair.
    """

    start: int
    prefix_end: int
    tails: tuple[tuple[int, int], ...]
    forks: tuple[int, ...] | None = None

    def __post_init__(self):
        check_whole("PairSpans: start", self.start)
        check_whole("PairSpans: prefix_end", self.prefix_end)
        for tail in check_each("PairSpans: tails", self.tails, tuple, "(start, end)", (tuple, list)):
            if len(tail) != 2:
                raise refusal("PairSpans: tails", self.tails, "(start, end) each")
            for row in tail:
                check_whole("PairSpans: tails", row)
        if self.forks is None:
            object.__setattr__(self, "forks", (self.prefix_end - 1,) * (len(self.tails) - 1))
        for row in check_each("PairSpans: forks", self.forks, int, "a row", (tuple, list)):
            check_whole("PairSpans: forks", row)
        if len(self.forks) != max(0, len(self.tails) - 1):
            raise refusal("PairSpans: forks", self.forks, f"a row for each of {len(self.tails)} tails but the first")

    @property
    def end(self) -> int:
        """One past the last row."""
        return self.tails[-1][1]

    def branch(self, j: int) -> tuple[int, int]:
        """The rows that are tail j's own; those of tail 0 include the prefix."""
        return (self.tails[j][0] if j else self.start), self.tails[j][1]

    def tail_of(self, row: int) -> int:
        """The tail that a row is a row of."""
        return bisect_right(self.tails, row, key=lambda tail: tail[1])

    def path(self, j: int) -> tuple[tuple[int, int], ...]:
        """The separate sequence that ends with tail j, as row ranges in their order."""
        start, end = self.branch(j)
        ranges = [(start, end)]
        while j:
            row = self.forks[j - 1]
            j = self.tail_of(row)
            ranges.append((self.branch(j)[0], row))
        return tuple(span for span in reversed(ranges) if span[0] < span[1])

    def is_sound(self, row: int) -> bool:
        """Whether it starts at this row, has no gaps and no empty parts, and every tail leaves a row before it."""
        bounds = [self.prefix_end, *(end for _, end in self.tails)]
        begins = self.start == row and self.start < self.prefix_end and len(self.tails) > 0
        return (
            begins
            and all(a == b and a < end for (a, end), b in zip(self.tails, bounds, strict=False))
            and all(self.prefix_end - 1 <= f < a for f, (a, _) in zip(self.forks, self.tails[1:], strict=True))
        )


@dataclass(frozen=True)
class SharedPrefixLayout:
    """All documents of a pack of `length` rows: contiguous, in order, the first one starts at row 0."""

    pairs: tuple[PairSpans, ...]
    length: int

    def __post_init__(self):
        tuple(check_each("SharedPrefixLayout: pairs", self.pairs, PairSpans, "a PairSpans", (tuple, list)))
        check_whole("SharedPrefixLayout: length", self.length)

    def check(self) -> None:
        """Raises ValueError unless pairs follow each other without gaps from row 0 to length, and tails repeat earlier rows."""
        row = 0
        for number, pair in enumerate(self.pairs):
            if not pair.is_sound(row):
                raise ValueError(
                    f"shared_prefix_layout: pair {number} is {pair}, expected to start at row {row} with a prefix of at "
                    f"least one row, then its tails, each of at least one row and starting where the one before it ends, and "
                    f"repeating a row before it, from the prefix's last one on"
                )
            row = pair.end
        if row != self.length:
            raise ValueError(f"shared_prefix_layout: its pairs end at row {row}, its length says {self.length}")
