"""How a run spends memory: one object that tiles and offloads a model and makes its optimizer, by hand or from a plan.

Which optimizer that is, transformers' arguments say (optim): named_optimizer reads them, and refuses what would be ignored.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longpo_ops.memory import optimizer, plan
from longpo_ops.memory.host_memory import available_host_bytes, processes_here
from longpo_ops.memory.offload import OffloadHandle, offload_activations
from longpo_ops.memory.quantise import CODECS
from longpo_ops.memory.tiling import tile_layers
from longpo_ops.runs.validate import check_kinds


@dataclass(frozen=True)
class Memory:
    """Settings of tile_layers (tile_rows), offload_activations (offload to save_attention) and the optimizer (the rest).

    host_bytes: of the machine, for all of the run's processes on it. states: None leaves the optimizer to transformers.
    Raises ValueError for values that make no sense.
    """

    tile_rows: int | None = None
    offload: bool = False
    device_bytes: int = 0
    host_bytes: int | None = None
    spill_dir: str | None = None
    store: str = "exact"
    save_attention: bool = False
    states: str | None = None
    master: str = "residue"
    host: bool = False
    step_in_backward: bool = False

    def __post_init__(self):
        check_kinds(vars(self), Memory, "memory: ")
        for name, least in (("tile_rows", 1), ("device_bytes", 0), ("host_bytes", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"memory: {name}={value}, expected at least {least}")
        for name, known in (
            ("store", tuple(CODECS)),
            ("states", (None, *optimizer.STATES)),
            ("master", optimizer.MASTERS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"memory: {name}={getattr(self, name)!r}, expected one of {', '.join(map(str, known))}"
                )
        if self.states is None and (self.host or self.step_in_backward):
            raise ValueError("memory: host and step_in_backward are of our optimizers; set states to float32 or 8bit")

    @classmethod
    def from_settings(cls, values: dict[str, Any] | None) -> Memory:
        """Raises ValueError naming a setting that nobody knows."""
        values = values or {}
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"memory: {', '.join(unknown)} unknown, expected some of {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_plan(cls, planned: plan.Plan, spill_dir: str | None = None) -> Memory:
        s = planned.settings
        host = planned.host.get("layer inputs", 0) + planned.host.get("attention outputs", 0)
        return cls(
            tile_rows=s.tile_rows,
            offload=s.offload,
            device_bytes=s.kept * plan.input_bytes(planned.work),
            host_bytes=host * processes_here() if s.offload else None,
            spill_dir=spill_dir if s.on_disk else None,
            store=s.store,
            save_attention=s.attention_layers > 0,
            states=s.states,
            master=s.master,
            host=s.host,
            step_in_backward=s.step_in_backward,
        )

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[OffloadHandle | None]:
        """Within it the model is tiled and offloaded. -> the handle of what is offloaded."""
        with ExitStack() as stack:
            handle = None
            if self.tile_rows is not None:
                stack.enter_context(tile_layers(model, self.tile_rows))
            if self.offload:
                where = {"device_bytes": self.device_bytes, "host_bytes": self.host_bytes, "spill_dir": self.spill_dir}
                how = {"store": self.store, "save_attention": self.save_attention}
                handle = stack.enter_context(offload_activations(model, **where, **how))
            yield handle

    def make_optimizer(self, groups, optim: str = "adamw_torch", **options) -> optimizer.MasterOptimizer:
        """The optimizer of that name over parameter groups. options: its numbers (lr, betas, alpha, eps, weight_decay)."""
        ours = dict(states=self.states, master=self.master, host=self.host, step_in_backward=self.step_in_backward)
        return optimizer.OPTIMS[optimizer.check_optim(optim)](groups, **options, **ours)

    def check_optimizer(self, arguments) -> None:
        """Raises ValueError for what transformers' arguments and these settings say of the optimizer and it would not do,
        before there are weights: it is made for a single number."""
        options = named_optimizer(arguments) | {"weight_decay": arguments.weight_decay}
        self.make_optimizer([torch.zeros(1)], **options)


ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}  # transformers' defaults


def named_optimizer(arguments) -> dict[str, Any]:
    """What make_optimizer takes beside weight_decay, as transformers' TrainingArguments say it: optim, lr, and betas and eps
    (AdamW) or alpha and eps (RMSprop, in optim_args: "alpha=0.9,eps=1e-6").

    Raises ValueError for an optimizer that is not ours, and for options that the one named would not look at.
    """
    try:
        name = optimizer.check_optim(arguments.optim)
    except ValueError as error:
        raise ValueError(
            f"{error}, as memory (states) and fit='auto' replace the optimizer by one with an exact float32 master; use one of "
            "these, or leave memory without states and fit off for transformers' own"
        ) from None
    if arguments.optim_target_modules is not None:
        raise ValueError(
            f"optim_target_modules={arguments.optim_target_modules!r}: {name} does not look at it; leave it out"
        )
    own = _parted(arguments.optim_args)
    known = ("alpha", "eps") if optimizer.OPTIMS[name] is optimizer.RMSprop else ()
    if unknown := sorted(set(own) - set(known)):
        instead = f"it takes {' and '.join(known)}" if known else f"it takes {', '.join(ADAM)}, settings of their own"
        raise ValueError(f"optim_args={arguments.optim_args!r}: {', '.join(unknown)} is not of {name} here; {instead}")
    given = {setting: getattr(arguments, setting) for setting in ADAM}
    lr = {"optim": name, "lr": arguments.learning_rate}
    if not known:
        return lr | {"betas": (given["adam_beta1"], given["adam_beta2"]), "eps": given["adam_epsilon"]}
    if changed := [f"{setting}={value!r}" for setting, value in given.items() if value != ADAM[setting]]:
        raise ValueError(
            f"{', '.join(changed)}: {name} does not look at it; its numbers are optim_args='alpha=...,eps=...'"
        )
    return lr | {setting: _number(value, arguments.optim_args) for setting, value in own.items()}


def _parted(optim_args: str | None) -> dict[str, str]:
    """ "alpha=0.9, eps=1e-6" -> values by name, as transformers parts it."""
    parts = filter(None, (optim_args or "").replace(" ", "").split(","))
    return {name: value for name, _, value in (part.partition("=") for part in parts)}


def _number(value: str, optim_args: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"optim_args={optim_args!r}: {value!r}, expected a number") from None


def machine_here(device: torch.device, spill_dir: str | None = None, host_bytes: int | None = None) -> plan.Machine:
    """What this process has of its machine. Without a GPU the host's memory is the device's, and only disk is further away. The
    run's other processes on the machine have as much (Machine.shared_by).

    host_bytes: of the host in all. Default: what is available now, which is too little in a guest whose memory grows as it
    is used. Of that the system already has its part, so that half of the reserve does.
    """
    disk = shutil.disk_usage(spill_dir).free * 9 // 10 if spill_dir else 0
    host = available_host_bytes() if host_bytes is None else host_bytes
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        rates = next((rates for name, rates in plan.CARDS.items() if name in card.name), {})
        reserve = plan.HOST_RESERVE // (2 if host_bytes is None else 1)
        return plan.Machine(card.total_memory, host, disk, host_reserve=reserve, **rates).shared_by(processes_here())
    here = processes_here()
    return plan.Machine(host // here, 0, disk, device_reserve=plan.GIB, host_reserve=0).shared_by(here)
