"""Where offloaded bytes go: pages of host memory and pages of a nameless file, and the lane that copies them.

    device tensor --lane--> host pages                       pinned, if the device is a GPU
    device tensor --lane--> one staging page --thread--> pages of the spill file

A tensor of n bytes takes ceil(n / page) pages, whatever its shape: pages are reused across layers, steps and sequence
lengths and never fragment, and at most one page per tensor is not full. Pinning page by page avoids the powers of two
that PyTorch's own pinned allocator rounds to. Memory: what has been reserved at most, up to the budget, until close().
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

RETRY = "Weights and optimizer are as before the step: clear the gradients and take the step again"
DEVICE, HOST, DISK = "device", "host", "disk"  # the tiers: a page belongs to one of the last two
PAGE = 16 << 20  # large enough for full copy and disk rates, small beside a checkpoint of gigabytes


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB" if nbytes >= 2**27 else f"{nbytes / 2**20:.3g} MiB"


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
    that have the same budget, with this one."""

    def __init__(self, page_bytes: int, budget: int, lane: Lane, sharers: int = 1):
        super().__init__(page_bytes)
        self.budget, self.lane, self.sharers = budget, lane, sharers
        self._memory: dict[int, Tensor] = {}

    def room(self) -> int:
        return self.budget // self.page_bytes - self.used

    def view(self, page: int, nbytes: int) -> Tensor:
        return self._memory[page][:nbytes]

    def _make(self, pages: int) -> None:
        for done in range(pages):
            try:
                memory = make_page(self.page_bytes, self.lane.pinned)
            except (OSError, RuntimeError) as error:
                missing = (pages - done) * self.page_bytes
                raise MemoryError(
                    f"the host gave {gib(len(self._memory) * self.page_bytes)} of offload memory and refused the next "
                    f"{gib(missing)} ({error}): lower host_bytes from {gib(self.budget * self.sharers)} and raise device_bytes "
                    "or give a spill_dir"
                ) from error
            self._memory[self.made] = memory
            self._free.append(self.made)
            self.made += 1

    def _drop(self) -> None:
        self.lane.drain()
        while self._free:
            free_page(self._memory.pop(self._free.popleft()), self.lane.pinned)
            self.made -= 1


def make_page(nbytes: int, pinned: bool) -> Tensor:
    """(nbytes,) uint8, straight from the system, so that freeing gives it back at once."""
    page = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
    if pinned:
        _check_cuda(int(torch.cuda.cudart().cudaHostRegister(page.data_ptr(), nbytes, 0)))
    return page


def free_page(page: Tensor, pinned: bool) -> None:
    if pinned:
        _check_cuda(int(torch.cuda.cudart().cudaHostUnregister(page.data_ptr())))


def _check_cuda(code: int) -> None:
    """Raises for a call of the runtime that was refused, and leaves nothing of it behind."""
    if code:
        _clear_cuda_error()
        torch.cuda.check_error(code)


def _clear_cuda_error() -> None:
    """The runtime keeps a refusal as this thread's last error, and torch asks for that after each launch: the next kernel
    would fail for it. torch has no binding of cudaGetLastError, and a library opened by name need not be the runtime that
    torch is linked with. So a kernel is launched here, whose check reads the error and thereby clears it."""
    with suppress(RuntimeError):
        torch.ones((), device="cuda")


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
        free = shutil.disk_usage(self.folder).free
        return OSError(
            error.errno,
            f"the spill file in {self.folder} failed: {error.strerror}; {gib(free)} are free there. Free space or give "
            f"another spill_dir. {RETRY}",
            str(self.folder),
        )


class Staging:
    """A few pages, beside the budget, that bytes pass through on their way between device and disk."""

    def __init__(self, count: int, page_bytes: int, lane: Lane):
        self._lane, self._count = lane, count
        self._pages: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(count):
            self._pages.put(make_page(page_bytes, lane.pinned))

    @contextmanager
    def page(self) -> Iterator[Tensor]:
        page = self._pages.get()
        try:
            yield page
        finally:
            self._pages.put(page)

    def close(self) -> None:
        for _ in range(self._count):
            free_page(self._pages.get(), self._lane.pinned)


def processes_here() -> int:
    """Processes of this run on this machine, as launchers say it; all of the group's where none does."""
    told = os.environ.get("LOCAL_WORLD_SIZE")
    return int(told) if told else torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def available_host_bytes() -> int:
    """Host memory that can be taken without swapping, the limit of a container included. 2^62 where it is unknown."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 1 << 62
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" without a limit
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        return min(free, limit - int((group / "memory.current").read_text()) + int(cache))
    except (OSError, ValueError, KeyError):
        return free
