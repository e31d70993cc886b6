"""What a launch needs around the kernel: argument checks, the device, and the configurations, one per architecture.

Tests: tests/kernels/test_interpreter.py, tests/kernels/test_compile.py.
"""

import contextlib
from typing import NamedTuple

import torch
import triton

# Arguments that change from call to call, and of which no load's width depends. Triton would compile a kernel anew for
# 1 and for multiples of 16; V, H and the pitches keep that, as they decide whether 16 bytes are read at a time.
PER_CALL = ("n", "splits")


class RowConfig(NamedTuple):
    """One program per row: `block` columns at a time, spread over `warps` warps."""

    block: int
    warps: int


class MatmulConfig(NamedTuple):
    """One program per tile of (rows, vocab) logits, summing over `inner` hidden units at a time."""

    rows: int
    vocab: int
    inner: int
    group: int  # row tiles that run side by side over the same part of the vocabulary
    warps: int
    stages: int
    descriptors: bool  # tensor descriptors (TMA) instead of pointers
    flatten: bool = True  # the loops over vocab and inner run as one pipeline
    parts: int = 1  # in which scaled_exps takes a tile's columns, 1 or 2


# Row kernels use no tensor cores and few bytes of shared memory: one choice serves every architecture. Registers are
# what ptxas gave for sm_80, sm_90a and sm_100a; a thread of a 32-warp program may have 64. A row is kept in registers
# up to 32 logits a thread (63-64 registers, no spill); where a bias, a soft-cap, float32 results (which do not share
# registers in pairs) or the addresses of unaligned rows live beside the logits, up to 16 (32-64 registers; at 32 that
# spills 8-190 bytes, unaligned rows only with triton 3.9).
PER_THREAD = {False: 32, True: 16}
# Longer rows: 32 warps of more than 32 registers make a row (or pair of rows) the only one on its multiprocessor. Few
# rows in flight is what lets the second pass find them in L2: 132 rows of 128256 columns are 68 MB, on average half of
# it still needed, of a 50 MB cache.
ROW = RowConfig(8192, 32)  # 40-48 registers
PAIR = RowConfig(4096, 32)  # 32-50 registers; with 16 warps the soft-capped JSD spills on sm_80

# Tiles of linear_logps, by architecture: 16-bit operands, the same with a bias or soft-cap, float32 operands.
# Registers of the flattened loops; nested they are 238, 255 and 189, and with a map 242, 172 and 210, no spill.
# mma.sync: 229-232 registers, 50 KiB of shared memory, which also fits the 99 KiB of sm_86, sm_89 and sm_120.
_AMPERE = MatmulConfig(128, 128, 32, 8, 8, 4, False)
# wgmma of 256 columns, two warp groups of 64 rows: 255 registers, 192 of 227 KiB.
_HOPPER = MatmulConfig(128, 256, 64, 16, 8, 4, True)
# tcgen05, the products in tensor memory, read back as 128 columns a thread: 158 registers (255 with 128 x 256).
_BLACKWELL = MatmulConfig(256, 128, 64, 8, 8, 4, True)
# 160 and 212 registers; in the larger tiles the temporaries of bias and soft-cap would spill 110-190 bytes.
_MAPPED = MatmulConfig(128, 128, 64, 16, 8, 4, True)
# Fused multiply-adds (and TF32 where torch allows it): 152-168 registers; 128 rows or columns spill.
_EXACT = MatmulConfig(64, 64, 16, 8, 4, 3, False)
LINEAR_LOGPS = {
    80: (_AMPERE, _AMPERE, _EXACT),
    90: (_HOPPER, _MAPPED, _EXACT),
    100: (_BLACKWELL, _MAPPED, _EXACT),
    120: (_AMPERE, _AMPERE, _EXACT),  # no tcgen05
}

# Tiles of scaled_exps, whose epilogue stores: half of a tile's columns at a time, or 128 x 256 spills and its staging does
# not fit. The same with a bias and soft-cap.
SCALED_EXPS = {
    80: _AMPERE._replace(parts=2),
    90: _HOPPER._replace(stages=4, parts=2),
    100: _BLACKWELL._replace(stages=4, parts=2),
    120: _AMPERE._replace(parts=2),
}
_ELEMENTWISE = MatmulConfig(128, 64, 32, 8, 8, 4, False)  # rows or columns that are not 16-byte units


def row_config(V: int, tight: bool, long: RowConfig = ROW) -> RowConfig:
    """For rows of V columns; `tight`: with a bias, a soft-cap, float32 results, unaligned rows, what is asked for beside
    the log-prob or affine gradients. `long`: for rows that registers do not hold."""
    block = max(128, triton.next_power_of_2(V))
    warps = max(1, block // (32 * PER_THREAD[tight]))
    return RowConfig(block, warps) if warps <= 32 else long


def linear_logps_config(capability: int, dtype: torch.dtype, mapped: bool, aligned: bool = True) -> MatmulConfig:
    """The newest architecture of the table that is not newer than the device; sm_80's, whatever it is, for rows that are not
    `aligned`: single elements instead of 16-byte units spill in the larger tiles."""
    capability = capability if aligned else 80
    plain, with_map, exact = LINEAR_LOGPS[max(key for key in LINEAR_LOGPS if key <= capability)]
    if dtype == torch.float32:
        return exact
    return with_map if mapped else plain


def scaled_exps_config(capability: int, dtype: torch.dtype, mapped: bool, aligned: bool = True) -> MatmulConfig:
    """The newest architecture of the table that is not newer than the device."""
    if dtype == torch.float32:
        return _EXACT
    return SCALED_EXPS[max(key for key in SCALED_EXPS if key <= capability)] if aligned else _ELEMENTWISE


def is_mapped(map) -> bool:
    return map.bias is not None or bool(map.softcap)


def capability(device: torch.device) -> int:
    """90 for sm_90. A CPU tensor means that Triton interprets: the kernels then take the way of sm_90."""
    if device.type == "cpu":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless the tensor is contiguous and has this shape, dtype and device."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name}: expected {dtype} {tuple(shape)} on {device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got strides {tensor.stride()}; pass {name}.contiguous()"
        )


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless the tensor is (rows, columns), columns contiguous and rows apart."""
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name}: expected two dimensions and at least one column, got shape {tuple(tensor.shape)}")
    rows, columns = tensor.shape
    if (columns > 1 and tensor.stride(1) != 1) or (rows > 1 and tensor.stride(0) < columns):
        raise ValueError(
            f"{name}: expected contiguous rows that do not overlap, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}; pass {name}.contiguous()"
        )


def check_tile(name: str, z: torch.Tensor) -> None:
    """Raises ValueError unless z is a float32 tile (n, V)."""
    if z.dtype != torch.float32:
        raise ValueError(f"{name}: expected a float32 tile, got {z.dtype}; the PyTorch back-end takes float64")
    check_rows(name, z)


def check_map(name: str, map, device: torch.device, V: int) -> None:
    """Raises ValueError unless the map's bias, if any, is (V,) of a floating dtype on the device."""
    if map.bias is not None:
        if not map.bias.is_floating_point():
            raise ValueError(f"{name}.bias: expected a floating dtype, got {map.bias.dtype}")
        check(f"{name}.bias", map.bias, (V,), map.bias.dtype, device)


def narrow(z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """z (n, V) float32 -> its first V elements of each row seen as `dtype`; raises ValueError for other dtypes."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    return z if dtype == torch.float32 else z.view(dtype)[:, : z.shape[1]]
