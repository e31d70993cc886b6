"""Questions about one document, and several answers to each, as one tree against separate sequences: seconds and peak memory of
forward, loss and backward, in the same run.

    python -m benchmarks.training.tree                  4 questions with 4 answers each, and with 16
    python -m benchmarks.training.tree --cases 4x4 --rounds 5

Of each question the first answer is preferred to the others (DPO, references of 0); loss and head are the same fused ones on
both sides. "separate" is every sequence by itself through the model's own sdpa attention, question by question: the answers of
one are compared, so their graphs wait for one backward. "tree" is data.pack_tree of all, one forward and one backward.
How many rows of the body that saves is arithmetic: with prefix P, Q questions of q tokens, A answers of a tokens each

    Q A (P + q + a)      P + Q q + Q A a + Q A - 1      rows, the latter with a repeated token for each tail but the first

A process for each measurement, rounds that alternate, medians, peak memory, and gradients compared each time as in
shared_prefix.py. Not covered: offload, tiles and whole steps with an optimizer.

Tests: tests/benchmarks/training/test_shared_prefix.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .shared_prefix import Case, Study, main, make_model, timed

TARGETS = {"faster": 8}  # at least


@dataclass(frozen=True)
class Tree(Case):
    """questions of `question` tokens, each with `answers` of `tail` tokens."""

    question: int = 16
    questions: int = 4
    answers: int = 4

    @property
    def rows(self) -> tuple[int, int]:
        """Of separate sequences and of the tree, where questions and answers begin differently."""
        count = self.questions * self.answers
        tree = self.prefix + self.questions * self.question + count * self.tail + count - 1
        return count * (self.prefix + self.question + self.tail), tree


SMALL = dict(prefix=2048, tail=64, width=128, layers=4, heads=4, vocab=1024, steps=1)
CASES = {"4x4": Tree(**SMALL), "4x16": Tree(**SMALL, answers=16)}


def make_sequences(case: Tree) -> list[list]:
    """Of each question its sequences, the preferred one first."""
    from longpo_ops.data import TokenSequence

    rng = np.random.default_rng(0)
    document, made = rng.integers(case.vocab, size=case.prefix), []
    for number in range(case.questions):
        prompt = np.concatenate([document, [number], rng.integers(case.vocab, size=case.question - 1)])
        made.append([])
        for answer in range(case.answers):
            ids = np.concatenate([prompt, [answer], rng.integers(case.vocab, size=case.tail - 1)])
            made[-1].append(TokenSequence(ids, np.where(np.arange(len(ids)) < len(prompt), -100, ids)))
    return made


def perform(name: str, side: str, gradients: str) -> dict:
    """One measurement, in this process. Writes loss and gradients to a file."""
    from longpo_ops import DPO, attach, packed_preference_loss
    from longpo_ops.attention import use_shared_prefix
    from longpo_ops.data import pack_tree
    from longpo_ops.train.forward import run

    case = CASES[name]
    model = attach(make_model(case))
    made = make_sequences(case)
    chosen, rejected = [first for first, *_ in made], [each for _, *others in made for each in others]
    pair = torch.arange(case.questions).repeat_interleave(case.answers - 1)
    if side == "tree":
        use_shared_prefix(model)
        batches = [(pack_tree([*chosen, *rejected]), pair)]
    else:
        batches = [
            (pack_tree(*([each] for each in of_one)), torch.zeros(case.answers - 1, dtype=torch.int64))
            for of_one in made
        ]

    def step() -> float:
        total = 0.0
        for batch, rejected_pair in batches:
            count, device = len(batch.answer_spans), model.device

            def compute(hidden, head, batch=batch, rejected_pair=rejected_pair, count=count, device=device):
                return head(
                    hidden,
                    (batch.labels, batch.segments),
                    loss=packed_preference_loss,
                    num_chosen=count - len(rejected_pair),
                    rejected_pair=rejected_pair,
                    ref_chosen_logps=torch.zeros(count - len(rejected_pair), device=device),
                    ref_rejected_logps=torch.zeros(len(rejected_pair), device=device),
                    objective=DPO(),
                    num_pairs=case.questions,
                ).loss

            loss, _ = run(model, batch, compute, device)
            loss.backward()
            total += float(loss.detach())
        return total

    return timed(model, step, case.steps, gradients) | {"rows": sum(batch.layout.length for batch, _ in batches)}


def table(rows: list[dict]) -> str:
    lines = [
        "| questions x answers | tokens | separate rows | tree | fewer | separate | tree | faster | processor time "
        "| separate peak | tree |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape, alone, tree = row["shape"], row["separate"], row["tree"]
        many, few = (row[f"{side}_rounds"][0]["rows"] for side in ("separate", "tree"))
        tokens = " + ".join(str(shape[part]) for part in ("prefix", "question", "tail"))
        lines.append(
            f"| {shape['questions']} x {shape['answers']} | {tokens} | {many:,} | {few:,} | {many / few:.1f}x | "
            f"{alone['seconds']:.2f} s | {tree['seconds']:.2f} s | {row['faster']:.1f}x | "
            f"{row['less_processor_time']:.1f}x less | "
            f"{alone['peak_bytes'] / 2**20:.0f} MiB | {tree['peak_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


STUDY = Study("benchmarks.training.tree", "tree", CASES, ("separate", "tree"), perform, table, TARGETS)

if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
