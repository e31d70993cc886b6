"""What one layer of a model takes, counted on the meta device: tensors there have shapes and no bytes, so that a layer of
524,288 rows runs through forward, recomputation and backward in a second, on any machine.

    embedding -> layer (checkpointed) -> last norm -> loss stand-in -> backward of all of it

A layer of each kind (structure.py) is counted. A Ledger sees every operation: storages that appear and go give the bytes alive,
matrix products their floating-point operations. Whatever the model's own code, or tile_layers, does is counted as it is.
Experts run as transformers runs them on a GPU, in grouped products over rows x experts of a token: what they take does not
depend on where a row is routed. A stand-in takes the place of attention (stand_in.py), as the scratch of its kernels cannot be
seen from here. Where ranks share a pack, the layer runs at the rows of one of them, the one with the most heads: ulysses.py
itself exchanges heads for rows around attention, and a stand-in takes the place of its collective.

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
from longpo_ops.memory import stand_in
from longpo_ops.memory.adapters import Adapters
from longpo_ops.memory.mesh import heads_of
from longpo_ops.memory.structure import BY_HAND, Config, one_layer
from longpo_ops.parallel import Shards

PRODUCTS = {"aten::mm": 1, "aten::addmm": 2, "aten::bmm": 1, "aten::baddbmm": 2}  # where the left factor's columns are
AUTOCAST = torch.autocast
GROUPED = "aten::_grouped_mm"


class Ledger(TorchDispatchMode):
    """Bytes of storages alive, their peak since mark(), and operations of matrix products since mark()."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._seen = {x.untyped_storage()._cdata for x in known}  # counted elsewhere: weights

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        out = _grouped(*args[:3]) if name == GROUPED else function(*args, **(kwargs or {}))
        if name in PRODUCTS:
            self.flops += 2 * out.numel() * args[PRODUCTS[name] - 1].shape[-1]
        elif name == GROUPED:  # each row by its own expert, or each expert's rows by each other
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
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


def _grouped(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """What a grouped product gives, in every dtype: on the meta device torch knows bfloat16 alone. ends (E,).

    a (S, in), b (E, in, out) -> (S, out);    a (in, S), b (S, out) -> (E, in, out)
    """
    size = (a.shape[0], b.shape[-1])
    return a.new_empty(size if b.ndim == 3 else (ends.shape[0], *size))


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


def _autocast(device_type: str, *more, **options):
    """torch's, which knows no meta device; nothing is cast there."""
    return nullcontext() if device_type == "meta" else AUTOCAST(device_type, *more, **options)


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
    pair_flops: int  # of its attention's forward, for each pair of a query and a key
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


def trace(
    config,
    rows: int,
    tile_rows: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    gradients: str = "new",
    float32_gradients: bool = False,
    ranks: int = 1,
    layer: int = 0,
    adapters: Adapters | None = None,
) -> Trace:
    """A layer of `config` at `rows` rows, those of one of so many ranks that share a pack.

    gradients: "new" appear in this backward, "held" were there before (accumulation), "freed" go as soon as they are there.
    Raises ValueError for heads that the ranks cannot share, and for a model that cannot run without data (a RoPE that reads
    its positions, say).
    """
    return _trace(Config.of(config), rows, tile_rows, dtype, gradients, float32_gradients, ranks, layer, adapters)


@functools.lru_cache(maxsize=256)
def _trace(
    config: Config,
    rows: int,
    tile_rows: int | None,
    dtype: torch.dtype,
    gradients: str,
    float32_gradients: bool,
    ranks: int,
    index: int,
    adapters: Adapters | None,
) -> Trace:
    heads = heads_of(config.config, ranks)
    shared = {} if ranks == 1 else {"shards": Shards(ranks * rows, _Rank(heads.busiest, ranks))}
    model, body, layer = one_layer(config.config, index, dtype, adapters)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    known = [*model.parameters(), *model.buffers()]
    for p in filter(lambda p: p.requires_grad, body.parameters()):
        if float32_gradients and p.dtype.itemsize < 4:
            p.grad_dtype = torch.float32
        if gradients == "held":
            p.grad = torch.empty_like(p, dtype=torch.float32 if float32_gradients else None)
            known.append(p.grad)
        elif gradients == "freed":
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ledger, exchanges = Ledger(known), _Exchanges()
    marks: dict[str, tuple[int, int, int]] = {}
    notes: list[tuple[int, int]] = []  # of attention: in forward, and again in recomputation

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
    patches = (
        mock.patch.object(ulysses, "_all_to_all", exchanges),
        mock.patch.object(stand_in, "note", lambda *told: notes.append(told)),
        mock.patch.object(torch, "autocast", _autocast),
    )
    with _tiled(model, tile_rows), patches[0], patches[1], patches[2], ledger:
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
        if not notes:
            raise ValueError(
                f"model {config.config.name_or_path!r}: {type(model).__name__} cannot be planned: layer {index} asks for no "
                f"attention, and the planner does not know what it computes instead; {BY_HAND}"
            )
        mark("norm")
        kept, pair_flops = map(sum, zip(*notes, strict=True))
        loss.backward()
        mark("embedding_backward")
    del loss
    size = rows * config.config.hidden_size * dtype.itemsize
    positions = marks["embedding"][0] - size
    peaks = {name: peak - positions - size for name, (_, peak, _) in marks.items()}
    return Trace(
        input=size,
        attention=kept,
        pair_flops=pair_flops,
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
