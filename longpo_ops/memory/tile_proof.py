"""Which parts of a model may be computed by tiles of rows: tried on a small model of the same class and config.

The small model (pretrained/probe.py) has two layers of each kind that the real one has, as one may leave something for the
next, in float64. Its own forward shows what each layer is called with. Of each kind one is then computed by tiles, and its
results and every gradient are held against its own:

    whole      the layer, split around its call of attention
    parts      where that fails: those of its modules that are row-wise (norms, the MLP or experts)
    nothing    where that fails too

and at last the whole model so tiled against itself, which sees what layers leave for each other. Nothing is read off a name:
what a layer computes, its own code says. Proofs are remembered in the process, by class and config. Not seen: what layers
further apart than two of a kind leave for each other in some other place than the containers they are called with, and code
that goes by the number of a row beyond LENGTH x REPEATS.

Tests: tests/memory/test_tile_proof.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from longpo_ops.memory.tiled_calls import (
    INTERFACE,
    Call,
    Results,
    Split,
    Unproved,
    holder_of,
    replaced,
    run_rowwise,
    run_split,
    run_to_attention,
    shared_containers,
)
from longpo_ops.pretrained.probe import (
    Refused,
    build,
    difference,
    kinds_of,
    layers_of,
    pick_layers,
    randomise,
    remembered,
    with_gradients,
)
from longpo_ops.pretrained.small import small_config

LENGTH, ROWS, BATCH = 11, 4, 2  # three tiles, the last of them shorter
REPEATS = 2000  # of the rows, where they are looked at far from the first
WINDOW = 5
TOLERANCE = 1e-4  # of the largest number: parts of models compute in float32 in any case


@dataclass(frozen=True)
class Part:
    """How a layer is tiled. split: as a whole. modules: row-wise ones, by name, where it is not. why: what stands against
    more."""

    split: Split | None = None
    modules: tuple[str, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        if self.split:
            return "whole"
        return f"{', '.join(self.modules)} only, as {self.why}" if self.modules else f"not, as {self.why}"


@dataclass(frozen=True)
class Proof:
    """What was shown of a model. layers: one Part a layer. last: names of row-wise modules of the body after the layers."""

    layers: tuple[Part, ...] = ()
    last: tuple[str, ...] = ()
    why: str = ""

    def __bool__(self) -> bool:
        return any(part.split or part.modules for part in self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return f"layers are not tiled: {self.why}"
        lines = [f"{count} layers: {part}" for part, count in Counter(map(str, self.layers)).items()]
        return "; ".join([*lines, *([f"after the layers: {', '.join(self.last)}"] if self.last else [])])


@remembered
def prove(model_class: type[nn.Module], config) -> Proof:
    """What of a causal LM of this class and transformers config can be tiled. Takes a second or two the first time."""
    try:
        picked, like = pick_layers(model_class, config, "eager", each=2)
        model = build(model_class, small_config(config, WINDOW, picked), "eager", dtype=torch.float64)
        randomise(model)
        proof = prove_model(model)
    except Refused as refused:
        return Proof(why=str(refused))
    except Exception as error:  # whatever the code of some model raises, it is not tiled then
        return Proof(why=f"a small model of this config does not run ({type(error).__name__}: {error})")
    return Proof(tuple(proof.layers[i] for i in like), proof.last, proof.why) if proof.layers else proof


# --- one model --------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a module was called with by the model's own forward."""

    args: tuple
    kwargs: dict[str, Any]
    order: int


def prove_model(model: nn.Module) -> Proof:
    """model: a causal LM as it is, weights and all, small."""
    layers, body = layers_of(model), _body(model)
    kind = dict(zip(layers, kinds_of(model), strict=True))
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (BATCH, LENGTH))
    seen = _look(body, ids, [body, *layers])
    if not any(layer in seen for layer in layers):
        return Proof(why="its text model does not call them")
    shown: dict[tuple, Part] = {}
    for layer in layers:
        if layer in seen and kind[layer] not in shown:
            shown[kind[layer]] = _prove_layer(layer, seen)
    uncalled = Part(why="the model does not call it")
    parts = [shown[kind[layer]] if layer in seen else uncalled for layer in layers]
    ended = max(seen[layer].order for layer in layers if layer in seen)
    after = [n for n, m in body.named_children() if m in seen and seen[m].order > ended and m not in layers]
    proof = Proof(tuple(parts), _rowwise_children(body, after, seen))
    return _confirm(model, body, ids, proof)


def _confirm(model: nn.Module, body: nn.Module, ids: Tensor, proof: Proof) -> Proof:
    """The proof, or as much of it as is true of the whole model."""

    def run(ids: Tensor) -> Tensor:
        return body(ids, use_cache=False).last_hidden_state

    reduced = [proof]
    if any(part.split for part in proof.layers):
        why = "layers leave something for each other"
        reduced.append(Proof(tuple(Part(why=why) if part.split else part for part in proof.layers), proof.last))
    expected = _results(run, (ids,), {}, body)
    for candidate in reduced:
        with attached(model, candidate, ROWS):
            why = _difference(expected, lambda: _results(run, (ids,), {}, body))
        if not why:
            return candidate
    return Proof(tuple(Part(why=why) for _ in proof.layers))


def _look(body: nn.Module, ids: Tensor, parents: list[nn.Module]) -> dict[nn.Module, Seen]:
    """One forward of the model: what its layers, and the children of layers and body, were called with, each first."""
    seen: dict[nn.Module, Seen] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module not in seen:
            seen[module] = Seen(
                *tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs)), len(seen)
            )

    watched = dict.fromkeys([*parents[1:], *(child for parent in parents for child in parent.children())])
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in watched]
    try:
        with torch.no_grad():
            body(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


# --- one layer --------------------------------------------------------------------------------------------------------


def _prove_layer(layer: nn.Module, seen: dict[nn.Module, Seen]) -> Part:
    called = seen[layer]
    try:
        expected = _results(layer, called.args, called.kwargs, layer)
        if shared := shared_containers(called.args, called.kwargs):
            raise Unproved(f"layers share {', '.join(shared)}")
        split = _find_split(layer, called)
        forward = partial(run_split, layer, layer.forward, split, ROWS)
        with interface(), replaced(layer, forward):
            why = _difference(expected, lambda: _results(layer, called.args, called.kwargs, layer))
        why = why or _difference(_silenced(layer, called, 1), lambda: _silenced(layer, called, REPEATS))
        if not why:
            return Part(split)
    except Exception as error:  # of the model's own code, run as it is not meant to be
        why = str(error) if isinstance(error, Unproved) else f"{type(error).__name__}: {error}"
    return Part(None, _rowwise_children(layer, [name for name, _ in layer.named_children()], seen), why)


def _silenced(layer: nn.Module, called: Seen, repeats: int) -> dict[str, Tensor]:
    """What the last rows give attention, which answers with zeros, and what the layer makes of it, its rows so often repeated:
    code may go by the number of a row, or by how many there are, beyond a bound only (Llama 4 scales queries so)."""
    call, kept = Call(called.args, called.kwargs), []
    rows = tuple(x.repeat(1, repeats, *[1] * (x.ndim - 2)) for x in call.inputs())

    def give(function, module, q, k, v, *_, **__):
        kept.extend(x.transpose(1, 2) for x in (q, k, v))
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None

    args, kwargs = call.of(rows)
    with torch.no_grad(), interface(), INTERFACE.answered(give):
        out = layer.forward(*args, **kwargs)
    given = [*kept, *Results().rows(out, BATCH, rows[0].shape[1])]
    return {f"result {i}": x[:, -LENGTH:] for i, x in enumerate(given)}


def _rowwise_children(parent: nn.Module, names: list[str], seen: dict[nn.Module, Seen]) -> tuple[str, ...]:
    found = []
    for name in names:
        module = getattr(parent, name)
        if module not in seen or not any(True for _ in module.parameters()):
            continue
        args, kwargs = seen[module].args, seen[module].kwargs
        if not Call(args, kwargs).takes_rows:
            continue
        try:
            expected = _results(module, args, kwargs, module)
            with replaced(module, partial(run_rowwise, module, module.forward, ROWS)):
                why = _difference(expected, lambda m=module, a=args, k=kwargs: _results(m, a, k, m))
        except Exception as error:  # as above
            why = str(error)
        if not why:
            found.append(name)
    return tuple(found)


def _find_split(layer: nn.Module, called: Seen) -> Split:
    """Where the layer's forward calls attention, and what it does with the answer."""
    call = Call(called.args, called.kwargs)
    if not call.takes_rows:
        raise Unproved("it is not called with hidden states (B, T, H)")
    own = layer.forward
    inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in call.inputs())
    with interface():
        reached, qkv = run_to_attention(own, call, inputs)
        end = _End(reached.module)
        args, kwargs = call.of(inputs)
        with end.watched():
            out = own(*args, **kwargs)
    before, after = (_used(layer, tree_flatten(results)[0]) for results in (qkv, out))
    holders = partial(_holders, layer, before, after)
    attention = next((name for name, m in layer.named_modules() if m is reached.module), None)
    projection = end.projection if attention else None
    return Split(attention, projection, end.results, holders((True, False)), holders((True, True)), holders())


def _used(layer: nn.Module, results: list) -> set[str]:
    """Names of the parameters that results depend on."""
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    results = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
    grads = torch.autograd.grad([x.sum() for x in results], list(named.values()), allow_unused=True) if results else ()
    return {name for name, grad in zip(named, grads, strict=False) if grad is not None}


def _holders(
    layer: nn.Module, before: set[str], after: set[str], use: tuple[bool, bool] | None = None
) -> frozenset[str]:
    """What holds the parameters that are used so, before and after attention: modules, by themselves all of whose parameters
    are used alike, or else the parameters."""
    held = []
    for path, module in layer.named_modules():
        names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
        uses = {name: (name in before, name in after) for name in names}
        whole = path and not any(True for _ in module.children()) and len(set(uses.values())) == 1
        held += [(path, uses[names[0]])] if whole else uses.items()
    alike = {name: {u for n, u in held if n == name} for name, _ in held}
    return frozenset(holder_of(name) for name, uses in alike.items() if use is None or use in uses)


class _End:
    """How an attention module goes from what attention gave to what it returns."""

    def __init__(self, attention: nn.Module):
        self.attention, self.projection, self.results = attention, None, 0
        self._a = self._weights = self._name = self._out = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it attention gives constants, and the modules that it is followed by are looked at."""
        hooks = [m.register_forward_hook(partial(self._follow, n)) for n, m in self.attention.named_modules() if n]
        hooks.append(self.attention.register_forward_hook(self._return))
        try:
            with INTERFACE.answered(self._give):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _give(self, function: Callable, *args, **options):
        if self._a is not None:
            raise Unproved("it calls attention more than once")
        out = function(*args, **options)
        self._a, self._weights = out[0].detach(), out[1]
        return self._a, *out[1:]

    def _follow(self, name: str, module: nn.Module, args: tuple, out: Any) -> None:
        if self._a is not None and self._name is None:
            alone = len(args) == 1 and isinstance(args[0], Tensor) and args[0].data_ptr() == self._a.data_ptr()
            if alone and torch.equal(args[0], self._a.flatten(2)):
                self._out = out
            self._name = name

    def _return(self, module: nn.Module, args: tuple, out: Any) -> None:
        first, *others = out if isinstance(out, tuple) else (out,)
        if first is self._out and all(x is None or x is self._weights for x in others):
            self.projection, self.results = self._name, len(out) if isinstance(out, tuple) else 0


# --- comparison -------------------------------------------------------------------------------------------------------


def _results(function: Callable, args: tuple, kwargs: dict, module: nn.Module) -> dict[str, Tensor | None]:
    """Results of a call, and the gradients of its rows and of the module's parameters."""
    call, leaves = Call(args, kwargs), []
    if call.takes_rows:
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in call.inputs()]
        args, kwargs = call.of(tuple(leaves))
    results = [x for x in tree_flatten(function(*args, **kwargs))[0] if isinstance(x, Tensor)]
    wanted = {f"input {i}": x for i, x in enumerate(leaves)} | dict(module.named_parameters())
    return with_gradients({f"result {i}": x for i, x in enumerate(results)}, wanted)


def _difference(expected: dict[str, Tensor | None], compute: Callable[[], dict[str, Tensor | None]]) -> str:
    """Why the results are not the expected ones, or nothing."""
    if any(x is not None and not x.isfinite().all() for x in expected.values()):
        return "its own numbers are not finite"
    try:
        worst, off = difference(compute(), expected)
    except Exception as error:  # of the model's own code, run as it is not meant to be
        return str(error) if isinstance(error, Unproved) else f"{type(error).__name__}: {error}"
    return "" if off <= TOLERANCE else f"its rows depend on each other outside of attention ({worst}: error {off:.1e})"


# --- attached ---------------------------------------------------------------------------------------------------------


@contextmanager
def interface() -> Iterator[None]:
    INTERFACE.open()
    try:
        yield
    finally:
        INTERFACE.close()


def forwards_of(model: nn.Module, proof: Proof, rows: int) -> dict[nn.Module, Callable]:
    """The tiled forwards of all that was proved. Raises ValueError for other layers than the proof's."""
    layers, forwards = layers_of(model), {}
    if len(layers) != len(proof.layers):
        raise ValueError(f"model: it has {len(layers)} layers, its config says {len(proof.layers)}")
    for layer, part in zip(layers, proof.layers, strict=True):
        if part.split:
            forwards[layer] = partial(run_split, layer, layer.forward, part.split, rows)
        forwards |= {m: partial(run_rowwise, m, m.forward, rows) for m in (getattr(layer, n) for n in part.modules)}
    body = _body(model)
    return forwards | {m: partial(run_rowwise, m, m.forward, rows) for m in (getattr(body, n) for n in proof.last)}


@contextmanager
def attached(model: nn.Module, proof: Proof, rows: int) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(interface())
        for module, forward in forwards_of(model, proof, rows).items():
            stack.enter_context(replaced(module, forward))
        yield


def _body(model: nn.Module) -> nn.Module:
    """What has the layers, and gives the last hidden state."""
    body = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = layers_of(model)
    if body not in (None, model) and not set(layers).isdisjoint(body.modules()):
        return body
    path = next(name for name, module in model.named_modules() if module is layers[0])
    return model.get_submodule(path.rpartition(".")[0].rpartition(".")[0])
