"""Slabs of host memory: few mappings, huge pages, forks, locks, and limits that are told apart. How much memory there is."""

import mmap
import os
from pathlib import Path

import pytest
import torch

from longpo_ops.memory import host_memory
from longpo_ops.memory.host_memory import available_host_bytes, free_slab, make_slab, processes_here
from longpo_ops.memory.tiers import PAGE as LARGE
from longpo_ops.memory.tiers import SLAB, HostPages, Lane, Staging

from ..processes import run

PAGE = 4096
HUGE = Path("/sys/kernel/mm/transparent_hugepage")


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("\n")


def smaps(address: int) -> dict[str, list[str]]:
    """Of the mapping at this address: the name of a field -> its words."""
    found, inside = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *words = line.split()
        if not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
            inside = start <= address < end
        elif inside:
            found[first[:-1]] = words
    return found


# --- mappings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [70_000, 1])
def test_seventy_thousand_pages_are_few_mappings(at_once):
    """More than vm.max_map_count has, asked for together or one after the other."""
    before, pages = mappings(), HostPages(PAGE, 70_000 * PAGE, Lane())
    numbers = [number for _ in range(70_000 // at_once) for number in pages.take(at_once)]
    assert len(set(numbers)) == 70_000 and mappings() - before <= 100  # a 64th each, and what Python took
    for number in (*numbers[:2], *numbers[-2:]):
        pages.view(number, PAGE).fill_(number % 251)
    assert [int(pages.view(number, PAGE)[-1]) for number in numbers[-2:]] == [number % 251 for number in numbers[-2:]]
    pages.give(numbers)
    pages.close()
    assert mappings() - before <= 30


@pytest.mark.parametrize("tebibytes", [1, 2])
def test_a_large_host_has_mappings_for_its_memory(tebibytes):
    """Pages as large as in training. Nothing is written to them, so nothing is taken."""
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("this host promises no more memory than it has")
    before, pages = mappings(), HostPages(LARGE, tebibytes << 40, Lane())
    pages.reserve(pages.room())
    assert (pages.made, pages.nbytes) == (tebibytes << 16, tebibytes << 40)
    assert mappings() - before <= (tebibytes << 40) // SLAB + 30
    pages.close()
    assert mappings() - before <= 30


def test_memory_is_huge_pages_where_the_system_has_them():
    if not HUGE.exists() or "[never]" in (HUGE / "enabled").read_text():
        pytest.skip(f"{HUGE} offers no huge pages")
    slab = make_slab(32 << 20, False)
    assert "hg" in smaps(slab.data_ptr())["VmFlags"]  # asked for
    if int((HUGE / "hpage_pmd_size").read_text()) > 2 << 20:
        pytest.skip("a huge page of this system is larger than the memory that is written here")
    slab.fill_(1)
    took = int(smaps(slab.data_ptr())["AnonHugePages"][0]) * 1024
    assert took >= 8 << 20  # and given, be memory so fragmented that of sixteen twelve are not to be had


def test_memory_is_taken_as_it_is_written_to():
    slab = make_slab(16 << 20, False)
    before = rss()
    slab[: 2 << 20].fill_(1)
    assert rss() - before < 8 << 20
    slab.fill_(1)
    assert rss() - before > 12 << 20
    del slab
    assert rss() - before < 8 << 20


def rss() -> int:
    return host_memory._sizes("/proc/self/status")["VmRSS"]


def test_a_forked_child_has_none_of_it_and_frees_what_it_likes():
    """A loader's worker would copy what the parent writes to, and keep what the parent frees."""
    pages = HostPages(PAGE, 1024 * PAGE, Lane())
    numbers = pages.take(1024)
    for number in numbers:
        pages.view(number, PAGE).fill_(7)
    ends = os.pipe()
    child = os.fork()
    if not child:
        seen = sum(int(pages.view(number, PAGE).sum()) for number in numbers)
        pages.give(numbers)
        pages.close()
        os.write(ends[1], f"{seen} {pages.nbytes}".encode())
        os._exit(0)
    assert os.read(ends[0], 100) == b"0 0"
    assert os.waitpid(child, 0)[1] == 0
    assert all(int(pages.view(number, PAGE).min()) == 7 for number in numbers)
    for end in ends:
        os.close(end)


# --- locks ------------------------------------------------------------------------------------------------------------


class Runtime:
    """A CUDA runtime that refuses all but the first `slabs` slabs, and keeps the refusal as its last error, as CUDA does."""

    def __init__(self, slabs=0, frees=True):
        self.slabs, self.frees, self.last, self.launches = slabs, frees, 0, 0
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address, nbytes, flags):
        if len(self.locked) == self.slabs:
            return self.refuse()
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        del self.locked[address]
        return 0 if self.frees else self.refuse()

    def refuse(self):
        self.last = 2
        return 2

    def launch(self, *size, device):
        """What torch does after each launch: it asks for the last error, which clears it, and raises it."""
        assert device == "cuda"
        self.launches += 1
        last, self.last = self.last, 0
        if last:
            raise RuntimeError("an error of another call")

    def check_error(self, code):
        assert self.last == 0  # cleared before anything is raised
        raise RuntimeError(f"CUDA error: out of memory ({code})")


def run_on(monkeypatch, runtime) -> Runtime:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", runtime.check_error)
    monkeypatch.setattr(host_memory.torch, "ones", runtime.launch)
    return runtime


class PinnedLane(Lane):
    pinned = True


def test_a_refused_slab_leaves_no_error_for_the_next_launch(monkeypatch):
    runtime = run_on(monkeypatch, Runtime(slabs=1))
    pages = HostPages(PAGE, 10 * PAGE, PinnedLane())
    with pytest.raises(MemoryError) as refused:
        pages.take(3)
    assert str(refused.value) == (
        "the host gave 0.00391 MiB of offload memory and refused the next 0.00781 MiB (CUDA error: out of memory (2)): lower "
        "host_bytes from 0.0391 MiB and raise device_bytes or give a spill_dir"
    )
    assert (runtime.last, runtime.launches) == (0, 1)
    pages.close()
    assert runtime.launches == 1  # what is not refused launches nothing


def test_a_slab_that_cannot_be_unlocked_leaves_no_error_for_the_next_launch(monkeypatch):
    runtime = run_on(monkeypatch, Runtime(slabs=1, frees=False))
    slab = make_slab(PAGE, True)
    assert runtime.launches == 0
    with pytest.raises(RuntimeError, match="CUDA error"):
        free_slab(slab, True)
    assert (runtime.last, runtime.launches) == (0, 1)


def test_a_slab_is_locked_in_one_call_and_unlocked_with_its_last_page(monkeypatch):
    runtime = run_on(monkeypatch, Runtime(slabs=99))
    pages = HostPages(PAGE, 640 * PAGE, PinnedLane())
    numbers = pages.take(20)
    assert list(runtime.locked.values()) == [10 * PAGE] * 2
    pages.give(numbers[1:])
    pages.close()
    assert list(runtime.locked.values()) == [10 * PAGE]
    pages.give(numbers[:1])
    assert not runtime.locked
    staging = Staging(3, PAGE, PinnedLane())
    assert list(runtime.locked.values()) == [3 * PAGE]
    with staging.page() as one, staging.page() as two:
        assert one.numel() == two.numel() == PAGE and one.data_ptr() != two.data_ptr()
    staging.close()
    assert not runtime.locked


def test_a_refused_lock_names_the_limit_on_locked_memory(monkeypatch):
    run_on(monkeypatch, Runtime())
    monkeypatch.setattr(host_memory.resource, "getrlimit", lambda kind: (1 << 20, 1 << 20))
    before = mappings()
    with pytest.raises(RuntimeError, match=r"out of memory.*may lock 1 MiB of memory.*ulimit -l unlimited") as refused:
        make_slab(2 << 20, True)
    assert mappings() <= before  # the error, which is still there, does not hold it
    with pytest.raises(RuntimeError) as other:
        make_slab(PAGE, True)
    assert "ulimit" not in str(other.value) and refused


# --- limits -----------------------------------------------------------------------------------------------------------

REFUSED = """
import mmap, resource
from longpo_ops.memory.host_memory import _sizes
from longpo_ops.memory.tiers import HostPages, Lane
pages = HostPages(1 << 30, 64 << 30, Lane())
pages.take(1)
{limit}
try:
    pages.take(40)
except MemoryError as error:
    print(error)
kept = None
pages.take(1)
"""


@pytest.mark.parametrize(
    "kind, field, option, name", [("AS", "VmSize", "v", "address space"), ("DATA", "VmData", "d", "data")]
)
def test_a_limit_on_the_process_is_named(kind, field, option, name):
    limit = f"""
before = resource.getrlimit(resource.RLIMIT_{kind})
resource.setrlimit(resource.RLIMIT_{kind}, (_sizes("/proc/self/status")["{field}"] + (5 << 29), before[1]))
"""
    done = run(
        REFUSED.format(limit=limit).replace("kept = None", f"resource.setrlimit(resource.RLIMIT_{kind}, before)")
    )
    text = done.stdout
    assert "gave 3 GiB of offload memory and refused the next 38 GiB" in text, done.stderr[-2000:]
    assert f"GiB of {name} and has" in text and f"ulimit -{option} unlimited" in text and "lower host_bytes" in text
    assert done.returncode == 0, done.stderr[-2000:]  # and what was refused is not lost


def test_no_mappings_left_is_named():
    """Shared ones are not made one by the kernel, however alike. Python itself then lives on what it has set aside."""
    limit = """
objects, blocks, kept = [object() for _ in range(1 << 20)], [bytearray(1 << 16) for _ in range(256)], [None] * (1 << 17)
del objects[::2], blocks[:-1], kept[:]
try:
    while True:
        kept.append(mmap.mmap(-1, 4096, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))
except (OSError, MemoryError):
    pass
"""
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    if most > 200_000:
        pytest.skip(f"this host allows {most} mappings: too many to fill")
    done = run(REFUSED.format(limit=limit))
    assert "gave 1 GiB" in done.stdout and f"of {most} at most: raise vm.max_map_count" in done.stdout, done.stderr[
        -2000:
    ]
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_host_that_promises_only_what_it_has_is_named(monkeypatch):
    """Told by the files that such a host would have, as one process cannot make it so."""
    read = Path.read_text
    told = {"/proc/sys/vm/overcommit_memory": "2\n", "/proc/meminfo": "CommitLimit:  1000 kB\nCommitted_AS:  900 kB\n"}
    monkeypatch.setattr(Path, "read_text", lambda path, *args: told.get(str(path)) or read(path, *args))
    assert "promises 0.977 MiB" in host_memory._limit(101 << 10) and "overcommit_ratio" in host_memory._limit(101 << 10)
    assert host_memory._limit(99 << 10) == ""


# --- what there is ----------------------------------------------------------------------------------------------------


def test_processes_here_are_those_of_the_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert processes_here() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert processes_here() == 8


def test_available_memory_is_that_of_this_machine():
    with mmap.mmap(-1, PAGE):
        assert PAGE < available_host_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


GROUPS = {  # version -> what /proc/self/cgroup says, the folder where groups are, names of limit, use and cache
    "2": ("0::/jobs/job_7/step\n", "", "memory.max", "memory.current", "inactive_file"),
    "1": (
        "9:cpu,cpuacct:/else\n4:blkio,memory:/jobs/job_7/step\n0::/\n",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


@pytest.mark.parametrize("version", GROUPS)
def test_limits_of_a_batch_job_count_wherever_they_are_set(version, tmp_path):
    """Slurm's is on a group above the process's own; the group at the top has no files of its own, or a container's."""
    told, below, limit, used, cache = GROUPS[version]
    (tmp_path / "mine").write_text(told)
    top = tmp_path / "groups" / below
    for folder, most in (
        ("", None),
        ("jobs", "max" if version == "2" else str(1 << 63)),
        ("jobs/job_7", "1000"),
        ("jobs/job_7/step", "4000"),
    ):
        (top / folder).mkdir(parents=True, exist_ok=True)
        if most:
            (top / folder / limit).write_text(most + "\n")
            (top / folder / used).write_text("700\n")
            (top / folder / "memory.stat").write_text(f"anon 5\n{cache} 50\n")
    rooms = list(host_memory._group_rooms(str(tmp_path / "mine"), str(tmp_path / "groups")))
    assert min(rooms) == 350 and len(rooms) == (2 if version == "2" else 3)
    (top / limit).write_text("900")
    (top / used).write_text("700")
    (top / "memory.stat").write_text(f"{cache} 50")
    assert min(host_memory._group_rooms(str(tmp_path / "mine"), str(tmp_path / "groups"))) == 250
    assert list(host_memory._group_rooms(str(tmp_path / "none"))) == []
