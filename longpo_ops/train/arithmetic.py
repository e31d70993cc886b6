"""One arithmetic for policy and reference: dtype of the weights, autocast, tiles of rows.

Where both read the same input with the same weights, rewards beta (log pi - log pi_ref) begin at 0. Under two arithmetics
they do not: in bfloat16 the log-prob of an answer of ten tokens differs by tenths. Not covered: what DeepSpeed and FSDP's own
mixed precision do to the policy.

Tests: tests/train/test_arithmetic.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..memory.tiling import is_tiled, tile_layers
from ..pretrained import is_plain

log = logging.getLogger("longpo_ops.train")

SMALL_STEP = 1e-5  # below this, rounding to bfloat16 keeps 99 % of the weights where they are
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by TrainingArguments' mixed_precision


def base_model(model: nn.Module) -> nn.Module:
    """The causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def keep_float32_master(model: nn.Module, args) -> None:
    """Turns trained 16-bit weights into float32 ones under autocast where steps are too small for them."""
    small = [p for p in model.parameters() if p.requires_grad and p.dtype.itemsize < 4]
    if small and args.learning_rate < SMALL_STEP:
        for parameter in small:
            parameter.data = parameter.data.float()
        if args.mixed_precision == "no":
            args.bf16, args.mixed_precision = True, "bf16"


@dataclass(frozen=True)
class Arithmetic:
    """How a model computes, beside the dtype of its weights: what autocast computes in, and rows of memory.tile_layers."""

    autocast: torch.dtype | None = None
    tile_rows: int | None = None

    @classmethod
    def of_run(cls, mixed_precision: str, tile_rows: int | None) -> Arithmetic:
        """As accelerate computes under TrainingArguments' mixed_precision. Raises ValueError for another than its own."""
        if mixed_precision not in AUTOCAST:
            raise ValueError(
                f"mixed_precision={mixed_precision!r}: a reference computes like the policy in {', '.join(AUTOCAST)} only; "
                "expected one of them"
            )
        return cls(AUTOCAST[mixed_precision], tile_rows)

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Within it the model computes so, whatever it does otherwise."""
        device = next(model.parameters()).device.type
        tiled = self.tile_rows is not None and not is_tiled(model)
        with (
            torch.autocast(device, self.autocast or torch.bfloat16, enabled=self.autocast is not None),
            tile_layers(model, self.tile_rows) if tiled else contextlib.nullcontext(),
        ):
            yield


def widen(reference: nn.Module, policy: nn.Module) -> None:
    """Gives weights of the reference the dtype of the policy's of the same name, where that is wider: no number changes.

    A reference that stays wider than the policy is warned of: rewards then begin with what rounding makes of the policy.
    Quantised weights of either are left alone.
    """
    dtypes = {
        name.replace(".base_layer.", "."): p.dtype for name, p in base_model(policy).named_parameters() if is_plain(p)
    }
    wider = set()
    for name, parameter in reference.named_parameters():
        if not is_plain(parameter):
            continue
        dtype = dtypes.get(name, parameter.dtype)
        if dtype.itemsize > parameter.dtype.itemsize:
            parameter.data = parameter.data.to(dtype)
        elif dtype != parameter.dtype:
            wider.add((parameter.dtype, dtype))
    for theirs, ours in sorted(wider, key=str):
        log.warning("the reference's weights are %s, the policy's %s: rewards do not begin at 0", theirs, ours)
