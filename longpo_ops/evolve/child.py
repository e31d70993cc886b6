"""A stage of an evolution in a process of its own, or in several that a launcher starts: what `evolve` runs.

    python -m longpo_ops.evolve.child FOLDER                 FOLDER/task.json --> the stage's output
    torchrun --nproc-per-node 8 -m longpo_ops.evolve.child FOLDER

    FOLDER/told.json     how far it is, and its peaks of memory: of the first process, once a second
    FOLDER/ended.json    the words of the process that failed first, or none where the stage is done

Launchers flatten exit codes and write their own reports, so what became of the stage is in ended.json and nowhere else.
A process ends with what it has started once `evolve` is gone (its lock on FOLDER/parent is free), and once the launcher
is (it has another parent).

Tests: tests/evolve/test_child.py, tests/parallel/test_evolve_ranks.py.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from ..runs import disk

TASK, TOLD, ENDED, PARENT, LOG = "task.json", "told.json", "ended.json", "parent", "log"
BEAT = 1.0  # seconds between two looks at the parent, and two messages to it
GRACE = 5.0  # seconds that processes have to end by themselves


def main() -> None:
    folder = Path(sys.argv[1])
    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    threading.Thread(target=_watch, args=(folder, task["machine"]), daemon=True).start()
    logging.basicConfig(level=logging.INFO if _is_first() else logging.ERROR, format="%(message)s")
    try:
        _work(folder, task)
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        words = disk.told(error) if isinstance(error, OSError) else str(error)
        _end(folder, {"kind": _kind(error), "error": words or type(error).__name__})
        traceback.print_exc()
        _leave(1)  # a process group, or what a library left to exit, may hang
    if _is_first():
        _end(folder, {"error": None})


def machine() -> str:
    """Of which process ids and locks are known here: another string on another machine, and after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _work(folder: Path, task: dict[str, Any]) -> None:
    import torch

    from ..train.checks import check_model
    from .receipt import peaks
    from .work import from_plain, naming, perform

    if "check" in task:
        for name, plain in task["check"].items():
            with naming(name):
                run = from_plain(plain)
                check_model(run, run.config())
    else:
        news = {"fraction": 0.0, "note": ""}
        if _is_first():
            threading.Thread(target=_report, args=(folder, news, peaks), daemon=True).start()
        perform(from_plain(task), lambda fraction, note="": news.update(fraction=fraction, note=note))
        if _is_first():
            _tell(folder, news, peaks)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _kind(error: Exception) -> str:
    from ..pretrained import is_out_of_memory

    if is_out_of_memory(error):
        return "memory"
    return "told" if isinstance(error, ValueError | OSError | ImportError) else type(error).__name__


def _end(folder: Path, how: dict[str, Any]) -> None:
    """The first process to end says how."""
    try:
        with open(folder / ENDED, "x", encoding="utf-8") as file:
            json.dump(how, file)
    except FileExistsError:
        pass


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# -- beside the work ---------------------------------------------------------------------------------------------------


def _report(folder: Path, news: dict[str, Any], peaks) -> None:
    while True:
        _tell(folder, news, peaks)
        time.sleep(BEAT)


def _tell(folder: Path, news: dict[str, Any], peaks) -> None:
    host, device = peaks()
    partial = folder / f"{TOLD}.{threading.get_ident()}.partial"
    try:
        partial.write_text(json.dumps(news | {"host_bytes": host, "device_bytes": device}), encoding="utf-8")
        os.replace(partial, folder / TOLD)
    except OSError:  # the stage itself will say that the disk is full
        pass


def _watch(folder: Path, parents_machine: str) -> None:
    launcher, here = os.getppid(), machine() == parents_machine
    while os.getppid() == launcher and not (here and _is_free(folder / PARENT)):
        time.sleep(BEAT)
    print("evolve or its launcher is gone: ending", file=sys.stderr, flush=True)
    end_all_below()
    os._exit(1)


def _is_free(lock: Path) -> bool:
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except OSError:  # held, or not to be known
        return False


def end_all_below() -> None:
    """Ends what this process has started, and what that has: vLLM's engines, loaders of data."""
    import psutil

    below = psutil.Process().children(recursive=True)
    for each in below:
        each.terminate()
    for each in psutil.wait_procs(below, GRACE)[1]:
        each.kill()


if __name__ == "__main__":
    main()
