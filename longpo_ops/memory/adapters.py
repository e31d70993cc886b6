"""LoRA adapters of a plan, on a base that is frozen: in 16 bits, or its linear weights in 8 or 4.

    y = W x + s B A x       A (r, in), B (out, r) float32, as PEFT keeps them beside a 16-bit base

W has no gradient, master or states; a layer's backward still gives the gradient of its input. The adapters are PEFT's own, put
on the model that is traced, so that what they keep for their backward (the layer's input in float32, say) is counted. Of a
quantised base each product makes the 16-bit weight that it needs, in forward and in backward, and lets it go.

Tests: tests/memory/test_plan_adapters.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longpo_ops.kinds import check_number, check_whole, refusal
from longpo_ops.pretrained import NONE, check_scheme

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Adapters:
    """rank to dropout, rank_pattern: as PEFT's LoraConfig has them. quantization: of the base's linear weights, a name that
    pretrained.check_scheme knows.

    The head stays as it is. Experts that are one tensor are no linear layers: they are not quantised, and PEFT itself says
    which names mean them.
    """

    rank: int
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    target_parameters: tuple[str, ...] = ()
    dropout: float = 0.0
    quantization: str = NONE
    rank_pattern: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        check_whole("lora_rank", self.rank, 1)
        check_scheme(self.quantization)
        if not 0 <= check_number("lora_dropout", self.dropout) < 1:
            raise refusal("lora_dropout", self.dropout, "a number of at least 0, below 1")
        if self.target_modules != ALL_LINEAR and not (isinstance(self.target_modules, tuple) and self.target_modules):
            raise refusal("lora_target_modules", self.target_modules, f"{ALL_LINEAR}, or a tuple of names")

    @classmethod
    def of(cls, model: nn.Module, quantization: str) -> Adapters:
        """Those of a PEFT model. Raises ValueError for others than LoRA of one rank."""
        (given, *others) = model.peft_config.values()
        if others or given.peft_type.value != "LORA":
            raise ValueError(f"adapters of {[g.peft_type.value for g in (given, *others)]}: expected one set of LoRA")
        targets = given.target_modules
        modules = (
            targets if targets == ALL_LINEAR else tuple(sorted([targets] if isinstance(targets, str) else targets))
        )
        parameters = tuple(sorted(getattr(given, "target_parameters", None) or ()))
        ranks = tuple(sorted(given.rank_pattern.items()))
        return cls(given.r, modules, parameters, given.lora_dropout, quantization, ranks)

    def put_on(self, model: nn.Module) -> int:
        """Freezes a model and gives it adapters. -> numbers of weights that are quantised. Raises ValueError for targets that
        the model has none of."""
        from peft import LoraConfig, get_peft_model

        quantised = self._quantise(model) if self.quantization != NONE else 0
        model.enable_input_require_grads()
        config = LoraConfig(
            r=self.rank,
            lora_dropout=self.dropout,
            target_modules=ALL_LINEAR if self.target_modules == ALL_LINEAR else list(self.target_modules),
            target_parameters=list(self.target_parameters) or None,
            rank_pattern=dict(self.rank_pattern),
            task_type="CAUSAL_LM",
        )
        get_peft_model(model, config)
        return quantised

    def _quantise(self, model: nn.Module) -> int:
        head, numbers = model.get_output_embeddings(), 0
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not head:
                module.forward = functools.partial(_linear, module)
                numbers += module.weight.numel()
        return numbers

    def quantised_bytes(self, numbers: int) -> int:
        """Of so many quantised weights: one each, with a scale a row that is not counted; or half of one, and for 64 of them
        a scale of a byte, for 256 of which there is a float32."""
        return numbers if self.quantization == "int8" else -(-numbers // 2) + numbers // 64 + numbers // 4096


def scheme_of(config) -> str:
    """How the weights of a model that is stored quantised are counted. Raises ValueError for ways that are not known."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return NONE
    told = stored if isinstance(stored, dict) else vars(stored)
    method = getattr(told.get("quant_method"), "value", told.get("quant_method"))
    if method not in ("bitsandbytes", "torchao"):
        raise ValueError(
            f"model {config.name_or_path!r}: its weights are quantised ({method}), and the planner knows bitsandbytes and "
            "torchao only; set memory by hand, and fit to 'off'"
        )
    return "nf4" if told.get("load_in_4bit") or told.get("_load_in_4bit") else "int8"


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    y = _Dequantised.apply(x, module.weight)
    return y if module.bias is None else y + module.bias


class _Dequantised(torch.autograd.Function):
    """x (..., in) -> (..., out) by a weight whose 16 bits exist for each product's time."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return x @ torch.empty_like(weight, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy @ torch.empty_like(ctx.weight, dtype=dy.dtype), None
