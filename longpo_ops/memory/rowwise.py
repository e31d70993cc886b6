"""A row-wise function of long tensors, computed and differentiated tile by tile of their rows.

    results = f(inputs)      inputs, results (B, T, ...); row t of the results depends on row t of the inputs alone

forward runs f on `rows` rows at a time and keeps nothing. backward runs each tile's f again, with gradients, and sums
parameter gradients over tiles in float32. Memory: inputs, results and their gradients at full length, the temporaries of one
tile, 4 bytes per parameter.

Under checkpointing a function that ends a layer (ends=True) does not run a third time: its inputs are saved by _Before, in
front of it, and itself (_After) saves nothing, so that checkpointing has all that was saved, and stops, before it comes to run.
The backward of _After hands its results' gradients over to _Before, which does the work.

Tests: tests/memory/test_tiling.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RowWise:
    """A function of tensors (B, T, ...) that treats every row by itself, the parameters it reads, and how it was called.

    Inputs of batch size 1 beside others (cos and sin) are shared by the batch. Autocast is that of the forward; where
    `random`, so is the state of the random generators, from which the backward draws the same numbers again.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], parameters: list[Tensor], rows: int, random: bool):
        self.function, self.rows, self.random = function, rows, random
        self.parameters = [p for p in parameters if p.requires_grad]
        self.state = None
        self.dresults: tuple[Tensor | None, ...] = ()  # on their way from _After to _Before

    def __call__(self, *inputs: Tensor, ends: bool) -> tuple[Tensor, ...]:
        """The function's results. ends: nothing that saves tensors comes after it, see above."""
        if not ends:
            return _Whole.apply(self, len(inputs), *inputs, *self.parameters)
        anchor = _Before.apply(self, len(inputs), *inputs, *self.parameters)
        return _After.apply(anchor, self, *(x.detach() for x in inputs))

    def _tiles(self, length: int) -> Iterator[slice]:
        for start in range(0, length, self.rows):
            yield slice(start, min(start + self.rows, length))

    def begin(self, x: Tensor) -> None:
        """Remembers what must be the same in the backward."""
        kind = x.device.type
        self.autocast = dict(
            device_type=kind, enabled=torch.is_autocast_enabled(kind), dtype=torch.get_autocast_dtype(kind)
        )
        if self.random:
            self.state = torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if kind == "cuda" else None

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's results, (B, T, ...) each."""
        length, results = inputs[0].shape[1], None
        for tile in self._tiles(length):
            parts = self.function(*(x[:, tile].contiguous() for x in inputs))  # no copy of one sequence
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
                    tiles = (x[:, tile].contiguous().detach() for x in inputs)
                    leaves = [x.requires_grad_(n) for x, n in zip(tiles, needs, strict=True)]
                    parts = self.function(*leaves)
                pairs = [
                    (p, d[:, tile]) for p, d in zip(parts, dresults, strict=True) if d is not None and p.requires_grad
                ]
                wanted = [leaf for leaf in leaves if leaf.requires_grad] + self.parameters
                results, upstream = zip(*pairs, strict=True) if pairs else ((), ())
                given = (
                    torch.autograd.grad(results, wanted, upstream, allow_unused=True) if pairs else [None] * len(wanted)
                )
                grads = iter(given)
                for dinput in filter(lambda d: d is not None, dinputs):
                    grad = next(grads)
                    dinput[:, tile] = 0 if grad is None else grad
                for i, grad in enumerate(grads):
                    if grad is not None:
                        totals[i] = _add(totals[i], grad)
                del leaves, parts, pairs, results, upstream, wanted, given, grads
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


class _Whole(torch.autograd.Function):
    """The row-wise function; saves its inputs."""

    @staticmethod
    def forward(ctx, part: RowWise, count: int, *inputs_and_parameters: Tensor):
        _save(ctx, part, inputs_and_parameters[:count])
        ctx.set_materialize_grads(False)
        return part.forward(*inputs_and_parameters[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx, *dresults):
        return _gradients(ctx, dresults)


class _Before(torch.autograd.Function):
    """Stands before the row-wise function, saves its inputs and does its backward. -> a number that _After hangs on."""

    @staticmethod
    def forward(ctx, part: RowWise, count: int, *inputs_and_parameters: Tensor):
        _save(ctx, part, inputs_and_parameters[:count])
        return inputs_and_parameters[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        dresults, ctx.part.dresults = ctx.part.dresults, ()
        return _gradients(ctx, dresults)


class _After(torch.autograd.Function):
    """The row-wise function itself: saves nothing."""

    @staticmethod
    def forward(ctx, anchor: Tensor, part: RowWise, *inputs: Tensor):
        ctx.part, ctx.anchor = part, (anchor.dtype, anchor.device)
        ctx.set_materialize_grads(False)
        return part.forward(*inputs)

    @staticmethod
    def backward(ctx, *dresults):
        ctx.part.dresults = dresults
        dtype, device = ctx.anchor
        return torch.zeros((), dtype=dtype, device=device), *[None] * (len(ctx.needs_input_grad) - 1)


def _save(ctx, part: RowWise, inputs: tuple[Tensor, ...]) -> None:
    part.begin(inputs[0])
    ctx.part, ctx.count = part, len(inputs)
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dresults: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[2 : 2 + ctx.count]
    dinputs, dparameters = ctx.part.backward(inputs, needs, dresults)
    return None, None, *dinputs, *dparameters
