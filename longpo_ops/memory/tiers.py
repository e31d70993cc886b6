"""Where offloaded bytes go: pages of host memory and of a nameless file, reached by a lane that copies.

    device tensor --lane--> host pages                       pinned, if the device is a GPU
    device tensor --lane--> one staging page --thread--> pages of the spill file

A tensor of n bytes takes ceil(n / page) pages, whatever its shape: pages are reused across layers, steps and sequence
lengths and never fragment, and at most one page per tensor is not full. Host pages are views of slabs (host_memory.py), which
PyTorch's own pinned allocator would round to powers of two. Memory: what has been reserved at most, in whole slabs, up to the
budget, until close().
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from longpo_ops.memory.host_memory import free_slab, gib, make_slab

RETRY = "Weights and optimizer are as before the step: clear the gradients and take the step again"
DEVICE, HOST, DISK = "device", "host", "disk"  # the tiers: a page belongs to one of the last two
PAGE = 16 << 20  # large enough for full copy and disk rates, small beside a checkpoint of gigabytes
SLAB = 1 << 30  # at most: a host of 2 TiB takes 2,048, where 65,530 mappings are the end of a process


# --- lanes: how copies are ordered against the computation ------------------------------------------------------------


class Lane:
    """Copies between a device and pages of host memory. On a CPU a copy is done when the call returns, and a point in
    time needs no waiting for: the events are None."""

    pinned = False

    def now(self):
        """The point that the computation queued so far will have reached."""
        return None

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after):
        """Copies each (to, from) once the computation has reached `after`. -> the point where all of it is done."""
        for to, origin in pairs:
            to.copy_(origin)
        return None

    def hold(self, event) -> None:
        """What is computed from here on comes after the event."""

    def wait(self, event) -> None:
        """Returns when the event has come."""

    def drain(self) -> None:
        """Returns when all copies are done."""


class CudaLane(Lane):
    """One side stream for both directions: copies out of and into the same page stay in order without further events."""

    pinned = True

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def now(self):
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, pairs, after):
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            for to, origin in pairs:
                to.copy_(origin, non_blocking=True)
            return self.stream.record_event()

    def hold(self, event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def wait(self, event) -> None:
        event.synchronize()

    def drain(self) -> None:
        self.stream.synchronize()


def lane_of(device: torch.device) -> Lane:
    """Raises ValueError for a device that offloading has no copies for."""
    if device.type not in ("cpu", "cuda", "meta"):  # on meta nothing is copied
        raise ValueError(f"model: its parameters are on {device}, offloading knows cpu and cuda devices")
    return CudaLane(device) if device.type == "cuda" else Lane()


# --- pages ------------------------------------------------------------------------------------------------------------


class Pages:
    """Numbered pages of one store. Those given back are taken again before new ones are made.

    give() may run in any thread and at any moment, a finaliser's too: it only appends to a deque.
    """

    def __init__(self, page_bytes: int):
        self.page_bytes, self.made, self.closed = page_bytes, 0, False
        self._free: deque[int] = deque()
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        return self.made - len(self._free)

    def count(self, nbytes: int) -> int:
        """Pages that so many bytes take."""
        return -(-nbytes // self.page_bytes)

    def room(self) -> int:
        """Pages that can still be taken."""
        raise NotImplementedError

    def reserve(self, pages: int) -> None:
        """Makes sure that so many pages are free. Raises what making them raises; nothing is lost then."""
        with self._lock:
            self._make(max(0, pages - len(self._free)))

    def take(self, pages: int) -> list[int]:
        with self._lock:
            self._make(max(0, pages - len(self._free)))
            return [self._free.popleft() for _ in range(pages)]

    def give(self, pages: Iterable[int]) -> None:
        self._free.extend(pages)
        if self.closed:
            self._drop()

    def close(self) -> None:
        """Frees what is free now, and the rest when it is given back."""
        self.closed = True
        self._drop()

    def _make(self, pages: int) -> None:
        raise NotImplementedError

    def _drop(self) -> None:
        """Frees the store behind all free pages."""
        raise NotImplementedError


class HostPages(Pages):
    """Pages of host memory within a budget in bytes, page-locked for a lane that wants it. sharers: processes of this machine
    that have the same budget, with this one.

    They are views of slabs of a 64th of the budget, 1 GiB at most: small beside the budget, and few. Page p is in slab
    p // slab_pages. A slab with a page in use outlives close().
    """

    def __init__(self, page_bytes: int, budget: int, lane: Lane, sharers: int = 1):
        super().__init__(page_bytes)
        self.budget, self.lane, self.sharers = budget, lane, sharers
        self.slab_pages = max(1, min(SLAB, budget // 64) // page_bytes)
        self._slabs: dict[
            int, tuple[Tensor, Iterator[int]]
        ] = {}  # with a count of its pages that came back after close()

    @property
    def nbytes(self) -> int:
        """What all slabs take."""
        return sum(slab.numel() for slab, _ in tuple(self._slabs.values()))

    def room(self) -> int:
        return self.budget // self.page_bytes - self.used

    def view(self, page: int, nbytes: int) -> Tensor:
        number, within = divmod(page, self.slab_pages)
        return self._slabs[number][0].narrow(0, within * self.page_bytes, nbytes)

    def _make(self, pages: int) -> None:
        while pages > 0:
            count = min(self.slab_pages, max(pages, self.budget // self.page_bytes - self.made))
            try:
                slab = make_slab(count * self.page_bytes, self.lane.pinned)
            except (OSError, RuntimeError) as error:
                raise MemoryError(
                    f"the host gave {gib(self.nbytes)} of offload memory and refused the next "
                    f"{gib(max(pages, count) * self.page_bytes)} ({error}): lower host_bytes from "
                    f"{gib(self.budget * self.sharers)} and raise device_bytes or give a spill_dir"
                ) from error
            number = len(self._slabs)
            self._slabs[number] = slab, itertools.count(1)
            self._free.extend(range(number * self.slab_pages, number * self.slab_pages + count))
            self.made, pages = self.made + count, pages - count

    def _drop(self) -> None:
        self.lane.drain()
        while self._free:
            number = self._free.popleft() // self.slab_pages
            self.made -= 1
            slab, back = self._slabs[number]
            if next(back) * self.page_bytes == slab.numel():  # of all threads that give pages back, one comes last
                del self._slabs[number]
                free_slab(slab, self.lane.pinned)


class SpillPages(Pages):
    """Pages of a file without a name in `folder`: the system frees it when this process ends, however it ends, and
    nobody can remove or rename it. Space is allocated when pages are made, so that a full disk shows before a step. sharers:
    processes of this machine that spill there, with this one; each takes its share of what is free when this is made."""

    def __init__(self, page_bytes: int, folder: str | os.PathLike, sharers: int = 1):
        super().__init__(page_bytes)
        self.folder, self.share = Path(folder), None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.folder, prefix="longpo-spill-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"spill_dir: {str(folder)!r} takes no file ({error}): give a writable folder") from error
        if sharers > 1:
            self.share = shutil.disk_usage(self.folder).free // sharers // page_bytes

    def room(self) -> int:
        free = shutil.disk_usage(self.folder).free // self.page_bytes
        return (free if self.share is None else min(free, self.share - self.made)) + len(self._free)

    def write(self, page: int, data: Tensor) -> None:
        """Raises OSError, saying where and why."""
        view, offset = memoryview(data.numpy()), page * self.page_bytes
        while view:
            try:
                done = os.pwrite(self._file.fileno(), view, offset)
            except OSError as error:
                raise self._failure(error) from error
            view, offset = view[done:], offset + done

    def read(self, page: int, data: Tensor) -> None:
        """Raises OSError, saying where and why, and for a file that has been cut short."""
        view, offset = memoryview(data.numpy()), page * self.page_bytes
        while view:
            try:
                done = os.preadv(self._file.fileno(), [view], offset)
            except OSError as error:
                raise self._failure(error) from error
            if done == 0:
                size = os.fstat(self._file.fileno()).st_size
                raise OSError(
                    errno.EIO,
                    f"the spill file in {self.folder} was cut short: it ends at byte {size}, byte {offset} was "
                    f"written. {RETRY}",
                )
            view, offset = view[done:], offset + done

    def _make(self, pages: int) -> None:
        if not pages:
            return
        try:
            os.posix_fallocate(self._file.fileno(), self.made * self.page_bytes, pages * self.page_bytes)
        except OSError as error:
            raise self._failure(error) from error
        self._free.extend(range(self.made, self.made + pages))
        self.made += pages

    def _drop(self) -> None:
        if not self.used and not self._file.closed:
            self._file.close()
            self._free.clear()
            self.made = 0

    def _failure(self, error: OSError) -> OSError:
        free, limit = shutil.disk_usage(self.folder).free, resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        small = f"; files of this process may have {gib(limit)}: raise the limit (ulimit -f unlimited)"
        known = small if error.errno == errno.EFBIG and limit != resource.RLIM_INFINITY else ""
        return OSError(
            error.errno,
            f"the spill file in {self.folder} failed: {error.strerror}{known}; {gib(free)} are free there. Free space or "
            f"give another spill_dir. {RETRY}",
            str(self.folder),
        )


class Staging:
    """A few pages, beside the budget, that bytes pass through on their way between device and disk."""

    def __init__(self, count: int, page_bytes: int, lane: Lane):
        self._lane, self._slab = lane, make_slab(count * page_bytes, lane.pinned)
        self._all = self._slab.split(page_bytes)
        self._pages: SimpleQueue[Tensor] = SimpleQueue()
        for page in self._all:
            self._pages.put(page)

    @contextmanager
    def page(self) -> Iterator[Tensor]:
        page = self._pages.get()
        try:
            yield page
        finally:
            self._pages.put(page)

    def close(self) -> None:
        for _ in self._all:
            self._pages.get()
        free_slab(self._slab, self._lane.pinned)
