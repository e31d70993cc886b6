"""The weight (V, H) and bias (V,) of a language-model head as they are at this moment, adapters and all.

    W = W_0 + sum_k s_k B_k A_k      b = b_0 + sum_k s_k c_k      over the active LoRA adapters k that the head has

Formed at each call, differentiable in A, B and c. Not covered: adapters other than plain LoRA and trained copies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HeadRefused(ValueError):
    """A model or a head that cannot be attached."""


def read_head(lm_head: nn.Module, merge_lora: bool) -> tuple[Tensor, Tensor | None]:
    """-> (weight, bias). Raises ValueError for a head that is no linear map with a float weight, and for adapters on it
    that are not merged (merge_lora=False) or cannot be (dropout, DoRA and other variants)."""
    if "modules_to_save" in lm_head._modules:  # PEFT: a trained copy of the whole head
        return _linear(_trained_copy(lm_head))
    if not hasattr(lm_head, "active_adapters"):
        return _linear(lm_head)
    if not merge_lora:
        raise HeadRefused(
            f"model: its head carries adapters {list(lm_head.active_adapters)}; expected a plain head. Use "
            "attach(model, merge_lora=True), or leave lm_head out of target_modules"
        )
    if not isinstance(getattr(lm_head, "lora_B", None), nn.ModuleDict):  # AdaLoRA's are parameters
        kind = f"{type(lm_head).__name__} of {type(lm_head).__module__}"
        raise HeadRefused(f"merge_lora=True: the head's adapter is {kind}; expected plain LoRA")
    return _merged(lm_head)


def _trained_copy(lm_head: nn.Module) -> nn.Module:
    """The copy of the active adapter, or the original head while there is none."""
    active = list(lm_head.active_adapters)
    if lm_head.disable_adapters or not active or active[0] not in lm_head.modules_to_save:
        return lm_head.original_module
    return lm_head.modules_to_save[active[0]]


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise HeadRefused(f"model: its head is {type(module).__name__}; expected a linear head with a weight (V, H)")
    if hasattr(weight, "placements"):
        raise HeadRefused(
            f"model: its head's weight is sharded as {weight.placements} where it is used; expected it whole (FSDP2 "
            "gathers it, tensor parallelism does not): leave lm_head out of the plan"
        )
    if weight.dtype not in DTYPES or type(weight) not in (Tensor, nn.Parameter):
        raise HeadRefused(
            f"model: its head's weight is {type(weight).__name__} of {weight.dtype}; expected a float weight (V, H). "
            "Leave lm_head out of quantisation (llm_int8_skip_modules, modules_to_not_convert)"
        )
    return weight, getattr(module, "bias", None)


def _merged(lm_head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The base alone while adapters are disabled, as PEFT's own forward has it."""
    if lm_head.disable_adapters and lm_head.merged:
        lm_head.unmerge()
    weight, bias = _linear(lm_head.base_layer)
    if lm_head.disable_adapters or lm_head.merged:
        return weight, bias
    for name in (name for name in lm_head.active_adapters if name in lm_head.lora_A):
        _check_mergeable(lm_head, name)
        weight = weight + lm_head.get_delta_weight(name).to(weight.dtype)
        shift = lm_head.lora_B[name].bias
        if shift is not None:
            shift = (shift * lm_head.scaling[name]).to(weight.dtype)
            bias = shift if bias is None else bias + shift
    return weight, bias


def _check_mergeable(lm_head: nn.Module, name: str) -> None:
    dropout = getattr(lm_head.lora_dropout[name], "p", 0.0)
    variant = getattr(lm_head, "lora_variant", {}).get(name)
    if dropout or variant is not None:
        raise HeadRefused(
            f"merge_lora=True: the head's adapter has dropout={dropout}, variant={type(variant).__name__}; "
            "expected plain LoRA with lora_dropout=0"
        )
