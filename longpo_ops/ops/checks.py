"""What every op checks before it allocates anything: each failure names the argument, what came and what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .sweep import default_workspace, workspace_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, name: str = "hidden", head: str = "weight") -> None:
    """Raises ValueError where hidden (..., H), weight (V, H) and bias (V,) do not fit together."""
    arguments = {name: hidden, head: weight} | ({} if bias is None else {"bias": bias})
    for argument, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{argument}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{argument}.dtype={tensor.dtype}: expected float16, bfloat16, float32 or float64")
        if tensor.device != hidden.device:
            raise ValueError(f"{argument} is on {tensor.device}, {name} on {hidden.device}: expected one device")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{head}.shape={tuple(weight.shape)}: expected (V, H), neither of them 0")
    if hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}.shape={tuple(hidden.shape)} and {head}.shape={tuple(weight.shape)}: expected the same H in both"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias.shape={tuple(bias.shape)}: expected ({weight.shape[0]},), one entry per row of {head}")


def check_rows(hidden: Tensor, name: str = "hidden") -> None:
    """Raises ValueError unless hidden is (N, H)."""
    if hidden.dim() != 2:
        raise ValueError(f"{name}.shape={tuple(hidden.shape)}: expected (N, H); use {name}.flatten(0, -2)")


def check_labels(labels: Tensor, shape: tuple[int, ...], name: str = "labels") -> None:
    """Raises ValueError unless labels is an int64 tensor of that shape; its device is free."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise ValueError(f"{name}: expected an int64 tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"{name}.shape={tuple(labels.shape)}: expected {tuple(shape)}, one label per hidden state")


def check_numbers(numbers: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    """Raises ValueError unless numbers is a floating-point tensor of that shape, or None."""
    if numbers is None:
        return
    if not isinstance(numbers, Tensor) or not numbers.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating-point tensor, got {getattr(numbers, 'dtype', type(numbers))}")
    if tuple(numbers.shape) != tuple(shape):
        raise ValueError(f"{name}.shape={tuple(numbers.shape)}: expected {tuple(shape)}")


def check_reduction(reduction: str, row_weights: Tensor | None, rows: int) -> None:
    """Raises ValueError for an unknown reduction, and for row weights that do not fit the rows or want a gradient that
    only "none" gives."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean', 'sum' or 'none'")
    check_numbers(row_weights, (rows,), "row_weights")
    if row_weights is not None and row_weights.requires_grad and torch.is_grad_enabled() and reduction != "none":
        raise ValueError(f"row_weights requires a gradient with reduction={reduction!r}: expected reduction='none'")


def compute_dtype(hidden: Tensor, weight: Tensor, head: str = "weight") -> torch.dtype:
    """What an op counts in: autocast's dtype where that is on, else the one dtype of both. Raises ValueError if they differ."""
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype}, {head} is {weight.dtype}: expected one dtype; convert one, or use autocast"
        )
    return hidden.dtype


def logit_map(scale: float, softcap: float | None, temperature: float = 1.0) -> tuple[float, float]:
    """-> (scale, softcap or 0) with the temperature folded in. Raises ValueError for values that make no map."""
    given = {"scale": scale, "temperature": temperature} | ({} if softcap is None else {"softcap": softcap})
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}: expected a finite number > 0")
    return scale / temperature, (softcap or 0.0) / temperature


def check_workspace(workspace_bytes: int | None, weight: Tensor, dtype: torch.dtype, tiles: int = 1) -> int:
    """Bytes of scratch for a call: what was asked for, or the device's default (at least one row's worth).

    Raises ValueError when workspace_bytes is no int or does not hold one row of logits.
    """
    least = workspace_of(1, weight, dtype, tiles)
    if workspace_bytes is None:
        return max(default_workspace(weight.device), least)
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int) or workspace_bytes < least:
        raise ValueError(
            f"workspace_bytes={workspace_bytes!r}: expected at least {least} bytes, which hold one row of "
            f"V={weight.shape[0]} logits at H={weight.shape[1]}, or None"
        )
    return workspace_bytes
