"""How a run spends memory: one object that tiles and offloads a model and makes its optimizer, by hand or from a plan."""

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
from longpo_ops.memory.offload import OffloadHandle, offload_activations
from longpo_ops.memory.quantise import CODECS
from longpo_ops.memory.tiers import available_host_bytes
from longpo_ops.memory.tiling import tile_layers
from longpo_ops.runs.validate import check_kinds


@dataclass(frozen=True)
class Memory:
    """Settings of tile_layers (tile_rows), offload_activations (offload to save_attention) and optimizer.AdamW (the rest).

    states: None leaves the optimizer to transformers. Raises ValueError for values that make no sense.
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
            raise ValueError("memory: host and step_in_backward are of our AdamW; set states to float32 or 8bit")

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
            device_bytes=s.kept * plan.traced(planned.work, s).input,
            host_bytes=host if s.offload else None,
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

    def make_optimizer(self, groups, **options) -> optimizer.AdamW:
        """AdamW over parameter groups. options: lr, betas, eps, weight_decay."""
        ours = dict(states=self.states, master=self.master, host=self.host, step_in_backward=self.step_in_backward)
        return optimizer.AdamW(groups, **options, **ours)


def machine_here(device: torch.device, spill_dir: str | None = None, host_bytes: int | None = None) -> plan.Machine:
    """What this machine has. Without a GPU the host's memory is the device's, and only disk is further away.

    host_bytes: of the host in all. Default: what is available now, which is too little in a guest whose memory grows as it
    is used. Of that the system already has its part, so that half of the reserve does.
    """
    disk = shutil.disk_usage(spill_dir).free * 9 // 10 if spill_dir else 0
    host = available_host_bytes() if host_bytes is None else host_bytes
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        rates = next((rates for name, rates in plan.CARDS.items() if name in card.name), {})
        reserve = plan.HOST_RESERVE // (2 if host_bytes is None else 1)
        return plan.Machine(card.total_memory, host, disk, host_reserve=reserve, **rates)
    return plan.Machine(host, 0, disk, device_reserve=plan.GIB, host_reserve=0)
