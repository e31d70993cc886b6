"""What `make gpu-check` runs on: a GPU at full size, or the CPU with tiny shapes to rehearse the script itself.

Tests: tests/benchmarks/gpu/test_check.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from longpo_ops.memory.host_memory import available_host_bytes
from longpo_ops.ops.dispatch import choose_backend
from longpo_ops.ops.tiles import Tiles

from ..budget import DRAWS

BACKENDS = ("triton", "cuda", "torch")  # those that only a GPU can judge first
OPT_IN = "scaled"  # a candidate: bfloat16 alone, and the triton back-end but for its chunks
ON_GPU_ONLY = ("triton", "cuda", OPT_IN)
NO_GPU = "skipped: no GPU"
MIB, GIB = 1 << 20, 1 << 30


class Elsewhere(NamedTuple):
    """A back-end of another machine, whose rows are listed and not computed."""

    name: str
    linear_logps: bool | None


@dataclass(frozen=True)
class Setting:
    device: torch.device
    card: str  # whose costs are planned with: H100, H200 or CPU
    device_bytes: int
    host_bytes: int
    width: int  # H
    vocabularies: tuple[int, ...]  # V of the models that matter, the first worth most
    odd_vocab: int  # a V that no vector width divides
    rows: int  # N of the whole loss
    few_rows: int  # N of a loss that is one chunk
    answers: int  # answer tokens of each of a pair's two sequences
    tile_bytes: int  # of the logits tile that epilogues and copies are timed on
    dtype: torch.dtype
    seconds: float  # spent on each measurement, warm-up aside
    draws: int  # of every case that is judged as a whole

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def elsewhere(self) -> bool:
        """Whether it is of another machine than this one."""
        return self.on_gpu and not torch.cuda.is_available()

    def backends(self) -> Iterator[tuple[str, Tiles | Elsewhere | str]]:
        """-> name and its tiles, or in words why there are none."""
        return ((name, self.backend(name)) for name in BACKENDS)

    def backend(self, name: str) -> Tiles | Elsewhere | str:
        """Its tiles, or in words why there are none."""
        if self.elsewhere:
            return Elsewhere(name, name == "triton" or None)
        if name in ON_GPU_ONLY and not self.on_gpu:
            return NO_GPU
        try:
            return choose_backend(self.device, self.dtype, name)
        except ValueError as error:
            return f"failed: {error}"


H100 = Setting(
    device=torch.device("cuda"),
    card="H100",
    device_bytes=85_017_624_576,  # 79.2 GiB, what 81,559 MiB leave
    host_bytes=120 * GIB,
    width=4096,
    vocabularies=(128_256, 32_000, 151_936),
    odd_vocab=4_099,
    rows=1 << 16,
    few_rows=4096,
    answers=1024,
    tile_bytes=1 << 30,
    dtype=torch.bfloat16,
    seconds=0.3,
    draws=DRAWS,
)
H200 = replace(H100, card="H200", device_bytes=150_109_880_320)  # 139.8 GiB
CARDS = {setting.card: setting for setting in (H100, H200)}
REHEARSAL = Setting(
    device=torch.device("cpu"),
    card="CPU",
    device_bytes=1 << 62,
    host_bytes=1 << 62,
    width=32,
    vocabularies=(250, 96),
    odd_vocab=131,
    rows=256,
    few_rows=64,
    answers=16,
    tile_bytes=1 << 16,
    dtype=torch.float32,
    seconds=0.0,
    draws=2,
)


def setting_here(host_bytes: int | None = None) -> Setting:
    """The setting of this machine's first GPU; of cards without one, that of the H100 with this card's memory. host_bytes: of
    the host in all, where more can be had than is available now."""
    properties = torch.cuda.get_device_properties(0)
    card = next((card for card in reversed(CARDS) if card in properties.name), "H100")
    host = host_bytes or available_host_bytes()
    return replace(CARDS[card], device_bytes=properties.total_memory, host_bytes=host)


def measure(setting: Setting, run: Callable, prepare: Callable = lambda: None) -> dict:
    """Median time of run(*prepare()) and its peak memory beyond what was there. prepare is not timed.

    Two runs warm up (compilation, caches), the second for the memory; then at least five more, until `seconds` have
    gone into them, each between two CUDA events (on CPU: one to warm up, two by perf_counter, no memory).
    """

    def arguments():
        prepared = prepare()
        return prepared if isinstance(prepared, tuple) else ()

    run(*arguments())
    peak = None
    given = arguments()
    if setting.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*given)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    times = []
    while len(times) < (5 if setting.on_gpu else 2) or (sum(times) < setting.seconds and len(times) < 200):
        given = arguments()
        times.append(_gpu_seconds(run, given) if setting.on_gpu else _cpu_seconds(run, given))
    return {
        "status": "measured",
        "milliseconds": statistics.median(times) * 1e3,
        "fastest_milliseconds": min(times) * 1e3,
        "repeats": len(times),
        "milliseconds_runs": [round(each * 1e3, 4) for each in times],
        "peak_extra_bytes": peak,
    }


def measure_seconds(setting: Setting, one: float) -> float:
    """What `measure` takes for a run of so many seconds, compiles aside."""
    return 2 * one + max(5 * one, setting.seconds)


def _cpu_seconds(run: Callable, given: tuple) -> float:
    start = time.perf_counter()
    run(*given)
    return time.perf_counter() - start


def _gpu_seconds(run: Callable, given: tuple) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run(*given)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
