"""How a tensor becomes bytes and comes back: as it is, or in block-scaled 8 bits.

    block of 128 numbers x:   s = max|x| / 127    c = round(x / s)    x' = c s        |x - x'| <= max|x| / 254

plus the rounding of x' to the tensor's dtype. A block that holds a NaN or an infinity comes back as NaN throughout.
Shapes: x of n numbers; bytes (nbytes,) uint8: the codes, padded to whole blocks, then one float32 scale per block:
1.03 n bytes, against 2 n in bfloat16. Memory: float32 temporaries of CHUNK numbers.

Tests: tests/memory/test_tiers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
CHUNK = 1 << 22
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Exact:
    """The tensor's own bytes."""

    @staticmethod
    def nbytes(x: Tensor) -> int:
        return x.nbytes

    @staticmethod
    def encode(flat: Tensor) -> Tensor:  # (n,) -> (nbytes,), no copy
        return flat.view(torch.uint8)

    @staticmethod
    def decode(payload: Tensor, dtype: torch.dtype, n: int) -> Tensor:
        return payload.view(dtype)


class Int8:
    """Block-scaled 8 bits."""

    @staticmethod
    def nbytes(x: Tensor) -> int:
        blocks = -(-x.numel() // BLOCK)
        return blocks * (BLOCK + 4)

    @staticmethod
    def encode(flat: Tensor) -> Tensor:  # (n,) -> (nbytes,)
        if flat.dtype not in DTYPES:
            raise ValueError(f"store='int8' holds bfloat16, float16 and float32, got {flat.dtype}: use store='exact'")
        blocks = -(-flat.numel() // BLOCK)
        payload = torch.empty(blocks * (BLOCK + 4), dtype=torch.uint8, device=flat.device)
        codes, scales = _parts(payload, blocks)
        for start in range(0, blocks, CHUNK // BLOCK):
            part = flat[start * BLOCK : start * BLOCK + CHUNK].float()
            part = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
            scale = part.abs().amax(1, keepdim=True).div_(127)
            # A scale of 0 gives 0 / 0: the codes become 0. So do those of a block that is not finite: 0 * inf is NaN.
            code = part.div_(scale).round_().nan_to_num_(0).clamp_(-127, 127)
            codes[start : start + len(code)] = code.to(torch.int8)
            scales[start : start + len(code)] = scale
        return payload

    @staticmethod
    def decode(payload: Tensor, dtype: torch.dtype, n: int) -> Tensor:
        blocks = payload.numel() // (BLOCK + 4)
        codes, scales = _parts(payload, blocks)
        out = torch.empty(n, dtype=dtype, device=payload.device)
        for start in range(0, blocks, CHUNK // BLOCK):
            end = start + CHUNK // BLOCK
            part = (codes[start:end].float() * scales[start:end]).view(-1)
            target = out[start * BLOCK : start * BLOCK + CHUNK]
            target.copy_(part[: target.numel()])
        return out


def _parts(payload: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Codes (blocks, BLOCK) int8 and scales (blocks, 1) float32: views of the payload."""
    codes, scales = payload.split([blocks * BLOCK, blocks * 4])
    return codes.view(torch.int8).view(blocks, BLOCK), scales.view(torch.float32).view(blocks, 1)


CODECS = {"exact": Exact, "int8": Int8}
