"""Whether sequences of a model may share a prefix: shown on a small model of its class and config, not looked up in a list.

    masks    all layers of the config cut in width, with its own windows: what transformers' mask function shows (masks.py), and
             that every argument of attention is one that the implementation knows
    rows     the same layers with attention silenced: no row may reach a later one by another way (state, convolution, code of
             its own), and none may go by its number in the call, or by the call's length
    kinds    layers told apart by their modules' classes, shapes and settings, and by what their rows see: one of each is left
    numbers  these with windows and chunks of a few rows, every parameter random: log-probs and all gradients of a pack with our
             attention are those of its separate sequences with the model's eager attention, in float32
    far      these behind FAR rows, as code may go by such numbers beyond a bound only (Llama 4 scales queries by the row's)

0.5 to 4 s of processor time, 1.6 for 32 layers of a Llama; remembered by class and config for the life of the process. Not
covered: what depends on weights, what a model does in training alone or beyond FAR rows, and RoPE that depends on length, of
which rope.py asks every pack.

Tests: tests/attention/test_proof.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longpo_ops.attention.masks import Seen, read_mask
from longpo_ops.attention.rope import rope_depends_on_length
from longpo_ops.data.layout import PairSpans, SharedPrefixLayout
from longpo_ops.pretrained.probe import (
    Refused,
    build,
    difference,
    layers_of,
    pick_layers,
    randomise,
    remembered,
    shake,
    with_gradients,
)
from longpo_ops.pretrained.small import READ, small_config

PROBE = "longpo_probe"
NEAR, FAR = 30, 40_000  # rows before those looked at: beyond the bounds at which code of models changes
WINDOW = 5  # rows of windows in the small model; chunks have one more
TOLERANCE = 2e-4  # of the largest number: roundings of float32 stay some hundred times below, faults above
UNSTEADY = 1e-2  # but ten times the roundings of a model that multiplies them (Gemma 4), up to this
# Of pairs: prefix, chosen tail, rejected tails. The last of the first pair leaves the tail before it at that one's row FORK.
LENGTHS = ((9, 8, (7, 12)), (3, 11, (2,)))
FORK = 3
UNREAD = "a mask that was not read"


class PrefixNotShared(ValueError):
    """A model whose sequences cannot share a prefix; the message says why, and what to do."""


@dataclass(frozen=True)
class Proof:
    """What was shown. reason: why a prefix cannot be shared, None where it can. seen: what each layer's rows see, None for one
    without attention. attention: the name of each layer's attention inside it. off: the largest difference between a pack and
    its separate sequences, as a share of the largest number."""

    reason: str | None
    seen: tuple[Seen | None, ...] = ()
    attention: tuple[str | None, ...] = ()
    off: float | None = None


def prove(model: nn.Module) -> Proof:
    """What holds for a transformers model (or a PEFT model of one) of this class and config; its weights are not looked at."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind, config = type(model), getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return Proof(f"{kind.__name__} has no transformers config")
    if hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is None:
        return Proof(
            f"{kind.__name__} has no head, whose log-probs would be compared: give the causal LM that it is a part of"
        )
    return _prove(kind, config)


@remembered
def _prove(kind: type[nn.Module], config: Any) -> Proof:
    try:
        with _attention(PROBE, _gone, _gone):
            return _shown(kind, config)
    except Refused as refused:
        return Proof(str(refused))


def _shown(kind: type[nn.Module], config: Any) -> Proof:
    some, _ = pick_layers(kind, config, PROBE)
    _look(build(kind, small_config(config, layers=some), PROBE))  # what refuses does so soon
    whole = build(kind, small_config(config), PROBE)
    layers = _look(whole)
    _check_apart(whole, NEAR)
    picked, _ = pick_layers(kind, config, PROBE, told=[layer.seen for layer in layers])
    model = build(kind, small_config(config, WINDOW, picked), PROBE)
    short = _look(model)
    for cut, i in zip(short, range(len(layers)) if picked is None else picked, strict=True):
        _check_cut(cut.seen, layers[i].seen)
    off = _compare(model, short)
    _check_apart(build(kind, small_config(config, layers=picked), PROBE), FAR)
    return Proof(None, *_told(layers), off)


def _told(layers: Sequence[_Layer]) -> tuple[tuple[Seen | None, ...], tuple[str | None, ...]]:
    return tuple(each.seen for each in layers), tuple(each.name for each in layers)


def _check_cut(cut: Seen | None, real: Seen | None) -> None:
    """Raises Refused unless a small model's rows see what the real one's do, but for the size of windows and chunks."""
    if cut == real is None:
        return
    kinds = {(seen.window is None, seen.chunk is None) if seen else None for seen in (cut, real)}
    if len(kinds) > 1 or max(cut.window or 0, cut.chunk or 0) > WINDOW + 1:
        raise Refused(f"rows of a layer see {real}, and {cut} where windows are set to {WINDOW} rows")


# --- masks, arguments, rows -------------------------------------------------------------------------------------------


@dataclass
class _Layer:
    """What the attention of a layer was given."""

    seen: Seen | None = None
    name: str | None = None


def _look(model: nn.Module) -> list[_Layer]:
    """Per layer what it sees. Raises Refused for unknown arguments, and for rows that reach others without attention."""
    from longpo_ops.attention.registration import unknown_arguments

    blocks, name = layers_of(model), type(model).__name__
    where = {m: (i, path) for i, block in enumerate(blocks) for path, m in block.named_modules()}
    layers = [_Layer() for _ in blocks]

    def attend(module, q, k, v, attention_mask=None, dropout=0.0, scaling=None, sliding_window=None, **given):
        if module not in where:
            raise Refused(f"{type(module).__name__} is no part of the layers of {name}")
        if unknown := unknown_arguments(given):
            raise Refused(f"{type(module).__name__} gives its attention {', '.join(unknown)}, which we do not know")
        if dropout:
            raise Refused(
                f"{type(module).__name__} drops out {dropout:g} of its attention in training: set that to 0 in its config"
            )
        if attention_mask is UNREAD:
            raise Refused("a mask of its layers is neither causal, nor a window or chunks of the past")
        if not isinstance(mask := attention_mask, Seen):
            raise Refused(f"{type(module).__name__} has a mask of its own ({type(mask).__name__})")
        if not getattr(module, "is_causal", True):
            raise Refused(f"{type(module).__name__} is bidirectional")
        if sliding_window is not None and sliding_window != mask.window:
            raise Refused(f"{type(module).__name__} is told of a window of {sliding_window}, its mask shows {mask}")
        i, path = where[module]
        if layers[i].seen not in (None, mask):
            raise Refused(f"layer {i} attends twice, to {layers[i].seen} and to {mask}")
        if layers[i].name not in (None, path):
            raise Refused(f"layer {i} has two modules that attend, {layers[i].name} and {path}")
        layers[i] = _Layer(mask, path)
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None

    with _attention(PROBE, attend, _read), torch.no_grad():
        randomise(model)
        _check_rows(model, _tokens(model, 12))
        _run(model.train(), _tokens(model, 12))  # with dropout
        model.eval()
    if not any(each.seen for each in layers):
        raise Refused(f"the layers of {name} do not use the attention functions of transformers")
    return layers


def _read(*args, mask_function: Callable, **_) -> Seen | str:
    """What a mask shows, or UNREAD: a model may make one that none of its layers uses (Qwen2-MoE, of a window of 0)."""
    return read_mask(mask_function) or UNREAD


def _check_rows(model: nn.Module, ids: Tensor) -> None:
    """Raises Refused where other tokens in the first half change rows of the second, though attention gives nothing."""
    other, half = ids.clone(), ids.shape[1] // 2
    other[:, :half] = (other[:, :half] + 1) % 7 + 3
    leaks: list[str] = []

    def differs(x: Any) -> bool:
        rows = isinstance(x, Tensor) and x.ndim > 2 and x.shape[:2] == (2, ids.shape[1])
        return rows and not torch.equal(x[0, half:], x[1, half:])

    def watch(module, args, kwargs, output):
        first = output[0] if isinstance(output, tuple | list) and output else output
        if differs(first) and not any(map(differs, [*args, *kwargs.values()])):
            leaks.append(type(module).__name__)

    own = [m for m in model.modules() if not type(m).__module__.startswith("torch.")]
    hooks = [m.register_forward_hook(watch, with_kwargs=True) for m in own]
    try:
        out = _run(model, torch.cat([ids, other])).logits
    finally:
        for hook in hooks:
            hook.remove()
    late = out[:, half:].double()
    if (late[0] - late[1]).abs().max() > TOLERANCE * late.abs().max():
        raise Refused(
            f"{leaks[0] if leaks else 'its body'} passes on what earlier rows hold by another way than transformers' attention "
            "(a state, a convolution, attention of its own)"
        )


def _check_apart(model: nn.Module, before: int) -> None:
    """Raises Refused where rows give their attention, or their logits, other numbers behind so many rows than alone, although
    their tokens and positions are the same."""
    ids = _tokens(model, 12)
    longest = ids.shape[1] if rope_depends_on_length(model) else _context(model)
    alone = _given(model, ids, torch.arange(ids.shape[1])[None])
    positions = torch.cat([torch.arange(before) % longest, torch.arange(ids.shape[1])])[None]
    behind = _given(model, torch.cat([_tokens(model, before), ids], 1), positions)
    for (name, ours), (_, theirs) in zip(behind, alone, strict=True):
        if not difference({"": ours}, {"": theirs})[1] <= TOLERANCE:
            raise Refused(
                f"{name} computes other numbers of rows behind {before:,} others than of the same rows alone: it goes by the "
                "number of a row in its call, or by the call's length"
            )


def _given(model: nn.Module, ids: Tensor, positions: Tensor) -> list[tuple[str, Tensor]]:
    """What the last 12 rows give attention, which is silenced, by its module's class, and their logits."""
    given = []

    def attend(module, q, k, v, attention_mask=None, **_):
        given.extend((type(module).__name__, x[:, :, -12:].clone()) for x in (q, k, v))
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None

    with _attention(PROBE, attend, lambda *_, **__: None), torch.no_grad():
        randomise(model)
        logits = _run(model, ids, position_ids=positions).logits
    return [*given, (type(model).__name__, logits[:, -12:])]


def _context(model: nn.Module) -> int:
    config = model.config.get_text_config()
    return next((n for name in READ if type(n := getattr(config, name, None)) is int), FAR)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _compare(model: nn.Module, layers: Sequence[_Layer]) -> float:
    """-> how far log-probs and gradients of a pack are from those of separate sequences. Raises Refused where too far."""
    from longpo_ops.attention.registration import installed

    layout, ids, positions, sequences = _pack(model)
    randomise(model)
    model.set_attn_implementation("eager")
    if model.config._attn_implementation != "eager":
        raise Refused(f"{type(model).__name__} has no eager attention to be compared with")
    parameters = dict(model.named_parameters())

    def compute_alone() -> dict[str, Tensor | None]:
        rows = torch.cat([_logps(model, ids[:, rows])[-own:] for rows, own in sequences])
        return with_gradients({"log-probs": rows}, parameters)

    expected = compute_alone()
    with installed(model, Proof(None, *_told(layers))):
        packed = _logps(model, ids, position_ids=positions, shared_prefix_layout=layout)
        ours = with_gradients({"log-probs": packed}, parameters)
    (worst, off), allowed = difference(ours, expected), TOLERANCE
    if TOLERANCE < off < UNSTEADY:  # a model that multiplies its own roundings, perhaps
        shake(model)
        allowed = min(max(TOLERANCE, 10 * difference(compute_alone(), expected)[1]), UNSTEADY)
    if not off <= allowed:
        raise Refused(
            f"{worst} of a pack differ from those of its separate sequences by {off:.2g} of the largest, "
            f"expected {allowed:.2g} at most"
        )
    return off


def _logps(model: nn.Module, ids: Tensor, **given) -> Tensor:
    """(T,) of some next token of every row; which one is nothing to the comparison, so it is a row's own."""
    return _run(model, ids, **given).logits[0].float().log_softmax(-1).gather(-1, ids[0, :, None])[:, 0]


def _run(model: nn.Module, ids: Tensor, **given):
    try:
        return model(input_ids=ids, use_cache=False, **given)
    except (
        Refused,
        ValueError,
        TypeError,
        RuntimeError,
        AttributeError,
        IndexError,
        KeyError,
        AssertionError,
    ) as error:
        if isinstance(error, Refused):
            raise
        if "no shared_prefix_layout came" in str(error):
            raise Refused(f"{type(model).__name__} does not hand what it is given on to its attention") from error
        if "'Seen'" in str(error):
            raise Refused(f"{type(model).__name__} adds to its mask, or has attention of its own") from error
        raise Refused(
            f"a small {type(model).__name__} does not run ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _tokens(model: nn.Module, count: int) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(3, min(vocabulary, 100), (1, count), generator=torch.Generator().manual_seed(1))


def _pack(model: nn.Module) -> tuple[SharedPrefixLayout, Tensor, Tensor, list[tuple[list[int], int]]]:
    """A pack of LENGTHS: layout, ids and positions (1, N), and each sequence's rows in it and how many are its own."""
    pairs, positions, sequences, row = [], [], [], 0
    for prefix, chosen, rejected in LENGTHS:
        start, tails, forks = row, [(row + prefix, row + prefix + chosen)], []
        positions += range(prefix + chosen)
        sequences.append((list(range(start, tails[0][1])), prefix + chosen))
        for length in rejected:
            first = tails[-1][1]
            forks.append(tails[-1][0] + FORK if forks else start + prefix - 1)
            before = sequences[-1][0][: sequences[-1][0].index(forks[-1])]
            tails.append((first, first + 1 + length))
            positions += range(len(before), len(before) + 1 + length)
            sequences.append((before + list(range(first, first + 1 + length)), 1 + length))
        row = tails[-1][1]
        pairs.append(PairSpans(start, start + prefix, tuple(tails), tuple(forks)))
    layout, ids = SharedPrefixLayout(tuple(pairs), row), _tokens(model, row)
    for pair in pairs:
        for (first, _), fork in zip(pair.tails[1:], pair.forks, strict=True):
            ids[:, first] = ids[:, fork]
    return layout, ids, torch.tensor(positions)[None], sequences


# --- surroundings -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _attention(name: str, attend: Callable, mask: Callable) -> Iterator[None]:
    """Functions of transformers' registries under a name, within it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    try:
        yield
    finally:
        AttentionInterface.register(name, _gone)
        AttentionMaskInterface.register(name, _gone)


def _gone(*args, **kwargs):
    raise RuntimeError(f"{PROBE} is in use while a model is proved only")
