"""A small model that stands for a real one of its class and config: what all proofs are made of.

    @remembered      a proof runs in a surrounding of its own, once for a class and what a config says
    pick_layers      which layers show all kinds that the real model has, and which of them each real layer is like
    build            the model of a small config (small.py); nothing of it takes memory on the meta device
    randomise        every number that is trained or stored: as they are made, norms and biases would hide what is left out
    shake            a rounding of every parameter: models that multiply roundings are judged by what they make of it
    with_gradients   results, and gradients for random upstream gradients
    difference       how far they are from the expected ones, as a share of the largest

Three proofs are made of it, and differ where what they show does:

    attention/proof.py     one layer of each kind, in the float32 that our attention computes in
    memory/tile_proof.py   two of each kind, as one may leave something for the next; float64, where only sums change order
    text_part.py           the whole depth, as a wrapper tells its layers by number what else they read; float32, as it loads
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from .loading import quiet
from .small import DEPTH, small_config

MOST = 64  # layers of a small model, where the kinds of layers do not come in fewer
LEAST = 1e-3  # of the largest number of all: what is smaller throughout is measured by it
NOT_DATA = {  # of a config, to a proof
    *("transformers_version", "_name_or_path", "name_or_path", "dtype", "use_cache", "architectures", "vocab_size"),
}
NUMBERS = re.compile("(.*_)?(layer|block)_(idx|id|index)|training")  # what a module calls numbers of layers; its mode


class Refused(Exception):
    """What stands against a model; the message says it."""


# --- surroundings -----------------------------------------------------------------------------------------------------


def remembered(prove: Callable[[type[nn.Module], Any], Any]) -> Callable[[type[nn.Module], Any], Any]:
    """prove(model_class, config), once for a class and a config's content in the life of the process.

    It runs in a thread of its own, where no mode of torch is in force that the caller may have set (autocast, inference,
    devices, functions), in float32 and with random numbers from a seed; what it sets is nothing to the caller.
    """

    @functools.wraps(prove)
    def remembering(model_class: type[nn.Module], config: Any) -> Any:
        described = {name: value for name, value in config.to_dict().items() if name not in NOT_DATA}
        key = model_class, json.dumps(described, sort_keys=True, default=str)
        if key not in remembering.known:
            with ThreadPoolExecutor(1) as thread:
                remembering.known[key] = thread.submit(_undisturbed, prove, model_class, config).result()
        return remembering.known[key]

    remembering.known = {}
    return remembering


def _undisturbed(prove: Callable, model_class: type[nn.Module], config: Any) -> Any:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with quiet(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would set those of GPUs
            return prove(model_class, config)
    finally:
        torch.set_default_dtype(default)


# --- a small model ----------------------------------------------------------------------------------------------------


def build(
    model_class: type[nn.Module],
    small: Any,
    attention: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """In eval mode. attention: the implementation's name. Raises Refused where the model's own code fails."""
    name, options = model_class.__name__, {"attn_implementation": attention} if attention else {}
    try:
        with torch.device(device):
            if not hasattr(model_class, "_from_config"):
                return model_class(small).to(dtype).eval()
            small._experts_implementation = "eager"  # grouped products of experts know no float64
            return model_class._from_config(small, dtype=torch.float32, **options).to(dtype).eval()
    except Exception as error:  # of any kind: of code that was never tried
        if attention and attention in str(error):
            raise Refused(f"{name} has attention of its own, not one of transformers' functions") from error
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise Refused(f"a small {name} of its config cannot be built ({why})") from error


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Every parameter, and every buffer that is stored with them and constant as it is made; what others hold is part of the
    equations (decays, angles)."""
    generator, stored = torch.Generator().manual_seed(0), model.state_dict().keys()
    buffers = [(n, b) for n, b in model.named_buffers() if n in stored and b.numel() and bool(b.min() == b.max())]
    for name, x in [*model.named_parameters(), *buffers]:
        if x.is_floating_point():
            wide = x.shape[-1] ** -0.5 if x.ndim > 1 else 0.3
            drawn = torch.randn(x.shape, generator=generator, dtype=torch.float32)
            x.copy_(drawn * wide + (x.ndim == 1 and name.endswith("weight")))


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Moves every parameter by a rounding, up or down: what comes of it a model makes of any rounding."""
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.mul_(1 + torch.finfo(p.dtype).eps * (torch.randint(2, p.shape, generator=generator) * 2 - 1))


# --- its layers -------------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers: those of its decoder that transformers checkpoints one by one; of a model that has none such the one
    list of modules that is as long as its config says, or nothing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for modules in (_direct(decoder), model.modules()):
        if layers := [m for m in modules if isinstance(m, GradientCheckpointingLayer)]:
            return layers
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = next((n for name in DEPTH if isinstance(n := getattr(config, name, None), int)), None)
    found = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and len(m) == depth]
    return found[0] if len(found) == 1 else []


def _direct(decoder: nn.Module) -> list[nn.Module]:
    """Entries of its own lists: other parts that it may hold (a vision tower) have theirs."""
    return [m for each in decoder.children() if isinstance(each, nn.ModuleList) for m in each]


def kinds_of(model: nn.Module) -> list[tuple]:
    """Of every layer what tells it from others: its modules' classes, settings and shapes, and what the config lists for it.

    To be asked before a model runs, which may change its settings.
    """
    layers, listed = layers_of(model), []
    for value in model.config.get_text_config().to_dict().values():
        if isinstance(value, list | tuple) and len(value) == len(layers) and [*value] != [*range(len(value))]:
            listed.append(value)
    return [(_structure(layer), tuple(str(value[i]) for value in listed)) for i, layer in enumerate(layers)]


def _structure(layer: nn.Module) -> tuple:
    return tuple(
        (name, type(m), _settings(m), tuple((n, tuple(p.shape)) for n, p in m.named_parameters(recurse=False)))
        for name, m in layer.named_modules()
    )


def _settings(module: nn.Module) -> tuple:
    """Flags, names and whole numbers; of what else there is, its type."""
    told = {name: value for name, value in vars(module).items() if name[0] != "_" and not NUMBERS.fullmatch(name)}
    plain = {name: v if isinstance(v, bool | int | str | None) else type(v).__name__ for name, v in told.items()}
    return tuple(sorted(plain.items()))


def pick_layers(
    model_class: type[nn.Module],
    config: Any,
    attention: str | None = None,
    each: int = 1,
    told: Sequence[Any] | None = None,
) -> tuple[list[int] | None, list[int]]:
    """-> the layers of a small model that has `each` of each kind (fewer where there are fewer), and for every real layer the
    place among them of the first of its kind. told: what else tells every layer from others.

    Where a config cannot be cut to those alone they are the first layers that have them all, or None, all of them. Raises
    Refused where those are too many, and for a model that has no layers.
    """
    kinds = kinds_of(build(model_class, small_config(config), attention, "meta"))
    if not kinds:
        raise Refused(f"{model_class.__name__} has no layers that transformers checkpoints, nor one list of its depth")
    kinds = [(*kind, extra) for kind, extra in zip(kinds, told or [None] * len(kinds), strict=True)]
    picked, had, why = [], Counter(), ""
    for i, kind in enumerate(kinds):
        had[kind] += 1
        picked += [i] if had[kind] <= each else []
    for tried in (picked, list(range(max(picked) + 1)), None):
        real = list(range(len(kinds))) if tried is None else tried
        if len(real) > MOST:
            continue
        try:
            came = kinds_of(build(model_class, small_config(config, layers=tried), attention, "meta"))
        except (Refused, IndexError) as refused:
            why = f": {refused}"
            continue
        if [structure for structure, _ in came] == [structure for structure, *_ in (kinds[i] for i in real)]:
            place = {kinds[i]: place for place, i in reversed([*enumerate(real)])}
            return tried, [place[kind] for kind in kinds]
    raise Refused(f"its {len(kinds)} layers, of {len(had)} kinds, do not come in a small model{why}")


# --- comparison -------------------------------------------------------------------------------------------------------


def with_gradients(results: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Results, and the gradients of what is wanted, None where there is none, for random upstream gradients."""
    generator = torch.Generator().manual_seed(1)
    trained = [x for x in results.values() if x.requires_grad]
    upstream = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in trained]
    wanted = {name: x for name, x in wanted.items() if x.requires_grad}
    found = [None] * len(wanted)
    if trained and wanted:
        found = torch.autograd.grad(trained, list(wanted.values()), upstream, allow_unused=True)
    gradients = {f"gradients of {name}": gradient for name, gradient in zip(wanted, found, strict=True)}
    return {name: x.detach() for name, x in results.items()} | gradients


def difference(ours: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> tuple[str, float]:
    """-> the name of what is furthest from what is expected, and how far, as a share of its largest number (of LEAST of the
    largest of all, where that is more). None are zeros; infinity for a name or a shape that is not there, and for numbers that
    are not finite on either side."""
    largest = max((float(x.abs().max()) for x in expected.values() if x is not None and x.numel()), default=0.0)
    off = {}
    for name in {**expected, **ours}:
        there = name in ours and name in expected
        off[name] = _off(ours[name], expected[name], LEAST * largest) if there else float("inf")
    worst = max(off, key=off.get, default="")
    return worst, off.get(worst, 0.0)


def _off(ours: Tensor | None, expected: Tensor | None, least: float) -> float:
    ours, expected = (
        torch.zeros_like(y) if x is None and y is not None else x for x, y in ((ours, expected), (expected, ours))
    )
    if ours is None or not (ours.numel() or expected.numel()):
        return 0.0
    if ours.shape != expected.shape or not (ours.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return float((ours - expected).abs().max()) / max(float(expected.abs().max()), least, 1e-30)
