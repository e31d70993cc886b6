"""The language-model head as a module that turns hidden states into losses, alone or attached to a transformers model.

    head(hidden, labels, loss=linear_logprobs)                  one tensor of rows
    head((chosen, rejected), (chosen_labels, rejected_labels))  fused_preference_loss, the default

The weight is read inside the module's own forward, so hooks of FSDP2 and ZeRO-3 gather it and those of DDP see its
gradient. Not covered: outputs that are no single linear layer.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from ..kinds import check_flag, check_number, check_object
from .head_call import call_loss, call_with_head, one_call_at_a_time
from .head_probe import Probed, probe, settings
from .head_weight import HeadRefused, read_head
from .preference import fused_preference_loss

log = logging.getLogger("longpo_ops.ops")

_ATTACHED = "_longpo_ops_attached"
REMEMBERED = 8  # settings, as adapters and the like are switched to and fro


class PreferenceHead(nn.Module):
    """Owns weight (V, H) and bias (V,) of a head, and how its products become logits.

    weight, bias: parameters to share (a tied head shares the embedding's). softcap, scale: as in fused_preference_loss.
    Raises ValueError for what is no parameter of that shape, or no number.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None, *, softcap=None, scale: float = 1.0):
        super().__init__()
        for name, parameter, dims in (("weight", weight, 2), ("bias", bias, 1)):
            if name == "weight" or parameter is not None:
                check_object(name, parameter, nn.Parameter, "an nn.Parameter")
                if parameter.dim() != dims:
                    raise ValueError(
                        f"{name} has {parameter.dim()} dimensions: expected {('(V,)', '(V, H)')[dims - 1]}"
                    )
        self.weight, self.bias = weight, bias
        self.softcap, self.scale = _checked_map(softcap, scale)

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
        return call_loss(loss, hidden, self.weight, labels, given | options)

    def extra_repr(self) -> str:
        vocab, width = self.weight.shape
        return f"{width} -> {vocab}, bias={self.bias is not None}, softcap={self.softcap}, scale={self.scale}"


def _checked_map(softcap: float | None, scale: float) -> tuple[float | None, float]:
    """Raises ValueError for numbers that make no map of logits."""
    return None if softcap is None else check_number("softcap", softcap, above=0), check_number("scale", scale, above=0)


def attach(
    model: nn.Module,
    *,
    merge_lora: bool = False,
    check: bool = True,
    softcap: float | None = None,
    scale: float = 1.0,
) -> nn.Module:
    """Makes forward of a transformers causal LM (or a PEFT model of one) stop at the hidden states. detach() undoes it.

        attach(model)
        model(input_ids, ...)                   -> the body's output; .last_hidden_state (B, T, H), no logits
        model(input_ids, ..., compute=f)        -> f(hidden (B, T, H), head), run inside forward, where
                                                   head(hidden, labels, loss=..., **options) works as PreferenceHead does
        model(input_ids, ..., compute=f, return_outputs=True)
                                                -> that, and the model's own outputs: aux_loss, router_logits,
                                                   hidden_states, ... (its logits are empty)

    Attach before wrapping in DDP, FSDP2 or ZeRO-3, call the wrapper, and their hooks run; calling the body directly would
    pass them by. `compute` is the form that every wrapper supports, as the head's weight is gathered while it runs.

    check=True measures what the model does to its head's products (logit scale, soft-cap, under whatever name), compares
    log-probs with the model's own, and sees whether it is causal: two forwards of 24 tokens, here or, where its weights
    are not here yet (meta, sharded) or it cannot run yet, at the first call. A call under other settings than were
    measured (numbers, flags and names in the config and in the model's own attributes; a look of some 0.4 ms) measures
    again. Compiled code sees attributes of the config and the modules alone, not dicts and constants in them, and is traced
    anew; it is one graph from torch 2.13 on. Attach anew after a change elsewhere, as in code. check=False measures
    nothing and takes softcap and scale as given.

    The head is looked up at each call: one that was resized, replaced or adapted since is the one that is used. Tied heads
    stay tied. LoRA on the head: a ValueError, or with merge_lora=True the merged weight (V, H) is formed at each call and
    gradients reach its factors. generate() runs the model as it was before. A mixture of experts with
    output_router_logits: a call that would lose the auxiliary loss it trains by is refused, see return_outputs.

    Raises ValueError for a model without a linear float head, one that is attached already, that is not causal,
    or whose log-probs are not those of its head under a soft-cap and a scale; for an adapter on the head that cannot be
    merged exactly (dropout, DoRA); in a call, for labels, by name or position, and for a hook on the head that needs its
    logits or their gradients, which are not made (forward pre-hooks, and hooks that pass on any output, run as ever).
    """
    merge_lora, check = check_flag("merge_lora", merge_lora), check_flag("check", check)
    softcap, scale = _checked_map(softcap, scale)
    causal = _causal_lm(model)
    if hasattr(causal, _ATTACHED):
        raise ValueError(f"model: {type(causal).__name__} is attached already; detach(model) first")
    if check and (softcap is not None or scale != 1.0):
        raise ValueError(f"softcap={softcap}, scale={scale}: measured with check=True; give them with check=False")
    _check_parts(causal, check)
    names = _positional(causal.forward)
    state = _Attached(causal, merge_lora, names, check, None if check else Probed(softcap, scale, ends_at_head=True))
    if _has_weights(causal):
        read_head(causal.get_output_embeddings(), merge_lora)
        if check:
            _probe_or_postpone(causal, state)
    for name, function in (("forward", _forward), ("generate", _generate)):
        state.before[name] = causal.__dict__.get(name)
        setattr(causal, name, functools.partial(function, causal))
    setattr(causal, _ATTACHED, state)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undoes attach(model). Raises ValueError for a model that is not attached."""
    causal = _causal_lm(model)
    if not hasattr(causal, _ATTACHED):
        raise ValueError(f"model: {type(causal).__name__} is not attached")
    _put_back(causal)
    delattr(causal, _ATTACHED)
    return model


@dataclass
class _Attached:
    causal: nn.Module
    merge_lora: bool
    names: tuple[str, ...]  # of what forward takes by position
    check: bool
    probed: Probed | None  # None until the first call
    measured: dict[tuple, Probed] = field(default_factory=dict)  # by settings, the last used last
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)  # settings of now that are some object's
    before: dict[str, Callable | None] = field(default_factory=dict)  # what the instance had of its own

    def see_settings(self) -> bool:
        """Measures the model under the settings that it has now, unless it was before."""
        causal = self.causal
        with one_call_at_a_time(causal):
            found = settings(causal)
            now = _key(found)
            probed = self.measured.pop(now, None) or self._measure(now)
            self.probed = self.measured[now] = probed
            if len(self.measured) > REMEMBERED:
                del self.measured[next(iter(self.measured))]
            attributes = (each for each in found if not isinstance(each[0], dict | NoneType))
            self.attributes = [each for each in attributes if each[2] == each[2]]  # NaN differs from itself
        return True

    # As by torch.compiler.assume_constant_result, which imports Dynamo: run while a graph is traced, and not when it is called.
    # A method, as torch 2.11 takes no module as such a function's argument.
    see_settings._dynamo_marked_constant = True

    def _measure(self, now: tuple) -> Probed:
        probed = _probe_at_last(self.causal, _own(self.causal, "forward"), self.merge_lora)
        if self.measured:
            before, then = next(reversed(self.measured.items()))
            changed = ", ".join(sorted({str(name) for name, _ in set(now) ^ set(before)}))
            level = logging.DEBUG if probed == then else logging.INFO  # where it makes a difference
            log.log(level, "%s is measured again, as it has other %s: %s", type(self.causal).__name__, changed, probed)
        return probed

    def trace_settings(self) -> None:
        """Traced by Dynamo, each comparison is a condition of the compiled code, which is traced anew where one fails."""
        for owner, name, value in self.attributes:
            if owner.__dict__[name] != value:
                raise AssertionError(name)


def _forward(causal: nn.Module, *args, compute: Callable | None = None, return_outputs: bool = False, **kwargs):
    state, forward = getattr(causal, _ATTACHED), _own(causal, "forward")
    given = {**dict(zip(state.names, args, strict=False)), **kwargs}
    if given.get("labels") is not None:
        raise ValueError(
            f"labels: {type(causal).__name__} is attached and makes no logits, so it has no loss of its own; use "
            "compute=lambda hidden, head: head(rows, labels, loss=linear_cross_entropy), or detach(model)"
        )
    if compute is not None and given.get("return_dict") is False:
        raise ValueError(
            "return_dict=False: a tuple does not tell an auxiliary loss by its name; leave return_dict out"
        )
    if state.check:
        state.see_settings()
        if torch.compiler.is_compiling():
            state.trace_settings()
    if compute is None:
        return _body(causal, state.probed)(*args, **kwargs)
    result, outputs = call_with_head(causal, forward, compute, state.probed.map, state.merge_lora, args, kwargs)
    if return_outputs:
        return result, outputs
    aux_loss = getattr(outputs, "aux_loss", None)
    if isinstance(aux_loss, Tensor) and aux_loss.requires_grad:
        raise ValueError(
            f"model: {type(causal).__name__} has an auxiliary loss (output_router_logits=True) that this call would lose; "
            "use `result, outputs = model(..., compute=f, return_outputs=True)` and add router_aux_loss_coef * "
            "outputs.aux_loss, or set output_router_logits=False"
        )
    return result


def _generate(causal: nn.Module, *args, **kwargs):
    """Texts need logits: with the model as it was."""
    with one_call_at_a_time(causal), _detached(causal):
        return causal.generate(*args, **kwargs)


@contextlib.contextmanager
def _detached(causal: nn.Module) -> Iterator[None]:
    attached = {name: causal.__dict__[name] for name in getattr(causal, _ATTACHED).before}
    _put_back(causal)
    try:
        yield
    finally:
        causal.__dict__.update(attached)


def _put_back(causal: nn.Module) -> None:
    for name, own in getattr(causal, _ATTACHED).before.items():
        if own is None:
            del causal.__dict__[name]
        else:
            causal.__dict__[name] = own


def _own(causal: nn.Module, name: str) -> Callable:
    """The model's own method, from before it was attached."""
    return getattr(causal, _ATTACHED).before[name] or functools.partial(getattr(type(causal), name), causal)


def _key(found: list[tuple[Any, str, Any]]) -> tuple:
    return tuple((name, value) for _, name, value in found)


def _positional(forward: Callable) -> tuple[str, ...]:
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _body(causal: nn.Module, probed: Probed) -> nn.Module:
    if not probed.ends_at_head:
        raise ValueError(
            f"compute is missing: {type(causal).__name__} has no body whose hidden states are those that its head reads; "
            "compute=f gets them"
        )
    return causal.base_model


def _probe_or_postpone(causal: nn.Module, state: _Attached) -> None:
    try:
        state.measured[_key(settings(causal))] = probe(causal, causal.forward, state.merge_lora)
    except HeadRefused:
        raise
    except Exception as error:
        log.warning(
            "%s does not run on a few tokens here (%s: %s); it is checked at the first call",
            type(causal).__name__,
            type(error).__name__,
            error,
        )


def _probe_at_last(causal: nn.Module, forward: Callable, merge_lora: bool) -> Probed:
    try:
        return probe(causal, forward, merge_lora)
    except HeadRefused:
        raise
    except Exception as error:
        raise ValueError(
            f"model: {type(causal).__name__} cannot be checked, as it does not run on a few tokens alone "
            f"({type(error).__name__}: {error}); use attach(model, check=False, softcap=..., scale=...)"
        ) from error


def _has_weights(causal: nn.Module) -> bool:
    """Not on meta, not sharded by FSDP2 (DTensor) or ZeRO-3."""
    return not any(p.is_meta or hasattr(p, "placements") or hasattr(p, "ds_id") for p in causal.parameters())


def _causal_lm(model: nn.Module) -> nn.Module:
    """The causal LM inside a compiled or PEFT model, or the model itself. Raises ValueError for something else."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper compiles the forward that is attached
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(causal, "base_model_prefix") or not hasattr(causal, "get_output_embeddings"):
        raise ValueError(
            f"model: {type(model).__name__} is no transformers causal LM; attach before wrapping it in DDP or FSDP, "
            "or use PreferenceHead with a body of your own"
        )
    return causal


def _check_parts(causal: nn.Module, check: bool) -> None:
    if getattr(causal.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: {type(causal).__name__} is an encoder with a decoder; expected a causal LM, which reads one sequence"
        )
    if causal.get_output_embeddings() is None:
        raise ValueError(f"model: {type(causal).__name__} has no language-model head; expected an AutoModelForCausalLM")
    if type(causal).__name__.endswith("ForMaskedLM"):  # in 16 bits a shallow one may look causal
        raise ValueError(
            f"model: {type(causal).__name__} fills in masked tokens, it has no log-probs of a text; expected a causal LM"
        )
    # Known without weights, which the probe needs.
    both_ways = any(getattr(module, "is_causal", None) is False for module in causal.modules())
    if check and getattr(causal.config, "is_decoder", None) is False and both_ways:
        raise ValueError(
            f"model: {type(causal).__name__} is an encoder, whose tokens see those after them; expected a causal LM "
            "(is_decoder=True in its config, where it was trained so)"
        )
