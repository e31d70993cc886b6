"""The C++ back-end for CPUs: csrc/cpu behind the tile interface (equations and contract: tiles.py).

    z (n, V) float32  ->  logps (n,), stats (n, 2), dz (n, V) float32, float16 or bfloat16 in z's memory

Rows are split over torch's threads; a row is read from memory once. Scratch: 4 KiB a thread, and V floats for a
bias that is not float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .build import load_cpu
from .sparse import RULE, Kept, sparse_gradient
from .tiles import NOTHING, _narrow


class CpuTiles:
    """Rows in C++. Raises BuildError when the library cannot be compiled or loaded, ValueError for a tile unlike the
    contract, before anything is written."""

    name = "cpu"
    linear_logps = scaled_exps = None

    def __init__(self):
        load_cpu()
        self._ops = torch.ops.longpo_cpu

    def logps(self, z, labels, map, beside=NOTHING):
        return self._ops.logps(z, labels, *map, *beside)

    def gradient_(self, z, labels, stats, g, map, dtype, classes=None):
        self._ops.gradient_(z, labels, stats, g, *map, dtype, classes)
        return _narrow(z, dtype)

    def logps_gradient_(self, z, labels, g, map, dtype):
        return self._ops.logps_gradient_(z, labels, g, *map, dtype), _narrow(z, dtype)

    def divergence_(self, z, z_teacher, kappa, divergence, map, map_teacher, dtype, need_student, need_teacher):
        values = self._ops.divergence_(
            z, z_teacher, kappa, *divergence, *map, *map_teacher, dtype, need_student, need_teacher
        )
        return (
            values,
            _narrow(z, dtype) if need_student else None,
            _narrow(z_teacher, dtype) if need_teacher else None,
        )

    def sparse_gradient(self, dz, products, rule):
        return sparse_gradient(dz, products, self.keep_columns_)

    def keep_columns_(self, dz: Tensor) -> Kept | None:
        if dz.shape[0] < RULE.least_rows:
            return None
        columns, sums, shares = self._ops.keep_columns_(dz, *RULE[:4])
        kept = columns.shape[0]
        return None if kept == dz.shape[1] else Kept(dz[:, :kept], columns, sums, shares)

    def segment_sums(self, values, segments, out):
        self._ops.segment_sums(values, segments, out)
