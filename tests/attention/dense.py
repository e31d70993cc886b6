"""What shared-prefix attention must equal, as separate sequences and dense masks, and how close it must come."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.gpu.attention import dense_attention, make_layout, make_tree, separate_attention, sequences, visible
from longpo_ops.data.layout import SharedPrefixLayout

__all__ = [
    "TrueFloat64",
    "dense_attention",
    "make_layout",
    "make_tree",
    "positions",
    "separate_attention",
    "sequences",
    "true_float64",
    "visible",
]


def positions(layout: SharedPrefixLayout) -> Tensor:
    """(1, T): each row's place in its separate sequence."""
    result = torch.empty(1, layout.length, dtype=torch.long)
    for rows in (rows for pair in sequences(layout) for rows in pair):
        result[0, rows] = torch.arange(len(rows))
    return result


class TrueFloat64(TorchFunctionMode):
    """Inside it a float64 model really computes in float64: transformers' norms, rotary angles and eager softmax ask
    for float32 whatever the model's dtype, which would leave a truth no better than what it judges."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        widen = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        if function is torch.Tensor.float:
            return args[0].double()
        if function in (torch.Tensor.to, torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax):
            args, kwargs = tuple(map(widen, args)), {name: widen(x) for name, x in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))


@contextmanager
def true_float64() -> Iterator[None]:
    """The same where a checkpoint is recomputed in the backward, which knows no modes: methods of Tensor itself."""
    to, widen = Tensor.to, lambda x: torch.float64 if x is torch.float32 else x
    changed = dict(
        to=lambda self, *args, **kwargs: to(self, *map(widen, args), **{n: widen(x) for n, x in kwargs.items()}),
        float=Tensor.double,
    )
    with mock.patch.multiple(Tensor, **changed):
        yield
