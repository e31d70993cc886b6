"""Kinds of arguments: a check for each, used wherever a public function takes one.

    check_number   a finite number, Python's or numpy's    -> float
    check_whole    a whole number that int64 holds         -> int
    check_flag     True or False, Python's or numpy's      -> bool
    check_choice   one of some names                       -> the name
    check_object   an object of some class                 -> the object
    check_each     several of them, one by one             -> the objects
    check_tensor   a dense tensor with its numbers at hand -> the tensor

What is of the kind comes back as a plain Python value. What is not is a ValueError that names the argument, what came and
what was expected. A tensor is no number, as reading it may wait for a device and loses its gradient. Checks cost
microseconds, read no tensor's numbers, and torch.compile traces them without a break.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import UnionType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = sys.float_info.max
INT64 = range(-(1 << 63), 1 << 63)
SHOWN = 100  # characters of a value in a message

T = TypeVar("T")
Kind = type | UnionType | tuple[type, ...]  # what isinstance takes


def shown(value: Any) -> str:
    """A value as a message tells it: its repr, cut; a tensor by its kind, unless a few numbers on the host."""
    if isinstance(value, Tensor) and (value.device.type != "cpu" or value.numel() > 8):
        return f"a {value.dtype} tensor {tuple(value.shape)} on {value.device}"
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN:
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def refusal(name: str, value: Any, expected: str) -> ValueError:
    advice = "; of a tensor give .item()" if isinstance(value, Tensor) else ""
    return ValueError(f"{name}={shown(value)}: expected {expected}{advice}")


def check_number(name: str, value: Any, above: float = -math.inf) -> float:
    """-> value as a float. Raises ValueError unless it is a finite number greater than `above`."""
    value = value.item() if isinstance(value, np.generic) else value
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not -LARGEST <= value <= LARGEST or value <= above:
        raise refusal(name, value, "a finite number" + ("" if above == -math.inf else f" > {above:g}"))
    return float(value)


def check_whole(name: str, value: Any, least: int = INT64.start, expected: str = "") -> int:
    """-> value as an int. Raises ValueError, telling what was `expected`, unless it is a whole number from `least` on that
    int64 holds."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= value < INT64.stop:
        plain = f"an int >= {least}" if least > INT64.start else "an int that int64 holds"
        raise refusal(name, value, expected or plain)
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """-> value as a bool. Raises ValueError for what is neither True nor False, 0 and 1 included."""
    if not isinstance(value, bool | np.bool_):
        raise refusal(name, value, "True or False")
    return bool(value)


def check_choice(name: str, value: Any, known: Sequence[str]) -> str:
    """-> value. Raises ValueError unless it is one of the names."""
    if not isinstance(value, str) or value not in known:
        raise refusal(name, value, f"one of {', '.join(known)}")
    return value


def check_object(name: str, value: T, kind: Kind, what: str) -> T:
    """-> value. Raises ValueError, telling `what` was expected, unless it is an object of that class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {what}, got {_came(value)}")
    return value


def check_each(name: str, values: Iterable[T], kind: Kind, what: str, holder: Kind = Iterable) -> Iterator[T]:
    """Yields the values. Raises ValueError for one that is no object of that class, and where they come in no `holder`."""
    if isinstance(values, Tensor | str) or not isinstance(values, holder):
        raise ValueError(f"{name}: expected several, each {what}, got {_came(values)}")
    for number, value in enumerate(values):
        yield check_object(f"{name}[{number}]", value, kind, what)


def check_tensor(
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype] = FLOATS,
    shape: tuple[int, ...] | None = None,
    note: str = "",
) -> Tensor:
    """-> value. Raises ValueError unless it is a tensor of one of the dtypes, of that shape, whose numbers lie in memory with
    strides: sparse, nested, sharded and quantised tensors are none, nor are tensors on the meta device. note: what a message
    says after the shape that was expected."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor of {_names(dtypes)}, got {_came(value)}")
    if value.layout != torch.strided or value.is_nested or hasattr(type(value), "__tensor_flatten__"):
        raise ValueError(f"{name}: {_structure(value)}")
    if value.dtype not in dtypes:
        raise ValueError(f"{name}.dtype={value.dtype}: expected {_names(dtypes)}")
    if value.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, without numbers: expected a tensor on a device that computes")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}.shape={tuple(value.shape)}: expected {tuple(shape)}{note}")
    return value


def _came(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _names(dtypes: Sequence[torch.dtype]) -> str:
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} or {last}" if first else last


def _structure(value: Tensor) -> str:
    """What a tensor is that is not plainly dense, and what to do."""
    if hasattr(value, "full_tensor"):
        return (
            "a sharded DTensor came: expected a whole tensor; call inside the wrapped forward, or give .full_tensor()"
        )
    if value.is_nested:
        return "a nested tensor came: expected a padded or packed one; give .to_padded_tensor(0.0)"
    if value.layout != torch.strided:
        return f"a tensor of layout {str(value.layout).removeprefix('torch.')} came: expected a dense one; give .to_dense()"
    return f"a {type(value).__name__} came: expected a plain tensor; dequantise or convert it first"
