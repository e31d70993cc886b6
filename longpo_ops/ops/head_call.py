"""A transformers model's own forward, with something else in the place of its language-model head.

    input_ids -> body -> h (B, T, H) -> [compute(h, ...) -> result, logits] -> the rest of forward -> result, outputs

Whatever the model does before its head reaches h, and whatever it does besides (auxiliary losses, recorded states) is in
outputs. `compute` runs inside the head's own forward, where the hooks of FSDP2 and ZeRO-3 have gathered its weight, and
(result, logits) passes through them. The head is looked up at each call. All that is changed on the model is put back
before a call returns. Not covered: models that call their head several times in one forward, or never, and hooks on the
head that want logits.

Tests: tests/ops/test_head.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock
from traceback import walk_tb
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..kinds import check_each
from .head_weight import HeadRefused, read_head
from .logprobs import linear_cross_entropy, linear_logprobs
from .preference import fused_preference_loss, packed_preference_loss

TAKES = {  # tensors of hidden states and of labels
    fused_preference_loss: (2, 2),
    packed_preference_loss: (1, 2),
    linear_cross_entropy: (1, 1),
    linear_logprobs: (1, 1),
}


def call_with_head(causal: nn.Module, forward: Callable, compute: Callable, map: dict, merge_lora: bool, args, kwargs):
    """-> compute(hidden, head), and the model's outputs, whose logits are (B, 0, V). head as in ops/head.py.

    map: softcap and scale of the head. Raises ValueError for a head that read_head refuses, and for an auxiliary loss
    without the gradient that the hidden states have.
    """

    def at_the_head(hidden: Tensor, plain: Callable):
        weight, bias = read_head(causal.get_output_embeddings(), merge_lora)

        def head(hidden, labels, *, loss=fused_preference_loss, **options):
            return call_loss(loss, hidden, weight, labels, {"bias": bias, **map, **options})

        nothing = hidden.new_zeros(*hidden.shape[:-2], 0, len(weight))
        return (compute(hidden, head), hidden.requires_grad), nothing

    (result, differentiable), outputs = call_in_place_of_head(causal, forward, at_the_head, args, kwargs)
    aux_loss = getattr(outputs, "aux_loss", None)
    if differentiable and isinstance(aux_loss, Tensor) and not aux_loss.requires_grad:
        raise ValueError(
            f"model: the auxiliary loss of {type(causal).__name__} has no gradient, as its layers ran without one "
            "(reentrant gradient checkpointing, or offload of layers); use gradient checkpointing with "
            "use_reentrant=False, or set output_router_logits=False to train without it"
        )
    return result, outputs


def call_in_place_of_head(causal: nn.Module, forward: Callable, compute: Callable, args, kwargs) -> tuple[Any, Any]:
    """-> result, outputs of forward(*args, **kwargs), where result, logits = compute(hidden, the head's own forward), or
    compute gives logits alone, which hooks on the head then see as ever, and result is None.

    Raises ValueError unless forward calls its head exactly once, and for a hook on it that takes only a tensor.
    """
    with one_call_at_a_time(causal):
        stand_in = _StandIn(causal, compute)
        with stand_in.placed():
            outputs = forward(*args, **kwargs)
    if not stand_in.results:
        raise HeadRefused(
            f"model: forward of {type(causal).__name__} does not call its head; expected one call of the module that "
            "get_output_embeddings() gives. Use PreferenceHead with its hidden states"
        )
    return stand_in.results[0], outputs


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # beside the models, which stay copyable


def one_call_at_a_time(causal: nn.Module):
    """A model is changed while it is called: other threads wait, and the same one may call it from within."""
    return nullcontext() if torch.compiler.is_compiling() else _LOCKS.setdefault(causal, RLock())


class _StandIn:
    """What a model's forward finds under its head's name: calls the head, keeps the result and gives the logits on.

    An instance's own attribute comes before nn.Module's look-up of children, which stay as they are. The head's own forward
    is exchanged as well, within the hooks of accelerate where it has some, so that hooks run around `compute`. While
    compute runs, the model is as it was.
    """

    def __init__(self, causal: nn.Module, compute: Callable):
        self.lm_head, self.model, self.results = causal.get_output_embeddings(), type(causal).__name__, []
        self._compute, self._made = compute, None
        if hooks := [*self.lm_head._backward_hooks.values(), *self.lm_head._backward_pre_hooks.values()]:
            raise HeadRefused(
                f"model: backward hook on the head of {self.model}: {', '.join(map(_name, hooks))} would not be called, as an "
                "attached model makes no logits and no gradients of them. Remove it, move it to the body or to the head's "
                "weight, or detach(model)"
            )
        slot = "_old_forward" if "_old_forward" in self.lm_head.__dict__ else "forward"
        self._plain = getattr(self.lm_head, slot)
        parents = ((m.__dict__, name) for m in causal.modules() for name, c in m._modules.items() if c is self.lm_head)
        self._slots = [(attributes, name, None, self) for attributes, name in parents]
        self._slots.append((self.lm_head.__dict__, slot, self.lm_head.__dict__.get(slot), self._forward))

    def __call__(self, *args, **kwargs) -> Tensor:
        if self.results:
            raise HeadRefused(
                f"model: forward of {self.model} calls its head several times; expected once. Give it shorter inputs "
                "if it goes through them in chunks, or use PreferenceHead with its hidden states"
            )
        # Dynamo of torch 2.11 takes the forward of a module's class, whatever the instance has in its place
        compiled = torch.compiler.is_compiling() and not _has_hooks(self.lm_head)
        try:
            output = (self._forward if compiled else self.lm_head)(*args, **kwargs)
        except Exception as error:
            if self._made is None or (hook := _hook_that_raised(error, self.lm_head)) is None:
                raise
            self._refuse(_name(hook), f"failed ({type(error).__name__}: {error})", error)
        made, self._made = self._made, None
        if not _alike(output, made):
            hooks = ", ".join(map(_name, self.lm_head._forward_hooks.values())) or "a global one"
            self._refuse(hooks, f"returned {type(output).__name__} in its place")
        result, logits = output if isinstance(output, tuple) else (None, output)
        self.results.append(result)
        return logits

    def _refuse(self, hook: str, what: str, error: Exception | None = None) -> NoReturn:
        raise HeadRefused(
            f"model: forward hook on the head of {self.model}: {hook} got a tuple of what compute returned and empty logits "
            f"(B, 0, V), and {what}; an attached model makes no logits. Remove it, move it to the body, whose output is "
            "hidden states, or detach(model)"
        ) from error

    def __getattr__(self, name: str):
        return getattr(self.lm_head, name)

    def _forward(self, hidden, *args, **kwargs):
        if args or kwargs:
            raise HeadRefused(f"model: its head is called with {[*args, *kwargs]} beside hidden states; expected none")
        self._take()
        try:
            self._made = self._compute(hidden, self._plain)
            return self._made
        finally:
            self._put()

    @contextmanager
    def placed(self) -> Iterator[None]:
        self._put()
        try:
            yield
        finally:
            self._take()

    def _put(self) -> None:
        for attributes, name, _, ours in self._slots:
            attributes[name] = ours

    def _take(self) -> None:
        for attributes, name, own, _ in self._slots:
            if own is None:
                del attributes[name]
            else:
                attributes[name] = own


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "_old_forward" in module.__dict__)


def _alike(output: Any, made: Any) -> bool:
    """Whether hooks passed on what was made, a tensor or (result, logits), whatever they did to its tensors."""
    if isinstance(made, Tensor):
        return isinstance(output, Tensor)
    if not isinstance(output, tuple) or len(output) != 2 or not isinstance(output[1], Tensor):
        return False
    same = isinstance(output[0], Tensor) if isinstance(made[0], Tensor) else type(output[0]) is type(made[0])
    return same and output[1].shape == made[1].shape


def _hook_that_raised(error: Exception, lm_head: nn.Module) -> Callable | None:
    """As nn.Module's own frame has it; None where the error is no hook's."""
    frames = (frame.f_locals for frame, _ in walk_tb(error.__traceback__))
    return next((names["hook"] for names in frames if names.get("self") is lm_head and "hook" in names), None)


def _name(hook: Callable) -> str:
    named = hook if hasattr(hook, "__qualname__") else type(hook)
    return f"{named.__module__}.{named.__qualname__}"


def call_loss(loss: Callable, hidden, weight: Tensor, labels, options: dict) -> Any:
    """loss(*hidden, weight, *labels, **options), where one tensor stands for a tuple of one. Raises ValueError for a loss that
    is no function, and for other tensors than one of this package takes."""
    if not callable(loss) or isinstance(loss, type):
        raise ValueError(f"loss={loss!r}: expected a function of this package that takes hidden states and a head")
    given = _as_tuple("hidden", hidden), _as_tuple("labels", labels)
    came = tuple(map(len, given))
    if (expected := TAKES.get(loss, came)) != came:
        raise ValueError(
            f"hidden and labels: {loss.__name__} takes {expected[0]} and {expected[1]} tensors, got {came[0]} and {came[1]}"
        )
    return loss(*given[0], weight, *given[1], **options)


def _as_tuple(name: str, tensors: Tensor | tuple | list) -> tuple[Tensor, ...]:
    given = tensors if isinstance(tensors, tuple | list) else (tensors,)
    return tuple(check_each(name, given, Tensor, "a tensor"))
