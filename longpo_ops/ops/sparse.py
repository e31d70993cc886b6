"""The hidden gradient from the columns that matter: dh = dZ W without most of dZ's columns (opt-in).

Of a trained model's row nearly all of softmax lies in a few tokens. Of a chunk dz (n, V), with D the columns that are dropped:

    s_t   = |dz_t without its largest number|           the row's own scale; the label's 1 - p would hide a flat tail
    D     = columns with max_t |dz_tj| / s_t <= epsilon
    r_t   = sum of dz_tj over D                          what the row loses
    c_g   = sum over rows t of group g of sign(r_t) / s_t dz_tD            8 groups of neighbouring rows
    dh_t  = sum over kept j of dz_tj W_j  +  r_t / rho_g  c_g W_D,         rho_g = sum over t in g of |r_t| / s_t

The second term puts what row t loses where the rows beside it lose theirs: exact where their dropped parts are multiples of
each other, and sums of rows are always kept. docs/mathematics.md has the derivation, the bound and what is lost: on real
states less than by rounding dZ to bfloat16. Where more than 0.6 of the columns matter (flat distributions), or a
number is not finite, all are taken: the product is then the exact one.

Operations: 2 n K H for K kept columns, and 16 V H; dz is read twice. Scratch: 8 V numbers, and a block of the rows
of W that are kept; the kept columns lie where dz lay. The head's gradient is not touched: Adam would enlarge what is left out.

Tests: tests/ops/test_sparse.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .products import Products


class Rule(NamedTuple):
    """Which columns are kept, the same for every form."""

    epsilon: float = 2.0**-12
    floor: float = 2.0**-20  # of a row's largest number: a scale for rows that have nothing else
    most: float = 0.6  # of the columns: gathering rows of W and the rest cost what more would save
    groups: int = 8
    least_rows: int = 64  # of a chunk: W is read once more for the groups' sums


RULE = Rule()


class Kept(NamedTuple):
    """What stands for dz (n, V)."""

    dz: Tensor  # (n, K) the kept columns, in the memory of dz
    columns: Tensor  # (K,) int64, increasing
    sums: Tensor  # (G, V) c_g, 0 in kept columns
    shares: Tensor  # (n,) r_t / rho_g

    def gradient(self, products: Products) -> Tensor:
        """(n, H) in the operands' dtype or in float32."""
        dh = products.hidden_gradient(self.dz, self.columns)
        of_groups = products.hidden_gradient(self.sums.to(self.dz.dtype))
        size = group_size(dh.shape[0])
        for group, rows, shares in zip(of_groups, dh.split(size), self.shares.to(dh.dtype).split(size), strict=False):
            rows.addr_(shares, group)
        return dh


def group_size(rows: int) -> int:
    """Of a chunk: the rows of one group; the last ones may have fewer, or none."""
    return -(-rows // RULE.groups)


def keep_columns_(dz: Tensor) -> Kept | None:
    """dz (n, V) of any float dtype -> what is kept of it, written over it; None, and dz as it was, where all columns matter."""
    n, vocab = dz.shape
    if n < RULE.least_rows:
        return None
    wide = torch.promote_types(dz.dtype, torch.float32)
    inverse, peaks = dz.new_empty(n, dtype=wide), dz.new_zeros(vocab, dtype=wide)
    for rows in _blocks(dz, 0, n):
        size = dz[rows].to(wide).abs()
        inverse[rows] = _inverse_tail(size)
        peaks = torch.maximum(peaks, size.mul_(inverse[rows, None]).amax(0))
    columns = (peaks > RULE.epsilon).nonzero().squeeze(1)
    if columns.shape[0] > RULE.most * vocab or not bool(peaks.isfinite().all()):
        return None
    dropped = torch.ones_like(peaks).index_fill_(0, columns, 0.0)
    sums, shares = dz.new_zeros(RULE.groups, vocab, dtype=wide), dz.new_empty(n, dtype=wide)
    for group, start in enumerate(range(0, n, group_size(n))):
        members = slice(start, min(start + group_size(n), n))
        for rows in _blocks(dz, members.start, members.stop):
            part = dz[rows].to(wide) * dropped
            shares[rows] = part.sum(1)
            sums[group].addmv_(part.t(), torch.where(shares[rows] < 0, -inverse[rows], inverse[rows]))
            dz[rows, : columns.shape[0]] = dz[rows].index_select(1, columns)
        mass = (shares[members].abs() * inverse[members]).sum()
        shares[members] = torch.where(mass > 0, shares[members] / mass, 0.0)
    return Kept(dz[:, : columns.shape[0]], columns, sums, shares)


def sparse_gradient(dz: Tensor, products: Products, keep: Callable[[Tensor], Kept | None] = keep_columns_) -> Tensor:
    """dz (n, V) -> (n, H), from the columns that `keep` keeps in dz's memory, or all where it keeps all."""
    kept = keep(dz)
    return products.hidden_gradient(dz) if kept is None else kept.gradient(products)


def _inverse_tail(size: Tensor) -> Tensor:
    """|dz| (r, V) -> (r,) 1 / s_t, 0 for rows of zeros."""
    top = size.amax(1)
    squares = size.double().square().sum(1) - top.double().square()
    tail = torch.maximum(squares.clamp_(min=0).sqrt_().to(top.dtype), RULE.floor * top)
    return torch.where(top != 0, 1 / tail, 0.0)


def _blocks(dz: Tensor, start: int, stop: int):
    """Slices of about 1 MiB on a CPU and of a 16th of the rows elsewhere, as the tile functions'."""
    rows = max(1, (1 << 20) // max(1, dz.shape[1] * 8))
    if dz.device.type != "cpu":
        rows = max(rows, dz.shape[0] // 16)
    return (slice(i, min(i + rows, stop)) for i in range(start, stop, rows))
