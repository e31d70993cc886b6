"""The sweep that keeps 16-bit exponentials of a chunk in place of its float32 logits (kernels/scaled_exps.py; opt-in).

    E, S, logp   from the product's epilogue       dz = r E,  r = -g scale / S  (n,)      docs/mathematics.md
    dh = r (E W)                                   r in float32, by rows of a float32 product
    dW += E^T (r h)                                r h rounded to the operands' dtype

E does not depend on g: a chunk is scored, waits and is pushed, or visited at once. E lies where the tile of logits would, in
half of its bytes. Bytes beside the products': 2 n V written; 4 n H for r h, 10 n H for dh by way of float32.

What needs logits takes the tile, as in HeadSweep: what is asked for beside a log-prob, the affine family, a bias that takes a
gradient (column sums of dz), a sparse hidden gradient (rows of dz of both signs), and weights whose rows are not contiguous.

Tests: tests/kernels/test_scaled_exps.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .products import is_row_major
from .rows import Chunk, to_device
from .sweep import HeadSweep, Held
from .tiles import NOTHING, Beside, _narrow


class HeldExps(NamedTuple):
    """A scored chunk waiting for its weights."""

    chunk: Chunk
    h: Tensor
    exps: Tensor  # (n, V) bfloat16
    totals: Tensor  # (n,) S
    stats: Tensor


class ExpsSweep(HeadSweep):
    """HeadSweep over tiles that have scaled_exps."""

    @property
    def _serves(self) -> bool:
        plain = self.db is None and not self.options.sparse
        return plain and not self.products.blockwise and is_row_major(self.products.weight)

    def score(self, chunk: Chunk, beside: Beside = NOTHING, affine: bool = False) -> tuple[Tensor, Held | HeldExps]:
        if affine or beside.columns > 2 or not self._serves:
            return super().score(chunk, beside)
        h, labels = chunk.hidden(self.products.dtype), to_device(chunk.labels(), self.device)
        room = _narrow(self.tile[: h.shape[0]], torch.bfloat16)
        found = self.tiles.scaled_exps(h, self.products.weight, labels, self.map, room)
        return found.logps, HeldExps(chunk, h, found.exps, found.totals, found.stats)

    def push(self, held: Held | HeldExps, g: Tensor, classes: Tensor | None = None) -> None:
        if isinstance(held, Held):
            return super().push(held, g, classes)
        r = (-self.map.scale * g / held.totals)[:, None]
        exps = held.exps.to(self.products.dtype)  # itself, where operands have 16 bits
        if self.dw is not None:
            rows = torch.mul(held.h, r, out=torch.empty_like(held.h))
            self.products.add_weight_gradient_(self.dw, exps, rows, not self.gathered)
            self.gathered = True
        if self.options.need_hidden:  # last: with reuse_hidden this overwrites what h may be a view of
            held.chunk.write(self.products.hidden_gradient(exps, wide=True).mul_(r))

    def visit(self, chunk: Chunk, g: Tensor) -> Tensor:
        if not self._serves:
            return super().visit(chunk, g)
        logps, held = self.score(chunk)
        self.push(held, g)
        return logps
