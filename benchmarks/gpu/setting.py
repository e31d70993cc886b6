"""What `make gpu-check` runs on: the GPU at full size, or the CPU with tiny shapes to rehearse the script itself.

Tests: tests/benchmarks/gpu/test_check.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from longpo_ops.ops.dispatch import choose_backend
from longpo_ops.ops.tiles import Tiles

from ..budget import DRAWS

BACKENDS = ("torch", "triton", "cuda")
ON_GPU_ONLY = ("triton", "cuda")
NO_GPU = "skipped: no GPU"


@dataclass(frozen=True)
class Setting:
    device: torch.device
    width: int  # H
    vocabularies: tuple[int, ...]  # V of the models that matter
    odd_vocab: int  # a V that no vector width divides
    rows: int  # N of the whole loss
    answers: int  # answer tokens of each of a pair's two sequences
    tile_bytes: int  # of the logits tile that epilogues and copies are timed on
    workspaces: tuple[int, ...]  # bytes
    dtype: torch.dtype
    seconds: float  # spent on each measurement, warm-up aside
    draws: int  # of every case that is judged as a whole

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def backends(self) -> Iterator[tuple[str, Tiles | str]]:
        """-> name and its tiles, or in words why there are none."""
        for name in BACKENDS:
            if name in ON_GPU_ONLY and not self.on_gpu:
                yield name, NO_GPU
                continue
            try:
                yield name, choose_backend(self.device, self.dtype, name)
            except ValueError as error:
                yield name, f"failed: {error}"


MIB = 1 << 20
FULL = Setting(
    device=torch.device("cuda"),
    width=4096,
    vocabularies=(32_000, 128_256, 151_936),
    odd_vocab=4_099,
    rows=1 << 16,
    answers=1024,
    tile_bytes=1 << 30,
    workspaces=tuple(MIB << k for k in range(8, 13)),
    dtype=torch.bfloat16,
    seconds=2.0,
    draws=DRAWS,
)
REHEARSAL = Setting(
    device=torch.device("cpu"),
    width=32,
    vocabularies=(96, 250),
    odd_vocab=131,
    rows=256,
    answers=16,
    tile_bytes=1 << 16,
    workspaces=(8 * MIB, 16 * MIB),
    dtype=torch.float32,
    seconds=0.0,
    draws=2,
)


def attempt(row: dict, compute: Callable[..., dict], *arguments) -> dict:
    """row | compute(*arguments), or the failure in words: one case that breaks does not hide the others."""
    try:
        return row | compute(*arguments)
    except torch.OutOfMemoryError:
        return row | {"status": "failed: out of memory"}
    except Exception as error:  # whatever it is belongs in the report
        return row | {"status": f"failed: {type(error).__name__}: {error}"[:500]}


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
        "peak_extra_bytes": peak,
    }


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
