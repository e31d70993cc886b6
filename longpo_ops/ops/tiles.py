"""What happens to one tile of logits: the interface every back-end implements, and its PyTorch form.

A tile z (n, V) holds h @ W.T for n rows, before bias. With the logit map

    l = f(z + bias),   f(x) = scale * x                            (softcap == 0)
                       f(x) = softcap * tanh(scale * x / softcap)  (softcap > 0)

a tile function computes, for row t with label y and stats (m, s) = (max_j l_j, log sum_j exp(l_j - m)):

    logp        = (l_y - m) - s                       the log-probability of the label
    p_j         = exp((l_j - m) - s)
    dz_j        = g * (1[j == y] - p_j) * f'(z_j)     the gradient of g * logp

The pair (m, s) is kept instead of m + s: at |l| = 1e4 their float32 sum would cost 1e-3 nats.

Contract, the same for every back-end (torch | cpu | triton | cuda):
  z        (n, V) float32, last dimension contiguous, any row pitch >= V; n may be 0. The torch form also takes float64.
  labels   (n,)   int64 on z's device, each in [0, V): rows without a label never reach a tile.
  stats    (n, 2) z.dtype
  g        (n,)   z.dtype
  A row with a NaN (or +inf) logit gives a NaN logp and NaN gradients; -inf logits have probability 0 and gradient 0.
  Functions ending in _ overwrite z. With `dtype` float16 or bfloat16 the result is written into the first half of each
  float32 row and returned as a view (n, V) whose row pitch is twice z's, so that no second tile exists.
Scratch: O(n) numbers; for the PyTorch form blocks of rows, of about 1 MiB on a CPU and a 16th of the tile elsewhere.

Products and chunks are not a tile's matter: products.py, sweep.py.

Tests: tests/ops/test_cpu_tiles.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 20  # of the PyTorch form on a CPU: its caches hold them
BLOCK_SHARE = 16  # of a tile per block elsewhere: what a launch costs, an H200 reads 20 MB in


class LogitMap(NamedTuple):
    """How a product h @ W.T becomes a logit. A temperature T divides both scale and softcap."""

    bias: Tensor | None = None  # (V,), any floating dtype, on the tile's device
    scale: float = 1.0
    softcap: float = 0.0

    def apply_(self, z: Tensor) -> Tensor:
        """(n, V) products to logits, in place."""
        if self.bias is not None:
            z.add_(self.bias)
        if self.softcap:
            return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return z.mul_(self.scale) if self.scale != 1.0 else z

    def chain_(self, dl: Tensor, logits: Tensor) -> Tensor:
        """(n, V) gradient by the logits to gradient by the products, in place; f' = scale * (1 - (l / softcap)^2)."""
        if self.softcap:
            dl.mul_(1 - (logits / self.softcap).square_())
        return dl.mul_(self.scale) if self.scale != 1.0 else dl


class Divergence(NamedTuple):
    """Which full-vocabulary divergence: p is the student's distribution, q the teacher's.

    forward: KL(q || p)      reverse: KL(p || q)
    jsd:     beta * KL(q || m) + (1 - beta) * KL(p || m),  m = beta * q + (1 - beta) * p
    """

    kind: str  # "forward" | "reverse" | "jsd"
    beta: float = 0.5


class Tiles(Protocol):
    """A back-end. `linear_logps` is optional (None): log-probs of rows straight from hidden states, without a tile."""

    name: str

    def logps(self, z: Tensor, labels: Tensor, map: LogitMap) -> tuple[Tensor, Tensor]:
        """-> logps (n,), stats (n, 2); z is left as it is."""

    def gradient_(
        self, z: Tensor, labels: Tensor, stats: Tensor, g: Tensor, map: LogitMap, dtype: torch.dtype
    ) -> Tensor:
        """-> dz (n, V) in `dtype`, in z's memory, of rows whose stats are known."""

    def logps_gradient_(
        self, z: Tensor, labels: Tensor, g: Tensor, map: LogitMap, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """-> logps (n,), dz (n, V): both of the above in one visit of the row."""

    def divergence_(
        self,
        z: Tensor,
        z_teacher: Tensor,
        kappa: Tensor,
        divergence: Divergence,
        map: LogitMap,
        map_teacher: LogitMap,
        dtype: torch.dtype,
        need_student: bool,
        need_teacher: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """-> values (n,), and where needed kappa * d value / dz and kappa * d value / dz_teacher, (n, V) in `dtype`,
        each in its tile's memory. Both tiles may be overwritten; kappa (n,) is not multiplied into the values."""

    def segment_sums(self, values: Tensor, segments: Tensor, out: Tensor) -> None:
        """out (K,) float64 += the sums of values (n,) by segments (n,) int64; -1 belongs nowhere. Bitwise repeatable."""


def empty_tile(rows: int, vocab: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(rows, V) without values. On CUDA rows begin at multiples of 16 numbers, so that any V is read in 16-byte units."""
    pitch = vocab if device.type == "cpu" else -(-vocab // 16) * 16
    return torch.empty(rows, pitch, device=device, dtype=dtype)[:, :vocab]


def _narrow(z: Tensor, dtype: torch.dtype) -> Tensor:
    """z (n, V) float32 with any pitch -> the first half of each row, seen as (n, V) of a 16-bit dtype."""
    return z if dtype == z.dtype else z.view(dtype)[:, : z.shape[1]]


def _row_blocks(z: Tensor):
    rows = max(1, BLOCK_BYTES // max(1, z.shape[1] * z.element_size()))
    if z.device.type != "cpu":
        rows = max(rows, z.shape[0] // BLOCK_SHARE)
    return (slice(i, i + rows) for i in range(0, z.shape[0], rows))


def _log_softmax(z: Tensor, map: LogitMap) -> tuple[Tensor, Tensor, Tensor]:
    """(r, V) products -> logits, log-probabilities (both new tensors) and stats (r, 2)."""
    logits = map.apply_(z.clone())
    peak = logits.amax(-1, keepdim=True)
    shifted = logits - peak
    log_sum = shifted.exp().sum(-1, keepdim=True).log_()
    return logits, shifted.sub_(log_sum), torch.cat([peak, log_sum], -1)


class TorchTiles:
    """The PyTorch form: every device, float32 and float64, block by block."""

    name = "torch"
    linear_logps = None

    def logps(self, z, labels, map):
        logps, stats = z.new_empty(z.shape[0]), z.new_empty(z.shape[0], 2)
        for rows in _row_blocks(z):
            _, log_p, stats[rows] = _log_softmax(z[rows], map)
            logps[rows] = log_p.gather(-1, labels[rows, None]).squeeze(-1)
        return logps, stats

    def gradient_(self, z, labels, stats, g, map, dtype):
        for rows in _row_blocks(z):
            logits = map.apply_(z[rows].clone())
            log_p = (logits - stats[rows, :1]).sub_(stats[rows, 1:])
            self._write_gradient(z[rows], logits, log_p, labels[rows], g[rows], map, dtype)
        return _narrow(z, dtype)

    def logps_gradient_(self, z, labels, g, map, dtype):
        logps = z.new_empty(z.shape[0])
        for rows in _row_blocks(z):
            logits, log_p, _ = _log_softmax(z[rows], map)
            logps[rows] = log_p.gather(-1, labels[rows, None]).squeeze(-1)
            self._write_gradient(z[rows], logits, log_p, labels[rows], g[rows], map, dtype)
        return logps, _narrow(z, dtype)

    def divergence_(self, z, z_teacher, kappa, divergence, map, map_teacher, dtype, need_student, need_teacher):
        values = z.new_empty(z.shape[0])

        def visit(z, z_teacher, k):  # a block's temporaries end with it
            student, log_p, _ = _log_softmax(z, map)
            teacher, log_q, _ = _log_softmax(z_teacher, map_teacher)
            block_values, dl, dl_teacher = _divergence_rows(log_p, log_q, divergence)
            if need_student:
                _narrow(z, dtype).copy_(map.chain_(dl.mul_(k), student))
            if need_teacher:
                _narrow(z_teacher, dtype).copy_(map_teacher.chain_(dl_teacher.mul_(k), teacher))
            return block_values

        for rows in _row_blocks(z):
            values[rows] = visit(z[rows], z_teacher[rows], kappa[rows, None])
        return (
            values,
            _narrow(z, dtype) if need_student else None,
            _narrow(z_teacher, dtype) if need_teacher else None,
        )

    def segment_sums(self, values, segments, out):
        numbers = torch.arange(out.shape[0], device=out.device)[:, None]  # (K, 1) against (1, n): K n numbers at a time
        room = BLOCK_BYTES if out.device.type == "cpu" else 4 * BLOCK_BYTES  # of the six blocks that a tile may take
        block = max(1, room // (8 * max(1, out.shape[0])))
        for part, of in zip(values.split(block), segments.split(block), strict=True):
            out.add_(torch.where(of == numbers, part.double(), 0.0).sum(1))

    @staticmethod
    def _write_gradient(z, logits, log_p, labels, g, map, dtype):
        dl = log_p.exp_().mul_(-g[:, None])
        dl.scatter_add_(1, labels[:, None], g[:, None])
        _narrow(z, dtype).copy_(map.chain_(dl, logits))


def _divergence_rows(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
    """log-probabilities (r, V) -> values (r,), gradients by student and teacher logits (r, V).

    With u = log p - log q and 0 * log 0 = 0:
      forward: sum -q u        dl = p - q                           dl_teacher = q (-u - value)
      reverse: sum  p u        dl = p (u - value)                   dl_teacher = q - p
      jsd:     m = beta q + (1 - beta) p
               dl = (1 - beta) p (log p/m - KL(p||m))               dl_teacher = beta q (log q/m - KL(q||m))
    """
    p, q = log_p.exp(), log_q.exp()

    def expected(weight: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """sum w * r, and w * (r - that sum), in the memory of r."""
        absent = weight == 0
        log_ratio.masked_fill_(absent, 0.0)
        mean = (weight * log_ratio).sum(-1, keepdim=True)
        return mean.squeeze(-1), log_ratio.sub_(mean).mul_(weight).masked_fill_(absent, 0.0)

    if divergence.kind == "forward":
        value, dl_teacher = expected(q, log_q - log_p)
        return value, p - q, dl_teacher
    if divergence.kind == "reverse":
        value, dl = expected(p, log_p - log_q)
        return value, dl, q - p
    beta = divergence.beta
    if beta <= 0.5:
        p_to_m, q_to_m = _log_ratios_to_mixture(log_p, log_q, beta)
    else:
        q_to_m, p_to_m = _log_ratios_to_mixture(log_q, log_p, 1 - beta)
    value_q, dl_teacher = expected(q, q_to_m)
    value_p, dl = expected(p, p_to_m)
    return beta * value_q + (1 - beta) * value_p, dl.mul_(1 - beta), dl_teacher.mul_(beta)


def _log_ratios_to_mixture(log_a: Tensor, log_b: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """-> log a/m and log b/m for m = (1 - share) a + share b, share <= 1/2. With v = log b - log a:

    log a/m = -log(1 + share (e^v - 1)) is as small as share, and a's gradient is made of it alone: so log1p. Where m is b
    in the main, share e^v > 1, the small one is log b/m = -log(share + (1 - share) e^-v).
    """
    tiny = torch.finfo(log_a.dtype).tiny
    share = max(share, tiny)
    v = log_b - log_a
    e = v.clamp(max=-math.log(tiny)).exp_()
    log_near = (e - 1).mul_(share).log1p_()
    log_far = e.reciprocal_().mul_(1 - share).add_(share).log_()
    far = v > -math.log(share)
    return torch.where(far, log_far + v, log_near).neg_(), torch.where(far, log_far, log_near.sub_(v)).neg_()
