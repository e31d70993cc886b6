"""Several ranks of one gloo process group, for tests: forked warm, met by a file, and named when one of them fails or hangs.

    def worker(folder):                 # a function of a module, run on every rank inside the group
        ...                             # dist.get_rank() and collectives as anywhere
        return results                  # anything torch.save takes

    one, two = run_ranks(worker, 2, tmp_path)

A file of tests starts its ranks once (a fixture of scope "module") with all its cases inside. Ranks have the environment of a
launcher (RANK, LOCAL_RANK, WORLD_SIZE, ...), so transformers and accelerate find their group; `gpus_of_cpus` is the prelude
for accelerate's FSDP2 and meshes, the folder GPUS on PYTHONPATH the same for runs of the real command line.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import runpy
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from tests.processes import SERVER

GPUS = Path(__file__).with_name("gpus")  # for PYTHONPATH of runs of the real command line: what gpus_of_cpus does
GRACE = 5.0  # seconds that the others have once a rank has failed


class RanksFailed(AssertionError):
    """Some ranks raised, died or hung; `told` says of each that did what was seen, the first one first."""

    def __init__(self, told: dict[int, str]):
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in told.items()))
        self.told = told


def gpus_of_cpus() -> None:
    """A prelude: passes gloo on CPUs off as an accelerator's group, as accelerate has FSDP2 and meshes for those only."""
    runpy.run_path(str(GPUS / "sitecustomize.py"))


def run_ranks(
    function: Callable,
    ranks: int,
    *arguments: object,
    environment: dict[str, str] | None = None,
    prelude: Callable[[], None] | None = None,
    hang: float = 60.0,
    timeout: float = 400.0,
) -> list:
    """function(*arguments) on each rank -> what each returned.

    environment, prelude: set and called before the group is made. hang: seconds that a collective may wait for a rank.
    timeout: seconds for everything. Raises RanksFailed with tracebacks, exit codes, and the stacks of ranks that hang.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = (folder, ranks, function, arguments, environment or {}, prelude, hang)
        processes = [SERVER.Process(target=_perform, args=(rank, *given)) for rank in range(ranks)]
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):  # the server's, if these are its first
            for process in processes:
                process.start()
        try:
            told = _watch(processes, folder, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if told:
            raise RanksFailed(told)
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(ranks)]


def _watch(processes: list, folder: Path, end: float) -> dict[int, str]:
    """Waits for all, GRACE seconds beyond the first failure or until `end` -> what is to be told of those that failed."""
    told: dict[int, str] = {}
    while any(process.exitcode is None for process in processes) and time.monotonic() < end:
        for rank, process in enumerate(processes):
            if process.exitcode and rank not in told:
                end = end if told else min(end, time.monotonic() + GRACE)
                told[rank] = _failure(folder, rank, process.exitcode)
        time.sleep(0.01)
    hung = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for rank in hung:
        os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(0.5 * bool(hung))  # they write their stacks
    told |= {rank: f"still running; its stack:\n{_read(folder / f'{rank}.stack')}" for rank in hung}
    return told | {
        rank: _failure(folder, rank, process.exitcode)
        for rank, process in enumerate(processes)
        if process.exitcode and rank not in told
    }


def _failure(folder: Path, rank: int, code: int) -> str:
    return _read(folder / f"{rank}.error") or f"ended with exit code {code}\n{_read(folder / f'{rank}.stack')}"


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _perform(rank: int, folder: Path, ranks: int, function, arguments, environment, prelude, hang: float) -> None:
    """In the child."""
    gc.freeze()  # what was imported is no garbage
    with open(folder / f"{rank}.stack", "w") as stack:
        faulthandler.enable(stack)
        faulthandler.register(signal.SIGUSR1, stack)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        os.environ.update({"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"} | environment)
        torch.set_num_threads(1)
        try:
            if prelude is not None:
                prelude()
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=hang),
            )
            torch.save(function(*arguments), folder / f"{rank}.result")
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
            stack.flush()
            os._exit(1)  # at once: an ordinary exit would wait for the group's threads
