"""Host memory as the system has it: how much there is, slabs of it, and by which of its limits it refuses one.

    slab   one private mapping of nbytes zeros; takes memory as it is written to, or at once where it is page-locked

Slabs are few and large because a process has 65,530 mappings (vm.max_map_count) and a page-locking call costs a driver's time.
Private and not shared, for three reasons. Huge pages: distributions offer them to private memory that asks (`enabled` in
/sys/kernel/mm/transparent_hugepage is "madvise" or "always"), to shared memory not (`shmem_enabled` is "never"). Freeing: what
a process forked while a shared mapping was there, a loader's worker, keeps the memory until it ends itself. And what is private
is never a file of /dev/shm, whatever that one's size. A fork would make private memory copy-on-write, hence WIPE_ON_FORK: the
child has the addresses, to unmap as it likes, and zeros there; the parent's memory stays as it is, huge and locked.

Not covered: pools of huge pages that an administrator set aside (hugetlbfs); which NUMA node memory comes from.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

WIPE_ON_FORK = 18  # MADV_WIPEONFORK of linux/mman.h, which Python's mmap does not name
UNKNOWN = 1 << 62


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB" if nbytes >= 2**27 else f"{nbytes / 2**20:.3g} MiB"


# --- slabs ------------------------------------------------------------------------------------------------------------


def make_slab(nbytes: int, pinned: bool) -> Tensor:
    """(nbytes,) uint8 zeros, straight from the system, so that freeing gives them back at once. pinned: page-locked for CUDA,
    in one call.

    Raises OSError or, from CUDA, RuntimeError, naming the limit that was met, where one is known, and what to do about it.
    """
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}{_limit(nbytes)}") from error
    for advice in (mmap.MADV_HUGEPAGE, WIPE_ON_FORK):
        with suppress(OSError):  # a kernel built without it
            mapping.madvise(advice)
    slab = torch.frombuffer(mapping, dtype=torch.uint8)
    if pinned:
        try:
            _check_cuda(int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), nbytes, 0)))
        except RuntimeError as error:
            del slab, mapping  # the error refers to this frame
            raise RuntimeError(f"{error}{_lock_limit(nbytes)}") from error
    return slab


def free_slab(slab: Tensor, pinned: bool) -> None:
    """Unlocks it; its memory is the system's again when nothing refers to it. Raises RuntimeError if CUDA refuses."""
    if pinned:
        _check_cuda(int(torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())))


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


# --- limits -----------------------------------------------------------------------------------------------------------


def _limit(nbytes: int) -> str:
    """Which limit refuses a mapping of so many bytes, and what to do. The system's error is the same for all of them."""
    taken = _sizes("/proc/self/status")
    for name, kind, field, option in (
        ("address space", resource.RLIMIT_AS, "VmSize", "v"),
        ("data", resource.RLIMIT_DATA, "VmData", "d"),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and taken.get(field, 0) + nbytes > limit:
            return (
                f"; this process may have {gib(limit)} of {name} and has {gib(taken.get(field, 0))}: raise the limit "
                f"(ulimit -{option} unlimited)"
            )
    try:
        most, strict = (int(Path("/proc/sys/vm", name).read_text()) for name in ("max_map_count", "overcommit_memory"))
        with open("/proc/self/maps", "rb") as lines:  # one by one: a process at its end has no room for all
            mappings = sum(1 for _ in lines)
    except (OSError, ValueError):
        return ""
    if mappings >= most - 1:
        return f"; this process has {mappings} mappings, of {most} at most: raise vm.max_map_count (sysctl -w)"
    host = _sizes("/proc/meminfo")
    if strict == 2 and host.get("Committed_AS", 0) + nbytes > host.get("CommitLimit", UNKNOWN):
        return (
            f"; this host promises {gib(host['CommitLimit'])} to all its processes and has promised "
            f"{gib(host['Committed_AS'])}: raise vm.overcommit_ratio, or set vm.overcommit_memory to 0"
        )
    return ""


def _lock_limit(nbytes: int) -> str:
    """Not every driver counts page-locked memory against the limit of the process: a likely cause, no proof."""
    limit, taken = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], _sizes("/proc/self/status")
    if limit == resource.RLIM_INFINITY or taken.get("VmLck", 0) + taken.get("VmPin", 0) + nbytes <= limit:
        return ""
    return f"; this process may lock {gib(limit)} of memory, if the driver counts it: raise the limit (ulimit -l unlimited)"


def _sizes(file: str) -> dict[str, int]:
    """The fields of a file of /proc that are sizes, in bytes. Empty where there is no such file."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


# --- what there is ----------------------------------------------------------------------------------------------------


def processes_here() -> int:
    """Processes of this run on this machine, as launchers say it; all of the group's where none does."""
    told = os.environ.get("LOCAL_WORLD_SIZE")
    return int(told) if told else torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def available_host_bytes() -> int:
    """Host memory that can be taken without swapping, the limits of a container or a batch job included. 2^62 where it is
    unknown."""
    return min([_sizes("/proc/meminfo").get("MemAvailable", UNKNOWN), *_group_rooms()])


def _group_rooms(mine: str = "/proc/self/cgroup", mounted: str = "/sys/fs/cgroup") -> Iterator[int]:
    """Bytes that each control group this process is in still has room for, its own and those above it, of both versions of
    control groups. A container may see its own at the top, whatever path it is told."""
    try:
        lines = Path(mine).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            top, names, cache = Path(mounted), ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in kinds.split(","):
            top, cache = Path(mounted, "memory"), "total_inactive_file"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                with suppress(
                    OSError, ValueError, KeyError
                ):  # "max" is no limit; the top of the machine has no such files
                    limit, used = (int((folder / name).read_text()) for name in names)
                    stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                    yield limit - used + int(stat[cache])
