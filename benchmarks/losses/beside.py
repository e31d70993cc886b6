"""What each output beside the log-prob costs, and each term of a cross-entropy, as multiples of the plain call in one run.

    python -m benchmarks.losses.beside [--rows 512] [--width 1024] [--vocab 32000] [--threads 2] [--repeats 7]

Times are of forward and backward, float32; the repetitions of all lines alternate, so that a busy machine weighs on all
alike. Medians. Memory: inputs, gradients and the default workspace.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from longpo_ops import linear_cross_entropy, linear_logprobs

LINES = {  # name -> what it is a multiple of, and what to ask for
    "cross-entropy": ("cross-entropy", {}),
    "class weights": ("cross-entropy", {"class_weights": True}),
    "label smoothing": ("cross-entropy", {"label_smoothing": 0.1}),
    "z-loss": ("cross-entropy", {"z_loss_weight": 1e-4}),
    "all three": ("cross-entropy", {"label_smoothing": 0.1, "z_loss_weight": 1e-4, "class_weights": True}),
    "log-probs": ("log-probs", {}),
    "predicted": ("log-probs", {"outputs": ("predicted",)}),
    "logsumexp": ("log-probs", {"outputs": ("logsumexp",)}),
    "entropy": ("log-probs", {"outputs": ("entropy",)}),
    "all outputs": ("log-probs", {"outputs": ("entropy", "logsumexp", "predicted")}),
}


def calls(rows: int, width: int, vocab: int) -> dict[str, Callable[[], None]]:
    """By name, one forward and backward."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) * width**-0.5).requires_grad_()
    labels = torch.randint(vocab, (rows,), generator=generator)
    classes = torch.rand(vocab, generator=generator)

    def run(plain: str, options: dict) -> None:
        hidden.grad = weight.grad = None
        if plain == "cross-entropy":
            options = options | ({"class_weights": classes} if "class_weights" in options else {})
            linear_cross_entropy(hidden, weight, labels, **options).backward()
            return
        told = linear_logprobs(hidden, weight, labels, **options)
        found = [told] if isinstance(told, torch.Tensor) else [x for x in told[:3] if x is not None]
        sum(x.mean() for x in found).backward()

    return {name: lambda line=line: run(*line) for name, line in LINES.items()}


def measure(rows: int, width: int, vocab: int, repeats: int) -> dict[str, tuple[float, float]]:
    """name -> (median milliseconds, multiple of the plain call)."""
    seconds: dict[str, list[float]] = {name: [] for name in LINES}
    todo = calls(rows, width, vocab)
    for repeat in range(repeats + 1):
        for name, run in todo.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {name: (medians[name] * 1e3, medians[name] / medians[plain]) for name, (plain, _) in LINES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.rows} rows, {options.width} wide, V={options.vocab}, float32, {options.threads} threads")
    for name, (milliseconds, multiple) in measure(options.rows, options.width, options.vocab, options.repeats).items():
        print(f"  {name:16s} {milliseconds:8.1f} ms  {multiple:5.3f}")


if __name__ == "__main__":
    main()
