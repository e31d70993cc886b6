"""One tensor away from the device: copied out, kept in pages of host memory or of the spill file, copied back.

    Stored(x)   the copy out begins      settle()   x's memory may be used again, in the order of the computation
    fetch()     the copy back begins     load()     the tensor, once it is there

Memory on the device: the tensor until it is settled, in its encoded form too where that is another, and the arriving
copy from fetch() to load(); away from it whole pages, given back when the last reference to it goes.

Tests: tests/memory/test_offload.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from longpo_ops.memory.tiers import HOST, HostPages, SpillPages, Staging

WORKERS = 2  # threads of the disk tier: one writes or reads ahead while another serves what is wanted now


class Move(NamedTuple):
    """What happened: "keep" (stays on the device), "out", "in" (copy begun), "use" (handed to the backward)."""

    what: str
    layer: int
    tier: str
    nbytes: int


class Shape(NamedTuple):
    """All of a tensor but its bytes."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Stored:
    """A tensor that has left, held by the graph; when the graph lets it go, its pages are given back.

    The tensor is held until its copy is done (`source`), a copy on its way back until it is used (`arrival`).
    """

    def __init__(self, mover: Mover, layer: int, x: Tensor, tier: str, codec):
        self.pages: list[int] = []  # first, as __del__ asks for it whatever fails here
        flat = _flat(x)
        dense = flat.data_ptr() == x.data_ptr()
        self.shape = Shape(x.shape, x.stride() if dense else _contiguous(x.shape), x.dtype, x.device)
        self.mover, self.layer, self.tier, self.codec = mover, layer, tier, codec
        self.job: Future | None = None
        self.arrival: tuple[Tensor, object, Future | None] | None = None
        self.source: Tensor | None = codec.encode(flat)
        self.nbytes, self.version = self.source.numel(), self.source._version
        self.store = mover.host if tier == HOST else mover.disk
        self.pages = self.store.take(self.store.count(self.nbytes))
        mover.note("out", layer, tier, self.nbytes)
        self.event = mover.lane.now()
        if tier == HOST:
            self.event = mover.lane.copy(list(self._parts(self.source)), self.event)
        else:
            self.job = mover.submit(mover.write, self.source, self.pages, self.event)

    def settle(self) -> None:
        """Lets the tensor go: what is computed from here on may use its memory. Raises what writing it raised, once."""
        source, self.source = self.source, None
        if source is None:
            return
        if self.job is not None:
            _finish(self.job)
        else:
            self.mover.lane.hold(self.event)
        if source._version != self.version:
            raise RuntimeError(
                f"the input of layer {self.layer}, {tuple(self.shape.size)}, was modified in place while it was being "
                f"offloaded: use the out-of-place operation, as gradient checkpointing recomputes from this tensor"
            )

    def fetch(self) -> None:
        """Begins the copy back, unless it is on its way."""
        if self.arrival is not None:
            return
        self.settle()
        if self.job is not None:
            _finish(self.job)  # raises again, should the write have failed
        mover = self.mover
        payload = torch.empty(self.nbytes, dtype=torch.uint8, device=self.shape.device)
        mover.note("in", self.layer, self.tier, self.nbytes)
        now = mover.lane.now()  # until here the memory of `payload` may be in use by what freed it
        if self.tier == HOST:
            event = mover.lane.copy([(part, page) for page, part in self._parts(payload)], now)
            self.arrival = payload, event, None
        else:
            self.arrival = payload, None, mover.submit(mover.read, payload, self.pages, now)

    def load(self) -> Tensor:
        """The tensor again, as often as it is asked for."""
        self.fetch()
        payload, event, job = self.arrival
        if job is not None:
            self.arrival = None  # a failed read is tried anew, should anyone ask again
            _finish(job)
        else:
            self.mover.lane.hold(event)
            self.arrival = None
        self.mover.note("use", self.layer, self.tier, self.nbytes)
        flat = self.codec.decode(payload, self.shape.dtype, self.shape.size.numel())
        return flat.as_strided(self.shape.size, self.shape.stride)

    def _parts(self, payload: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Host pages and the parts of the payload that belong in them."""
        for page, part in zip(self.pages, payload.split(self.store.page_bytes), strict=True):
            yield self.store.view(page, part.numel()), part

    def __del__(self):
        """Copies under way still own what they read and write: memory and pages are free only after them."""
        if not self.pages:
            return
        give, pages = self.store.give, self.pages
        if self.tier == HOST:
            # Any thread may run this, one with another current stream too: the host itself waits. Rare, and short.
            if self.arrival is not None or self.source is not None:
                self.mover.lane.wait(self.event if self.arrival is None else self.arrival[1])
            give(pages)
            return
        jobs = [job for job in (self.job, self.arrival and self.arrival[2]) if job is not None and not job.done()]
        if jobs:
            jobs[-1].add_done_callback(lambda _: give(pages))
        else:
            give(pages)


def _finish(job: Future) -> None:
    """Waits for a thread's work. Raises its error anew: raised as it is, the error would refer to the frames it passes,
    these to the tensor, that to the work, and the work to the error: memory held until a collection of cycles."""
    error = job.exception()
    if error is not None:
        raise type(error)(*error.args) from error


def _flat(x: Tensor) -> Tensor:
    """(n,) view of a tensor without gaps in memory, in memory order; a contiguous copy of any other."""
    x = x.detach()
    order = sorted(range(x.ndim), key=lambda d: (x.stride(d), x.size(d)))
    expected = 1
    for d in order:
        if x.size(d) != 1:
            if x.stride(d) != expected:
                return x.contiguous().view(-1)
            expected *= x.size(d)
    return x.as_strided((x.numel(),), (1,))


def _contiguous(size: torch.Size) -> tuple[int, ...]:
    return torch.empty(size, device="meta").stride()


class Mover:
    """What all tensors of one handle share: the lane, the pages, the threads, and the list of what happened."""

    def __init__(self, lane, host: HostPages, disk: SpillPages | None):
        self.lane, self.host, self.disk = lane, host, disk
        self.moves: deque[Move] = deque(maxlen=8192)
        self.workers = disk and ThreadPoolExecutor(WORKERS, thread_name_prefix="longpo-spill")
        self.staging = disk and Staging(WORKERS, host.page_bytes, lane)

    def note(self, what: str, layer: int, tier: str, nbytes: int) -> None:
        self.moves.append(Move(what, layer, tier, nbytes))

    def submit(self, work: Callable, *args) -> Future:
        return self.workers.submit(work, *args)

    def write(self, payload: Tensor, pages: list[int], after) -> None:
        with self.staging.page() as stage:
            for page, part in zip(pages, payload.split(self.disk.page_bytes), strict=True):
                piece = stage[: part.numel()]
                self.lane.wait(self.lane.copy([(piece, part)], after))
                self.disk.write(page, piece)

    def read(self, payload: Tensor, pages: list[int], after) -> None:
        with self.staging.page() as stage:
            for page, part in zip(pages, payload.split(self.disk.page_bytes), strict=True):
                piece = stage[: part.numel()]
                self.disk.read(page, piece)
                self.lane.wait(self.lane.copy([(part, piece)], after))

    def close(self) -> None:
        """Ends the threads when their work is done, and frees all memory and the file; pages in use when given back."""
        if self.workers:
            self.workers.shutdown(wait=True)
            self.disk.close()
            self.staging.close()
        self.host.close()
