"""What happens to one tile of logits: the interface every back-end implements, and its PyTorch form.

A tile z (n, V) holds h @ W.T for n rows, before bias. With the logit map

    l = f(z + bias),   f(x) = scale * x                            (softcap == 0)
                       f(x) = softcap * tanh(scale * x / softcap)  (softcap > 0)

a tile function computes, for row t with label y and stats (m, s) = (max_j l_j, log sum_j exp(l_j - m)):

    logp        = (l_y - m) - s                       the log-probability of the label
    p_j         = exp((l_j - m) - s)
    dz_j        = g * (1[j == y] - p_j) * f'(z_j)     the gradient of g * logp

The pair (m, s) is kept instead of m + s: at |l| = 1e4 their float32 sum would cost 1e-3 nats.

Beside its log-prob a row can be asked for (class Beside), each a column of stats:

    mean        sum_j p_j (l_j - m)       the entropy is s - mean: no difference of large numbers, whatever m is
    total       sum_j c_j (l_j - m)       c_j the class weights, or 1: sum_j c_j log p_j = total - s * sum_j c_j
    predicted   the first j with l_j = m  as a number: exact up to V = 2^24; -1 in a row without a log-prob

and its gradient can be any member of the affine family (docs/mathematics.md), of which (g, -g, 0, 0) is that of logp:

    dz_j        = (alpha * 1[j == y] + p_j * (beta + gamma * (l_j - m)) + delta * c_j) * f'(z_j)

Contract, the same for every back-end (torch | cpu | triton | cuda):
  z        (n, V) float32, last dimension contiguous, any row pitch >= V; n may be 0. The torch form also takes float64.
  labels   (n,)   int64 on z's device, each in [0, V): rows without a label never reach a tile.
  stats    (n, 2) z.dtype, or with a Beside (n, 5): what was not asked for is 0. gradient_ reads the first two columns.
  g        (n,)   z.dtype; for gradient_ also (n, 4): alpha, beta, gamma, delta of each row.
  classes  (V,)   z.dtype, contiguous, the c_j; None for ones.
  A row with a NaN (or +inf) logit gives a NaN logp and NaN gradients; -inf logits have probability 0, add 0 to
  the mean and have gradient 0 but for delta; c_j = 0 adds 0 to the total whatever l_j is.
  Functions ending in _ overwrite z. With `dtype` float16 or bfloat16 the result is written into the first half of each
  float32 row and returned as a view (n, V) whose row pitch is twice z's, so that no second tile exists.
Scratch: O(n) numbers; for the PyTorch form blocks of rows, of about 1 MiB on a CPU and a 16th of the tile elsewhere.

Products and chunks are not a tile's matter: products.py, sweep.py.

Tests: tests/ops/test_cpu_tiles.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .products import Products
    from .sparse import Rule

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


PEAK, LOG_SUM, MEAN, TOTAL, PREDICTED = range(5)  # the columns of stats
COLUMNS = 5


class Beside(NamedTuple):
    """What a row is asked for beside its log-prob: the columns of stats that are filled in."""

    mean: bool = False
    total: bool = False
    predicted: bool = False
    classes: Tensor | None = None  # (V,) c_j of the total

    @property
    def columns(self) -> int:
        """Of stats."""
        return COLUMNS if self.mean or self.total or self.predicted else 2


NOTHING = Beside()


def entropies(stats: Tensor) -> Tensor:
    """(n, 5) stats with the mean -> (n,) float64 entropies in nats, NaN for a row without a log-prob."""
    log_sum = stats[:, LOG_SUM].double()
    return torch.where(log_sum >= 0, log_sum - stats[:, MEAN].double(), math.nan)


def logsumexps(stats: Tensor) -> Tensor:
    """(n, 2 or 5) stats -> (n,) float64, NaN for a row without a log-prob."""
    log_sum = stats[:, LOG_SUM].double()
    return torch.where(log_sum >= 0, log_sum + stats[:, PEAK].double(), math.nan)


def predictions(stats: Tensor) -> Tensor:
    """(n, 5) stats with what is predicted -> (n,) int64 token ids, -1 for a row without a log-prob."""
    return stats[:, PREDICTED].long()


class Divergence(NamedTuple):
    """Which full-vocabulary divergence: p is the student's distribution, q the teacher's.

    forward: KL(q || p)      reverse: KL(p || q)
    jsd:     beta * KL(q || m) + (1 - beta) * KL(p || m),  m = beta * q + (1 - beta) * p
    """

    kind: str  # "forward" | "reverse" | "jsd"
    beta: float = 0.5


class Tiles(Protocol):
    """A back-end. Optional (None): `linear_logps`, log-probs of rows straight from hidden states, without a tile,
    `scaled_exps`, 16-bit exponentials in place of one (exponentials.py), and `sparse_gradient`, in whose place sparse.py has
    a PyTorch form."""

    name: str

    def logps(self, z: Tensor, labels: Tensor, map: LogitMap, beside: Beside = NOTHING) -> tuple[Tensor, Tensor]:
        """-> logps (n,), stats (n, 2), or (n, 5) where something is asked for beside; z is left as it is."""

    def gradient_(
        self,
        z: Tensor,
        labels: Tensor,
        stats: Tensor,
        g: Tensor,
        map: LogitMap,
        dtype: torch.dtype,
        classes: Tensor | None = None,
    ) -> Tensor:
        """-> dz (n, V) in `dtype`, in z's memory, of rows whose stats are known; g (n,) or (n, 4)."""

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

    def sparse_gradient(self, dz: Tensor, products: Products, rule: Rule) -> Tensor:
        """dz (n, V), as the functions above return it -> (n, H) as products.hidden_gradient does, from the columns that
        matter (sparse.py); dz is overwritten, with all of z's memory."""

    def segment_sums(self, values: Tensor, segments: Tensor, out: Tensor) -> None:
        """out (K,) float64 += the sums of values (n,) by segments (n,) int64; -1 belongs nowhere. Bitwise repeatable."""


def empty_tile(rows: int, vocab: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(rows, V) without values. Rows begin at multiples of 16 numbers, so that any V is read in 16-byte units of a GPU or
    lines of a CPU. There float32 rows are an odd number of lines apart, or all rows of V = 49152 would share a few sets of
    its caches."""
    lines = -(-vocab // 16)
    if device.type == "cpu":
        lines |= 1
    return torch.empty(rows, 16 * lines, device=device, dtype=dtype)[:, :vocab]


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
    linear_logps = scaled_exps = sparse_gradient = None

    def logps(self, z, labels, map, beside=NOTHING):
        logps, stats = z.new_empty(z.shape[0]), z.new_zeros(z.shape[0], beside.columns)
        for rows in _row_blocks(z):
            logits, log_p, stats[rows, :2] = _log_softmax(z[rows], map)
            logps[rows] = log_p.gather(-1, labels[rows, None]).squeeze(-1)
            if beside.columns == COLUMNS:
                _fill_beside(stats[rows], logits, log_p, beside)
        return logps, stats

    def gradient_(self, z, labels, stats, g, map, dtype, classes=None):
        for rows in _row_blocks(z):
            logits = map.apply_(z[rows].clone())
            shifted = logits - stats[rows, :1]
            if g.dim() == 1:
                log_p = shifted.sub_(stats[rows, 1:2])
                self._write_gradient(z[rows], logits, log_p, labels[rows], g[rows], map, dtype)
            else:
                dl = _affine_gradient(shifted, stats[rows, 1:2], labels[rows], g[rows], classes)
                _narrow(z[rows], dtype).copy_(map.chain_(dl, logits))
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


def _fill_beside(stats: Tensor, logits: Tensor, log_p: Tensor, beside: Beside) -> None:
    """The columns of stats (r, 5) that are asked for, from logits and log-probabilities (r, V); both are overwritten."""
    peak = stats[:, :1]
    if beside.predicted:
        predicted = logits.argmax(-1).to(stats.dtype)
        stats[:, PREDICTED] = predicted.where(stats[:, LOG_SUM] >= 0, -1.0)
    shifted = logits.sub_(peak)
    if beside.mean:
        p = log_p.exp_()
        stats[:, MEAN] = p.mul_(shifted).masked_fill_(shifted == -math.inf, 0.0).sum(-1)
    if beside.total:
        if beside.classes is not None:
            shifted.mul_(beside.classes).masked_fill_(beside.classes == 0, 0.0)
        stats[:, TOTAL] = shifted.sum(-1)


def _affine_gradient(shifted: Tensor, log_sum: Tensor, labels: Tensor, g: Tensor, classes: Tensor | None) -> Tensor:
    """l - m (r, V), s (r, 1), alpha to delta (r, 4) -> the gradient by the logits (r, V), in the memory of l - m."""
    alpha, beta, gamma, delta = g[:, :, None].unbind(1)
    p = (shifted - log_sum).exp_()
    dl = shifted.mul_(gamma).masked_fill_(p == 0, 0.0).add_(beta).mul_(p)
    dl.add_(delta if classes is None else delta * classes)
    return dl.scatter_add_(1, labels[:, None], alpha)


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
