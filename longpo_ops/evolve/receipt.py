"""A stage's receipt: what it was asked to do, whether it is done, and what it has cost so far.

    OUT/ROUND/STAGE.json    {"settings": ..., "done": ..., "seconds": ..., "host_bytes": ..., "device_bytes": ...}

Cost. host_bytes is the peak of this process's resident memory while the stage ran: the kernel keeps it (VmHWM) and is
told to begin anew at the start of each stage (/proc/self/clear_refs), so nothing is sampled and no peak is missed. Where a
system has no such thing it is the peak since the process began, and `exact` is false. device_bytes is torch's peak of
allocated memory on the CUDA device. Of a stage in processes of its own (processes.py) they are those of the first one.
Processes that an engine starts (vLLM's) are in neither. A killed stage's cost is that of its last whole second or two, and
the next attempt adds its seconds and raises its peaks.
"""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engines.address import shown
from ..runs.journal import changes, write_atomically
from ..runs.usage import peak_bytes

BEAT = 2.0  # seconds between two writes of a running stage's cost


@dataclass(frozen=True)
class Cost:
    """Seconds, and peaks in bytes; device_bytes is 0 without CUDA."""

    seconds: float = 0.0
    host_bytes: int = 0
    device_bytes: int = 0
    exact: bool = True


@dataclass
class Receipt:
    """Of the stage whose output lies in `out`. settings: what decides that output; a receipt of others is refused."""

    out: Path
    settings: dict[str, Any]
    done: bool = False
    cost: Cost = field(default_factory=Cost)

    @classmethod
    def open(cls, out: Path, settings: dict[str, Any]) -> Receipt:
        """As it was written, or new where there is no output. Raises ValueError where it is of other settings."""
        receipt = cls(out, json.loads(json.dumps(settings)))
        if not receipt.path.exists() or not out.is_dir():
            return receipt
        try:
            kept = json.loads(receipt.path.read_text(encoding="utf-8"))
            before, receipt.done, receipt.cost = kept["settings"], kept["done"], Cost(**kept["cost"])
            if before.get("judge"):  # earlier versions wrote the address as it came
                before["judge"] = shown(before["judge"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{receipt.path} is damaged; remove it, and its stage goes on from what {out} holds"
            ) from None
        if changed := changes(before, receipt.settings):
            raise ValueError(
                f"{out} was begun with other settings ({changed}); use those, or another out, or remove "
                "that folder to do this stage again"
            )
        return receipt

    @property
    def path(self) -> Path:
        return self.out.with_name(f"{self.out.name}.json")

    def write(self) -> None:
        """Put it on the disk as it is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"settings": self.settings, "done": self.done, "cost": asdict(self.cost)}
        write_atomically(self.path, (json.dumps(kept, indent=1, allow_nan=False) + "\n").encode())

    @contextmanager
    def measured(self, apart: Callable[[], tuple[int, int]] | None = None) -> Iterator[None]:
        """Within it time and memory are counted towards the stage's cost; left without an exception, it is done. apart: gives
        the peaks of a stage that runs in another process.
        """
        _free()
        exact = _reset_peaks() if apart is None else True
        before, began, over = self.cost, time.monotonic(), threading.Event()

        def count() -> None:
            host, device = (apart or peaks)()
            self.cost = Cost(
                before.seconds + time.monotonic() - began,
                max(before.host_bytes, host),
                max(before.device_bytes, device),
                before.exact and exact,
            )

        def beat() -> None:
            while not over.wait(BEAT):
                count()
                with suppress(OSError):  # the stage itself will say that the disk is full
                    self.write()

        self.write()
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
            self.done = True
        finally:
            over.set()
            thread.join()
            count()
            with nullcontext() if self.done else suppress(OSError):  # what ended the stage tells more
                self.write()
            _free()


def _free() -> None:
    """What the stage before holds must not count towards the next one, nor take its room on the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _reset_peaks() -> bool:
    """Whether the host's peak begins anew."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def peaks() -> tuple[int, int]:
    """Bytes, of this process and of its CUDA device."""
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return peak_bytes(), device
