"""Offload and tiling against plain gradient checkpointing: peak memory, time, copies; loss excluded.

    python -m benchmarks.training.offload                     the 8-layer model at 32K tokens, on this machine's CPU or GPU
    python -m benchmarks.training.offload --tokens 65536 --window 0 --layers 4 --width 4096 --rows 8192     on a GPU
    python -m benchmarks.training.offload --only-peers          plain checkpointing and others' offload alone (offload_peers.py)

One process per setting: forward of the model's body, backward from a random gradient; a short step first, so that
code loaded on first use does not count. Peaks are beyond weights and their gradients, which are there in every setting.
CPU: resident bytes, with an allocator that gives large blocks back when they are freed, as otherwise the history of its
heap is measured. GPU: allocated device bytes, host bytes beside them. Gradients must be bitwise those of plain
checkpointing where only offload is on; with tiling they are compared in norm. On a GPU they are those of one more step,
by kernels that repeat themselves. Attention is windowed by default, so that 32K tokens take a minute on a CPU; all
settings share it. Others' offload is a row beside ours, with whether its gradients are plain checkpointing's to the bit (an
environment of its own may have other products); one that cannot run says why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from longpo_ops.memory.tiers import PAGE, HostPages, lane_of

from ..measure import Peak, fresh
from ..stamp import RESULTS, ROOT, host_class, stamp
from .offload_peers import PEERS, attach, counted

SETTINGS = {  # name -> offload's tier (None: plain checkpointing), tiled, attention saved
    "checkpointing": (None, False, False),
    "checkpointing + tiles": (None, True, False),
    "offload to disk": ("disk", False, False),
    "offload to disk + tiles": ("disk", True, False),
    "offload to host + tiles": ("host", True, False),
    "offload to host + tiles + attention saved": ("host", True, True),
}
CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # what repeatable() needs, and as much as there is without it
REQUIRED = 0.5  # of plain checkpointing's peak, on a CPU, with disk as the far tier
SLOWDOWN = 1.03  # on a GPU, of offload to the host against keeping all on the device, at
LONG = 65536  # tokens and up
RATE = 0.9  # on a GPU, of one large pinned copy's rate
COMPARED = (  # by make gpu-check (benchmarks/gpu/steps.py), in one process: the first keeps what the others offload
    "checkpointing + tiles",
    "offload to host + tiles",
    "offload to host + tiles + attention saved",
)


@dataclass(frozen=True)
class Shape:
    """A Mistral-like model and its input."""

    tokens: int
    layers: int = 8
    width: int = 256
    window: int = 256  # 0: full attention
    rows: int = 2048
    threads: int = 1
    steps: int = 2
    page_bytes: int = PAGE
    device: str = "cpu"
    dtype: str = "float32"


def perform(shape: Shape, setting: str) -> dict:
    """One setting, measured in this process."""
    from longpo_ops.attention import use_shared_prefix
    from longpo_ops.memory import offload_activations, tile_layers

    torch.set_num_threads(shape.threads)
    tier, tiled, save_attention = SETTINGS.get(setting, (None, False, False))
    model = make_model(shape)
    use_shared_prefix(model)
    ids = torch.randint(64, (1, shape.tokens), device=shape.device)
    upstream = torch.randn(1, shape.tokens, shape.width, device=shape.device, dtype=model.dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    around, moved = attach(setting, model)
    if tiled:
        tile_layers(model, rows=shape.rows)
    with tempfile.TemporaryDirectory() as folder:
        options = dict(host_bytes=0, spill_dir=folder) if tier == "disk" else {}
        handle = tier and offload_activations(
            model, save_attention=save_attention, page_bytes=shape.page_bytes, **options
        )
        seconds, peak = [], 0

        def step(rows: int) -> None:
            with around:
                model.model(ids[:, :rows], use_cache=False).last_hidden_state.backward(upstream[:, :rows])
            if shape.device != "cpu":
                torch.cuda.synchronize()

        for rows in [shape.tokens // 32] + [shape.tokens] * shape.steps:
            clear_gradients(model)
            with DevicePeak(shape.device) as mark:
                start = time.perf_counter()
                step(rows)
                seconds.append(time.perf_counter() - start)
            peak = max(peak, mark.bytes)
        if shape.device != "cpu":
            clear_gradients(model)
            with repeatable():
                step(shape.tokens)
        result = {"peak_bytes": peak, "seconds": seconds[-1], "gradients": digest(model), "norm": norm(model)}
        result |= counted(moved)
        if handle:
            out = [move.nbytes for move in handle.moves if move.what == "out"][-shape.layers :]
            result |= {"host_bytes": handle.host_bytes, "disk_bytes": handle.disk_bytes}
            result |= {"offloaded_bytes": sum(out), "used_bytes_after": handle.used_bytes}
            handle.remove()
    return result


def make_model(shape: Shape):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    heads = max(1, shape.width // 128)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=shape.width,
        intermediate_size=shape.width * 7 // 2,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=shape.tokens,
        sliding_window=shape.window or None,
    )
    with torch.device(shape.device):
        return MistralForCausalLM._from_config(config, dtype=getattr(torch, shape.dtype)).train()


def clear_gradients(model) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


@contextmanager
def repeatable() -> Iterator[None]:
    """Kernels that give the same bits every time: the fastest backward of attention adds in whatever order blocks end."""
    os.environ.update(CUBLAS)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class DevicePeak(Peak):
    """Peak bytes beyond those at the start: of the process on a CPU, of the allocator on a GPU."""

    def __init__(self, device: str):
        self.cuda = device != "cpu"

    def __enter__(self):
        if not self.cuda:
            return super().__enter__()
        torch.cuda.reset_peak_memory_stats()
        self.start = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *exc):
        if not self.cuda:
            return super().__exit__(*exc)
        self.bytes = torch.cuda.max_memory_allocated() - self.start


def digest(model) -> str:
    """Of all gradients' bytes."""
    total = hashlib.sha256()
    for p in model.model.parameters():
        total.update(p.grad.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def norm(model) -> float:
    return float(torch.stack([p.grad.double().norm() for p in model.model.parameters()]).norm())


def measure(shape: Shape, setting: str, seconds: float | None = None, python: str = sys.executable) -> dict:
    """One setting, in a process of its own."""
    order = json.dumps([asdict(shape), setting])
    heap = {"MALLOC_MMAP_THRESHOLD_": str(1 << 22), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
    try:
        environment = heap | CUBLAS
        return fresh(
            "benchmarks.training.offload", "--order", order, seconds=seconds, environment=environment, python=python
        )
    except RuntimeError as error:
        raise RuntimeError(f"{setting}: {error}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{setting}: no result within {seconds:.0f} s") from None


def measure_peer(shape: Shape, name: str, plain: dict, python: Path) -> dict:
    """A peer's row beside plain checkpointing's: {"status"} alone where it cannot be had or moves nothing. python: of the
    environment of those that need one of their own."""
    own = PEERS[name].own_environment
    if own and not python.exists():
        return {"status": "not installed: requirements/offload.txt says how"}
    try:
        result = measure(shape, name, python=str(python) if own else sys.executable)
    except RuntimeError as error:
        return {"status": f"failed: {error}".replace(f"{name}: ", "", 1)}
    if "status" in result:
        return {"status": result["status"]}
    same = result["gradients"] == plain["gradients"]
    times, share = (result[key] / plain[key] for key in ("seconds", "peak_bytes"))
    error = abs(result["norm"] / plain["norm"] - 1)
    return result | {"times": times, "share": share, "same_bits": same, "norm_error": error}


def told(name: str, row: dict) -> str:
    """A peer's line."""
    if "status" in row:
        return f"{name:42} {row['status']}"
    peak, seconds = row["peak_bytes"] / 2**20, row["seconds"]
    bits = "same bits" if row["same_bits"] else f"norm off by {row['norm_error']:.0e}"
    return f"{name:42} peak {peak:8.0f} MiB ({row['share']:4.2f})   {seconds:7.2f} s ({row['times']:4.2f})   {bits}"


def copy_rates(device: str, nbytes: int = 1 << 30, page_bytes: int = PAGE) -> dict:
    """Bytes per second of page-wise copies out of and into the device, and of one copy of all bytes. The best of three."""
    lane = lane_of(torch.device(device))
    pages = HostPages(page_bytes, nbytes, lane)
    numbers = pages.take(nbytes // page_bytes)
    there = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    here = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=lane.pinned)
    views = [pages.view(number, page_bytes) for number in numbers]
    parts = there.split(page_bytes)
    rates = {}
    for name, pairs in {
        "out": list(zip(views, parts, strict=True)),
        "out, one copy": [(here, there)],
        "in": list(zip(parts, views, strict=True)),
        "in, one copy": [(there, here)],
    }.items():
        seconds = []
        for _ in range(3):
            lane.drain()
            start = time.perf_counter()
            lane.copy(pairs, lane.now())
            lane.drain()
            seconds.append(time.perf_counter() - start)
        rates[name] = nbytes / min(seconds)
    pages.give(numbers)
    del views, pairs
    pages.close()
    return rates


def verdict(results: dict[str, dict], rates: dict[str, float], shape: Shape) -> str:
    """ "passed", or what is wrong."""
    plain = results["checkpointing"]
    if results.get("offload to disk", plain)["gradients"] != plain["gradients"]:
        return "failed: offload changed the gradients of plain checkpointing"
    for name, result in results.items():
        if abs(result["norm"] - plain["norm"]) > 1e-3 * plain["norm"]:
            return f"failed: {name}: the gradients' norm is {result['norm']}, of plain checkpointing {plain['norm']}"
        if result.get("used_bytes_after"):
            return f"failed: {name}: {result['used_bytes_after']} bytes are still held after the step"
    if shape.device == "cpu":
        share = results["offload to disk + tiles"]["peak_bytes"] / plain["peak_bytes"]
        if share > REQUIRED:
            return f"failed: the peak is {share:.2f} of plain checkpointing's, at most {REQUIRED} required"
        return "passed"
    slower = results["offload to host + tiles"]["seconds"] / results["checkpointing + tiles"]["seconds"]
    if shape.tokens >= LONG and slower > SLOWDOWN:
        return f"failed: offload takes {slower:.3f} times as long as keeping all, at most {SLOWDOWN} required"
    slow = [way for way in ("out", "in") if rates[way] < RATE * rates[f"{way}, one copy"]]
    return f"failed: copies {slow} are below {RATE} of one pinned copy's rate" if slow else "passed"


def settings_for(shape: Shape) -> list[str]:
    """Those that run: windowed attention on a CPU is no single operator whose output could be saved."""
    return [name for name, (_, _, saves) in SETTINGS.items() if not (saves and shape.window and shape.device == "cpu")]


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256, help="hidden size")
    parser.add_argument("--window", type=int, default=256, help="of attention; 0 for full attention")
    parser.add_argument("--rows", type=int, default=2048, help="rows per tile")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="the last one is timed, the peak is that of all")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--only-peers", action="store_true", help="plain checkpointing and others' offload")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-offload/bin/python", help="that has the peers")
    parser.add_argument("--order", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    order, python, only_peers = given.pop("order"), given.pop("python"), given.pop("only_peers")
    if order:
        fields, setting = json.loads(order)
        print(json.dumps(perform(Shape(**fields), setting)))
        return
    shape = Shape(**given)
    rates, results, peers = {} if only_peers else copy_rates(shape.device), {}, {}
    print("  ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items()))
    for setting in settings_for(shape)[: 1 if only_peers else None]:
        results[setting] = measure(shape, setting)
        peak, seconds = results[setting]["peak_bytes"], results[setting]["seconds"]
        share = peak / results["checkpointing"]["peak_bytes"]
        print(f"{setting:42} peak {peak / 2**20:8.0f} MiB ({share:4.2f})   {seconds:7.2f} s", flush=True)
    for name in PEERS:
        peers[name] = measure_peer(shape, name, results["checkpointing"], python)
        print(told(name, peers[name]), flush=True)
    status = "passed" if only_peers else verdict(results, rates, shape)
    print(status)
    report = stamp(shape=asdict(shape), status=status, bytes_per_second=rates, results=results, peers=peers)
    path = RESULTS / f"{report['date'][:10]}-offload-{'peers-' * only_peers}{host_class()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    if status != "passed":
        raise SystemExit(1)


if __name__ == "__main__":
    main()
