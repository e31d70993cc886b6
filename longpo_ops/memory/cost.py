"""Bytes that training keeps for each weight, on the rank whose shard it is in, under the settings of memory and of Trainer.

    8.03 = 2 weight + 2 residue + 2.03 8-bit states + 2 gradient        bfloat16, mixed_precision "no", one pack a step
    10.03 = 4 weight + 2.03 8-bit states + 4 gradient                   what FSDP2 makes of it with mixed_precision "bf16"

Not counted: what lives for a layer's time (gathered weights, gradients that are not reduced yet), and the float32 states of
vectors and small weights in 8 bits, a thousandth of a language model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from longpo_ops.memory.optimizer import OPTIMS
from longpo_ops.memory.pieces import SCALED


class WeightBytes(NamedTuple):
    """By what they are for."""

    weight: float
    master: float
    states: float
    gradient: float

    @property
    def total(self) -> float:
        return sum(self)

    def __str__(self) -> str:
        parts = (f"{value:.3g} {name}" for name, value in zip(self._fields, self, strict=True) if value)
        return f"{self.total:.4g} bytes a weight ({', '.join(parts)})"


def weight_bytes(
    dtype: torch.dtype,
    states: str | None = "float32",
    master: str = "residue",
    *,
    optim: str = "adamw_torch",
    mixed_precision: str = "no",
    accumulation: int = 1,
    fsdp: bool = False,
) -> WeightBytes:
    """What the settings really cost.

    dtype: of the weights as they are loaded. states, master: of optimizer.MasterOptimizer; None for torch's optimizer, whose
    states have the weights' dtype. optim: a name of optimizer.OPTIMS. mixed_precision: of TrainingArguments; under FSDP2
    accelerate makes weights that train float32 unless it is "no". accumulation: packs of a step; our optimizers sum several in
    float32, and under FSDP2 Trainer reduces each pack's gradients, so that no rank holds those of other shards.
    """
    if fsdp and mixed_precision != "no":
        dtype = torch.float32
    steps, ours, narrow = OPTIMS[optim].kinds[states or "float32"], states is not None, dtype.itemsize < 4
    each = 1 + 4 / SCALED if steps.quantised else max(4, dtype.itemsize) if ours else dtype.itemsize
    return WeightBytes(
        weight=dtype.itemsize,
        master={"residue": 2, "float32": 4}[master] if ours and narrow else 0,
        states=each * len(steps.averages),
        gradient=4 if ours and narrow and accumulation > 1 else dtype.itemsize,
    )
