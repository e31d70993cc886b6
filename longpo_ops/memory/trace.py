"""What one layer of a model takes, counted on the meta device: tensors there have shapes and no bytes, so that a layer of
524,288 rows runs through forward, recomputation and backward in a second, on any machine.

    embedding -> layer (checkpointed) -> last norm -> loss stand-in -> backward of all of it

A Ledger sees every operation: storages that appear and go give the bytes alive, matrix products their floating-point
operations. Whatever the model's own code, or tile_layers, does is counted as it is. A stand-in takes the place of attention: it
allocates what shared-prefix attention does (Attention), as the scratch of its kernels cannot be seen from here. Where ranks
share a pack, the layer runs at the rows of one of them, the one with the most heads: ulysses.py's own code exchanges heads for
rows around attention, and a stand-in takes the place of its collective.

Tests: tests/memory/test_plan.py.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longpo_ops.attention import ulysses
from longpo_ops.attention.shared_prefix import GROUP
from longpo_ops.memory.mesh import heads_of
from longpo_ops.parallel import Shards

NAME = "longpo_ops_plan"
PRODUCTS = {"aten::mm": 1, "aten::addmm": 2, "aten::bmm": 1, "aten::baddbmm": 2}  # where the left factor's columns are


class Ledger(TorchDispatchMode):
    """Bytes of storages alive, their peak since mark(), and operations of matrix products since mark()."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._seen = {x.untyped_storage()._cdata for x in known}  # counted elsewhere: weights

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name().partition(".")[0]
        if name in PRODUCTS:
            self.flops += 2 * out.numel() * args[PRODUCTS[name] - 1].shape[-1]
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes

    def mark(self) -> tuple[int, int, int]:
        """-> bytes alive, their peak and the operations since the last mark."""
        seen = self.live, self.peak, self.flops
        self.peak, self.flops = self.live, 0
        return seen


class Attention(torch.autograd.Function):
    """Allocates what shared-prefix attention does and computes nothing: q (B, H, T, D), k, v (B, Hk, T, D).

    Forward: out and logsumexp, and the output of one group of heads (GROUP). Backward: all gradients, and for one group
    its own dq, dk, dv; in 16 bits also its dq in float32 and dk, dv for every query head, as flash kernels have them.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, rows, size = q.shape
        out = q.new_empty(batch, rows, heads, size)
        lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        q.new_empty(batch, Attention.group(q, k), rows, size)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        q, k, v, _, _ = ctx.saved_tensors
        batch, heads, rows, size = q.shape
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        group = Attention.group(q, k)
        scratch = [q.new_empty(batch, group + 2 * group * k.shape[1] // heads, rows, size)]
        if q.dtype.itemsize < 4:
            scratch.append(q.new_empty(batch, group, rows, size, dtype=torch.float32))
            scratch.append(q.new_empty(batch, 2 * group if heads > k.shape[1] else 0, rows, size))
        return grads

    @staticmethod
    def group(q: Tensor, k: Tensor) -> int:
        """Query heads of one kernel call."""
        batch, heads, rows, size = q.shape
        per_key = heads // k.shape[1]
        return min(heads, per_key * max(1, GROUP // (batch * per_key * rows * size)))


def _attend(module, q, k, v, mask, shards: Shards | None = None, **_):
    if shards is None:
        return Attention.apply(q, k, v), None
    heads, kv_heads = q.shape[1], k.shape[1]
    out = Attention.apply(*ulysses.to_heads(q, k, v, shards))
    return ulysses.to_rows(out, heads, kv_heads, shards), None


class _Rank(NamedTuple):
    """What Shards asks of a process group, without processes."""

    index: int
    ranks: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.ranks


class _Exchanges:
    """In place of ulysses.py's collective: allocates what comes, and counts."""

    count = 0

    def __call__(self, sent: Tensor, sizes: list[int], sizes_to_come: list[int], shards: Shards) -> Tensor:
        self.count += 1
        return sent.new_empty(sum(sizes_to_come))


class _Mark(torch.autograd.Function):
    """The identity; calls `then` when its gradient has arrived."""

    @staticmethod
    def forward(ctx, x: Tensor, then) -> Tensor:
        ctx.then = then
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.then()
        return grad, None


class _Loss(torch.autograd.Function):
    """The hidden gradient exists before backward begins, as the fused losses compute it with the loss."""

    @staticmethod
    def forward(ctx, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(hidden))
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0]


class Trace(NamedTuple):
    """Bytes beside weights, at the length of the trace, and operations of matrix products of a layer.

    Peaks leave out `positions` (token ids, cos and sin, alive throughout) and one input of the layer.
    """

    input: int  # what a checkpoint of the layer holds
    attention: int  # its attention output and logsumexp
    positions: int
    embedding: int  # peak
    forward: int  # peak; the layer's output is part of it
    norm: int  # peak
    held: int  # alive while the loss is computed: last hidden state, its gradient, what the last norm saved
    norm_backward: int  # peak
    backward: int  # peak, gradients of this layer's weights included
    embedding_backward: int  # peak, gradient of the embedding included
    forward_flops: int
    backward_flops: int  # recomputation included


def read_config(model):
    """A transformers config of a name carried here, a folder or file, a hub name, or a config itself; of a model with
    several parts its text part's, which is what is trained."""
    import json
    from pathlib import Path

    from transformers import AutoConfig, PretrainedConfig

    from longpo_ops import pretrained

    if isinstance(model, PretrainedConfig):
        return pretrained.text_config(model)
    carried = Path(__file__).parent / "models" / f"{str(model).lower()}.json"
    if carried.is_file():
        return AutoConfig.for_model(**json.loads(carried.read_text("utf-8")))
    try:
        return pretrained.read_config(str(model))
    except ValueError as error:
        names = ", ".join(carried_models())
        raise ValueError(
            f"model {model!r}: neither one of {names} nor a model that transformers finds ({error})"
        ) from None


def carried_models() -> list[str]:
    """Names of the model shapes that come with the library."""
    from pathlib import Path

    return sorted(path.stem for path in (Path(__file__).parent / "models").glob("*.json"))


def build(config, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model on the meta device, all layers or the first few. Raises ValueError for what is no causal LM, and for one whose
    attention, or layers, the planner cannot reach."""
    import copy

    from transformers import AttentionInterface

    from longpo_ops.pretrained import BrokenModel, build_empty

    AttentionInterface.register(NAME, _attend)
    config = copy.deepcopy(config) if layers is None else first_layers(config, layers)
    try:
        model = build_empty(config, dtype=dtype, attn_implementation=NAME)
    except BrokenModel as error:
        if NAME not in str(error.__cause__):
            raise
        raise ValueError(
            f"model {config.name_or_path!r}: a model of type {config.model_type!r} cannot be planned: it takes no "
            "attention but those of its own code, and the planner puts one of its own in place"
        ) from error
    body = getattr(model, model.base_model_prefix)
    if not hasattr(body, "layers"):
        raise ValueError(
            f"model {config.name_or_path!r}: {type(model).__name__} cannot be planned: the planner looks for the layers in "
            f"`layers` of the body, and a {type(body).__name__} has them elsewhere"
        )
    return model


def first_layers(config, layers: int):
    """A copy of a config that has its first layers only."""
    import copy

    config = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = layers
    return config


def trace(
    config,
    rows: int,
    tile_rows: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    gradients: str = "new",
    float32_gradients: bool = False,
    ranks: int = 1,
) -> Trace:
    """One layer of `config` at `rows` rows, those of one of so many ranks that share a pack.

    gradients: "new" appear in this backward, "held" were there before (accumulation), "freed" go as soon as they are there.
    Raises ValueError for heads that the ranks cannot share, and for a model that cannot run without data (a RoPE that reads
    its positions, say).
    """
    config = first_layers(config, 1)  # however many there are, this one is traced
    key = config.to_json_string(use_diff=False)
    return _trace(_Config(key, config), rows, tile_rows, dtype, gradients, float32_gradients, ranks)


class _Config(NamedTuple):
    """A config that hashes by what it says."""

    key: str
    config: object

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return self.key == other.key


@functools.lru_cache(maxsize=256)
def _trace(config: _Config, rows: int, tile_rows, dtype, gradients: str, float32_gradients: bool, ranks: int) -> Trace:
    heads = heads_of(config.config, ranks)
    shared = {} if ranks == 1 else {"shards": Shards(ranks * rows, _Rank(heads.busiest, ranks))}
    model = build(config.config, 1, dtype)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    body = getattr(model, model.base_model_prefix)
    (layer,) = body.layers
    known = [*model.parameters(), *model.buffers()]
    for p in body.parameters():
        if float32_gradients and p.dtype.itemsize < 4:
            p.grad_dtype = torch.float32
        if gradients == "held":
            p.grad = torch.empty_like(p, dtype=torch.float32 if float32_gradients else None)
            known.append(p.grad)
        elif gradients == "freed":
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ledger, exchanges = Ledger(known), _Exchanges()
    marks: dict[str, tuple[int, int, int]] = {}

    def mark(name: str) -> None:
        marks[name] = ledger.mark()

    def before(_, args, kwargs):
        if "embedding" in marks:  # the recomputation calls the layer and its hooks again
            return None
        mark("embedding")
        return (_Mark.apply(args[0], lambda: mark("backward")), *args[1:]), kwargs

    def after(_, __, out):
        if "forward" in marks:
            return None
        mark("forward")
        return _Mark.apply(out, lambda: mark("norm_backward"))

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)
    with _tiled(model, tile_rows), mock.patch.object(ulysses, "_all_to_all", exchanges), ledger:
        ids = torch.empty(1, rows, dtype=torch.int64, device="meta")
        try:
            loss = _Loss.apply(body(input_ids=ids, use_cache=False, **shared).last_hidden_state)
        except (NotImplementedError, RuntimeError) as error:
            name = config.config.name_or_path
            raise ValueError(
                f"model {name!r}: {type(model).__name__} cannot be planned: its forward needs data ({error})"
            ) from error
        if shared and not exchanges.count:
            raise ValueError(
                f"{type(model).__name__} does not pass shards on to its attention: expected sequence_parallel=1"
            )
        mark("norm")
        loss.backward()
        mark("embedding_backward")
    del loss
    size = rows * config.config.hidden_size * dtype.itemsize
    positions = marks["embedding"][0] - size
    peaks = {name: peak - positions - size for name, (_, peak, _) in marks.items()}
    return Trace(
        input=size,
        attention=ranks * rows * max(heads.query) * (layer.self_attn.head_dim * dtype.itemsize + 4),
        positions=positions,
        held=marks["norm"][0] - positions - size,
        forward_flops=marks["forward"][2],
        backward_flops=marks["backward"][2],
        **peaks,
    )


@contextmanager
def _tiled(model: nn.Module, rows: int | None) -> Iterator[None]:
    """The layers tiled; autocast, which the meta device does not know, is off there."""
    if rows is None:
        with nullcontext():
            yield
        return
    from longpo_ops.memory import tiling

    def begin(part, x: Tensor) -> None:
        part.autocast = dict(device_type="cpu", enabled=False)

    with mock.patch.object(tiling.RowWise, "begin", begin), tiling.tile_layers(model, rows):
        yield
