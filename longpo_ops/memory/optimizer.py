"""AdamW and RMSprop for 16-bit weights: an exact float32 master, states in float32 or 8 bits, on the device or on the host.

    bits(master) = (bits(weight) << 16) + residue      weight bfloat16, the nearest (ties away from 0); residue int16

A step runs over pieces of at most PIECE numbers: a piece's master is joined in float32, stepped by well-kept code
(pieces.py) and split again, block by block. The inner optimizers never see the 16-bit weights. Weights on a device that step
on the host cross in their own dtype while the host steps the piece before (host_step.py).

Bytes per weight: 2 residue or 4 float32 master (none for float32 weights); states 8 of AdamW, 4 of RMSprop, in 8 bits 2.03
of AdamW. Scratch: about four float32 pieces. Residue and full master give bitwise the same weights. Not covered: other
algorithms, and RMSprop's momentum and centred variant.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from longpo_ops.kinds import check_choice, check_each, check_flag, check_number, refusal
from longpo_ops.memory.host_step import Crossing, HostSteps, room_bytes
from longpo_ops.memory.pieces import AdamWPiece, CompiledAdamWPiece, RMSpropPiece
from longpo_ops.memory.tiers import lane_of

PIECE = 1 << 24  # numbers: 64 MiB of float32, and few enough shapes for what torchao compiles per shape
STATES = ("float32", "8bit")
MASTERS = ("residue", "float32")
HALF = 1 << 15  # of the unit in the last place of bfloat16, in float32 bits


def split(master: Tensor, weight: Tensor, residue: Tensor) -> None:
    """master (n,) float32 -> weight (n,) bfloat16 and residue (n,) int16, written in place; exact for every number. Leaves no
    numbers in master.

    The largest numbers round to an infinite weight, as in any conversion, and are still exact; NaN becomes the plain NaN.
    """
    # A NaN of all ones would carry into the sign and look like 0.
    bits = master.nan_to_num_(torch.nan, torch.inf, -torch.inf).view(torch.int32)
    residue.copy_(bits)  # the low half: what the conversion to int16 keeps
    weight.view(torch.int16).copy_(bits.add_(HALF).bitwise_right_shift_(16))


def join(weight: Tensor, residue: Tensor) -> Tensor:
    """weight (n,) bfloat16 and residue (n,) int16 -> (n,) float32, the inverse of split."""
    bits = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(residue).view(torch.float32)


def float32_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Lets 16-bit weights gather their gradients in float32 (4 bytes a weight): what sums over several packs need."""
    for parameter in check_each("parameters", parameters, Tensor, "a parameter"):
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            parameter.grad_dtype = torch.float32


def refuse_step_in_backward(accumulation: int, max_grad_norm: float | None, processes: int = 1) -> None:
    """Raises ValueError where weights cannot be stepped as soon as their gradient is there, saying why."""
    what = None
    if accumulation > 1:
        what = f"gradient_accumulation_steps={accumulation} sums gradients over several backward passes; set it to 1"
    elif max_grad_norm:
        what = f"max_grad_norm={max_grad_norm} needs all gradients before the first step; set it to 0"
    elif processes > 1:
        what = f"{processes} processes average gradients after backward; expected one process"
    if what is not None:
        raise ValueError(f"step_in_backward: {what}, or switch step_in_backward off")


class MasterOptimizer(Optimizer):
    """What steps bfloat16 weights through an exact float32 master: AdamW or RMSprop.

    params, defaults: as torch.optim.Optimizer takes them; learning-rate schedulers work as they do there.
    states: what a subclass keeps of each number, one of its `kinds`.
    master: "residue", for bfloat16 weights, or "float32", for any 16-bit ones. float32 weights are their own master.
    host: master and states live and step in host memory; weights and gradients go there and weights come back, piece by piece,
        through two rooms of up to 6 bytes for each of PIECE numbers, page-locked for a GPU, from the first step on.
    step_in_backward: a weight steps as soon as its gradient is there, and the gradient is freed. Backward then equals backward
        and step(), which is left to do nothing. One backward per step: another one before step() raises RuntimeError.
        Clipping needs all gradients at once (refuse_step_in_backward). Weights do not keep their optimizer alive: hold it.

    state_dict is exact: loading it, and the weights it was saved with, goes on bitwise. A state of another algorithm, of other
    states or of another master is refused. A step that raised may have moved some
    weights and not others: until a state is loaded, step() and state_dict() raise RuntimeError.

    Raises ValueError for unknown settings, and for weights that do not fit them; in a step MemoryError, before anything has
    moved, where the host refuses the memory of the rooms.
    """

    kinds: ClassVar[dict[str, type]]  # of pieces, by states

    def __init__(
        self,
        params,
        defaults: dict[str, Any],
        *,
        states: str = "float32",
        master: str = "residue",
        host: bool = False,
        step_in_backward: bool = False,
    ):
        name = type(self).__name__
        if check_choice("states", states, STATES) not in self.kinds:
            raise ValueError(
                f"states={states!r}: {name} has {' and '.join(self.kinds)} states only, as torchao has no other; use these, "
                "or AdamW (optim='adamw_torch')"
            )
        check_choice("master", master, MASTERS)
        host, step_in_backward = check_flag("host", host), check_flag("step_in_backward", step_in_backward)
        params = list(check_each("params", params, Tensor | dict | tuple, "a parameter or a group of them"))
        super().__init__(params, defaults)
        self.settings = {"algorithm": name, "states": states, "master": master}
        self._weights = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                self._weights[parameter] = _Weight(parameter, self.kinds[states], master, host)
        self._host = host
        self._hosts: dict[torch.device, HostSteps] = {}  # by the device that weights are on
        self._broken = False  # a step raised midway
        self._stepped: set[nn.Parameter] = set()  # in the backward passes since the last step()
        if step_in_backward:
            self._step_in_backward()

    @torch.no_grad()
    def step(self, closure=None):
        """Steps every weight that has a gradient. Returns closure()'s value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stepped.clear()
        self._step((p, group) for group in self.param_groups for p in group["params"] if p.grad is not None)
        return loss

    def _step(self, stepping: Iterable[tuple[nn.Parameter, dict]]) -> None:
        crossings: dict[torch.device, list[Iterator[Crossing]]] = {}
        for parameter, group in stepping:
            crossings.setdefault(parameter.device, []).append(self._weights[parameter].crossings(group))
        for device in crossings if self._host else ():
            if device not in self._hosts:
                self._hosts[device] = HostSteps(lane_of(device), max(w.room for w in self._weights.values()))
        with self._whole():
            for device, of_device in crossings.items():
                pieces = (crossing for weight in of_device for crossing in weight)
                if self._host:
                    self._hosts[device].run(pieces)
                else:
                    for piece in pieces:
                        piece.step(piece.weight, piece.gradient)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Nothing goes on from a step that raised within it: some weights may have moved, and others not."""
        self._refuse_broken()
        self._broken = True
        yield
        self._broken = False

    def _refuse_broken(self) -> None:
        if self._broken:
            raise RuntimeError(
                "a step raised midway, so that some weights have moved and others have not: load the weights and the "
                "optimizer's state of before it"
            )

    def _step_in_backward(self) -> None:
        if torch.distributed.is_initialized():
            refuse_step_in_backward(1, None, torch.distributed.get_world_size())
        ready = weakref.WeakMethod(self._ready)  # a hook that held the optimizer would keep the weights for ever
        for number, group in enumerate(self.param_groups):  # by number: load_state_dict makes new groups
            for parameter in group["params"]:
                if parameter.requires_grad:
                    handle = parameter.register_post_accumulate_grad_hook(lambda p, number=number: ready()(p, number))
                    weakref.finalize(self, handle.remove)

    @torch.no_grad()
    def _ready(self, parameter: nn.Parameter, number: int) -> None:
        if parameter in self._stepped:
            raise RuntimeError(
                "step_in_backward: a second backward pass before step(), whose gradient would be added to a weight that has "
                "moved; call step() after each backward, or switch step_in_backward off to accumulate gradients"
            )
        self._stepped.add(parameter)
        self._step([(parameter, self.param_groups[number])])
        parameter.grad = None

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings, param_groups as torch has them, and per weight its master and its pieces' states."""
        self._refuse_broken()
        weights = {i: weight.state_dict() for i, weight in enumerate(self._weights.values())}
        return super().state_dict() | {"state": weights, "settings": dict(self.settings)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for a state of other settings, and for one of other weights."""
        settings = state_dict.get("settings")
        if settings:
            settings = {"algorithm": "AdamW"} | settings  # which earlier versions did not name
        if settings != self.settings:
            raise ValueError(
                f"optimizer state of {settings}: expected {self.settings}; go on with the settings it began with"
            )
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for i, weight in enumerate(self._weights.values()):
            weight.load_state_dict(state_dict["state"][i])
        self._broken = False


class AdamW(MasterOptimizer):
    """AdamW with an exact float32 master of bfloat16 weights.

    params, lr, betas, eps, weight_decay: as in torch.optim.AdamW.
    states: "float32" (torch, fused) or "8bit" (torchao, blocks of 256; tensors of under 4,096 numbers stay in float32).
    master, host, step_in_backward: of MasterOptimizer.

    The first 8-bit step of each size in a process is compared with the same step uncompiled, on copies of one piece.

    Raises ValueError as MasterOptimizer does, for rates that make no sense and without torchao where it is needed; in a step
    RuntimeError where inductor's code gives wrong numbers.
    """

    kinds: ClassVar[dict[str, type]] = {"float32": AdamWPiece, "8bit": CompiledAdamWPiece}

    def __init__(
        self,
        params,
        lr: float = 5e-7,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **settings: Any,
    ):
        _check_rates(lr, eps, weight_decay)
        pair = betas if isinstance(betas, tuple | list) and len(betas) == 2 else (None, None)
        if not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in pair):
            raise refusal("betas", betas, "two numbers, each 0 <= beta < 1")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), **settings)


class RMSprop(MasterOptimizer):
    """RMSprop with an exact float32 master of bfloat16 weights, without momentum and not centred.

    params, lr, alpha, eps, weight_decay: as in torch.optim.RMSprop, whose weight decay is part of the gradient.
    states: "float32"; torchao has no 8-bit ones. master, host, step_in_backward: of MasterOptimizer.

    Raises ValueError as MasterOptimizer does, and for rates that make no sense.
    """

    kinds: ClassVar[dict[str, type]] = {"float32": RMSpropPiece}

    def __init__(
        self,
        params,
        lr: float = 5e-7,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **settings: Any,
    ):
        _check_rates(lr, eps, weight_decay)
        if not 0 <= check_number("alpha", alpha) < 1:
            raise refusal("alpha", alpha, "a number, 0 <= alpha < 1")
        super().__init__(params, dict(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay), **settings)


OPTIMS: dict[str, type[MasterOptimizer]] = {"adamw_torch": AdamW, "adamw_torch_fused": AdamW, "rmsprop": RMSprop}


def check_optim(optim: Any) -> str:
    """-> its name. Raises ValueError for an optimizer, by transformers' name or enum of it, that is not here."""
    return check_choice("optim", getattr(optim, "value", optim), tuple(OPTIMS))


def _check_rates(lr: float | Tensor, eps: float, weight_decay: float) -> None:
    """Raises ValueError for numbers that no weight steps by. A learning rate may be a tensor, as torch's may."""
    numbers = {"eps": eps, "weight_decay": weight_decay} | ({} if isinstance(lr, Tensor) else {"lr": lr})
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise refusal("lr", lr, "one number")
    for name, value in numbers.items():
        if check_number(name, value) < 0:
            raise refusal(name, value, "a finite number >= 0")


class _Weight:
    """One parameter: its master, and states for each piece of it. room: bytes that a piece and its gradient take at most."""

    def __init__(self, parameter: nn.Parameter, kind: type, master: str, host: bool):
        if not parameter.is_contiguous() or hasattr(parameter, "to_local"):
            raise ValueError(
                f"a {type(parameter).__name__} of shape {tuple(parameter.shape)} is sharded or not contiguous: expected plain "
                "contiguous weights; use an optimizer of torch.optim for others"
            )
        if parameter.dtype.itemsize < 4 and master == "residue" and parameter.dtype != torch.bfloat16:
            raise ValueError(
                f"master='residue' holds what bfloat16 rounds away, got {parameter.dtype}: use master='float32'"
            )
        self.parameter = parameter
        self.device = torch.device("cpu") if host else parameter.device
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.master: Tensor | None = None
        if parameter.dtype != self.dtype and master == "residue":
            self.master = torch.zeros(parameter.numel(), dtype=torch.int16, device=self.device)
        elif parameter.dtype != self.dtype:
            self.master = parameter.detach().flatten().to(self.device, torch.float32)
        count = math.ceil(parameter.numel() / PIECE)
        self.pieces = [kind(self.device, self.dtype) for _ in range(count)]
        self.room = room_bytes(min(PIECE, parameter.numel()), parameter.itemsize, self.dtype.itemsize)

    def crossings(self, group: dict) -> Iterator[Crossing]:
        """What a step does, piece by piece. Each is to be stepped before the next but one is asked for."""
        torch.autograd.graph.increment_version(self.parameter)  # who saved the weight for a later backward must be told
        weights, gradients = self.parameter.detach().view(-1), self.parameter.grad.reshape(-1)
        if gradients.itemsize > self.dtype.itemsize:
            gradients = gradients.to(self.dtype)
        for number, start in enumerate(range(0, weights.numel(), PIECE)):
            here = slice(start, start + PIECE)
            yield Crossing(weights[here], gradients[here], partial(self._step, number, here, group))

    def _step(self, number: int, here: slice, group: dict, weight: Tensor, gradient: Tensor) -> None:
        """Steps a piece's weight (n,), where master and states live, in place."""
        master, piece = None if self.master is None else self.master[here], self.pieces[number]
        for block in piece.blocks(weight.numel()):
            low, grad = weight[block], gradient[block].to(self.dtype)
            if master is None:
                piece.step(low, grad, block, group)
            elif master.dtype == torch.int16:
                value = join(low, master[block])
                piece.step(value, grad, block, group)
                split(value, low, master[block])
            else:
                piece.step(master[block], grad, block, group)
                low.copy_(master[block])

    def state_dict(self) -> dict[str, Any]:
        return {"master": self.master, "pieces": [piece.state() for piece in self.pieces]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        master, pieces = state["master"], state["pieces"]
        if len(pieces) != len(self.pieces) or (master is None) != (self.master is None):
            raise ValueError(f"optimizer state does not fit a weight of shape {tuple(self.parameter.shape)}")
        if master is not None:
            if master.shape != self.master.shape or master.dtype != self.master.dtype:
                raise ValueError(
                    f"optimizer state has a master of {tuple(master.shape)} {master.dtype}: expected "
                    f"{tuple(self.master.shape)} {self.master.dtype}, for a weight of shape {tuple(self.parameter.shape)}"
                )
            self.master.copy_(master)
        for piece, saved in zip(self.pieces, pieces, strict=True):
            piece.load(saved)
