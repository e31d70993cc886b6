"""How a piece of a float32 master steps, by code that others keep well: torch's AdamW and RMSprop, torchao's 8-bit AdamW.

    AdamW     m = b1 m + (1 - b1) g    v = b2 v + (1 - b2) g^2    p = (1 - lr w) p - lr (m / c1) / (sqrt(v / c2) + eps)
    RMSprop   v = alpha v + (1 - alpha) (g + w p)^2                p = p - lr (g + w p) / (sqrt(v) + eps)

w weight decay, c1 and c2 AdamW's bias corrections. A piece steps by blocks: on a CPU those that stay in its caches, as a pass
over memory is what a step costs there. Numbers, gradients and averages come with each step, and are written in place; what
is kept of them, and in which shape, is states.py's. What torch does on whole tensors is done here bit by bit, as each number
steps by itself; but torch's fused AdamW takes the last numbers of a tensor on a CPU, which fill no vector register, by code
whose last bits differ, so that a shard's last numbers may differ from the same ones amid a whole weight.

Tests: tests/memory/test_optimizer.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim.adamw import adamw
from torch.optim.rmsprop import rmsprop

BLOCK = 1 << 20  # numbers that a CPU steps at once: 4 MiB of float32, some 24 MiB with all that belongs to them
SCALED = 256  # numbers of an 8-bit average that share a scale
_COMPARED: set[tuple] = set()  # kinds of pieces whose compiled step this process has compared


class EightBit(NamedTuple):
    """n numbers of an average in 8 bits: codes (n,) uint8, and scale (ceil(n / SCALED),) float32."""

    codes: Tensor
    scale: Tensor


class AdamWSteps:
    """torch's, fused. averages: what is kept of each number."""

    averages: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    quantised: ClassVar[bool] = False

    def blocks(self, n: int, device: torch.device) -> Iterator[slice]:
        """The parts of n numbers that are to be stepped one after the other."""
        return _blocks(n, device)

    def step(self, value: Tensor, grad: Tensor, averages: list[Tensor], count: Tensor, group: dict) -> None:
        """Steps `value` (n,) and its averages, (n,) each, in place. count: of the steps before this one, left as it is."""
        beta1, beta2 = group["betas"]
        rates = _rates(group) | {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False, "fused": True}
        adamw([value], [grad], *([average] for average in averages), [], [count.clone()], **rates)


class RMSpropSteps:
    """torch's. averages: what is kept of each number."""

    averages: ClassVar[tuple[str, ...]] = ("square_avg",)
    quantised: ClassVar[bool] = False

    def blocks(self, n: int, device: torch.device) -> Iterator[slice]:
        return _blocks(n, device)

    def step(self, value: Tensor, grad: Tensor, averages: list[Tensor], count: Tensor, group: dict) -> None:
        """Steps `value` (n,) and its average (n,) in place. count: of the steps before this one, left as it is."""
        rates = _rates(group) | {"alpha": group["alpha"], "momentum": 0.0, "centered": False}
        rmsprop([value], [grad], averages, [], [], [count.clone()], **rates)


def _blocks(n: int, device: torch.device) -> Iterator[slice]:
    size = BLOCK if device.type == "cpu" else max(n, 1)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _rates(group: dict) -> dict[str, float]:
    return {"lr": float(group["lr"]), "eps": group["eps"], "weight_decay": group["weight_decay"]}


class CompiledAdamWSteps:
    """torchao's, compiled, in one block: a stand-in parameter holds a piece's numbers only while it steps.

    count lies on the host, whatever the numbers lie on: torchao's step reads it there.
    """

    averages: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    quantised: ClassVar[bool] = True

    def __init__(self):
        self._torchao, self._inner = _torchao(), {}

    def blocks(self, n: int, device: torch.device) -> Iterator[slice]:
        yield slice(0, n)

    def step(self, value: Tensor, grad: Tensor, averages: list[Tensor | EightBit], count: Tensor, group: dict) -> None:
        """Steps `value` (n,) and its averages of n numbers in place. count: of the steps before this one, left as it is.

        Raises RuntimeError where compiled code gives other numbers than uncompiled code.
        """
        short = -len(value) % SCALED if isinstance(averages[0], EightBit) else 0
        if short:  # a last block that is not full
            n, whole = len(value), [pad(x, (0, short)) for x in (value, grad, *(a.codes for a in averages))]
            scales = [average.scale for average in averages]
            padded = [EightBit(codes, scale) for codes, scale in zip(whole[2:], scales, strict=True)]
            self.step(whole[0], whole[1], padded, count, group)
            for x, stepped in zip((value, *(a.codes for a in averages)), (whole[0], *whole[2:]), strict=True):
                x.copy_(stepped[:n])
            return
        states = [self._state(average, signed) for average, signed in zip(averages, (True, False), strict=True)]
        kind = value.numel(), value.dtype, value.device, isinstance(averages[0], EightBit)
        if kind in _COMPARED:
            return self._step(value, grad, states, count, group)
        before, expected, twins = value.clone(), value.clone(), [_copy(state) for state in states]
        with torch.compiler.set_stance("force_eager"):
            self._step(expected, grad, twins, count, group)
        self._step(value, grad, states, count, group)
        _compare(value - before, expected - before, rounding=4 * torch.finfo(value.dtype).eps * before.abs().max())
        for ours, theirs in zip(states, twins, strict=True):
            _compare(_plain(ours), _plain(theirs))
        _COMPARED.add(kind)

    def inner(self, value: Tensor) -> torch.optim.Optimizer:
        """torchao's optimizer for numbers of this kind, over an empty stand-in."""
        kind = value.device, value.dtype
        if kind not in self._inner:
            empty = nn.Parameter(torch.empty(0, device=value.device, dtype=value.dtype))
            self._inner[kind] = self._torchao.AdamW8bit([empty], block_size=SCALED)
        return self._inner[kind]

    def _step(self, value: Tensor, grad: Tensor, states: list[Tensor], count: Tensor, group: dict) -> None:
        inner = self.inner(value)
        its = inner.param_groups[0]
        (stand_in,) = its["params"]
        its.update({name: group[name] for name in ("betas", "eps", "weight_decay")})
        its["lr"].fill_(float(group["lr"]))  # a tensor, as torchao would compile a number in
        empty = stand_in.data
        inner.state[stand_in] = {"step": count.clone()} | dict(zip(self.averages, states, strict=True))
        stand_in.data, stand_in.grad = value, grad
        try:
            inner.step()
        finally:
            stand_in.grad = None
            stand_in.data = empty
            inner.state.clear()

    def _state(self, average: Tensor | EightBit, signed: bool) -> Tensor:
        """The average as torchao has it, over the same memory."""
        if not isinstance(average, EightBit):
            return average
        from torchao.optim.subclass_8bit import OptimState8bit

        levels = _levels(signed, average.codes.device)
        return OptimState8bit(average.codes, average.scale, levels, signed, dtype=torch.float32)


@cache
def _levels(signed: bool, device: torch.device) -> Tensor:
    """(256,) float32: the numbers that torchao's codes stand for. Made once, as a device waits for what a host sends."""
    from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

    return torch.tensor(get_qmap_signed() if signed else get_qmap_unsigned(), dtype=torch.float32, device=device)


def _compare(ours: Tensor, theirs: Tensor, rounding: Tensor | float = 0.0) -> None:
    """Raises RuntimeError where a compiled step differs by more than 8 bits may round to either side."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    off, most = (ours - theirs).abs().masked_fill(same, 0.0).max(), theirs.abs().nan_to_num(nan=0.0).max()
    if not off <= 0.02 * most + rounding:
        raise RuntimeError(
            f"the compiled step of 8-bit states differs from the uncompiled one by {float(off):.3g} in numbers of up to "
            f"{float(most):.3g}: code in TORCHINDUCTOR_CACHE_DIR ({os.environ.get('TORCHINDUCTOR_CACHE_DIR', 'not set')}) that "
            "was compiled for another processor does that; empty that folder, or give this machine its own"
        )


def _plain(state: Tensor) -> Tensor:
    """A state's numbers, out of 8 bits where it has them."""
    return state.dequantize() if hasattr(state, "__tensor_flatten__") else state


def _copy(state: Tensor) -> Tensor:
    """A clone; of a tensor made of tensors, which knows no clone(), by its parts."""
    if not hasattr(state, "__tensor_flatten__"):
        return state.clone()
    names, context = state.__tensor_flatten__()
    return type(state).__tensor_unflatten__({name: getattr(state, name).clone() for name in names}, context)


def _torchao():
    try:
        from torchao import optim
    except ImportError:
        raise ValueError(
            "states='8bit' needs torchao, which is not installed: pip install 'longpo_ops[memory]', or use states='float32'"
        ) from None
    return optim
