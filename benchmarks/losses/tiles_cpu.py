"""The row functions of the C++ back-end against a plain copy of the same tile, in one run.

    python -m benchmarks.losses.tiles_cpu [--rows 512] [--vocab 32000] [--threads 1 2] [--backend cpu]

Prints medians in milliseconds and as multiples of z.copy_(), which reads and writes the tile once; a divergence is
measured against the copy of both of its tiles. The repetitions of all lines alternate, so that a busy machine weighs on
all alike. Memory: four tiles.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from longpo_ops.ops.dispatch import choose_backend
from longpo_ops.ops.tiles import Divergence, LogitMap


def cases(tiles, rows: int, vocab: int):
    """name -> (what to restore before each run, what to time, how many tiles the copy has)."""
    source, teacher = torch.randn(rows, vocab) * 3, torch.randn(rows, vocab) * 3
    z, t = source.clone(), teacher.clone()
    labels, g = torch.randint(0, vocab, (rows,)), torch.randn(rows)
    plain, bias, cap = LogitMap(), LogitMap(bias=torch.randn(vocab)), LogitMap(softcap=30.0)
    f32, bf16 = torch.float32, torch.bfloat16
    stats = tiles.logps(z, labels, plain)[1]

    def restore():
        z.copy_(source)
        t.copy_(teacher)

    def divergence(kind):
        return lambda: tiles.divergence_(z, t, g, Divergence(kind), plain, plain, f32, True, False)

    yield "copy", restore, lambda: z.copy_(source), 1
    yield "logps", restore, lambda: tiles.logps(z, labels, plain), 1
    yield "gradient_", restore, lambda: tiles.gradient_(z, labels, stats, g, plain, f32), 1
    yield "logps_gradient_", restore, lambda: tiles.logps_gradient_(z, labels, g, plain, f32), 1
    yield "logps_gradient_, bias", restore, lambda: tiles.logps_gradient_(z, labels, g, bias, f32), 1
    yield "logps_gradient_, softcap", restore, lambda: tiles.logps_gradient_(z, labels, g, cap, f32), 1
    yield "logps_gradient_, bfloat16", restore, lambda: tiles.logps_gradient_(z, labels, g, plain, bf16), 1
    for kind in ("forward", "reverse", "jsd"):
        yield f"divergence_, {kind}", restore, divergence(kind), 2


def measure(tiles, rows: int, vocab: int, repeats: int) -> dict[str, tuple[float, float]]:
    """name -> (median milliseconds, multiple of the copy)."""
    todo = list(cases(tiles, rows, vocab))
    seconds = {name: [] for name, *_ in todo}
    for repeat in range(repeats + 1):
        for name, restore, run, _ in todo:
            restore()
            start = time.perf_counter()
            run()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {name: (medians[name] * 1e3, medians[name] / (copies * medians["copy"])) for name, _, _, copies in todo}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--backend", default="cpu")
    options = parser.parse_args()
    tiles = choose_backend(torch.device("cpu"), torch.float32, options.backend)
    print(f"{options.rows} x {options.vocab} float32, back-end {tiles.name}, torch {torch.__version__}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"{threads} thread{'s' * (threads > 1)}")
        for name, (milliseconds, multiple) in measure(tiles, options.rows, options.vocab, options.repeats).items():
            print(f"  {name:26s} {milliseconds:8.2f} ms  {multiple:5.2f} copies")


if __name__ == "__main__":
    main()
