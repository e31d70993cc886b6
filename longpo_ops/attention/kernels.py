"""Attention kernels behind one interface: a forward that gives the logsumexp, a backward that takes any.

For query row i, key row j, score s_ij = scale * q_i . k_j (soft-capped: c * tanh(s_ij / c)), V_i the keys that i sees:

    lse_i = log sum_{j in V_i} exp(s_ij)      out_i = sum_{j in V_i} exp(s_ij - lse_i) v_j
    p_ij  = exp(s_ij - lse_i)                 ds_ij = p_ij * (dout_i . v_j - dout_i . out_i)

The backward never asks which keys out and lse came from. Given those of a LARGER key set it returns exactly this key
set's share of the gradients: what lets shared_prefix.py split a softmax over two calls.

Shapes, for every kernel: q, out, dout (B, H, Sq, D); k (B, Hk, Sk, D); v (B, Hk, Sk, Dv); lse (B, H, Sq), natural
logarithm, float32 (float64 for float64 inputs); H a multiple of Hk, query head h reads key head h // (H / Hk).
Memory beyond the results: the stock kernels' own (grouped heads cost flash's backward dk and dv once per query head);
the blockwise kernel holds a few blocks of SCORES numbers. Not covered: dropout, and masks other than causal ones with a
window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

SCORES = {"cpu": 1 << 20, "cuda": 1 << 25}  # scores per block of the blockwise kernel: cache there, launch cost here
ROWS = 256  # at most, of one block: a float32 product adds up its rows one by one, and loses a digit over thousands
aten = torch.ops.aten


def accumulator(q: Tensor) -> torch.dtype:
    """The dtype of logsumexps and of all sums: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class Case(NamedTuple):
    """Which keys the queries of one call see, and how scores are made.

    Query row i sits `offset` positions after key row i: it sees the keys j with i + offset - window < j <= i + offset.
    `window` is None where it would hide nothing.
    """

    rows: int
    keys: int
    offset: int
    scale: float
    window: int | None
    softcap: float

    @property
    def causal(self) -> bool:
        """Square and plainly causal."""
        return self.offset == 0 and self.rows == self.keys

    @property
    def full(self) -> bool:
        """Every row sees every key, the window aside."""
        return self.offset >= self.keys - 1


def make_case(rows: int, keys: int, offset: int, scale: float, window: int | None, softcap: float | None) -> Case:
    """A Case whose window is dropped where no row reaches back that far."""
    binds = window is not None and rows + offset > window
    return Case(rows, keys, offset, scale, window if binds else None, softcap or 0.0)


class Kernel(NamedTuple):
    """One back-end. refusal gives the reason why it cannot take a call, or None."""

    name: str
    refusal: Callable[[Tensor, Tensor, Tensor, Case], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, Case], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Case], tuple[Tensor, Tensor, Tensor]]


# --- blockwise: plain PyTorch, takes everything -----------------------------------------------------------------------


def _blocks(case: Case, heads: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Query rows, the keys that some of them see, and which of those are hidden from which row (None: none is)."""
    reach = case.keys if case.window is None else min(case.keys, 2 * max(case.window, 128))
    scores = SCORES.get(device.type, SCORES["cuda"])
    # Rows far apart share few keys, hence no more of them at once than half the reach.
    step = max(16, min(scores // (heads * reach), reach // 2, ROWS))
    for i0 in range(0, case.rows, step):
        i1 = min(i0 + step, case.rows)
        j0 = 0 if case.window is None else max(0, i0 + case.offset - case.window + 1)
        j1 = min(case.keys, i1 + case.offset)
        if j0 >= j1:  # the window has left all keys behind
            continue
        last = torch.arange(i0, i1, device=device)[:, None] + case.offset
        key = torch.arange(j0, j1, device=device)
        hidden = key > last if j1 - 1 > i0 + case.offset else None
        if case.window is not None and j0 <= i1 - 1 + case.offset - case.window:
            early = key <= last - case.window
            hidden = early if hidden is None else hidden | early
        yield slice(i0, i1), slice(j0, j1), hidden


def _fold(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """(B, H, n, D) to (B, Hk, H/Hk * n, D): the query heads of one key head become rows, so keys are never repeated."""
    return rearrange(x.to(dtype), "b (hk g) n d -> b hk (g n) d", hk=kv_heads)


def _unfold(x: Tensor, rows: int) -> Tensor:
    """Back to (B, H, n, D)."""
    return rearrange(x, "b hk (g n) d -> b (hk g) n d", n=rows)


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None, case: Case) -> tuple[Tensor, Tensor | None]:
    """Folded q (B, Hk, g * n, D) to scores (B, Hk, g * n, m), hidden ones -inf, and the soft-cap's derivative."""
    s = (q @ k.mT).mul_(case.scale)
    slope = None
    if case.softcap:
        t = torch.tanh_(s.div_(case.softcap))
        slope = 1 - t.square()
        s = t.mul_(case.softcap)
    if hidden is not None:
        s.unflatten(2, (-1, hidden.shape[0])).masked_fill_(hidden, float("-inf"))
    return s, slope


def _blockwise_forward(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    dtype, (batch, heads, rows, _), kv_heads = accumulator(q), q.shape, k.shape[1]
    out = q.new_zeros(batch, heads, rows, v.shape[-1])
    lse = q.new_full((batch, heads, rows), float("-inf"), dtype=dtype)
    for i, j, hidden in _blocks(case, batch * heads, q.device):
        s, _ = _scores(_fold(q[:, :, i], kv_heads, dtype), k[:, :, j].to(dtype), hidden, case)
        # A row whose window has left these keys is all -inf: the floor makes it out = 0, lse = -inf instead of NaN.
        top = s.amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)
        p = s.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        o = (p @ v[:, :, j].to(dtype)).div_(total.clamp_min(torch.finfo(dtype).tiny))
        n = i.stop - i.start
        out[:, :, i], lse[:, :, i] = _unfold(o, n), _unfold(top + total.log(), n).squeeze(-1)
    return out, lse


def _blockwise_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, case: Case
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, kv_heads = accumulator(q), k.shape[1]
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for i, j, hidden in _blocks(case, q.shape[0] * q.shape[1], q.device):
        qi, oi, gi = (_fold(x[:, :, i], kv_heads, dtype) for x in (q, out, dout))
        kj, vj = k[:, :, j].to(dtype), v[:, :, j].to(dtype)
        s, slope = _scores(qi, kj, hidden, case)
        p = s.sub_(_fold(lse[:, :, i, None], kv_heads, dtype)).exp_()
        dv[:, :, j] += p.mT @ gi
        ds = (gi @ vj.mT).sub_((gi * oi).sum(-1, keepdim=True)).mul_(p).mul_(case.scale)
        if slope is not None:
            ds.mul_(slope)
        dk[:, :, j] += ds.mT @ qi
        dq[:, :, i] = _unfold(ds @ kj, i.stop - i.start)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


BLOCKWISE = Kernel("blockwise PyTorch", lambda q, k, v, case: None, _blockwise_forward, _blockwise_backward)


# --- what all stock kernels ask for -----------------------------------------------------------------------------------


def _stock_refusal(q: Tensor, v: Tensor, case: Case) -> str | None:
    if case.softcap:
        return f"has no soft-cap ({case.softcap:g})"
    if case.window is not None:
        return f"has no sliding window ({case.window})"
    if not (case.causal or case.full):
        return "is causal for square calls only"
    if q.shape[-1] != v.shape[-1]:
        return f"wants one head size, got {q.shape[-1]} and {v.shape[-1]}"
    return None


def _half_refusal(q: Tensor) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"wants bfloat16 or float16, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] % 8:
        return f"wants a head size divisible by 8, got {q.shape[-1]}"
    return None


# --- torch's flash attention for CPU ----------------------------------------------------------------------------------


def _cpu_refusal(q: Tensor, k: Tensor, v: Tensor, case: Case) -> str | None:
    return _stock_refusal(q, v, case)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, case.causal, scale=case.scale)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, case: Case
) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, case.causal, scale=case.scale
    )


CPU_FLASH = Kernel("torch flash attention for CPU", _cpu_refusal, _cpu_forward, _cpu_backward)


# --- torch's flash attention and cuDNN on CUDA ------------------------------------------------------------------------


def _dispatcher_refusal(q: Tensor, k: Tensor, v: Tensor, case: Case, can_use: Callable) -> str | None:
    """Asks PyTorch's own dispatcher, which also knows the chip, the library versions and the user's enable_*_sdp."""
    refusal = _half_refusal(q) or _stock_refusal(q, v, case)
    if refusal:
        return refusal
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, case.causal, q.shape[1] != k.shape[1])
    return None if can_use(params) else "is refused by PyTorch for this GPU, shape or setting"


def _torch_flash_refusal(q: Tensor, k: Tensor, v: Tensor, case: Case) -> str | None:
    return _dispatcher_refusal(q, k, v, case, torch.backends.cuda.can_use_flash_attention)


def _torch_flash_forward(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, case.causal, scale=case.scale)
    return out, lse


def _torch_flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, case: Case
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the dropout generator's state
    sizes = (None, None, case.rows, case.keys)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), *sizes, 0.0, case.causal, unused, unused, scale=case.scale
    )


def _cudnn_refusal(q: Tensor, k: Tensor, v: Tensor, case: Case) -> str | None:
    return _dispatcher_refusal(q, k, v, case, torch.backends.cuda.can_use_cudnn_attention)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, case.causal, scale=case.scale)
    return out, lse.reshape(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, case: Case
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the dropout generator's state
    sizes = (None, None, None, case.rows, case.keys)
    stats = lse.contiguous().unsqueeze(-1)
    dout, out = _laid_out_like(dout, q), _laid_out_like(out, q)
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, stats, unused, unused, *sizes, 0.0, case.causal, scale=case.scale
    )


def _laid_out_like(x: Tensor, q: Tensor) -> Tensor:
    """x with the strides that PyTorch gives cuDNN's own output.

    PyTorch caches cuDNN graphs by the strides of q, k and v alone: another layout of out or dout could meet a graph
    that was built for theirs, and be misread.
    """
    like = torch.empty_like(q, device="meta")
    return x if x.stride() == like.stride() else torch.empty_like(q).copy_(x)


TORCH_FLASH = Kernel("torch flash attention", _torch_flash_refusal, _torch_flash_forward, _torch_flash_backward)
CUDNN = Kernel("cuDNN attention", _cudnn_refusal, _cudnn_forward, _cudnn_backward)


# --- the flash-attn package -------------------------------------------------------------------------------------------


@cache
def _flash_attn() -> object | None:
    """The package's functions where it is installed at 2.7 or later, which split the window into two arguments."""
    try:
        version = import_module("flash_attn").__version__
        functions = import_module("flash_attn.flash_attn_interface")
    except (ImportError, AttributeError):
        return None
    return functions if tuple(int(part) for part in version.split(".")[:2]) >= (2, 7) else None


def _flash_attn_refusal(q: Tensor, k: Tensor, v: Tensor, case: Case) -> str | None:
    if _flash_attn() is None:
        return "is not installed at version 2.7 or later"
    if case.window is not None and not case.causal:
        return "takes a sliding window in square causal calls only"
    if q.shape[-1] > 256:
        return f"wants a head size of at most 256, got {q.shape[-1]}"
    # Windows and soft-caps it has: what remains of the stock conditions is asked without them.
    return _half_refusal(q) or _stock_refusal(q, v, case._replace(window=None, softcap=0.0))


def _flash_attn_options(case: Case) -> dict:
    return dict(
        dropout_p=0.0,
        softmax_scale=case.scale,
        causal=case.causal,
        window_size_left=-1 if case.window is None else case.window - 1,
        window_size_right=-1,
        softcap=case.softcap,
        alibi_slopes=None,
    )


def _flash_attn_forward(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = _flash_attn()._flash_attn_forward(q, k, v, return_softmax=False, **_flash_attn_options(case))
    return out.transpose(1, 2), lse


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, case: Case
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _flash_attn()._flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        *grads,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_flash_attn_options(case),
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


FLASH_ATTN = Kernel("flash-attn", _flash_attn_refusal, _flash_attn_forward, _flash_attn_backward)


# --- the choice -------------------------------------------------------------------------------------------------------


def stock_kernels(device: torch.device) -> tuple[Kernel, ...]:
    """Fastest first. On Hopper and later cuDNN leads (published, H100: 595 / 516 TFLOP/s against 370 / 322)."""
    if device.type == "cpu":
        return (CPU_FLASH,)
    if device.type != "cuda":
        return ()
    if torch.cuda.get_device_capability(device)[0] >= 9:
        return CUDNN, FLASH_ATTN, TORCH_FLASH
    return FLASH_ATTN, TORCH_FLASH, CUDNN


def choose(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Kernel, str]:
    """The kernel for one call and the reason: why each faster one was passed over."""
    passed = []
    for kernel in stock_kernels(q.device):
        refusal = kernel.refusal(q, k, v, case)
        if refusal is None:
            return kernel, "; ".join(passed) or "first choice on this device"
        passed.append(f"{kernel.name} {refusal}")
    return BLOCKWISE, "; ".join(passed) or f"no stock kernel is used on {q.device.type}"
