"""RoPE whose frequencies follow from the longest position of a call, and which packs it allows.

    angle(t) = position(t) * frequency(longest position in the call)

`dynamic` raises its frequencies' base beyond the model's context, `longrope` has two sets of them, for calls within the
original context and for longer ones. A pack is one call, so a short sequence would get the frequencies of its longest
neighbour: other numbers than alone. Such a pack is refused unless all its sequences would get the same ones. transformers'
`dynamic` also keeps the frequencies of the longest call so far; for a pack they are made anew, so the order of packs is
nothing to the numbers. Which types these are is asked of the module itself. Not covered: calls without a layout, which are
transformers' own. Where the rows of a pack lie on several ranks (shards), each would go by the longest position of its own
rows: refused for these types, whatever the pack.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from longpo_ops.data.layout import SharedPrefixLayout

VERY_LONG = 1 << 30  # positions: beyond any context
STEADY = "give the model a RoPE that is the same at any length (default, linear, yarn, llama3)"


def rotary_modules(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, name) of every module of transformers that makes rotary angles."""
    found = ((parent, name, m) for parent in model.modules() for name, m in parent.named_children())
    return [(parent, name) for parent, name, m in found if hasattr(m, "rope_type") and hasattr(m, "config")]


def check_rope(model: nn.Module, position_ids: Tensor, layout: SharedPrefixLayout) -> None:
    """Raises ValueError where sequences of a pack would alone get other frequencies than their neighbours do.

    position_ids: (1, N), one position per row of the layout.
    """
    for parent, name in rotary_modules(model):
        _check(getattr(parent, name), position_ids, layout)


def rope_depends_on_length(model: nn.Module) -> bool:
    """Whether packs of this model have to be looked at by check_rope."""
    return any(_depends_on_length(getattr(parent, name)) for parent, name in rotary_modules(model))


def check_rope_over_ranks(model: nn.Module) -> None:
    """Raises ValueError where ranks that share the rows of a pack would get other frequencies than one with all rows."""
    for parent, name in rotary_modules(model):
        _refuse_over_ranks(getattr(parent, name))


def renew(name: str, parent: nn.Module, args: tuple, kwargs: dict) -> None:
    """A forward pre-hook of a rotary module's parent: checks the pack, and forgets the calls before it."""
    layout, rotary = kwargs.get("shared_prefix_layout"), getattr(parent, name)
    if kwargs.get("shards") is not None:
        _refuse_over_ranks(rotary)
    if layout is None or not _depends_on_length(rotary):
        return
    position_ids = inspect.signature(parent.forward).bind_partial(*args, **kwargs).arguments.get("position_ids")
    if position_ids is None or position_ids.is_meta:
        return
    _check(rotary, position_ids, layout)
    setattr(parent, name, _anew(rotary).to(position_ids.device))


def forget_lengths(model: nn.Module) -> None:
    """Makes each later call of the model, of one sequence alone, go by that sequence's own length: `dynamic` would keep the
    frequencies of the longest before it."""
    for parent, name in rotary_modules(model):
        if _depends_on_length(getattr(parent, name)):
            parent.register_forward_pre_hook(partial(_forget, name))


def _forget(name: str, parent: nn.Module, args: tuple) -> None:
    rotary = getattr(parent, name)
    setattr(parent, name, _anew(rotary).to(next(rotary.buffers()).device))


_DEPENDS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _depends_on_length(rotary: nn.Module) -> bool:
    """Whether a call of one position and a very long one get different frequencies; asked once of a module."""
    if rotary not in _DEPENDS:
        _DEPENDS[rotary] = not torch.equal(_frequencies(rotary, 0), _frequencies(rotary, VERY_LONG))
    return _DEPENDS[rotary]


def _check(rotary: nn.Module, position_ids: Tensor, layout: SharedPrefixLayout) -> None:
    ends = [end - 1 for pair in layout.pairs for _, end in pair.tails]
    if len(ends) < 2 or position_ids.shape[-1] != layout.length or not _depends_on_length(rotary):
        return  # the attention itself refuses a layout of another length
    lasts = sorted(set(position_ids[0, ends].tolist()))
    alone = [_frequencies(rotary, last) for last in lasts]
    other = next((last for last, given in zip(lasts, alone, strict=True) if not torch.equal(given, alone[-1])), None)
    if other is not None:
        raise ValueError(
            f"RoPE of type {_kinds(rotary)} depends on the length of a sequence: alone, one of {other + 1} positions and "
            f"one of {lasts[-1] + 1} get different frequencies, in one pack they get the same. Give them to the model as "
            f"separate sequences, or {STEADY}"
        )


def _refuse_over_ranks(rotary: nn.Module) -> None:
    if _depends_on_length(rotary):
        raise ValueError(
            f"RoPE of type {_kinds(rotary)} depends on the length of a sequence, and ranks that share its rows would each go "
            f"by their own: set sequence_parallel=1, or {STEADY}"
        )


def _kinds(rotary: nn.Module) -> str:
    kinds = rotary.rope_type
    return kinds if isinstance(kinds, str) else ", ".join(sorted(set(kinds.values())))


def _anew(rotary: nn.Module) -> nn.Module:
    return type(rotary)(config=rotary.config)


def _frequencies(rotary: nn.Module, last: int) -> Tensor:
    """(N,): cosines and sines of all kinds of layers, whose widths may differ, at position 1, which tell frequencies apart, in
    a call up to `last`. Some modules give one complex tensor."""
    kinds = [(kind,) for kind in rotary.rope_type] if isinstance(rotary.rope_type, dict) else [()]
    with torch.no_grad(), torch.device("cpu"):
        fresh, positions = _anew(rotary), torch.tensor([[1, last]])
        if hasattr(rotary, "mrope_section"):  # a row of positions for each of time, height and width
            positions = positions.expand(3, 1, 2)
        angles = [fresh(torch.zeros(1), positions, *kind) for kind in kinds]
        parts = [part for each in angles for part in (each if isinstance(each, tuple) else (each,))]
        parts = [torch.view_as_real(part).flatten(-2) if part.is_complex() else part for part in parts]
        return torch.cat([part.reshape(-1, 2, part.shape[-1])[:, 0].flatten() for part in parts])
