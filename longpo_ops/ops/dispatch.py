"""Which back-end runs the tiles, chosen once per device and dtype, and why.

    torch    PyTorch, every device, float32 and float64 tiles
    cpu      C++ (csrc/cpu), CPU, float32 tiles
    triton   Triton (kernels/), CUDA
    cuda     CUDA C++ (csrc/cuda), CUDA
    scaled   triton with bfloat16 exponentials in place of a float32 tile (exponentials.py), CUDA, bfloat16; opt-in until
             gpu-check has found it faster

All of them tell what is asked for beside a log-prob (tiles.Beside) and write gradients of the affine family, from a tile of
logits: Triton's log-probs straight from hidden states, which make no tile, know neither entropies nor what is predicted.

The first usable one of the device's order is taken. `backend="..."` on a call or LONGPO_OPS_BACKEND forces one; a forced
back-end that cannot run raises with the reason.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch

from ..kinds import FLOATS, check_choice, refusal
from .fastest import explain_products
from .tiles import Tiles, TorchTiles

ORDER = {"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")}
NAMES = ("torch", "cpu", "triton", "cuda", "scaled")


class Unusable(Exception):
    """A back-end that cannot run here; its text says why."""


@functools.cache
def _load(name: str) -> Tiles:
    """The back-end of that name. Raises Unusable when this machine cannot run it."""
    if name == "torch":
        return TorchTiles()
    if name != "cpu" and not torch.cuda.is_available():
        raise Unusable("torch sees no CUDA device")
    from .build import BuildError

    try:
        return {"cpu": _load_cpu, "triton": _load_triton, "cuda": _load_cuda, "scaled": _load_scaled}[name]()
    except BuildError as error:
        raise Unusable(str(error)) from error


def _load_cpu() -> Tiles:
    from .cpu_tiles import CpuTiles

    return CpuTiles()


def _load_triton() -> Tiles:
    if torch.cuda.get_device_capability() < (8, 0):
        raise Unusable(
            f"the kernels need sm_80 or newer, this device is sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
        )
    try:
        from longpo_ops.kernels.tiles import TritonTiles
    except ImportError as error:
        raise Unusable(f"triton cannot be imported: {error}") from error
    return TritonTiles()


def _load_scaled() -> Tiles:
    _load_triton()
    from longpo_ops.kernels.tiles import ScaledTiles

    return ScaledTiles()


def _load_cuda() -> Tiles:
    from .cuda_tiles import CudaTiles

    return CudaTiles()


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why that back-end cannot run these inputs, or None."""
    home = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda", "scaled": "cuda"}.get(name, device.type)
    if home != device.type:
        return f"it runs on {home} tensors, these are on {device.type}"
    if dtype == torch.float64 and name != "torch":
        return "float64 runs on the torch back-end only"
    if name == "scaled" and dtype != torch.bfloat16:
        return f"its exponentials are bfloat16's, whose exponents reach far enough; these inputs are {dtype}"
    try:
        _load(name)
    except Unusable as error:
        return str(error)
    return None


def choose_backend(
    device: torch.device, dtype: torch.dtype, name: str | None = None, divergence: bool = False
) -> Tiles:
    """The back-end for hidden states of `dtype` on `device`; for a divergence the one that CUDA C++ leaves it to.

    Raises ValueError for an unknown name, or for a forced back-end (argument or LONGPO_OPS_BACKEND) that cannot run here.
    """
    tiles = _choose(device.type, dtype, _forced(name))
    return tiles.divergence_tiles() if divergence and tiles.name == "cuda" else tiles


def _forced(name: str | None = None) -> str | None:
    forced = name or os.environ.get("LONGPO_OPS_BACKEND") or None
    return None if forced is None else check_choice("backend", forced, NAMES)


@functools.cache
def _choose(device_type: str, dtype: torch.dtype, forced: str | None) -> Tiles:
    device = torch.device(device_type)
    if forced is not None:
        reason = _refusal(forced, device, dtype)
        if reason:
            raise ValueError(f"backend={forced!r} cannot run here: {reason}. Leave backend unset to have one chosen")
        return _load(forced)
    for candidate in ORDER.get(device_type, ("torch",)):
        reason = _refusal(candidate, device, dtype)
        if reason is None:
            return _load(candidate)
        if dtype != torch.float64:
            warnings.warn(
                f"longpo_ops: back-end {candidate!r} is not used on {device_type}: {reason}. "
                "The next one gives the same results, more slowly.",
                stacklevel=4,
            )
    raise AssertionError("the torch back-end refuses nothing")


def explain_backend(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> str:
    """A few lines: which back-end runs inputs of `dtype` on `device` (default: CUDA if there is one), and why the others
    do not; on a CPU also which float32 products are the back-end's own and which torch's (fastest.py).

    Loads (and if need be compiles) what it asks about. Raises ValueError for what is no device."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise refusal("device", device, "a torch device such as 'cpu' or 'cuda'") from None
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise refusal("dtype", dtype, "torch.float16, bfloat16, float32 or float64")
    absent = device.type == "cuda" and not torch.cuda.is_available()
    forced = _forced()
    order = ORDER.get(device.type, ("torch",))
    reasons = {name: _refusal(name, device, dtype) for name in NAMES}
    chosen = forced or next(name for name in order if reasons[name] is None)
    lines = [
        f"{device.type}, {str(dtype).removeprefix('torch.')}: {chosen}"
        + (" (LONGPO_OPS_BACKEND)" if forced else "")
        + (" (but there is no CUDA device here)" if absent else "")
    ]
    for name in NAMES:
        if name == chosen:
            note = reasons[name] or ("runs" if name != "cpu" else f"runs, float32 with {explain_products()}")
        else:
            note = reasons[name] or ("usable, after the chosen one" if name in order else "usable, opt-in")
        lines.append(f"  {name:7s}{note}")
    return "\n".join(lines)
