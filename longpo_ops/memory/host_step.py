"""Weights that step on the host: pieces of them cross there and back while the host steps the piece between.

    copies   in 0   in 1   out 0   in 2   out 1   in 3   out 2   ...      one after the other, as they were asked for
    host                   step 0         step 1         step 2  ...      step i: after in i, before out i is asked for

in i brings n numbers of a weight and of its gradient, each in its own dtype, into page-locked memory; out i takes the weight
back. Two rooms hold a piece each, in i goes to room i mod 2. Host memory: both rooms, from the first step on.

What is read is there, and nothing is written over before it was read, because a Lane's copies happen in the order in which
they are asked for, each after all that the computation had been given by then (lane.now()):

    the gradient   in i comes after what computes it, and the host waits for in i (lane.wait) before it reads it
    room i mod 2   step i + 2 writes there after in i + 2, which is asked for after out i: out i has read it
    the weight     out i comes after all that the computation was given before run(), which reads the old numbers
    afterwards     run() returns, or raises, when all copies are done (lane.drain): who reads a weight then, on whichever
                   stream, in a later layer's backward, a forward or a state_dict, finds the new numbers, and the memory of
                   gradients may be freed and used for anything

So a hook that steps a weight in the middle of a backward may free its gradient at once. It stands still for the last copy
out and the first one in, some milliseconds a weight in all; the host's step of a piece takes far longer than its copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from longpo_ops.memory.host_memory import free_slab, gib, make_slab
from longpo_ops.memory.tiers import Lane


class Crossing(NamedTuple):
    """A piece of a weight (n,) and of its gradient (n,), and step(weight, gradient), which steps such a weight in place."""

    weight: Tensor
    gradient: Tensor
    step: Callable[[Tensor, Tensor], None]


class HostSteps:
    """Steps pieces that take up to nbytes (room_bytes) on the host of a device. lane: to that device.

    Raises MemoryError, before anything has moved, where the host refuses the memory of the two rooms.
    """

    def __init__(self, lane: Lane, nbytes: int):
        self.lane, self.rooms = lane, []
        close = weakref.finalize(self, _free, self.rooms, lane.pinned)
        close.atexit = False  # the end of the process frees them, and CUDA may be gone by then
        for _ in range(2):
            try:
                self.rooms.append(make_slab(nbytes, lane.pinned))
            except (OSError, RuntimeError) as error:
                raise MemoryError(
                    f"the host refused {gib(nbytes)} of {'page-locked ' * lane.pinned}memory, through which weights cross to "
                    f"step on it ({error}): free host memory, or keep master and states on the device with host=False"
                ) from error

    def run(self, crossings: Iterable[Crossing]) -> None:
        """Steps them all. Raises what a step raises: the pieces before it have stepped then, and what the step itself left
        of its weight is on the device, as its master may have moved with it."""
        arrived = None
        try:
            for number, crossing in enumerate(crossings):
                arriving = self._bring(crossing, self.rooms[number % 2])
                if arrived is not None:
                    self._step(*arrived)
                arrived = arriving
            if arrived is not None:
                self._step(*arrived)
        finally:
            self.lane.drain()

    def _bring(self, crossing: Crossing, room: Tensor) -> tuple:
        origins = crossing.weight, crossing.gradient
        starts = 0, _aligned(crossing.weight.nbytes)
        weight, gradient = (room[a : a + x.nbytes].view(x.dtype) for a, x in zip(starts, origins, strict=True))
        event = self.lane.copy(list(zip((weight, gradient), origins, strict=True)), self.lane.now())
        return crossing, weight, gradient, event

    def _step(self, crossing: Crossing, weight: Tensor, gradient: Tensor, event) -> None:
        self.lane.wait(event)
        try:
            crossing.step(weight, gradient)
        finally:
            self.lane.copy([(crossing.weight, weight)], self.lane.now())


def room_bytes(numbers: int, weight_size: int, gradient_size: int) -> int:
    """What a room takes for pieces of so many numbers, of so many bytes each."""
    return _aligned(numbers * weight_size) + numbers * gradient_size


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _free(rooms: list[Tensor], pinned: bool) -> None:
    while rooms:
        free_slab(rooms.pop(), pinned)
