"""Decoder layers by tiles of rows: no temporary of a layer is as long as the sequence, but what attention itself needs.

    q, k, v = rope(norm'(W n(x)))         rows of x at a time     saves x
    a       = attention(q, k, v)          as the model has it     saves q, k, v, a, logsumexp
    y       = h + mlp(n(h)), h = x + W a  rows of x, a at a time  saves x, a

x, y (B, T, H), q (B, heads, T, D), a (B, T, heads, D). Both row-wise parts keep their inputs only: the backward runs each
tile's forward again and differentiates it, parameter gradients summed over tiles in float32. Memory: x, a, y, q, k, v and
their gradients at full length, the temporaries of one tile, 4 bytes per parameter of one part. Attention goes by groups
of kv heads already, in shared-prefix attention.

Under checkpointing the last part would run three times: forward, recomputation, tile by tile in the backward. It does
not, because x and a are saved by an identity BEFORE it, and it saves nothing itself: checkpointing stops recomputing
once it has all that was saved. The backward of that identity then does the work: what arrives there is the gradient of
y, passed on as it is. The projections to q, k and v do run three times: 3 % more products for an 8B Llama. Not covered,
and refused: families of models that are not in FAMILIES.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longpo_ops.kinds import check_whole

ROWS = 8192  # large enough for full matrix-product rates; an 8B model's MLP then takes about 1 GiB of temporaries


# --- families ---------------------------------------------------------------------------------------------------------


def _own_window(attention: nn.Module) -> dict:
    return {"sliding_window": attention.sliding_window}


# What each family's attention passes on beside q, k, v, mask, dropout and scale. Each is held equal to its own forward.
FAMILIES: dict[str, Callable[[nn.Module], dict]] = {
    "llama": lambda attention: {},
    "mistral": lambda attention: {"sliding_window": getattr(attention.config, "sliding_window", None)},
    "qwen2": _own_window,
    "qwen3": _own_window,
    "gemma": lambda attention: {},
    "gemma2": lambda attention: _own_window(attention) | {"softcap": attention.attn_logit_softcapping},
    "gemma3_text": _own_window,
}


def _head(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, t, H) to q, k, v (B, t, heads, D), normed and turned by their positions."""
    attention = layer.self_attn
    normed = layer.input_layernorm(x)
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (project(normed).unflatten(-1, (-1, attention.head_dim)) for project in projections)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return *rotate(q, k, cos, sin, unsqueeze_dim=2), v


def _tail(layer: nn.Module, x: Tensor, a: Tensor) -> tuple[Tensor]:
    """(B, t, H) and (B, t, heads * D) to the layer's output (B, t, H)."""
    h = layer.self_attn.o_proj(a)
    if not hasattr(layer, "pre_feedforward_layernorm"):
        h = x + h
        return (h + layer.mlp(layer.post_attention_layernorm(h)),)
    h = x + layer.post_attention_layernorm(h)  # Gemma 2 and 3 also norm what they add
    return (h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h))),)


def _modules(layer: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that _head and _tail call."""
    attention = layer.self_attn
    head = [layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj]
    head += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    tail = [m for m in (attention.o_proj, *layer.children()) if m not in (attention, layer.input_layernorm)]
    return head, tail


# --- a row-wise function, tile by tile --------------------------------------------------------------------------------


class RowWise:
    """A function of tensors (B, T, ...) that treats every row by itself, the parameters it reads, and how it was called.

    Inputs of batch size 1 beside others (cos and sin) are shared by the batch. Autocast is that of the forward; where
    a module drops out, so is the state of the random generators, from which the backward draws the same masks again.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], modules: list[nn.Module], rows: int):
        self.function, self.rows = function, rows
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.drops_out = any(d.training and d.p > 0 for m in modules for d in m.modules() if isinstance(d, nn.Dropout))
        self.state = None

    def _tiles(self, length: int) -> Iterator[slice]:
        for start in range(0, length, self.rows):
            yield slice(start, min(start + self.rows, length))

    def begin(self, x: Tensor) -> None:
        """Remembers what must be the same in the backward."""
        kind = x.device.type
        self.autocast = dict(
            device_type=kind, enabled=torch.is_autocast_enabled(kind), dtype=torch.get_autocast_dtype(kind)
        )
        if self.drops_out:
            self.state = torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if kind == "cuda" else None

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's results, (B, T, ...) each."""
        length, results = inputs[0].shape[1], None
        for tile in self._tiles(length):
            parts = self.function(*(x[:, tile] for x in inputs))
            if results is None:
                results = [p.new_empty(p.shape[0], length, *p.shape[2:]) for p in parts]
            for result, part in zip(results, parts, strict=True):
                result[:, tile] = part
        return tuple(results)

    def backward(
        self, inputs: tuple[Tensor, ...], needs: tuple[bool, ...], dresults: tuple[Tensor | None, ...]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients of those inputs that need one, and of the parameters."""
        dinputs = [torch.empty_like(x) if need else None for x, need in zip(inputs, needs, strict=True)]
        totals: list[Tensor | None] = [None] * len(self.parameters)
        with self._replayed(inputs[0].device):
            for tile in self._tiles(inputs[0].shape[1]):
                with torch.enable_grad(), torch.autocast(**self.autocast):
                    leaves = [x[:, tile].detach().requires_grad_(n) for x, n in zip(inputs, needs, strict=True)]
                    parts = self.function(*leaves)
                pairs = [
                    (p, d[:, tile]) for p, d in zip(parts, dresults, strict=True) if d is not None and p.requires_grad
                ]
                wanted = [leaf for leaf in leaves if leaf.requires_grad] + self.parameters
                results, upstream = zip(*pairs, strict=True)
                grads = iter(torch.autograd.grad(results, wanted, upstream, allow_unused=True))
                for dinput in filter(lambda d: d is not None, dinputs):
                    grad = next(grads)
                    dinput[:, tile] = 0 if grad is None else grad
                for i, grad in enumerate(grads):
                    if grad is not None:
                        totals[i] = _add(totals[i], grad)
                del leaves, parts, pairs, results, upstream, wanted, grads
        return dinputs, [t if t is None else t.to(_grad_dtype(p)) for t, p in zip(totals, self.parameters, strict=True)]

    @contextmanager
    def _replayed(self, device: torch.device) -> Iterator[None]:
        """Within it random numbers are those of the forward, afterwards those that were due."""
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=self.state is not None):
            if self.state is not None:
                host, cuda = self.state
                torch.set_rng_state(host)
                if cuda is not None:
                    torch.cuda.set_rng_state(cuda, device)
            yield


def _add(total: Tensor | None, grad: Tensor) -> Tensor:
    if total is None:
        return grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
    return total.add_(grad)


def _grad_dtype(p: Tensor) -> torch.dtype:
    """What autograd expects of a parameter's gradient: users may ask for float32 beside bfloat16 weights."""
    return (getattr(p, "grad_dtype", None) if p.is_leaf else None) or p.dtype


class _Head(torch.autograd.Function):
    """A row-wise function that saves its inputs."""

    @staticmethod
    def forward(ctx, part: RowWise, count: int, *inputs_and_parameters: Tensor):
        inputs = inputs_and_parameters[:count]
        part.begin(inputs[0])
        ctx.part, ctx.count = part, count
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return part.forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dresults):
        return None, None, *_gradients(ctx, dresults)


class _Before(torch.autograd.Function):
    """Stands before a row-wise function of one result shaped like its first input, and does that function's backward:
    what _After hands on as this result's gradient is the gradient of the function's result."""

    @staticmethod
    def forward(ctx, part: RowWise, count: int, *inputs_and_parameters: Tensor):
        inputs = inputs_and_parameters[:count]
        part.begin(inputs[0])
        ctx.part, ctx.count = part, count
        ctx.save_for_backward(*inputs)
        return inputs[0].view_as(inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return None, None, *_gradients(ctx, (dy,))


class _After(torch.autograd.Function):
    """The row-wise function itself: saves nothing."""

    @staticmethod
    def forward(ctx, anchor: Tensor, part: RowWise, *inputs: Tensor) -> Tensor:
        return part.forward(*inputs)[0]

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy, *[None] * (len(ctx.needs_input_grad) - 1)


def _gradients(ctx, dresults: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[2 : 2 + ctx.count]
    dinputs, dparameters = ctx.part.backward(inputs, needs, dresults)
    return [*dinputs, *dparameters]


# --- layers -----------------------------------------------------------------------------------------------------------


def _layer_forward(
    layer: nn.Module,
    own: Callable,
    options: Callable[[nn.Module], dict],
    rows: int,
    hidden_states: Tensor,
    attention_mask=None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    past_key_values=None,
    **kwargs,
) -> Tensor:
    """A decoder layer's forward, tiled; its own where a cache of keys is in use."""
    if past_key_values is not None:
        return own(
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )
    kwargs.pop("use_cache", None)
    head_modules, tail_modules = _modules(layer)
    part = RowWise(partial(_head, layer), head_modules, rows)
    q, k, v = _Head.apply(part, 3, hidden_states, *position_embeddings, *part.parameters)
    a = _attend(layer.self_attn, options, q, k, v, attention_mask, kwargs)
    del q, k, v  # outside of checkpointing's recomputation nothing else holds them
    part = RowWise(partial(_tail, layer), tail_modules, rows)
    anchor = _Before.apply(part, 2, hidden_states, a, *part.parameters)
    return _After.apply(anchor, part, hidden_states.detach(), a.detach())


def _attend(attention: nn.Module, options, q: Tensor, k: Tensor, v: Tensor, mask, kwargs: dict) -> Tensor:
    """q, k, v (B, T, heads, D) to (B, T, heads * D), by the attention function that the model's config names."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[type(attention).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    out, _ = attend(
        attention,
        *(x.transpose(1, 2) for x in (q, k, v)),
        mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        **options(attention),
        **kwargs,
    )
    return out.flatten(2)


def _norm_forward(norm: nn.Module, own: Callable, rows: int, x: Tensor) -> Tensor:
    part = RowWise(lambda x: (own(x),), [norm], rows)
    return _Head.apply(part, 1, x, *part.parameters)[0]


class TilingHandle:
    """Undoes tile_layers: by remove(), or at the end of a with block."""

    def __init__(self, before: dict[nn.Module, Callable | None]):
        self._before = before

    def remove(self) -> None:
        """Gives every module its former forward back."""
        for module, forward in self._before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self._before = {}

    def __enter__(self) -> TilingHandle:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()


def tile_layers(model: nn.Module, rows: int = ROWS) -> TilingHandle:
    """Makes the decoder layers of a transformers causal LM (or a PEFT model of one), and its last norm, work by tiles of
    `rows` rows; the returned handle undoes it. Results are the model's own up to floating-point order.

    Submodules are called as they are, so adapters, hooks and compiled submodules on them stay in force; those on the
    attention module as a whole do not, as it is not called. With a cache of keys layers use their own forward.

    Raises ValueError for a family that has not been checked, a model that is tiled already, and rows below 1.
    """
    causal = _causal(model)
    config = getattr(causal, "config", None)
    kind = getattr(config, "model_type", type(causal).__name__)
    if kind not in FAMILIES:
        raise ValueError(
            f"model: tiling is checked for {', '.join(FAMILIES)}, got a model of type {kind!r}: leave its layers untiled"
        )
    rows = check_whole("rows", rows, 1, "a whole number of rows per tile, at least 1")
    if is_tiled(model):
        raise ValueError("model: its layers are tiled already: remove() the handle first")
    layers = _layers(causal)
    body = getattr(causal, causal.base_model_prefix, causal)
    before = {module: module.__dict__.get("forward") for module in (*layers, body.norm)}
    for layer in layers:
        layer.forward = partial(_layer_forward, layer, layer.forward, FAMILIES[kind], rows)
    body.norm.forward = partial(_norm_forward, body.norm, body.norm.forward, rows)
    return TilingHandle(before)


def is_tiled(model: nn.Module) -> bool:
    """Whether tile_layers is in force."""
    forwards = [layer.__dict__.get("forward") for layer in _layers(_causal(model))]
    return any(isinstance(forward, partial) and forward.func is _layer_forward for forward in forwards)


def _causal(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _layers(causal: nn.Module) -> list[nn.Module]:
    return [m for m in causal.modules() if hasattr(m, "self_attn") and hasattr(m, "mlp")]
