"""What a transformers model does to its head's products, measured: two forwards of 24 tokens.

    logits = softcap * tanh(scale * z / softcap),   z = W h + b      (softcap None: scale * z)

The first forward gets its causality judged by h, and numbers of known sizes in the place of z: the smallest give the
scale, the largest the soft-cap, and all of them, in every column, must come out as the equation says. The second takes
the way that losses take, and its log-probs must be those of the first one's logits. Weights are not looked at: a soft-cap
of 30 is found in a model whose logits are all 0.1. Nothing of the model is changed, nor the state of random numbers.

What was measured holds while settings() stay as they are. Refused are models that put logits into float16, whose range the
sizes leave, and soft-caps that 2**60 neither saturates nor leaves as it is.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from .head_call import call_in_place_of_head, call_with_head
from .head_weight import HeadRefused
from .logprobs import linear_logprobs

TOKENS = 8  # of each of three sequences: twice the same, and one that differs from the middle on
PLAIN = bool, int, float, str, type(None)
OTHERWISE = "use PreferenceHead with its hidden states, or attach(model, check=False, softcap=..., scale=...)"


@dataclass(frozen=True)
class Probed:
    softcap: float | None
    scale: float
    ends_at_head: bool  # the hidden states that the body returns are those that the head reads

    @property
    def map(self) -> dict:
        return {"softcap": self.softcap, "scale": self.scale}


@_disable_dynamo  # as torch.compiler.disable, which imports Dynamo where it stands
@torch.no_grad()
def probe(causal: nn.Module, forward: Callable, merge_lora: bool) -> Probed:
    """Raises ValueError (HeadRefused) for a model whose log-probs are not those of the equation, or that is not causal.

    forward: the model's own. Other exceptions are the model's: it cannot run here, on tokens alone.
    """
    name, ids = type(causal).__name__, _tokens(causal)
    takes = inspect.signature(type(causal).forward).parameters.values()
    quiet = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in takes)
    kwargs = {"input_ids": ids} | ({"use_cache": False} if quiet else {})

    def measure(hidden: Tensor, plain: Callable):
        if hidden.shape[:2] != ids.shape:
            raise HeadRefused(f"model: the head of {name} reads {tuple(hidden.shape)}; expected (B, T, H). {OTHERWISE}")
        products = plain(hidden)
        z = products.double()
        z[2] = _sizes(z[2])
        torch.set_grad_enabled(True)  # z is a constant: logits with a gradient have it from the map
        seen.append((hidden, products, z))
        return z.clone()  # alone, as hooks on the head know it: what they make of it is part of the map

    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    with _undisturbed(causal), _output_of(causal.base_model) as body:
        _, outputs = call_in_place_of_head(causal, forward, measure, (), kwargs)
        hidden, products, z = seen[0]
        torch.set_grad_enabled(False)
        logits = getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape != z.shape:
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(outputs).__name__
            raise HeadRefused(f"model: {name} gives {came}; expected logits {tuple(z.shape)}. {OTHERWISE}")
        if logits.requires_grad:
            raise HeadRefused(
                f"model: {name} trains what it makes of its head's products; expected fixed numbers. {OTHERWISE}"
            )
        _check_causal(name, hidden)
        softcap, scale = _fit(name, z[2], logits[2])
        if not body and causal.base_model is not causal:  # its forward calls parts of its body, or another one
            causal.base_model(**kwargs)
        ends_at_head = len(body) == 1 and body[0].shape == hidden.shape and torch.equal(body[0], hidden)
        probed = Probed(softcap, scale, ends_at_head)
        ours = _logps(causal, forward, probed, merge_lora, ids, kwargs)
    theirs = logits[:2].double().log_softmax(-1).gather(-1, ids[:2, :, None])[..., 0]
    _check_equal(name, ours[:2], theirs, products[:2], hidden)
    return probed


def _logps(causal, forward, probed: Probed, merge_lora: bool, ids: Tensor, kwargs: dict) -> Tensor:
    """(3, T) log-probs of the tokens themselves, as a loss would have them."""

    def compute(hidden, head):
        return head(hidden.flatten(0, 1), ids.flatten(), loss=linear_logprobs, backend="torch").view(ids.shape)

    return call_with_head(causal, forward, compute, probed.map, merge_lora, (), kwargs)[0]


def settings(causal: nn.Module) -> list[tuple[Any, str, Any]]:
    """-> owner (what has that attribute or entry, or None), name, value of what tells the map of a model's logits, as far as
    plain values do: the kind of its head and the hooks on it, and every number, flag and name in its config and in its own
    attributes and those of the modules that it calls, dicts of them and one-element constants included. Not seen: other
    objects, and what lies deeper in the body."""
    lm_head = causal.get_output_embeddings()
    found: list = [(None, "head", type(lm_head).forward), (None, "hooks", tuple(lm_head._forward_hooks))]
    seen: set[int] = set()  # as modules share a config
    for module in (causal, *causal.children()):
        _collect(module, found, seen)
    return found


def _collect(owner: Any, found: list, seen: set[int]) -> None:
    if id(owner) in seen:
        return
    seen.add(id(owner))
    for name, value in (owner if isinstance(owner, dict) else vars(owner)).items():
        if isinstance(value, PLAIN):
            if name != "training":
                found.append((owner, name, value))
        elif isinstance(value, Tensor):
            if value.numel() == 1 and not value.requires_grad:
                found.append((None, name, (id(value), 0 if value.is_inference() else value._version)))
        elif isinstance(value, dict) or hasattr(value, "to_dict"):  # or a config
            _collect(value, found, seen)


def _tokens(causal: nn.Module) -> Tensor:
    """(3, T) int64, none of them special in the model's config."""
    config = causal.config
    size = config.get_text_config().vocab_size if hasattr(config, "get_text_config") else config.vocab_size
    usual = torch.tensor(sorted(set(range(size)) - set(_special(config.to_dict()))) or [0], device="cpu")
    drawn = usual[torch.randint(len(usual), (2, TOKENS), generator=torch.Generator().manual_seed(0), device="cpu")]
    rows = drawn[0].repeat(3, 1)
    rows[2, TOKENS // 2 :] = drawn[1, TOKENS // 2 :]
    tensors = (causal.get_input_embeddings().weight, *causal.parameters(), *causal.buffers())
    return rows.to(next((tensor.device for tensor in tensors if not tensor.is_meta), "cpu"))


def _special(config: dict) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _special(value)
        elif str(key).endswith(("token_id", "token_ids", "token_index")):
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))


def _sizes(rows: Tensor) -> Tensor:
    """Numbers of both signs from 2**-20 (first row) to 2**60 (last), of all sizes between, another in each column."""
    columns = torch.arange(rows.shape[1], device=rows.device)
    pattern = 2 ** (10 * (columns * 0.6180339887).frac()) * (1 - 2 * (columns % 2))
    return torch.logspace(-20, 50, len(rows), base=2, dtype=rows.dtype, device=rows.device)[:, None] * pattern


def _fit(name: str, z: Tensor, logits: Tensor) -> tuple[float | None, float]:
    """softcap and scale that turn z (T, V) into these logits."""
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps)
    logits, largest = logits.double(), int(z[-1].abs().argmax())
    scale = _rounded(logits[0, 0] / z[0, 0])
    top, straight = abs(float(logits[-1, largest])), abs(scale * float(z[-1, largest]))
    softcap = None if abs(top - straight) <= 1e-3 * straight else _rounded(top)
    ours = z * scale
    if softcap:
        ours = softcap * torch.tanh(ours / softcap)
    off = ((ours - logits).abs() / ours.abs()).max()
    if not off <= 16 * eps:
        raise HeadRefused(
            f"model: {name} makes more of its head's products than scale {scale:.6g} and soft-cap {softcap}: logits "
            f"differ by up to {100 * float(off):.3g} % from that. {OTHERWISE}"
        )
    return softcap, scale


def _rounded(value) -> float:
    return float(f"{float(value):.12g}")


def _check_causal(name: str, hidden: Tensor) -> None:
    """Tokens of the second half must not reach the first half's hidden states."""
    if not hidden.isfinite().all():
        raise HeadRefused(
            f"model: hidden states of {name} are NaN or infinite on a few tokens; look at its weights and dtype"
        )
    first = hidden[:, : TOKENS // 2].float()
    noise, effect = ((first[0] - other).abs().max() for other in (first[1], first[2]))
    rounding = max(4 * torch.finfo(hidden.dtype).eps, 2.0**-16)  # linear attention by chunks sums in another order
    if not effect <= 4 * noise + rounding * first.abs().max():
        raise HeadRefused(
            f"model: {name} is not causal: other tokens later on change hidden states before them by {float(effect):.3g}. "
            "Masked and encoder models have no log-probs of a text; expected a causal LM (is_decoder=True, where its "
            "config has that; attach(model, check=False, softcap=..., scale=...) takes it as it is)"
        )


def _check_equal(name: str, ours: Tensor, theirs: Tensor, products: Tensor, hidden: Tensor) -> None:
    """Within the rounding of products in the coarsest type that took part, or of TF32."""
    eps = max(torch.finfo(t.dtype).eps for t in (products, hidden))
    off, allowed = (ours - theirs).abs().max(), 8 * max(eps, 2.0**-11) * products.double().abs().max() + 1e-5
    if not off <= allowed:
        raise HeadRefused(
            f"model: log-probs of {name} by its head's weight differ from its own by up to {float(off):.3g} (rounding "
            f"allows {float(allowed):.2g}); expected a linear head. {OTHERWISE}"
        )


@contextlib.contextmanager
def _undisturbed(causal: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode and the state of random numbers are put back."""
    modes = {module: module.training for module in causal.modules()}
    devices = {p.device.index for p in causal.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            for module in modes:
                module.training = False
            yield
        finally:
            for module, training in modes.items():
                module.training = training


@contextlib.contextmanager
def _output_of(body: nn.Module) -> Iterator[list[Tensor]]:
    """The first tensor that the body returns, of each call."""
    seen: list[Tensor] = []
    hook = body.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        hook.remove()
