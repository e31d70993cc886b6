"""Shared-prefix attention as an attention implementation of transformers.

    with use_shared_prefix(model):                        # or: handle = use_shared_prefix(model); handle.remove()
        model(input_ids, position_ids=p, shared_prefix_layout=layout, use_cache=False)

The layout travels to every layer as a keyword argument, and so do shards (parallel.Shards): the model then has this rank's
rows and positions, and the layout is the whole row's (ulysses.py). No mask is ever built: transformers would take position ids
that restart for packed sequences and hide the prefix from the rejected tail; an all-ones mask would show it the chosen
tail. Without a layout attention is plain causal. What cannot be computed rightly is refused with a ValueError. Not
covered, and refused by name: key-value caches, padding, dropout, layers that see more than the past, RoPE that gives the
sequences of a pack other frequencies than they have alone (rope.py).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longpo_ops.attention.rope import check_rope_over_ranks, renew, rotary_modules
from longpo_ops.attention.shared_prefix import plan_calls, shared_prefix_attention, under_autocast
from longpo_ops.attention.ulysses import check_heads, to_heads, to_rows
from longpo_ops.data.layout import SharedPrefixLayout
from longpo_ops.kinds import check_object
from longpo_ops.parallel import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "longpo_shared_prefix"
# Held equal to separate sequences by tests.
FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text")


class PrefixNotShared(ValueError):
    """A model whose sequences cannot share a prefix; it may be given separate ones."""


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
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> SharedPrefixHandle:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()


def use_shared_prefix(model: PreTrainedModel) -> SharedPrefixHandle:
    """Sets the model's attention to shared-prefix attention; the returned handle undoes it.

    Raises ValueError for a model family that has not been checked, and for a model that cannot switch its attention.
    """
    _check_model(model)
    name, before = register(), model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(f"{type(model).__name__} does not take the attention implementation {name!r}")
    hooks = [m.register_forward_pre_hook(_refuse_cache, with_kwargs=True) for m in _attention_modules(model)]
    for parent, rotary in rotary_modules(model):
        hooks.append(parent.register_forward_pre_hook(partial(renew, rotary), with_kwargs=True))
    return SharedPrefixHandle(model, before, hooks)


def check_ranks(model: PreTrainedModel, ranks: int) -> None:
    """Raises ValueError where a pack's rows cannot lie on so many ranks: too few heads, RoPE that depends on the length."""
    _check_model(model)
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

    _check_model(model)
    check_object("layout", layout, SharedPrefixLayout, "a SharedPrefixLayout, as a PairBatch has")
    kinds = Counter((_window(m), getattr(m, "attn_logit_softcapping", None)) for m in _attention_modules(model))
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = torch.empty(1, 1, 1, size, dtype=model.dtype, device=device or model.device)
    q = token.expand(1, config.num_attention_heads, layout.length, size)
    k = token.expand(1, config.num_key_value_heads, layout.length, size)
    lines = []
    for (window, softcap), count in kinds.items():
        lines.append(f"{count} layers with window {window}, soft-cap {softcap}, {token.dtype} on {token.device}:")
        plan = plan_calls(q, k, k, layout, 1.0, window, softcap)
        calls = [(i, c) for segment in plan for i, c in enumerate(segment)]
        uses = Counter((("own rows", "shared prefix")[i], c.kernel.name, c.why) for i, c in calls)
        lines += [f"  {part} x{n}: {kernel} ({why})" for (part, kernel, why), n in uses.items()]
    return "\n".join(lines)


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


def _window(module: nn.Module) -> int | None:
    """Mistral gives every layer its config's window, the others carry their own; Llama has none."""
    return getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))


def _check_model(model: PreTrainedModel) -> None:
    check_object("model", model, nn.Module, "a transformers model")
    _check_family(getattr(model, "config", None))


def _check_family(config) -> None:
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise PrefixNotShared(
            f"shared-prefix attention is checked for {', '.join(FAMILIES)}, got a model of type {kind!r}: "
            f"keep its own attention and give it separate sequences"
        )


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
    shared_prefix_layout: SharedPrefixLayout | None = None,
    shards: Shards | None = None,
    position_ids: Tensor | None = None,  # (1 or B, Tq)
    **_,
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
    if shards is not None:
        check_object("shards", shards, Shards, "parallel.Shards")
    if getattr(module, "layer_idx", 0) == 0 and (position_ids is not None or shards is not None):
        whole = position_ids if shards is None else _whole_row(position_ids, shards)
        _check_positions(whole, shared_prefix_layout)
    heads, kv_heads = query.shape[1], key.shape[1]
    if shards is not None:
        query, key, value = to_heads(*under_autocast(query, key, value), shards)
    out = shared_prefix_attention(
        query,
        key,
        value,
        layout=shared_prefix_layout,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return (out if shards is None else to_rows(out, heads, kv_heads, shards)), None


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
    repeats = [(start, pair.prefix_end - 1) for pair in layout.pairs for start, _ in pair.tails[1:]]
    tails, lasts = torch.tensor(repeats, dtype=torch.int64, device=position_ids.device).view(-1, 2).unbind(1)
    goes_back = position_ids.diff(dim=-1, prepend=position_ids[:, :1]) < 0
    goes_back[:, tails] = position_ids[:, tails] != position_ids[:, lasts]
    goes_back[:, [pair.start for pair in layout.pairs]] = False
    if goes_back.any():
        raise ValueError(
            "position_ids do not fit the shared_prefix_layout: positions of a sequence go back, or the first row of a rejected "
            "tail, which repeats the last prefix token, has not that token's position; pass the batch's own position_ids to "
            "the model, with shards those of shards.rows"
        )


def _no_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,  # (B, kv_length) bool
    use_vmap: bool = False,
    config=None,
    **_,
) -> None:
    """transformers' mask function: no mask, and a ValueError for what would need one."""
    if config is not None:
        _check_family(config)
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} has {int((~attention_mask.bool()).sum())} zeros: "
            f"shared-prefix attention takes no padding; give sequences singly, or packed with a shared_prefix_layout"
        )
    if use_vmap:
        raise ValueError(
            "this model asks for more than causal and sliding-window masks, which shared-prefix attention lacks"
        )
    if kv_offset + kv_length != q_offset + q_length:
        raise ValueError(
            f"the cache holds {kv_length} keys from position {kv_offset}, the queries end at {q_offset + q_length}: "
            f"shared-prefix attention works with growing caches only, not with a static one"
        )
