"""How a piece of a float32 master steps, by code that others keep well: torch's AdamW and RMSprop, torchao's 8-bit AdamW.

    AdamW     m = b1 m + (1 - b1) g    v = b2 v + (1 - b2) g^2    p = (1 - lr w) p - lr (m / c1) / (sqrt(v / c2) + eps)
    RMSprop   v = alpha v + (1 - alpha) (g + w p)^2                p = p - lr (g + w p) / (sqrt(v) + eps)

w weight decay, c1 and c2 AdamW's bias corrections. A piece holds the states of n numbers, none before its first step, and
steps by blocks: on a CPU those that stay in its caches, as a pass over memory is what a step costs there. The numbers
themselves come with each step. What torch does on whole tensors is done here bit by bit, as each number steps by itself.

Tests: tests/memory/test_optimizer.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.rmsprop import rmsprop

BLOCK = 1 << 20  # numbers that a CPU steps at once: 4 MiB of float32, some 24 MiB with all that belongs to them
_COMPARED: set[tuple] = set()  # kinds of pieces whose compiled step this process has compared


class Piece:
    """Its states: {step, and (n,) of each of `averages`}, none before the first step."""

    averages: ClassVar[tuple[str, ...]]

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.states: dict[str, Tensor] = {}

    def blocks(self, n: int) -> Iterator[slice]:
        """The parts that make up a step, each of which is to be stepped once, in turn."""
        if not self.states:
            zeros = {name: torch.zeros(n, dtype=self.dtype, device=self.device) for name in self.averages}
            self.states = {"step": torch.zeros((), dtype=torch.float32, device=self.device)} | zeros
        size = BLOCK if self.device.type == "cpu" else n
        for start in range(0, n, size):
            yield slice(start, start + size)
        self.states["step"] += 1

    def numbers(self, block: slice) -> list[list[Tensor]]:
        """A block of each average, as a list of one, which torch's functions take."""
        return [[self.states[name][block]] for name in self.averages]

    def count(self) -> list[Tensor]:
        """Steps made before this one; torch counts on in its copy."""
        return [self.states["step"].clone()]

    def state(self) -> dict[str, Any]:
        return dict(self.states)

    def load(self, state: dict[str, Any]) -> None:
        kinds = {"step": torch.float32} | dict.fromkeys(self.averages, self.dtype)
        self.states = {name: state[name].to(self.device, dtype, copy=True) for name, dtype in kinds.items() if state}


class AdamWPiece(Piece):
    averages = ("exp_avg", "exp_avg_sq")

    def step(self, value: Tensor, grad: Tensor, block: slice, group: dict) -> None:
        """Steps `value` (n,), the numbers of a block, in place."""
        beta1, beta2 = group["betas"]
        rates = _rates(group) | {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False, "fused": True}
        adamw([value], [grad], *self.numbers(block), [], self.count(), **rates)


class RMSpropPiece(Piece):
    averages = ("square_avg",)

    def step(self, value: Tensor, grad: Tensor, block: slice, group: dict) -> None:
        """Steps `value` (n,), the numbers of a block, in place."""
        rates = _rates(group) | {"alpha": group["alpha"], "momentum": 0.0, "centered": False}
        rmsprop([value], [grad], *self.numbers(block), [], [], self.count(), **rates)


def _rates(group: dict) -> dict[str, float]:
    return {"lr": float(group["lr"]), "eps": group["eps"], "weight_decay": group["weight_decay"]}


class CompiledAdamWPiece:
    """torchao's AdamW over one piece, in one block: a stand-in parameter holds its numbers only while it steps."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.stand_in = nn.Parameter(torch.empty(0, device=device, dtype=dtype))
        self.inner = _torchao().AdamW8bit([self.stand_in])

    def blocks(self, n: int) -> Iterator[slice]:
        yield slice(0, n)

    def step(self, value: Tensor, grad: Tensor, block: slice, group: dict) -> None:
        """Steps `value` (n,) in place. Raises RuntimeError where compiled code gives other numbers than uncompiled code."""
        kind = value.numel(), value.dtype, value.device
        if kind in _COMPARED:
            return self._step(value, grad, group)
        before, expected, twin = value.clone(), value.clone(), CompiledAdamWPiece(value.device, value.dtype)
        twin.load(self.state())
        with torch.compiler.set_stance("force_eager"):
            twin._step(expected, grad, group)
        self._step(value, grad, group)
        states = [[plain(state) for state in piece.state().values()] for piece in (self, twin)]
        _compare(value - before, expected - before, rounding=4 * torch.finfo(value.dtype).eps * before.abs().max())
        for ours, theirs in zip(*states, strict=True):
            _compare(ours, theirs)
        _COMPARED.add(kind)

    def _step(self, value: Tensor, grad: Tensor, group: dict) -> None:
        inner = self.inner.param_groups[0]
        inner.update({name: group[name] for name in ("betas", "eps", "weight_decay")})
        inner["lr"].fill_(float(group["lr"]))  # a tensor, as torchao would compile a number in
        empty = self.stand_in.data
        self.stand_in.data, self.stand_in.grad = value, grad
        try:
            self.inner.step()
        finally:
            self.stand_in.grad = None
            self.stand_in.data = empty

    def state(self) -> dict[str, Any]:
        return dict(self.inner.state[self.stand_in])

    def load(self, state: dict[str, Any]) -> None:
        copies = {name: _copy(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        groups = self.inner.state_dict()["param_groups"]
        self.inner.load_state_dict({"state": {0: copies} if copies else {}, "param_groups": groups})


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


def plain(value: Tensor) -> Tensor:
    """A state's numbers, out of 8 bits where it has them."""
    return value.dequantize() if hasattr(value, "__tensor_flatten__") else value


def _copy(value: Tensor) -> Tensor:
    """A clone; of a tensor made of tensors, which may know no clone(), by its parts."""
    if not hasattr(value, "__tensor_flatten__"):
        return value.clone()
    names, context = value.__tensor_flatten__()
    return type(value).__tensor_unflatten__({name: getattr(value, name).clone() for name in names}, context)


def _torchao():
    try:
        from torchao import optim
    except ImportError:
        raise ValueError(
            "states='8bit' needs torchao, which is not installed: pip install 'longpo_ops[memory]', or use states='float32'"
        ) from None
    return optim
