"""What an objective of one's own costs beside LongPO, and a fused per-token loss beside one made of log-probs, in one run.

    python -m benchmarks.losses.own_objective [--rows 1024] [--width 1024] [--vocab 32000] [--device cpu] [--threads 2]

LongPO writes its slopes out; the own objective, with the same formula, has them from autograd. A pair has `rows` answer tokens
in all, so that nothing else is swept. The policy loss costs 6 N H V; from `linear_logprobs` and autograd it costs 8. Times are
of forward and backward; repetitions of all lines alternate. float32 on a CPU, bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longpo_ops import Answers, LongPO, Objective, fused_policy_loss, linear_logprobs, packed_objective_loss

from .beside import medians

RATIOS = {"own objective": "longpo", "fused policy": "policy by log-probs"}


@dataclass(frozen=True, kw_only=True)
class Own(Objective):
    """LongPO's formula."""

    preference_weight: float = 0.01
    beta: float = 0.1

    def losses(self, answers: Answers) -> Tensor:
        chosen, rejected = answers.pairs(self.beta * answers.log_ratios)
        return answers.mean_over_rejected(-F.logsigmoid(chosen - rejected))


def calls(rows: int, width: int, vocab: int, device: str) -> dict[str, Callable[[], None]]:
    """By name, one forward and backward."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden = draw(rows, width).to(device, dtype).requires_grad_()
    weight = (draw(vocab, width) * width**-0.5).to(device, dtype).requires_grad_()
    labels = torch.randint(vocab, (rows,), generator=generator)
    sequences = torch.arange(rows) * 2 // rows
    with torch.no_grad():  # near the policy: a clipped token has no gradient, and log-probs skip its row
        old = linear_logprobs(hidden, weight, labels).float().cpu() + 0.01 * draw(rows)
    advantages = draw(rows)
    on_device = labels.to(device), advantages.to(device), old.to(device)

    def preference(objective: Objective) -> None:
        hidden.grad = weight.grad = None
        out = packed_objective_loss(
            hidden, weight, labels, sequences, groups=torch.zeros(2, dtype=torch.int64), roles=torch.arange(2),
            num_groups=1, objective=objective, ref_logps=torch.full((2,), -10.0 * rows / 2),
        )  # fmt: skip
        out.loss.backward()

    def fused() -> None:
        hidden.grad = weight.grad = None
        fused_policy_loss(hidden, weight, labels, advantages=advantages, old_logps=old).loss.backward()

    def by_logprobs() -> None:
        hidden.grad = weight.grad = None
        ratio = (linear_logprobs(hidden, weight, labels) - on_device[2]).exp()
        clipped = ratio.clamp(0.8, 1.2)
        (-torch.minimum(ratio * on_device[1], clipped * on_device[1])).mean().backward()

    return {
        "longpo": lambda: preference(LongPO()),
        "own objective": lambda: preference(Own()),
        "policy by log-probs": by_logprobs,
        "fused policy": fused,
    }


def measure(rows: int, width: int, vocab: int, repeats: int, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """name -> (median milliseconds, multiple of what it stands beside)."""
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = medians(calls(rows, width, vocab, device), repeats, settle)
    return {name: (seconds * 1e3, seconds / found[RATIOS.get(name, name)]) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.rows} rows, {options.width} wide, V={options.vocab}, {options.device}, {options.threads} threads")
    found = measure(options.rows, options.width, options.vocab, options.repeats, options.device)
    for name, (milliseconds, multiple) in found.items():
        print(f"  {name:20s} {milliseconds:8.1f} ms  {multiple:5.3f}")


if __name__ == "__main__":
    main()
