"""What an optimizer keeps of a weight (R, ...): tensors sharded like it, a step's flat view of them, and how blocks lie.

    residue | master     (R, ..., 2) uint8 | (R, ...) float32        float32 weights have neither
    m, v                 (R, ...) float32, or in 8 bits two of each:
    codes, scale         (R, ...) uint8, (R, ceil(C / 256)) float32    C numbers of a row, a scale for 256 of them
    step                 () float32, on the host with states="8bit"

A residue is an int16, kept as its two bytes, as collectives know no int16. The scales of `period` rows, which hold whole
blocks, lie in those rows, one after the other; what is left over stays 0. So all tensors are cut by rows as FSDP2 cuts the
weight, and torch.distributed.checkpoint cuts them anew. Of a DTensor each rank quantises its own shard: blocks begin with its
first number. Shards that begin with whole periods have the blocks of the whole weight, so that any number of them goes on
from any other; others have blocks of their own, which no other number goes on from (check_cuts).

Several ranks: tests/parallel/test_memory_ranks.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from longpo_ops.memory.pieces import SCALED, EightBit

HALF = 1 << 15  # of the unit in the last place of bfloat16, in float32 bits
QUANTISED = 4096  # numbers that a weight of two or more dimensions has at least, for its averages to be held in 8 bits


def split(master: Tensor, weight: Tensor, residue: Tensor) -> None:
    """master (n,) float32 -> weight (n,) bfloat16 and residue (n,) int16, written in place; exact for every number. Leaves no
    numbers in master.

    The largest numbers round to an infinite weight, as in any conversion, and are still exact; NaN becomes the plain NaN.
    """
    # A NaN of all ones would carry into the sign and look like 0.
    bits = master.nan_to_num_(torch.nan, torch.inf, -torch.inf).view(torch.int32)
    residue.copy_(bits)  # the low half: what the conversion to int16 keeps
    weight.view(torch.int16).copy_(bits.add_(HALF).bitwise_right_shift_(16))


def join(weight: Tensor, residue: Tensor) -> Tensor:
    """weight (n,) bfloat16 and residue (n,) int16 -> (n,) float32, the inverse of split."""
    bits = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(residue).view(torch.float32)


def local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor, over the same memory; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def flat(x: Tensor) -> Tensor:
    """(n,) of this rank, over the same memory where that has no gaps."""
    return local(x.detach()).reshape(-1)


def numbers_of(x: Tensor) -> int:
    """Of this rank."""
    return local(x).numel()


def is_quantised(weight: Tensor) -> bool:
    """Whether 8-bit states hold this weight's averages in 8 bits; the same whatever it is sharded over."""
    return weight.ndim > 1 and weight.numel() >= QUANTISED


class Like(NamedTuple):
    """A tensor kept of a weight: its dtype, numbers a row where they are not the weight's own, parts of each number."""

    dtype: torch.dtype
    width: int | None = None
    parts: int | None = None

    def size(self, shape: torch.Size) -> torch.Size:
        """Of the whole, or of a shard, by the weight's."""
        size = tuple(shape) if self.width is None else (shape[0], self.width)
        return torch.Size(size if self.parts is None else (*size, self.parts))

    def zeros(self, weight: Tensor, device: torch.device) -> Tensor:
        """Sharded as the weight is, on the device."""
        like = torch.empty(self.size(local(weight).shape), dtype=self.dtype, device="meta")
        if isinstance(weight, DTensor):  # without memory, as from_local moves what is on a host to a mesh of GPUs
            size = self.size(weight.shape)
            stride = torch.empty(size, device="meta").stride()
            like = DTensor.from_local(
                like, weight.device_mesh, weight.placements, run_check=False, shape=size, stride=stride
            )
        return torch.zeros_like(like, device=device)


MASTERS = {"residue": {"residue": Like(torch.uint8, parts=2)}, "float32": {"master": Like(torch.float32)}}


def averages_like(weight: Tensor, names: tuple[str, ...], dtype: torch.dtype, eight_bit: bool) -> dict[str, Like]:
    """What is kept of a weight's averages."""
    if not (eight_bit and is_quantised(weight)):
        return {name: Like(dtype) for name in names}
    width = -(-Blocks(weight).row // SCALED)
    pairs = ({f"{name}_codes": Like(torch.uint8), f"{name}_scale": Like(torch.float32, width)} for name in names)
    return {name: like for pair in pairs for name, like in pair.items()}


class Blocks:
    """How the blocks of a weight lie: numbers of a row, rows that hold whole blocks (period), its shards and their rows."""

    def __init__(self, weight: Tensor, shards: int | None = None):
        self.shape = tuple(weight.shape)
        self.row = math.prod(weight.shape[1:])
        self.period = SCALED // math.gcd(self.row, SCALED)
        self.width = -(-self.row // SCALED)
        self.shards = shards_of(weight) if shards is None else shards
        self.rows = -(-weight.shape[0] // self.shards)  # of each shard but the last ones

    @property
    def are_the_whole_weights(self) -> bool:
        return self.shards == 1 or self.rows % self.period == 0

    def places(self, here: slice, device: torch.device | None = None) -> Tensor | slice:
        """Where in flat scales are those of numbers `here`, which begin with a block."""
        first, end = here.start // SCALED, -(-here.stop // SCALED)
        of_period = self.period * self.row // SCALED
        if of_period == self.period * self.width:
            return slice(first, end)
        block = torch.arange(first, end, device=device)
        return block // of_period * (self.period * self.width) + block % of_period


def shards_of(weight: Tensor) -> int:
    """How many shards its rows are cut into. Raises ValueError where it is cut in another way."""
    if not isinstance(weight, DTensor):
        return 1
    cut = [(dim, place) for dim, place in enumerate(weight.placements) if not place.is_replicate()]
    if len(cut) > 1 or any(type(place) is not Shard or place.dim != 0 for _, place in cut):
        raise ValueError(
            f"states='8bit' of a weight of shape {tuple(weight.shape)} placed as {weight.placements}: expected rows cut over "
            "one dimension of the mesh, as FSDP2 does; use states='float32'"
        )
    return weight.device_mesh.size(cut[0][0]) if cut else 1


def check_cuts(weight: Tensor, shards: int) -> None:
    """Raises ValueError where blocks of 8-bit averages that were cut into so many shards are not those of the weight now."""
    saved, now = Blocks(weight, shards), Blocks(weight)
    if saved.shards != now.shards and not (saved.are_the_whole_weights and now.are_the_whole_weights):
        raise ValueError(
            f"8-bit optimizer states of a weight of shape {saved.shape} were saved by {_told(saved)}, and it has {_told(now)} "
            f"now: blocks of {SCALED} numbers lie otherwise, as {now.period} rows of {now.row} hold whole ones. Go on with "
            f"{saved.shards} processes that share the weights, or begin with states='float32'"
        )


def _told(blocks: Blocks) -> str:
    return f"{blocks.shards} {'shards' if blocks.shards > 1 else 'shard'} of {blocks.rows} rows"


def whole_state(weight: Tensor, saved: dict[str, Any], kept: dict[str, Like]) -> dict[str, Any]:
    """A state that an earlier version kept by flat pieces, each with averages of its own, none before the first step.

    Raises ValueError where it is of another weight, or has pieces in float32 of what is held in 8 bits since.
    """
    expected = f"for a weight of shape {tuple(weight.shape)}"
    master, pieces = saved["master"], [piece for piece in saved["pieces"] if piece]
    whole = {name: like.zeros(weight, torch.device("cpu")) for name, like in kept.items()}
    whole["step"] = pieces[0]["step"] if pieces else torch.zeros(())
    for name in kept.keys() & {"residue", "master"}:
        if master is None or master.nbytes != whole[name].nbytes:
            raise ValueError(f"optimizer state has a master of another size {expected}")
        whole[name] = master.view(kept[name].dtype).view(whole[name].shape)
    start, blocks = 0, Blocks(weight, 1)
    for piece in pieces:
        averages = {name: value for name, value in piece.items() if name != "step"}
        here = slice(start, start := start + next(iter(averages.values())).numel())
        if here.stop > weight.numel():
            break
        for name, value in averages.items():
            if name in kept:
                numbers = value.dequantize() if hasattr(value, "dequantize") and hasattr(value, "codes") else value
                whole[name].view(-1)[here] = numbers.flatten().cpu()
            elif hasattr(value, "codes"):
                codes, scale = (whole[f"{name}_{part}"].view(-1) for part in EightBit._fields)
                codes[here] = value.codes.flatten().cpu()
                scale[blocks.places(here)] = value.scale.cpu()
            else:
                raise ValueError(
                    f"optimizer state of an earlier version has {here.stop - here.start} numbers of {name} in float32 "
                    f"{expected}, which are held in 8 bits now: go on with that version, or begin anew"
                )
    if pieces and start != weight.numel():
        raise ValueError(f"optimizer state of {start} numbers or more does not fit {expected}")
    return whole
