"""What every op checks before it allocates anything: each failure names the argument, what came and what was expected.

Kinds of single arguments are longpo_ops/kinds.py's; here is what arguments of an op are to each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..kinds import check_choice, check_number, check_object, check_tensor, check_whole, refusal
from ..parallel import Shards
from .dispatch import NAMES
from .sweep import default_workspace, workspace_of

REDUCTIONS = ("mean", "sum", "none")
FLOAT32 = torch.finfo(torch.float32)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, name: str = "hidden", head: str = "") -> None:
    """Raises ValueError where hidden (..., H), weight (V, H) and bias (V,) do not fit together. head: what the names of
    weight and bias begin with."""
    matrix, vector = f"{head}weight", f"{head}bias"
    arguments = {name: hidden, matrix: weight} | ({} if bias is None else {vector: bias})
    for argument, tensor in arguments.items():
        if isinstance(tensor, Tensor) and isinstance(hidden, Tensor) and tensor.device != hidden.device:
            raise ValueError(f"{argument} is on {tensor.device}, {name} on {hidden.device}: expected one device")
        check_tensor(argument, tensor)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{matrix}.shape={tuple(weight.shape)}: expected (V, H), neither of them 0")
    if hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}.shape={tuple(hidden.shape)} and {matrix}.shape={tuple(weight.shape)}: expected the same H in both"
        )
    if bias is not None:
        check_tensor(vector, bias, shape=weight.shape[:1], note=f", one entry per row of {matrix}")
    check_transforms(arguments)


def check_transforms(arguments: dict[str, Tensor]) -> None:
    """Raises ValueError for tensors that torch.func's grad or jvp differentiates or made, and for those with a forward-mode
    tangent: torch would lose the derivative in silence, or speak of an autograd.Function. Tensors from outside a transform
    are constants to it. vmap over plain calls is torch's own loop."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in arguments.items():
        if _is_tracked(tensor):
            raise ValueError(
                f"{name} is differentiated by, or made within, a torch.func transform around longpo_ops: expected "
                "loss.backward() or torch.autograd.grad; gradients are made together with the loss"
            )
    if forward_ad._current_level >= 0:
        for name, tensor in arguments.items():
            if forward_ad.unpack_dual(tensor).tangent is not None:
                raise ValueError(
                    f"{name} carries a forward-mode tangent: expected a plain tensor and loss.backward(); longpo_ops has "
                    "no forward-mode derivatives"
                )


def _is_tracked(tensor: Tensor) -> bool:
    """Whether a level of torch.func's grad or jvp tracks the tensor, be it below those of vmap."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def check_rows(hidden: Tensor, name: str = "hidden") -> None:
    """Raises ValueError unless hidden is (N, H)."""
    if hidden.dim() != 2:
        raise ValueError(f"{name}.shape={tuple(hidden.shape)}: expected (N, H); use {name}.flatten(0, -2)")


def check_shards(shards: Shards | None, hidden: Tensor) -> tuple[int, str]:
    """-> how many rows there are on all ranks, and the name of the group that shares them, "" where one process has them all.
    Raises ValueError for what is no Shards, and for other rows than all of them on one process."""
    if shards is None:
        return hidden.shape[0], ""
    check_object("shards", shards, Shards, "a longpo_ops.parallel.Shards")
    if shards.size > 1:  # their number is looked at where all ranks find out
        return shards.length, shards.group.group_name
    check_held_rows(hidden, shards)
    return shards.length, ""


def check_held_rows(hidden: Tensor, shards: Shards) -> None:
    """Raises ValueError unless hidden has the rows of this rank."""
    rows, given = shards.rows, hidden.shape[0]
    if given != rows.stop - rows.start:
        raise ValueError(
            f"hidden has {given} rows on rank {shards.rank} of {shards.size}: expected {rows.stop - rows.start}, rows "
            f"{rows.start} to {rows.stop - 1} of {shards.length}; see Shards.rows"
        )


def check_labels(labels: Tensor, shape: tuple[int, ...], name: str = "labels", of: str = "hidden") -> Tensor:
    """-> the labels on the host, where rows are planned: those of a device cross here, once. Raises ValueError unless they
    are an int64 tensor of that shape."""
    check_tensor(name, labels, (torch.int64,), shape, f", one label per row of {of}")
    return labels.cpu()


def check_numbers(numbers: Tensor | None, shape: tuple[int, ...], name: str, note: str = "") -> None:
    """Raises ValueError unless numbers is a floating-point tensor of that shape that check_transforms takes, or None."""
    if numbers is not None:
        check_tensor(name, numbers, shape=shape, note=note)
        check_transforms({name: numbers})


def check_reduction(reduction: str, row_weights: Tensor | None, rows: int) -> None:
    """Raises ValueError for an unknown reduction, and for row weights that do not fit the rows or want a gradient that
    only "none" gives."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_numbers(row_weights, (rows,), "row_weights")
    if row_weights is not None and row_weights.requires_grad and torch.is_grad_enabled() and reduction != "none":
        raise ValueError(f"row_weights requires a gradient with reduction={reduction!r}: expected reduction='none'")


def check_class_weights(class_weights: Tensor | None, weight: Tensor) -> None:
    """Raises ValueError for weights that do not fit the classes, or that want a gradient."""
    check_numbers(class_weights, weight.shape[:1], "class_weights", ", one entry per row of weight")
    if class_weights is not None and class_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("class_weights requires a gradient, and none would reach it: expected class_weights.detach()")


def check_ignore_index(ignore_index: int) -> int:
    """-> ignore_index. Raises ValueError for what no label can be."""
    return check_whole("ignore_index", ignore_index)


def check_backend(backend: str | None) -> str:
    """-> the name of a back-end, "" for the best. Raises ValueError for an unknown one; whether it runs here is known later."""
    return "" if backend is None else check_choice("backend", backend, NAMES)


def compute_dtype(hidden: Tensor, weight: Tensor, name: str = "hidden", head: str = "weight") -> torch.dtype:
    """What an op counts in: autocast's dtype where that is on, else the one dtype of both. Raises ValueError if they differ."""
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"{name} is {hidden.dtype}, {head} is {weight.dtype}: expected one dtype; convert one, or use autocast"
        )
    return hidden.dtype


def logit_map(scale: float, softcap: float | None, temperature: float = 1.0, of: str = "") -> tuple[float, float]:
    """-> (scale, softcap or 0) with the temperature folded in. of: what the names of scale and softcap begin with.

    Raises ValueError for values that make no map, and for quotients that float32 does not hold."""
    temperature = check_number("temperature", temperature, above=0)
    folded = []
    for name, value in ((f"{of}scale", scale), (f"{of}softcap", softcap)):
        if value is None and name.endswith("softcap"):
            folded.append(0.0)
            continue
        quotient = check_number(name, value, above=0) / temperature
        if not FLOAT32.tiny <= quotient <= FLOAT32.max:
            raise refusal(name, value, f"a number that float32 holds when divided by temperature={temperature}")
        folded.append(quotient)
    return folded[0], folded[1]


def check_workspace(workspace_bytes: int | None, weight: Tensor, dtype: torch.dtype, tiles: int = 1) -> int:
    """Bytes of scratch for a call: what was asked for, or the device's default (at least one row's worth).

    Raises ValueError when workspace_bytes is no int or does not hold one row of logits.
    """
    least = workspace_of(1, weight, dtype, tiles)
    if workspace_bytes is None:
        return max(default_workspace(weight.device), least)
    expected = (
        f"at least {least} bytes, which hold one row of V={weight.shape[0]} logits at H={weight.shape[1]}, or None"
    )
    return check_whole("workspace_bytes", workspace_bytes, least, expected)
