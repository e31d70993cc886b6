"""Whether sequences of a model may share a prefix: shown on a small model of its class and config, not looked up in a list.

    kinds    layers of the config cut in width, told apart by their modules' classes, shapes and settings (meta device)
    masks    one layer of each kind with the config's own windows: what transformers' mask function shows (masks.py), and that
             every argument of attention is one that the implementation knows
    rows     the same layers with attention silenced: no row may reach a later one by another way (state, convolution, code of
             its own)
    numbers  the same layers with windows and chunks of a few rows, every parameter random: log-probs and all gradients of a
             pack with our attention are those of its separate sequences with the model's eager attention, in float32

0.3 to 1.4 s of processor time for a config of any size; remembered by class and config for the life of the process. Not
covered: what depends on weights, and RoPE that depends on length, of which rope.py asks every pack.

Tests: tests/attention/test_proof.py.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longpo_ops.attention.masks import Seen, read_mask
from longpo_ops.data.layout import PairSpans, SharedPrefixLayout
from longpo_ops.pretrained.small import DEPTH, small_config

PROBE = "longpo_probe"
UNKNOWN = object()  # in the place of a mask that is neither causal, nor a window or chunks of the past
WINDOW = 5  # rows of windows in the small model; chunks have one more
MOST = 64  # layers of the small model, where its kinds of layers do not come in fewer
TOLERANCE = (
    2e-4  # of the largest log-prob or gradient: roundings of float32 stay some hundred times below, faults above
)
LENGTHS = ((9, 8, (7, 12)), (3, 11, (2,)))  # of pairs: prefix, chosen tail, rejected tails
NOT_DATA = (
    "transformers_version",
    "_name_or_path",
    "name_or_path",
    "dtype",
    "use_cache",
    "architectures",
    "vocab_size",
)


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


class _Refused(Exception):
    pass


_PROVED: dict[tuple, Proof] = {}


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
    described = {k: v for k, v in config.to_dict().items() if k not in NOT_DATA}
    key = kind, json.dumps(described, sort_keys=True, default=str)
    if key not in _PROVED:
        _PROVED[key] = _prove(kind, config)
    return _PROVED[key]


def _prove(kind: type[nn.Module], config: Any) -> Proof:
    """In a thread of its own, where no mode of torch is in force that the caller may have set: autocast, inference, devices."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_in_thread, kind, config).result()


def _in_thread(kind: type[nn.Module], config: Any) -> Proof:
    try:
        with _undisturbed():
            return _shown(kind, config)
    except _Refused as refused:
        return Proof(str(refused))


def _shown(kind: type[nn.Module], config: Any) -> Proof:
    whole = _build(kind, small_config(config), "meta")
    kinds = _signatures(whole)
    picked, of_layer = _pick(kind, config, kinds)
    called = _look(_build(kind, small_config(config, layers=picked), "cpu"))
    model = _build(kind, small_config(config, WINDOW, picked), "cpu")
    short = _look(model)
    for cut, real in zip(short, called, strict=True):
        _check_cut(cut.seen, real.seen)
    off = _compare(model, short)
    layers = [called[i] for i in of_layer]
    return Proof(None, tuple(each.seen for each in layers), tuple(each.name for each in layers), off)


def _check_cut(cut: Seen | None, real: Seen | None) -> None:
    """Raises _Refused unless a small model's rows see what the real one's do, but for the size of windows and chunks."""
    if cut == real is None:
        return
    kinds = {(seen.window is None, seen.chunk is None) if seen else None for seen in (cut, real)}
    if len(kinds) > 1 or max(cut.window or 0, cut.chunk or 0) > WINDOW + 1:
        raise _Refused(f"rows of a layer see {real}, and {cut} where windows are set to {WINDOW} rows")


# --- a small model ----------------------------------------------------------------------------------------------------


def _build(kind: type[nn.Module], config: Any, device: str) -> nn.Module:
    try:
        with torch.device(device):
            make = getattr(kind, "_from_config", kind)
            model = make(config, attn_implementation=PROBE) if make is not kind else kind(config)
    except Exception as error:
        if PROBE in str(error):
            raise _Refused(f"{kind.__name__} has attention of its own, not one of transformers' functions") from error
        raise _Refused(
            f"a small {kind.__name__} of its config cannot be built ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    return model.eval()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers: its longest list of modules, as long as its config says. Raises ValueError where there is none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    config = model.config.get_text_config()
    depth = next((n for name in DEPTH if isinstance(n := getattr(config, name, None), int)), None)
    found = [list(m) for m in lists if len(m) == depth]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} lists of {depth} layers, expected one")
    return found[0]


def _blocks(model: nn.Module) -> list[nn.Module]:
    try:
        return blocks_of(model)
    except ValueError as error:
        raise _Refused(str(error)) from None


def _signatures(model: nn.Module) -> list[tuple]:
    """By layer: its modules' classes, settings and shapes, and what the config lists for it."""
    blocks, config = _blocks(model), model.config.get_text_config().to_dict()
    listed = [
        v for v in config.values() if isinstance(v, list | tuple) and len(v) == len(blocks) and [*v] != [*range(len(v))]
    ]
    return [(_structure(block), tuple(str(each[i]) for each in listed)) for i, block in enumerate(blocks)]


def _structure(block: nn.Module) -> tuple:
    return tuple(
        (name, type(m).__name__, _settings(m), tuple((n, tuple(p.shape)) for n, p in m.named_parameters(recurse=False)))
        for name, m in block.named_modules()
    )


def _settings(module: nn.Module) -> tuple:
    """Flags, names and whole numbers, but for the number of its layer."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | str | None) and not k.startswith("_")}
    return tuple(
        (k, v) for k, v in sorted(plain.items()) if k not in ("training", "layer_idx", "layer_id", "block_idx")
    )


def _pick(kind: type[nn.Module], config: Any, kinds: list[tuple]) -> tuple[list[int], list[int]]:
    """-> one layer of each kind, or the first layers that have them all, or all, and for every layer the place of its like."""
    picked, why = [kinds.index(each) for each in dict.fromkeys(kinds)], ""
    for tried in (picked, list(range(max(picked) + 1)), list(range(len(kinds)))):
        try:
            came = _signatures(_build(kind, small_config(config, layers=tried), "meta")) if len(tried) <= MOST else []
        except _Refused as refused:
            why = f": {refused}"
            continue
        if [each[0] for each in came] == [kinds[i][0] for i in tried]:
            return tried, [[kinds[i] for i in tried].index(each) for each in kinds]
    raise _Refused(f"its {len(kinds)} layers, of {len(picked)} kinds, do not come in a small model{why}")


def _randomise(model: nn.Module) -> None:
    """Every parameter, and every number that is stored with them: fresh biases are zeros and would hide their loss."""
    generator = torch.Generator().manual_seed(0)
    stored = model.state_dict().keys()
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in stored)]
    for name, x in named:
        if x.is_floating_point():
            drawn = torch.randn(x.shape, generator=generator)
            wide = x.shape[-1] ** -0.5 if x.ndim > 1 else 0.3
            x.copy_(drawn * wide + (x.ndim == 1 and name.endswith("weight")))


# --- masks, arguments, rows -------------------------------------------------------------------------------------------


@dataclass
class _Layer:
    """What the attention of a layer was given."""

    seen: Seen | None = None
    name: str | None = None


def _look(model: nn.Module) -> list[_Layer]:
    """Per layer what it sees. Raises _Refused for unknown arguments, and for rows that reach others without attention."""
    from longpo_ops.attention.registration import unknown_arguments

    blocks, name = _blocks(model), type(model).__name__
    where = {m: (i, path) for i, block in enumerate(blocks) for path, m in block.named_modules()}
    layers = [_Layer() for _ in blocks]

    def attend(module, q, k, v, attention_mask=None, dropout=0.0, scaling=None, sliding_window=None, **given):
        if module not in where:
            raise _Refused(f"{type(module).__name__} is no part of the layers of {name}")
        if unknown := unknown_arguments(given):
            raise _Refused(f"{type(module).__name__} gives its attention {', '.join(unknown)}, which we do not know")
        if dropout:
            raise _Refused(
                f"{type(module).__name__} drops out {dropout:g} of its attention in training: set that to 0 in its config"
            )
        if attention_mask is UNKNOWN:
            raise _Refused("a mask of its layers is neither causal, nor a window or chunks of the past")
        if not isinstance(mask := attention_mask, Seen):
            raise _Refused(f"{type(module).__name__} has a mask of its own ({type(mask).__name__})")
        if not getattr(module, "is_causal", True):
            raise _Refused(f"{type(module).__name__} is bidirectional")
        if sliding_window is not None and sliding_window != mask.window:
            raise _Refused(f"{type(module).__name__} is told of a window of {sliding_window}, its mask shows {mask}")
        i, path = where[module]
        if layers[i].seen not in (None, mask):
            raise _Refused(f"layer {i} attends twice, to {layers[i].seen} and to {mask}")
        layers[i] = _Layer(mask, path)
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None

    with _attention(PROBE, attend, _read), torch.no_grad():
        _randomise(model)
        _check_rows(model, _tokens(model, 12))
        _run(model.train(), _tokens(model, 12))  # with dropout
        model.eval()
    if not any(each.seen for each in layers):
        raise _Refused(f"the layers of {name} do not use the attention functions of transformers")
    return layers


def _read(*args, mask_function: Callable, **_) -> Seen | object:
    """What a mask shows, or UNKNOWN: a model may make one that none of its layers reads (Qwen2-MoE, of a window of 0)."""
    return read_mask(mask_function) or UNKNOWN


def _check_rows(model: nn.Module, ids: Tensor) -> None:
    """Raises _Refused where other tokens in the first half change rows of the second, though attention gives nothing."""
    other, half = ids.clone(), ids.shape[1] // 2
    other[:, :half] = (other[:, :half] + 1) % 7 + 3
    leaks: list[str] = []

    def watch(module, args, output):
        x = output[0] if isinstance(output, tuple) and output else output
        if leaks or not isinstance(x, Tensor) or x.ndim < 3 or x.shape[:2] != (2, ids.shape[1]):
            return
        if not torch.equal(x[0, half:], x[1, half:]) and not type(module).__module__.startswith("torch."):
            leaks.append(type(module).__name__)

    hooks = [m.register_forward_hook(watch) for m in model.modules()]
    try:
        out = _run(model, torch.cat([ids, other])).logits
    finally:
        for hook in hooks:
            hook.remove()
    late = out[:, half:].double()
    if (late[0] - late[1]).abs().max() > TOLERANCE * late.abs().max():
        raise _Refused(
            f"{leaks[0] if leaks else 'its body'} passes on what earlier rows hold by another way than transformers' attention "
            "(a state, a convolution, attention of its own)"
        )


# --- numbers ----------------------------------------------------------------------------------------------------------


def _compare(model: nn.Module, layers: Sequence[_Layer]) -> float:
    """-> how far log-probs and gradients of a pack are from those of separate sequences. Raises _Refused where too far."""
    from longpo_ops.attention.registration import installed

    layout, ids, positions, sequences = _pack(model)
    weights = torch.linspace(0.5, 1.5, layout.length)
    _randomise_in_place(model)
    model.set_attn_implementation("eager")
    if model.config._attn_implementation != "eager":
        raise _Refused(f"{type(model).__name__} has no eager attention to be compared with")
    alone = _with_gradients(
        model, lambda: torch.cat([_logps(model, ids[:, rows])[-own:] for rows, own in sequences]), weights
    )
    proof = Proof(None, tuple(each.seen for each in layers), tuple(each.name for each in layers))
    with installed(model, proof):
        packed = _with_gradients(
            model, lambda: _logps(model, ids, position_ids=positions, shared_prefix_layout=layout), weights
        )
    off = {"log-probs": _off(packed[0], alone[0], alone[0])}
    scale = max(g.abs().max() for g in alone[1].values())
    for name, theirs in alone[1].items():
        ours = packed[1].get(name, torch.full_like(theirs, torch.nan))
        off[f"gradients of {name}"] = _off(ours, theirs, torch.maximum(theirs.abs().max(), 1e-3 * scale))
    worst = max(off, key=off.get)
    if not off[worst] <= TOLERANCE:
        raise _Refused(
            f"{worst} of a pack differ from those of its separate sequences by {off[worst]:.2g} of the largest, "
            f"expected {TOLERANCE:g} at most"
        )
    return off[worst]


def _randomise_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        _randomise(model)


def _off(ours: Tensor, theirs: Tensor, scale: Tensor) -> float:
    return (
        float((ours - theirs).abs().max() / scale.abs().max().clamp(min=1e-30))
        if ours.isfinite().all()
        else float("inf")
    )


def _with_gradients(model: nn.Module, logps: Callable[[], Tensor], weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with torch.enable_grad():
        rows = logps()
        (rows * weights).sum().backward()
    named = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return rows.detach(), named


def _logps(model: nn.Module, ids: Tensor, **given) -> Tensor:
    """(T,) of some next token of every row; which one is nothing to the comparison, so it is a row's own."""
    return _run(model, ids, **given).logits[0].float().log_softmax(-1).gather(-1, ids[0, :, None])[:, 0]


def _run(model: nn.Module, ids: Tensor, **given):
    try:
        return model(input_ids=ids, use_cache=False, **given)
    except (
        _Refused,
        ValueError,
        TypeError,
        RuntimeError,
        AttributeError,
        IndexError,
        KeyError,
        AssertionError,
    ) as error:
        if isinstance(error, _Refused):
            raise
        if "no shared_prefix_layout came" in str(error):
            raise _Refused(f"{type(model).__name__} does not hand what it is given on to its attention") from error
        if "'Seen'" in str(error):
            raise _Refused(f"{type(model).__name__} adds to its mask, or has attention of its own") from error
        raise _Refused(
            f"a small {type(model).__name__} does not run ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _tokens(model: nn.Module, count: int) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(3, min(vocabulary, 100), (1, count), generator=torch.Generator().manual_seed(1))


def _pack(model: nn.Module) -> tuple[SharedPrefixLayout, Tensor, Tensor, list[tuple[list[int], int]]]:
    """A pack of LENGTHS: layout, ids and positions (1, N), and each sequence's rows in it and how many are its own."""
    pairs, positions, sequences, row = [], [], [], 0
    for prefix, chosen, rejected in LENGTHS:
        start, tails = row, [(row + prefix, row + prefix + chosen)]
        positions += range(prefix + chosen)
        sequences.append((list(range(start, tails[0][1])), prefix + chosen))
        for length in rejected:
            first = tails[-1][1]
            tails.append((first, first + 1 + length))
            positions += range(prefix - 1, prefix + length)
            sequences.append(
                (list(range(start, start + prefix - 1)) + list(range(first, first + 1 + length)), 1 + length)
            )
        row = tails[-1][1]
        pairs.append(PairSpans(start, start + prefix, tuple(tails)))
    layout, ids = SharedPrefixLayout(tuple(pairs), row), _tokens(model, row)
    for pair in pairs:
        ids[:, [start for start, _ in pair.tails[1:]]] = ids[:, pair.prefix_end - 1, None].clone()
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


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What surrounds a caller is nothing to a proof, and the other way round."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _attention(PROBE, _gone, _gone):
            yield
    finally:
        torch.set_default_dtype(default)
