"""A module's own forward, run tile by tile of its rows: around its one call of attention, or as it is.

    run_split    (q, k, v)_t = forward(x_t) as far as its call of attention     t: rows of one tile
                 a           = attention(q, k, v)                               the call it made, at full length
                 y_t         = forward(x_t), to whose call of attention a_t is the answer
    run_rowwise  y_t         = forward(x_t)

x, y (B, T, ...). No line of any model is copied here: what is computed is what the module's own forward computes. That its
rows do not see each other but in attention is shown by tile_proof.py, on a small model of the same class and config. Where the
attention module ends with a projection of `a`, the second run calls that in its place, and nothing is computed for nothing.

Tests: tests/memory/test_tiling.py, tests/memory/test_tile_proof.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from longpo_ops.memory.rowwise import RowWise

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


# --- a call and its rows ----------------------------------------------------------------------------------------------


class Call:
    """What a forward was called with, rows taken out: graphs hold on to a Call, and must not hold what checkpointing frees.

    inputs() gives the row tensors (B, T, ...), hidden states (B, T, H) first, once.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self.leaves, self.spec = tree_flatten((args, kwargs))
        named = kwargs.get("hidden_states") if not args else args[0]
        first = next((x for x in (named, *self.leaves) if isinstance(x, Tensor)), None)
        self.takes_rows = first is not None and first.ndim == 3 and first.is_floating_point()
        if not self.takes_rows:
            return
        self.batch, self.length = first.shape[:2]
        rows = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and self._has_rows(x)]
        self.rows = sorted(rows, key=lambda i: self.leaves[i] is not first)
        self._inputs = [self.leaves[i] for i in self.rows]
        for i in self.rows:
            self.leaves[i] = None

    def _has_rows(self, x: Tensor) -> bool:
        return x.ndim > 1 and x.shape[1] == self.length and x.shape[0] in (1, self.batch)

    def inputs(self) -> list[Tensor]:
        inputs, self._inputs = self._inputs, []
        return inputs

    def of(self, tiles: tuple[Tensor, ...]) -> tuple[tuple, dict]:
        """Arguments with these rows."""
        leaves = list(self.leaves)
        for i, tile in zip(self.rows, tiles, strict=True):
            leaves[i] = tile
        return tree_unflatten(leaves, self.spec)


def shared_containers(args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """Arguments that a layer could leave something in for others."""
    named = [*((str(i), x) for i, x in enumerate(args)), *kwargs.items()]
    return [name for name, x in named if isinstance(x, MutableMapping | MutableSequence | MutableSet)]


class Results:
    """A forward's results as row tensors (B, t, ...), and put together again. Rows may come flattened, (B * t, ...)."""

    def __init__(self):
        self.spec, self.leaves, self.flat = None, [], []

    def rows(self, out: Any, batch: int, length: int) -> list[Tensor]:
        self.leaves, self.spec = tree_flatten(out)
        tensors = [x for x in self.leaves if isinstance(x, Tensor)]
        self.flat = [x.shape[:2] != (batch, length) for x in tensors]
        for x, flat in zip(tensors, self.flat, strict=True):
            if flat and (not x.ndim or x.shape[0] != batch * length):
                raise Unproved(f"a result of shape {tuple(x.shape)} for {batch} x {length} rows")
        self.leaves = [None if isinstance(x, Tensor) else x for x in self.leaves]
        self.places = [i for i, x in enumerate(tree_flatten(out)[0]) if isinstance(x, Tensor)]
        return [x.unflatten(0, (batch, length)) if flat else x for x, flat in zip(tensors, self.flat, strict=True)]

    def whole(self, results: tuple[Tensor, ...]) -> Any:
        leaves = list(self.leaves)
        for place, x, flat in zip(self.places, results, self.flat, strict=True):
            leaves[place] = x.flatten(0, 1) if flat else x
        return tree_unflatten(leaves, self.spec)


class Unproved(ValueError):
    """Why a module cannot be tiled."""


# --- what transformers records by hooks (router logits) ---------------------------------------------------------------


def recorded_keys() -> list[str]:
    """Of router logits and the like, which transformers collects by hooks in a context variable: they are taken off the tiles
    as further results, and put into the model's own collection whole, with their gradients."""
    return [key for key, values in (_collector().get() or {}).items() if isinstance(values, list)]


def _collector():
    from transformers.utils.output_capturing import _active_collector

    return _active_collector


@contextmanager
def _collecting(into: dict[str, list] | None) -> Iterator[dict[str, list]]:
    token = _collector().set(into)
    try:
        yield into or {}
    finally:
        _collector().reset(token)


# --- attention, called by the model's own code ------------------------------------------------------------------------


class _Interface:
    """transformers' table of attention functions: while any model is tiled, what this thread's tile wants is answered in
    their place. Others get what they ask for."""

    def __init__(self):
        self.users, self.wanted, self.lock = 0, threading.local(), threading.Lock()

    @contextmanager
    def answered(self, by: Callable) -> Iterator[None]:
        """by(function, module, q, k, v, *others, **options), in place of function(module, q, ...)"""
        before = getattr(self.wanted, "by", None)
        self.wanted.by = by
        try:
            yield
        finally:
            self.wanted.by = before

    def open(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table

        with self.lock:
            self.users += 1
            if self.users == 1:
                table.get_interface = self._get_interface

    def close(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table

        with self.lock:
            self.users -= 1
            if self.users == 0:
                del table.get_interface

    def _get_interface(self, name: str, default: Callable) -> Callable:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table

        function, by = type(table).get_interface(table, name, default), getattr(self.wanted, "by", None)
        return function if by is None else lambda *args, **options: by(function, *args, **options)


INTERFACE = _Interface()


class _Reached(Exception):
    """The forward has come to its call of attention."""


@dataclass(frozen=True)
class Row:
    """Stands for a row tensor that reaches attention as it is (position ids), by its place among a call's inputs."""

    place: int


@dataclass(frozen=True)
class AttentionCall:
    """The call of attention that a forward makes: the same on every tile, but for rows."""

    function: Callable
    module: nn.Module
    others: tuple
    options: dict[str, Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor]) -> Tensor:
        """q, k, v (B, T, heads, D) -> (B, T, heads, D)"""
        given = tree_map(lambda x: inputs[x.place] if isinstance(x, Row) else x, (self.others, self.options))
        return self.function(self.module, *(x.transpose(1, 2) for x in (q, k, v)), *given[0], **given[1])[0]

    def check_same(self, other: AttentionCall) -> None:
        ours, theirs = (tree_flatten((c.module, c.others, c.options))[0] for c in (self, other))
        if len(ours) != len(theirs) or not all(map(_same, ours, theirs)):
            raise Unproved("what it gives to attention beside q, k and v differs by tile")


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, bool | int | float | str | Row) and type(a) is type(b) and a == b)


# --- tiled forwards ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Where a layer is parted. attention, projection: names of the attention module and of the one in it that turns `a` into
    all that the attention module returns, `results` things of which the others are None (0: the tensor itself), if there are
    such. before, both: what holds parameters that the forward reads before attention only, and before and after it; known:
    whatever holds parameters."""

    attention: str | None
    projection: str | None
    results: int
    before: frozenset[str]
    both: frozenset[str]
    known: frozenset[str]

    def parameters(self, layer: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Those read before and after attention; what is not known may be read in both."""
        first, second = [], []
        for name, p in layer.named_parameters():
            holders = holders_of(name)
            unknown = not holders & self.known
            if unknown or holders & (self.before | self.both):
                first.append(p)
            if unknown or not holders & self.before:
                second.append(p)
        return first, second


def holder_of(name: str) -> str:
    """A name in which numbers, as of experts in a list, do not count."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def holders_of(name: str) -> set[str]:
    """A parameter's name and the modules around it."""
    parts = holder_of(name).split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}


def is_untiled(call: Call, kwargs: dict[str, Any]) -> bool:
    """With a cache of keys, or attention weights asked for, modules use their own forward."""
    weights = any("attentions" in key for key in _collector().get() or {})
    return not call.takes_rows or weights or any(kwargs.get(name) is not None for name in CACHES)


def run_rowwise(module: nn.Module, own: Callable, rows: int, *args, **kwargs):
    """A row-wise module's forward, tile by tile."""
    call = Call(args, kwargs)
    if is_untiled(call, kwargs):
        return own(*args, **kwargs)
    return _end(module, lambda *tiles: _called(own, call, tiles), call, call.inputs(), list(module.parameters()), rows)


def run_split(layer: nn.Module, own: Callable, split: Split, rows: int, *args, **kwargs):
    """A layer's forward, tile by tile around its call of attention."""
    call = Call(args, kwargs)
    if is_untiled(call, kwargs):
        return own(*args, **kwargs)
    _check_arguments(call, args, kwargs)
    calls: list[AttentionCall] = []
    first, second = split.parameters(layer)

    def head(*tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reached, qkv = run_to_attention(own, call, tiles)
        if calls:
            calls[0].check_same(reached)
        else:
            calls.append(reached)
        return qkv

    def tail(*tiles_and_a: Tensor):
        with _attention_gives(layer, split, tiles_and_a[-1]):
            return _called(own, call, tiles_and_a[:-1])

    inputs = call.inputs()
    q, k, v = RowWise(head, first, rows, layer.training)(*inputs, ends=False)
    a = calls[0](q, k, v, inputs)
    del q, k, v  # outside of checkpointing's recomputation nothing else holds them
    return _end(layer, tail, call, [*inputs, a], second, rows)


def _called(own: Callable, call: Call, tiles: tuple[Tensor, ...]) -> Any:
    args, kwargs = call.of(tiles)
    return own(*args, **kwargs)


def _check_arguments(call: Call, args: tuple, kwargs: dict[str, Any]) -> None:
    if shared := shared_containers(args, kwargs):
        raise ValueError(
            f"tiles: a layer got {', '.join(shared)}, a container that layers share: leave its layers untiled"
        )
    if any(isinstance(x, Tensor) and x.requires_grad for x in call.leaves):
        raise ValueError("tiles: a layer got a tensor without rows that needs a gradient: leave its layers untiled")


def run_to_attention(own: Callable, call: Call, tiles: tuple[Tensor, ...]) -> tuple[AttentionCall, tuple]:
    """-> the call of attention, and the tile's q, k, v (B, t, heads, D)."""
    row = {id(tile): Row(i) for i, tile in enumerate(tiles)}
    box = []

    def stop(function, module, q, k, v, *others, **options):
        marked = tree_map(lambda x: row.get(id(x), x), (others, options))
        box.append((AttentionCall(function, module, *marked), tuple(x.transpose(1, 2) for x in (q, k, v))))
        raise _Reached

    try:
        with INTERFACE.answered(stop), _collecting(None):
            _called(own, call, tiles)
    except _Reached:
        return box[0]
    raise Unproved("it makes no call of attention through transformers' table of attention functions")


@contextmanager
def _attention_gives(layer: nn.Module, split: Split, a: Tensor) -> Iterator[None]:
    """Within it the layer's attention has computed a (B, t, heads, D)."""
    asked = []

    def give(function, module, *_, **__):
        asked.append(module)
        if split.projection or len(asked) > 1:
            raise Unproved("it calls attention more than once")
        return a, None

    with INTERFACE.answered(give):
        if split.projection is None:
            yield
            return
        attention = layer.get_submodule(split.attention)
        project = attention.get_submodule(split.projection)

        def projected(*_, **__):
            out = project(a.flatten(2))
            return (out, *[None] * (split.results - 1)) if split.results else out

        with replaced(attention, projected):
            yield


@contextmanager
def replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        restore(module, before)


def restore(module: nn.Module, forward: Callable | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _end(module, own, call: Call, inputs: list[Tensor], parameters: list, rows: int):
    """own's results over all rows, and what it records on the way."""
    results, keys = Results(), recorded_keys()

    def function(*tiles: Tensor) -> list[Tensor]:
        with _collecting({key: [] for key in keys}) as taken:
            out = own(*tiles)
        return results.rows((out, taken), call.batch, tiles[0].shape[1])

    out, taken = results.whole(RowWise(function, parameters, rows, module.training)(*inputs, ends=True))
    for key, values in taken.items():
        _collector().get()[key].extend(values)
    return out
