"""Shared-prefix attention as an attention implementation of transformers.

    with use_shared_prefix(model):                        # or: handle = use_shared_prefix(model); handle.remove()
        model(input_ids, position_ids=p, shared_prefix_layout=layout, use_cache=False)

A model is taken when proof.py shows it: that tells each layer's window or chunk, too, which here decides what its rows see. The
layout travels to every layer as a keyword argument, and so do shards (parallel.Shards): the model then has this rank's
rows and positions, and the layout is the whole row's (ulysses.py). No mask is ever built: transformers would take position ids
that restart for packed sequences and hide the prefix from the rejected tail; an all-ones mask would show it the chosen
tail. Without a layout attention is plain causal. What cannot be computed rightly is refused with a ValueError. Not
covered, and refused by name: key-value caches, padding, dropout, layers that see more than the past, arguments of attention
that are not known here, RoPE that gives the sequences of a pack other frequencies than they have alone (rope.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from longpo_ops.attention.masks import Seen
from longpo_ops.attention.proof import PrefixNotShared, Proof, prove
from longpo_ops.attention.rope import check_rope_over_ranks, renew, rotary_modules
from longpo_ops.attention.shared_prefix import plan_calls, shared_prefix_attention, under_autocast
from longpo_ops.attention.ulysses import check_heads, head_plan, to_heads, to_rows
from longpo_ops.data.layout import SharedPrefixLayout
from longpo_ops.kinds import check_object
from longpo_ops.parallel import Shards
from longpo_ops.pretrained.probe import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "longpo_shared_prefix"
# Arguments that attention is given and that change nothing it computes: of caches and outputs, and what was used before it.
UNHEARD = (
    *(
        "use_cache",
        "cache_position",
        "past_key_values",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
    ),
    *("return_dict", "position_embeddings", "logits_to_keep"),
)
KNOWN = ("shared_prefix_layout", "shards", "position_ids", "softcap", "s_aux")
_LAYER = "_longpo_ops_layer"


class _Layer(NamedTuple):
    """What attention must know of the module that calls it."""

    seen: Seen
    first: bool  # of the model's, which looks at the positions for all


def register() -> str:
    """Makes the implementation known to transformers (as often as wanted) and returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME


class SharedPrefixHandle:
    """Undoes use_shared_prefix: by remove(), or at the end of a with block."""

    def __init__(self, model: PreTrainedModel, before: str, hooks: list):
        self._model, self._before, self._hooks = model, before, hooks

    def remove(self) -> None:
        """Gives the model its former attention implementation back."""
        self._model.set_attn_implementation(self._before)
        for module in self._model.modules():
            module.__dict__.pop(_LAYER, None)
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> SharedPrefixHandle:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()


def use_shared_prefix(model: PreTrainedModel) -> SharedPrefixHandle:
    """Sets the model's attention to shared-prefix attention; the returned handle undoes it.

    Raises PrefixNotShared, a ValueError, for a model that is not shown to give the numbers of separate sequences (proof.py).
    """
    return _install(model, _proof(model))


def _install(model: PreTrainedModel, proof: Proof) -> SharedPrefixHandle:
    name, before = register(), model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise PrefixNotShared(f"{type(model).__name__} does not take the attention implementation {name!r}")
    attentions, hooks = _attentions(model, proof), []
    for number, (attention, seen) in enumerate(attentions.items()):
        setattr(attention, _LAYER, _Layer(seen, number == 0))
        hooks.append(attention.register_forward_pre_hook(_refuse_cache, with_kwargs=True))
    for parent, rotary in rotary_modules(model):
        hooks.append(parent.register_forward_pre_hook(partial(renew, rotary), with_kwargs=True))
    return SharedPrefixHandle(model, before, hooks)


@contextlib.contextmanager
def installed(model: PreTrainedModel, proof: Proof) -> Iterator[None]:
    """The attention within it, for a model that is still to be proved."""
    with _install(model, proof):
        yield


def _attentions(model: nn.Module, proof: Proof) -> dict[nn.Module, Seen]:
    """The modules that call attention, in order, and what their rows see."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = layers_of(model)
    if len(layers) != len(proof.seen):
        raise ValueError(f"model: it has {len(layers)} layers, its config says {len(proof.seen)}")
    shown = zip(layers, proof.attention, proof.seen, strict=True)
    return {layer.get_submodule(name): seen for layer, name, seen in shown if seen is not None}


def _proof(model: nn.Module) -> Proof:
    check_object("model", model, nn.Module, "a transformers model")
    proof = prove(model)
    if proof.reason is not None:
        raise PrefixNotShared(
            f"{type(model).__name__} cannot share a prefix between sequences: {proof.reason}. Keep its own attention and give "
            "it separate sequences (longpo train --separate)"
        )
    return proof


def unknown_arguments(given: dict[str, Any]) -> list[str]:
    """Names of arguments that came with a value, and that would go unheard although attention may depend on them."""
    on = (name for name, value in given.items() if value is not None and value is not False and name not in UNHEARD)
    return [name for name in on if name not in KNOWN and not (name == "is_causal" and given[name] is True)]


def check_ranks(model: PreTrainedModel, ranks: int) -> None:
    """Raises ValueError where a pack's rows cannot lie on so many ranks: too few heads, RoPE that depends on the length."""
    _proof(model)
    check_heads(model.config.get_text_config(), ranks)
    if ranks > 1:
        check_rope_over_ranks(model)


def explain_attention(
    model: PreTrainedModel, layout: SharedPrefixLayout, device: torch.device | str | None = None
) -> str:
    """Which kernel runs which part of the model's attention over this layout on a device, by default the model's, and why;
    nothing is computed.

    One paragraph per kind of layer (sliding window, soft-cap), one line per kind of call, with the number of calls.
    """
    from collections import Counter

    check_object("layout", layout, SharedPrefixLayout, "a SharedPrefixLayout, as a PairBatch has")
    attentions = _attentions(model, _proof(model))
    kinds = Counter((seen, getattr(m, "attn_logit_softcapping", None)) for m, seen in attentions.items())
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = torch.empty(1, 1, 1, size, dtype=model.dtype, device=device or model.device)
    q = token.expand(1, config.num_attention_heads, layout.length, size)
    k = token.expand(1, getattr(config, "num_key_value_heads", None) or config.num_attention_heads, layout.length, size)
    lines = []
    for (seen, softcap), count in kinds.items():
        lines.append(f"{count} layers with {seen}, soft-cap {softcap}, {token.dtype} on {token.device}:")
        plan = plan_calls(q, k, k, layout, 1.0, seen.window, softcap, seen.chunk)
        parts = (("own rows", [c for s in plan for c in s.own]), ("shared prefix", [c for s in plan for c in s.shared]))
        uses = Counter((part, c.kernel.name, c.why) for part, calls in parts for c in calls)
        lines += [f"  {part} x{n}: {kernel} ({why})" for (part, kernel, why), n in uses.items()]
    return "\n".join(lines)


def _refuse_cache(module: nn.Module, args: tuple, kwargs: dict) -> None:
    if kwargs.get("shared_prefix_layout") is not None and kwargs.get("past_key_values") is not None:
        raise ValueError("shared_prefix_layout came together with a key-value cache: pass use_cache=False to the model")


def _attention_forward(
    module: nn.Module,
    query: Tensor,  # (B, H, Tq, D)
    key: Tensor,  # (B, Hk, Tk, D)
    value: Tensor,  # (B, Hk, Tk, D)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (H,) attention sinks
    shared_prefix_layout: SharedPrefixLayout | None = None,
    shards: Shards | None = None,
    position_ids: Tensor | None = None,  # (1 or B, Tq)
    **given,
) -> tuple[Tensor, None]:
    """transformers' attention function: (B, Tq, H, D) and no weights. With shards, rows and positions are this rank's."""
    if attention_mask is not None:
        raise ValueError(
            f"shared-prefix attention takes no mask of its own making, got attention_mask of shape "
            f"{tuple(attention_mask.shape)}: leave attention_mask out"
        )
    if dropout:
        raise ValueError(f"shared-prefix attention has no dropout, got {dropout}: set config.attention_dropout to 0")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"shared-prefix attention is causal, {type(module).__name__} is bidirectional")
    seen, first = _layer_of(module, sliding_window)
    if unknown := unknown_arguments(given):
        raise ValueError(
            f"shared-prefix attention does not know {', '.join(unknown)}, which {type(module).__name__} gave it"
        )
    if shards is not None:
        check_object("shards", shards, Shards, "parallel.Shards")
    if first and (position_ids is not None or shards is not None):
        whole = position_ids if shards is None else _whole_row(position_ids, shards)
        _check_positions(whole, shared_prefix_layout)
    heads, kv_heads = query.shape[1], key.shape[1]
    if shards is not None:
        query, key, value = _to_own_heads(query, key, value, shards)
        if s_aux is not None:
            own = head_plan(heads, kv_heads, shards.size)[shards.rank].heads
            s_aux = s_aux[own.start : own.stop]
    out = shared_prefix_attention(
        query,
        key,
        value,
        layout=shared_prefix_layout,
        scale=scaling,
        window=seen.window,
        chunk=seen.chunk,
        softcap=softcap,
        sinks=s_aux,
    )
    return (out if shards is None else to_rows(out, heads, kv_heads, shards)), None


def _to_own_heads(query: Tensor, key: Tensor, value: Tensor, shards: Shards) -> tuple[Tensor, Tensor, Tensor]:
    """All rows of this rank's heads. Values narrower than keys (multi-head latent attention) travel as wide as those."""
    size = value.shape[-1]
    wide = nn.functional.pad(value, (0, key.shape[-1] - size)) if size < key.shape[-1] else value
    query, key, value = to_heads(*under_autocast(query, key, wide), shards)
    return query, key, value[..., :size]


def _layer_of(module: nn.Module, sliding_window: int | None) -> _Layer:
    layer = getattr(module, _LAYER, None)
    if layer is None:
        raise ValueError(
            f"{type(module).__name__} has not been looked at: set the attention by use_shared_prefix(model), once the "
            "model has all its layers"
        )
    if sliding_window is not None and sliding_window != layer.seen.window:
        raise ValueError(
            f"{type(module).__name__} has a window of {sliding_window}, and had {layer.seen} when use_shared_prefix looked "
            "at it: use it again after a change of the config"
        )
    return layer


def _whole_row(position_ids: Tensor | None, shards: Shards) -> Tensor:
    """(1, N) of (1, n_r) on each rank, so that all of them see, and raise, the same. A collective."""
    rows = shards.rows
    came = None if position_ids is None else tuple(position_ids.shape)
    if came != (1, rows.stop - rows.start):
        raise ValueError(
            f"position_ids of shape {came} came, rank {shards.rank} of {shards.size} holds rows [{rows.start}, {rows.stop}) of "
            f"{shards.length}; expected position_ids[:, shards.rows] of the whole row"
        )
    whole = position_ids.new_zeros(1, shards.length)
    whole[:, rows] = position_ids
    return shards.sum_(whole)


def _check_positions(position_ids: Tensor, layout: SharedPrefixLayout | None) -> None:
    """One look at the device per forward pass. Jumps ahead are fine (position synthesis), these are not:"""
    if layout is None:
        if (position_ids.diff(dim=-1) < 0).any():
            raise ValueError(
                "position_ids go back within a sequence but no shared_prefix_layout came: pass the pack's layout"
            )
        return
    if position_ids.shape[-1] != layout.length:  # the attention itself refuses a layout of another length
        return
    layout.check()
    repeats = [(start, f) for pair in layout.pairs for (start, _), f in zip(pair.tails[1:], pair.forks, strict=True)]
    tails, lasts = torch.tensor(repeats, dtype=torch.int64, device=position_ids.device).view(-1, 2).unbind(1)
    goes_back = position_ids.diff(dim=-1, prepend=position_ids[:, :1]) < 0
    goes_back[:, tails] = position_ids[:, tails] != position_ids[:, lasts]
    goes_back[:, [pair.start for pair in layout.pairs]] = False
    if goes_back.any():
        raise ValueError(
            "position_ids do not fit the shared_prefix_layout: positions of a sequence go back, or the first row of a rejected "
            "tail, which repeats the token it forks at, has not that token's position; pass the batch's own position_ids to "
            "the model, with shards those of shards.rows"
        )


def _no_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,  # (B, kv_length) bool
    **_,
) -> None:
    """transformers' mask function: no mask, and a ValueError for what would need one."""
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} has {int((~attention_mask.bool()).sum())} zeros: "
            f"shared-prefix attention takes no padding; give sequences singly, or packed with a shared_prefix_layout"
        )
    if kv_offset + kv_length != q_offset + q_length:
        raise ValueError(
            f"the cache holds {kv_length} keys from position {kv_offset}, the queries end at {q_offset + q_length}: "
            f"shared-prefix attention works with growing caches only, not with a static one"
        )
