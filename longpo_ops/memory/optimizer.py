"""AdamW and RMSprop for 16-bit weights: an exact float32 master, states in float32 or 8 bits, on the device or on the host.

    bits(master) = (bits(weight) << 16) + residue      weight bfloat16, the nearest (ties away from 0); residue int16

A step runs over pieces of at most PIECE numbers: a piece's master is joined in float32, stepped by well-kept code
(pieces.py) and split again, block by block. The inner optimizers never see the 16-bit weights. Weights on a device that step
on the host cross in their own dtype while the host steps the piece before (host_step.py).

Weights may be DTensors (FSDP2): each rank steps its own shard, as every number steps by itself, and what is kept of a weight
is sharded like it (states.py). States are made at the first step, of the parameters that param_groups hold then, as those
are sharded after an optimizer is made of them.

Bytes per weight: 2 residue or 4 float32 master (none for float32 weights); states 8 of AdamW, 4 of RMSprop, in 8 bits 2.03
of AdamW. Scratch: about four float32 pieces. Residue and full master give bitwise the same weights. Not covered: other
algorithms, and RMSprop's momentum and centred variant.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from longpo_ops.kinds import check_choice, check_each, check_flag, check_number, refusal
from longpo_ops.memory.host_step import Crossing, HostSteps, room_bytes
from longpo_ops.memory.pieces import AdamWSteps, CompiledAdamWSteps, EightBit, RMSpropSteps
from longpo_ops.memory.states import (
    MASTERS,
    Blocks,
    Like,
    averages_like,
    check_cuts,
    flat,
    is_quantised,
    join,
    local,
    numbers_of,
    split,
    whole_state,
)
from longpo_ops.memory.tiers import lane_of

PIECE = 1 << 24  # numbers: 64 MiB of float32, and few enough shapes for what torchao compiles per shape
STATES = ("float32", "8bit")
SETTINGS = (
    "algorithm",
    "states",
    "master",
)  # of every group of parameters, so that they are in every state that is saved


def float32_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Lets 16-bit weights gather their gradients in float32 (4 bytes a weight): what sums over several packs need.

    FSDP2 hands a sharded weight each pack's gradient in the weight's own dtype: those are to be called with once they are
    sharded, and to be reduced after each pack (accelerate's sync_each_batch), as what is not reduced yet is summed elsewhere.
    """
    for parameter in check_each("parameters", parameters, Tensor, "a parameter"):
        if not parameter.requires_grad or parameter.dtype.itemsize >= 4 or parameter.grad_dtype != parameter.dtype:
            continue
        if isinstance(parameter, DTensor):
            parameter.grad_dtype = None  # any: FSDP2 sets the weight's own, which the hook makes float32
            parameter.register_post_accumulate_grad_hook(_widen_gradient)
        else:
            parameter.grad_dtype = torch.float32


def _widen_gradient(parameter: nn.Parameter) -> None:
    """FSDP2 adds the next packs' gradients to the first one's, in place."""
    if parameter.grad.dtype != torch.float32:
        parameter.grad = parameter.grad.float()


def refuse_step_in_backward(
    accumulation: int, max_grad_norm: float | None, processes: int = 1, mixed_precision: str = "no"
) -> None:
    """Raises ValueError where weights cannot be stepped as soon as their gradient is there, saying why."""
    what = None
    if accumulation > 1:
        what = f"gradient_accumulation_steps={accumulation} sums gradients over several backward passes; set it to 1"
    elif max_grad_norm:
        what = f"max_grad_norm={max_grad_norm} needs all gradients before the first step; set it to 0"
    elif processes > 1:
        what = f"{processes} processes average gradients after backward; expected one process"
    elif mixed_precision == "fp16":
        what = "fp16 scales the loss, and all gradients tell whether its step is made; use bf16"
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

    state[p] has what states.py says, where p steps. state_dict is torch's and exact: loading it, and the weights it was saved
    with, goes on bitwise. So does torch.distributed.checkpoint with get_ and set_optimizer_state_dict, on other numbers of
    ranks too; saving changes nothing. A state of another algorithm, of other states or of another master is refused, and one
    of 8-bit blocks that are cut otherwise. A step that raised may have moved some weights and not others: until a state is
    loaded, step() and state_dict() raise RuntimeError.

    Raises ValueError for unknown settings, and for weights that do not fit them; in a step MemoryError, before anything has
    moved, where the host refuses the memory of the rooms, and ValueError for sharded weights with step_in_backward.
    """

    kinds: ClassVar[dict[str, type]]  # of steps (pieces.py), by states

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
        check_choice("master", master, tuple(MASTERS))
        host, step_in_backward = check_flag("host", host), check_flag("step_in_backward", step_in_backward)
        params = list(check_each("params", params, Tensor | dict | tuple, "a parameter or a group of them"))
        self.settings = {"algorithm": name, "states": states, "master": master}
        self._steps = self.kinds[states]()
        super().__init__(params, defaults | self.settings)
        for parameter in self._parameters():
            self._check(parameter)
        self._host, self._in_backward = host, step_in_backward
        self._hosts: dict[torch.device, HostSteps] = {}  # by the device that weights are on
        self._broken = False  # a step raised midway
        self._stepped: set[nn.Parameter] = set()  # in the backward passes since the last step()
        if step_in_backward:
            self._step_in_backward()

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _check(self, parameter: nn.Parameter) -> None:
        """Raises ValueError for a weight that cannot step."""
        if not local(parameter).is_contiguous():
            raise ValueError(
                f"a {type(parameter).__name__} of shape {tuple(parameter.shape)} is not contiguous: expected contiguous "
                "weights; use an optimizer of torch.optim for others"
            )
        if parameter.dtype.itemsize < 4 and self.settings["master"] == "residue" and parameter.dtype != torch.bfloat16:
            raise ValueError(
                f"master='residue' holds what bfloat16 rounds away, got {parameter.dtype}: use master='float32'"
            )

    @torch.no_grad()
    def step(self, closure=None):
        """Steps every weight that has a gradient. Returns closure()'s value.

        A first step whose rates and gradients are all 0 makes the states and is not counted: torch's
        get_optimizer_state_dict takes one to have them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stepped.clear()
        if not self.state and self._moves_nothing():
            self._make_states(self._parameters())
        else:
            self._step([(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None])
        return loss

    def _moves_nothing(self) -> bool:
        """Whether all rates and, on every rank, all gradients are 0."""
        if any(float(group["lr"]) for group in self.param_groups):
            return False
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        moving = any(bool(local(gradient).any()) for gradient in gradients)
        meshes = {gradient.device_mesh for gradient in gradients if isinstance(gradient, DTensor)}
        for mesh in meshes:
            for group in mesh.get_all_groups():
                told = torch.tensor(float(moving), device=mesh.device_type)
                torch.distributed.all_reduce(told, group=group)
                moving = bool(told)
        return not moving

    def _step(self, stepping: list[tuple[nn.Parameter, dict]]) -> None:
        self._refuse_broken()
        if self._in_backward and any(isinstance(p, DTensor) for p, _ in stepping):
            raise ValueError(
                "step_in_backward: weights are sharded since the optimizer was made of them (FSDP2), and their gradients "
                "are averaged after backward; expected whole weights, or switch step_in_backward off"
            )
        one_by_one = self._in_backward and self.state  # the first makes all states, no later one is to look for them
        self._make_states([p for p, _ in stepping] if one_by_one else self._parameters())
        crossings: dict[torch.device, list[Iterator[Crossing]]] = {}
        for parameter, group in stepping:
            crossings.setdefault(parameter.device, []).append(self._crossings(parameter, group))
        for device in crossings if self._host else ():
            if device not in self._hosts:
                self._hosts[device] = HostSteps(lane_of(device), max(map(_room, self._parameters())))
        with self._whole():
            for device, of_device in crossings.items():
                pieces = (crossing for weight in of_device for crossing in weight)
                if self._host:
                    self._hosts[device].run(pieces)
                else:
                    for piece in pieces:
                        piece.step(piece.weight, piece.gradient)

    def _crossings(self, parameter: nn.Parameter, group: dict) -> Iterator[Crossing]:
        """What a step of a weight does, piece by piece. Each is to be stepped before the next but one is asked for."""
        torch.autograd.graph.increment_version(parameter)  # who saved the weight for a later backward must be told
        weights, gradients, shard = flat(parameter), flat(parameter.grad), self._shard(parameter)
        if gradients.itemsize > shard.dtype.itemsize:
            gradients = gradients.to(shard.dtype)
        n = weights.numel()
        for start in range(0, n, PIECE):
            here = slice(start, min(start + PIECE, n))
            yield Crossing(weights[here], gradients[here], partial(shard.step, self._steps, here, group))
        if not n:  # a rank that holds nothing of it
            shard.count += 1

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

    def _kept(self, parameter: nn.Parameter) -> dict[str, Like]:
        """The tensors that are kept of a weight, beside the count of its steps."""
        kept = MASTERS[self.settings["master"]] if parameter.dtype.itemsize < 4 else {}
        return kept | averages_like(parameter, self._steps.averages, _wide(parameter.dtype), self._steps.quantised)

    def _make_states(self, parameters: Iterable[nn.Parameter]) -> None:
        """Those of before the first step, of each of the weights that trains and has none."""
        for parameter in parameters:
            if parameter not in self.state and (parameter.requires_grad or parameter.grad is not None):
                self._check(parameter)
                self.state[parameter] = self._make(parameter)

    def _make(self, parameter: nn.Parameter) -> dict[str, Any]:
        device = torch.device("cpu") if self._host else parameter.device
        state = {name: like.zeros(parameter, device) for name, like in self._kept(parameter).items()}
        if "master" in state:
            local(state["master"]).copy_(local(parameter.detach()))
        shards = {"shards": Blocks(parameter).shards} if self._is_quantised(parameter) else {}
        counts_on = torch.device("cpu") if self._steps.quantised else device  # where the code that steps reads them
        return {"step": torch.zeros((), dtype=torch.float32, device=counts_on)} | state | shards

    def _is_quantised(self, parameter: nn.Parameter) -> bool:
        return self._steps.quantised and is_quantised(parameter)

    def _shard(self, parameter: nn.Parameter) -> _Shard:
        state = self.state[parameter]
        kept = {name: flat(value) for name, value in state.items() if name not in ("step", "shards")}
        if "residue" in kept:
            kept["residue"] = kept["residue"].view(torch.int16)
        blocks = Blocks(parameter, state["shards"]) if "shards" in state else None
        return _Shard(kept, state["step"], numbers_of(parameter), _wide(parameter.dtype), blocks)

    def state_dict(self) -> dict[str, Any]:
        """As torch has it; each group says the settings, and each state of 8-bit blocks how many shards they were cut into."""
        self._refuse_broken()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies what it holds. Raises ValueError for a state of other settings, and for one of other weights, before anything
        has changed. States of earlier versions, which kept them by pieces, are taken over."""
        settings = _settings_of(state_dict)
        if settings != self.settings:
            raise ValueError(
                f"optimizer state of {settings}: expected {self.settings}; go on with the settings it began with"
            )
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        loaded = {
            p: state_dict["state"][n]
            for n, p in zip(names, self._parameters(), strict=False)
            if n in state_dict["state"]
        }
        if any("pieces" in state for state in loaded.values()):
            loaded = {p: whole_state(p, state, self._kept(p)) for p, state in loaded.items()}
        for parameter, state in loaded.items():
            self._check_fits(parameter, state)
        before = dict(self.state)
        groups = [group | self.settings for group in state_dict["param_groups"]]
        super().load_state_dict({"state": {}, "param_groups": groups})
        for parameter, state in loaded.items():
            own = self.state[parameter] = before.get(parameter) or self._make(parameter)
            for name in own.keys() - {"shards"}:
                local(own[name]).copy_(local(state[name]))
        self._broken = False

    def _check_fits(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        kept, whole, shard = self._kept(parameter), parameter.shape, local(parameter).shape
        expected = f"for a weight of shape {tuple(whole)}, {tuple(shard)} of it here"
        if missing := sorted({"step", *kept} - state.keys()):
            raise ValueError(
                f"optimizer state has no {', '.join(missing)} {expected}: it is of another weight or optimizer"
            )
        for name, like in kept.items():
            value = state[name]
            if value.dtype != like.dtype or value.shape != like.size(whole) or local(value).shape != like.size(shard):
                raise ValueError(
                    f"optimizer state has {name} of {tuple(value.shape)} {value.dtype}, {tuple(local(value).shape)} here: "
                    f"expected {tuple(like.size(whole))} {like.dtype}, {expected}"
                )
        if "shards" in state:
            check_cuts(parameter, int(state["shards"]))


class AdamW(MasterOptimizer):
    """AdamW with an exact float32 master of bfloat16 weights.

    params, lr, betas, eps, weight_decay: as in torch.optim.AdamW.
    states: "float32" (torch, fused) or "8bit" (torchao, blocks of 256; tensors of under 4,096 numbers stay in float32).
    master, host, step_in_backward: of MasterOptimizer.

    The first 8-bit step of each size in a process is compared with the same step uncompiled, on copies of one piece.

    Raises ValueError as MasterOptimizer does, for rates that make no sense and without torchao where it is needed; in a step
    RuntimeError where inductor's code gives wrong numbers.
    """

    kinds: ClassVar[dict[str, type]] = {"float32": AdamWSteps, "8bit": CompiledAdamWSteps}

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

    kinds: ClassVar[dict[str, type]] = {"float32": RMSpropSteps}

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


class _Shard:
    """What a step of a weight writes of its states on this rank, flat. kept: by name; count: of steps made, ()."""

    def __init__(self, kept: dict[str, Tensor], count: Tensor, n: int, dtype: torch.dtype, blocks: Blocks | None):
        self.kept, self.count, self.n, self.dtype, self.blocks = kept, count, n, dtype, blocks
        self.device = next(iter(kept.values())).device

    def step(self, steps, here: slice, group: dict, weight: Tensor, gradient: Tensor) -> None:
        """Steps a piece's weight (n,), numbers `here` of the shard, where the states live, in place."""
        for block in steps.blocks(weight.numel(), self.device):
            low, grad = weight[block], gradient[block].to(self.dtype)
            at = slice(here.start + block.start, here.start + block.stop)
            averages, done = self._averages(steps, at)
            if "residue" in self.kept:
                value = join(low, self.kept["residue"][at])
                steps.step(value, grad, averages, self.count, group)
                split(value, low, self.kept["residue"][at])
            elif "master" in self.kept:
                steps.step(self.kept["master"][at], grad, averages, self.count, group)
                low.copy_(self.kept["master"][at])
            else:
                steps.step(low, grad, averages, self.count, group)
            done()
        if here.stop == self.n:
            self.count += 1

    def _averages(self, steps, at: slice) -> tuple[list, Callable[[], None]]:
        """Those of some numbers, and what is to be done when they have stepped."""
        if self.blocks is None:
            return [self.kept[name][at] for name in steps.averages], lambda: None
        places = self.blocks.places(at, self.device)
        codes, scales = ([self.kept[f"{name}_{part}"] for name in steps.averages] for part in EightBit._fields)
        averages = [EightBit(code[at], scale[places]) for code, scale in zip(codes, scales, strict=True)]

        def done() -> None:
            for scale, average in zip(scales, averages, strict=True):
                scale[places] = average.scale  # a copy where a step's scales do not lie side by side

        return averages, done


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of this dtype step."""
    return torch.promote_types(dtype, torch.float32)


def _room(parameter: nn.Parameter) -> int:
    """Bytes that a piece and its gradient take at most."""
    return room_bytes(min(PIECE, numbers_of(parameter)), parameter.itemsize, _wide(parameter.dtype).itemsize)


def _settings_of(state_dict: dict[str, Any]) -> dict[str, str] | None:
    """Of a state; earlier versions wrote them beside the groups, and had AdamW only at first."""
    if "settings" in state_dict:
        return {"algorithm": "AdamW"} | state_dict["settings"]
    groups = [{name: group.get(name) for name in SETTINGS} for group in state_dict["param_groups"]]
    return groups[0] if groups and all(group == groups[0] != dict.fromkeys(SETTINGS) for group in groups) else None
