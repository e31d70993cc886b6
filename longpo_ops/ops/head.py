"""The language-model head as a module that turns hidden states into losses, alone or attached to a transformers model.

    head(hidden, labels, loss=linear_logprobs)                  one tensor of rows
    head((chosen, rejected), (chosen_labels, rejected_labels))  fused_preference_loss, the default

The weight is read inside the module's own forward, so hooks of FSDP2 and ZeRO-3 gather it and those of DDP see its
gradient. Not covered: outputs that are no single linear layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .preference import fused_preference_loss

_ATTACHED = "_longpo_ops_attached"


def _as_tuple(tensors: Tensor | tuple | list) -> tuple:
    return tuple(tensors) if isinstance(tensors, tuple | list) else (tensors,)


class PreferenceHead(nn.Module):
    """Owns weight (V, H) and bias (V,) of a head, and how its products become logits.

    weight, bias: parameters to share (a tied head shares the embedding's). softcap, scale: as in fused_preference_loss.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None, *, softcap=None, scale: float = 1.0):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.softcap, self.scale = softcap, scale

    def forward(
        self,
        hidden: Tensor | tuple[Tensor, ...],
        labels: Tensor | tuple[Tensor, ...],
        *,
        loss: Callable[..., Any] = fused_preference_loss,
        **options,
    ) -> Any:
        """loss(*hidden, weight, *labels, bias=..., softcap=..., scale=..., **options), for any function of this package
        that takes hidden states and a head. Raises what that function raises."""
        given = {"bias": self.bias, "softcap": self.softcap, "scale": self.scale}
        return loss(*_as_tuple(hidden), self.weight, *_as_tuple(labels), **given | options)

    def extra_repr(self) -> str:
        vocab, width = self.weight.shape
        return f"{width} -> {vocab}, bias={self.bias is not None}, softcap={self.softcap}, scale={self.scale}"


def attach(model: nn.Module, *, merge_lora: bool = False) -> nn.Module:
    """Makes forward of a transformers causal LM (or a PEFT model of one) stop at the hidden states. detach() undoes it.

        attach(model)
        model(input_ids, ...)                   -> the body's output; .last_hidden_state (B, T, H), no logits
        model(input_ids, ..., compute=f)        -> f(hidden (B, T, H), head), run inside forward, where
                                                   head(hidden, labels, loss=..., **options) works as PreferenceHead does

    Attach before wrapping in DDP, FSDP2 or ZeRO-3, call the wrapper, and their hooks run; calling the body directly would
    pass them by. `compute` is the form that every wrapper supports, as the head's weight is gathered while it runs.

    Tied heads stay tied. The config's final logit soft-cap and logit scale are taken over. LoRA on the head: a ValueError,
    or with merge_lora=True the merged weight (V, H) is formed at each call and gradients reach its factors.

    Raises ValueError for a model without a body and a linear head, one that is attached already, or an adapter on the head
    that cannot be merged exactly (dropout, DoRA, several active adapters).
    """
    causal = _causal_lm(model)
    if hasattr(causal, _ATTACHED):
        raise ValueError(f"model: {type(causal).__name__} is attached already; detach(model) first")
    body, lm_head = _parts(causal)
    map = _config_map(causal.config)
    read = _weight_reader(lm_head, merge_lora)
    before = {module: module.__dict__.get("forward") for module in (causal, lm_head)}
    lm_head.forward = functools.partial(_head_forward, lm_head.forward, read, map)
    causal.forward = functools.partial(_body_forward, body, lm_head)
    setattr(causal, _ATTACHED, before)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undoes attach(model). Raises ValueError for a model that is not attached."""
    causal = _causal_lm(model)
    if not hasattr(causal, _ATTACHED):
        raise ValueError(f"model: {type(causal).__name__} is not attached")
    for module, forward in getattr(causal, _ATTACHED).items():
        if forward is None:
            del module.forward
        else:
            module.forward = forward
    delattr(causal, _ATTACHED)
    return model


def _body_forward(body: nn.Module, lm_head: nn.Module, *args, compute: Callable | None = None, **kwargs):
    out = body(*args, **kwargs)
    if compute is None:
        return out
    return lm_head(out[0], compute=compute)


def _head_forward(plain: Callable, read: Callable, map: dict, hidden: Tensor, *, compute: Callable | None = None):
    """The head's forward: logits as ever, or compute(hidden, head) with the weight at hand."""
    if compute is None:
        return plain(hidden)
    weight, bias = read()

    def head(hidden, labels, *, loss=fused_preference_loss, **options):
        return loss(*_as_tuple(hidden), weight, *_as_tuple(labels), **{"bias": bias, **map, **options})

    return compute(hidden, head)


def _causal_lm(model: nn.Module) -> nn.Module:
    """The causal LM inside a PEFT model, or the model itself. Raises ValueError for something else."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(causal, "base_model_prefix") or not hasattr(causal, "get_output_embeddings"):
        raise ValueError(
            f"model: {type(model).__name__} is no transformers causal LM; attach before wrapping it in DDP or FSDP, "
            "or use PreferenceHead with a body of your own"
        )
    return causal


def _parts(causal: nn.Module) -> tuple[nn.Module, nn.Module]:
    body = getattr(causal, causal.base_model_prefix, None)
    lm_head = causal.get_output_embeddings()
    if body is None or lm_head is None or body is causal:
        raise ValueError(
            f"model: {type(causal).__name__} has no separate body and head; expected an AutoModelForCausalLM"
        )
    return body, lm_head


def _config_map(config) -> dict:
    """softcap and scale of the final logits, from the names transformers configs use (Gemma 2, Cohere, Granite)."""
    scale = getattr(config, "logit_scale", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    return {"softcap": getattr(config, "final_logit_softcapping", None), "scale": float(scale)}


def _weight_reader(lm_head: nn.Module, merge_lora: bool) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """How to get (weight, bias) of a head when it is called. Raises ValueError for a head that is no linear map."""
    if hasattr(lm_head, "modules_to_save"):  # PEFT: a trained copy of the whole head
        return functools.partial(_trained_copy, lm_head)
    if not hasattr(lm_head, "base_layer"):
        _linear(lm_head)
        return functools.partial(_linear, lm_head)
    if not merge_lora:
        raise ValueError(
            f"model: its head carries adapters {list(lm_head.active_adapters)}; expected a plain head. Use "
            "attach(model, merge_lora=True), or leave lm_head out of target_modules"
        )
    _check_mergeable(lm_head)
    return functools.partial(_merged, lm_head)


def _trained_copy(lm_head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The copy of the active adapter, or the original head while adapters are disabled."""
    if lm_head.disable_adapters:
        return _linear(lm_head.original_module)
    return _linear(lm_head.modules_to_save[lm_head.active_adapters[0]])


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"model: its head is {type(module).__name__}; expected a linear head with a float weight (V, H)"
        )
    return weight, getattr(module, "bias", None)


def _check_mergeable(lm_head: nn.Module) -> None:
    """Raises ValueError unless the adapter is one plain LoRA without dropout."""
    active = list(lm_head.active_adapters)
    if len(active) != 1 or not hasattr(lm_head, "get_delta_weight"):
        raise ValueError(f"merge_lora=True: the head has adapters {active}; expected one active LoRA adapter")
    dropout = getattr(lm_head.lora_dropout[active[0]], "p", 0.0) if active[0] in lm_head.lora_dropout else 0.0
    if dropout or getattr(lm_head, "use_dora", {}).get(active[0]):
        raise ValueError(
            f"merge_lora=True: the head's adapter has dropout={dropout} or DoRA; expected plain LoRA with lora_dropout=0"
        )


def _merged(lm_head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """base weight + B A * scaling, differentiable in the factors; the base alone while adapters are disabled."""
    weight, bias = _linear(lm_head.base_layer)
    if lm_head.disable_adapters or lm_head.merged:
        return weight, bias
    (active,) = lm_head.active_adapters
    return weight + lm_head.get_delta_weight(active).to(weight.dtype), bias
