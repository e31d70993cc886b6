"""A pair as one sequence against a pair as two: seconds and peak memory of one training step, in the same run.

    python -m benchmarks.training.shared_prefix                      the tiny model and one of realistic width
    python -m benchmarks.training.shared_prefix --cases tiny --rounds 5           exit status 1 where a target is missed

Both steps read the same pair with the same model (random weights, float32 on CPU): forward, LongPO loss with NLL,
backward. "two" is chosen and rejected sequence one after the other through the model's own sdpa attention, their
answers' log-probs and the NLL from the same fused loss, so that what differs is the shared prefix alone. Every
measurement is a process of its own; rounds alternate, and numbers are medians over them; processor time is kept beside
seconds, as it says more on a machine that does other work. Peak memory is resident bytes
at the step's peak (on a GPU allocated bytes) beyond those before its forward: all but weights and inputs. Loss and
gradients of the two are compared each time, or nothing is reported. Not covered: offload and tiles (offload.py), whole
steps with an optimizer (step.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..measure import Peak, fresh
from ..stamp import RESULTS, host_class, stamp

TARGETS = {"faster": 1.7, "memory": 0.6}  # at least, at most


@dataclass(frozen=True)
class Case:
    """prefix, tail: tokens that chosen and rejected share, and of each answer. The rest is a Llama's shape."""

    prefix: int
    tail: int
    width: int
    layers: int
    heads: int
    vocab: int
    steps: int  # timed ones in each process, after one that warms up


CASES = {
    "tiny": Case(prefix=2048, tail=64, width=128, layers=4, heads=4, vocab=1024, steps=5),
    "wide": Case(prefix=2048, tail=64, width=1024, layers=4, heads=16, vocab=32000, steps=1),
}


def make_model(case: Case):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.width,
        intermediate_size=3 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads // 2,
        max_position_embeddings=2 * case.prefix,
    )
    return LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")


def make_pair(case: Case):
    from longpo_ops.data import TokenizedPair, TokenSequence

    rng = np.random.default_rng(0)
    prompt = rng.integers(case.vocab, size=case.prefix)
    sequences = []
    for _ in range(2):
        ids = np.concatenate([prompt, rng.integers(case.vocab, size=case.tail)])
        labels = np.where(np.arange(len(ids)) < case.prefix, -100, ids)
        sequences.append(TokenSequence(ids, labels, ids))
    return TokenizedPair("pair", sequences[0], (sequences[1],))


def shared_step(model, case: Case):
    """-> a function that computes the loss of the pack."""
    from longpo_ops import attach, packed_preference_loss
    from longpo_ops.attention import use_shared_prefix
    from longpo_ops.data import pack

    use_shared_prefix(model)
    attach(model)
    batch, references = pack([make_pair(case)]), torch.zeros(1, device=model.device)
    ids, positions = batch.input_ids.to(model.device), batch.position_ids.to(model.device)

    def compute(hidden, head):
        return head(
            hidden[0],
            (batch.labels, batch.segments),
            loss=packed_preference_loss,
            num_chosen=1,
            rejected_pair=torch.tensor(batch.rejected_pair),
            nll_weights=batch.nll_weights,
            ref_chosen_logps=references,
            ref_rejected_logps=references,
        )

    return lambda: (
        model(ids, position_ids=positions, shared_prefix_layout=batch.layout, use_cache=False, compute=compute).loss
    )


def two_step(model, case: Case):
    """-> a function that computes the loss of two separate sequences."""
    from longpo_ops import attach

    attach(model)
    pair, references = make_pair(case), torch.zeros(1, device=model.device)
    sequences = (pair.chosen, pair.rejected[0])
    ids = [torch.from_numpy(sequence.ids)[None].to(model.device) for sequence in sequences]
    labels = tuple(torch.from_numpy(sequence.labels)[None] for sequence in sequences)
    nll = torch.from_numpy(pair.chosen.nll_labels)[None]

    def step():
        chosen = model(ids[0], use_cache=False).last_hidden_state

        def compute(rejected, head):
            return head(
                (chosen, rejected), labels, ref_chosen_logps=references, ref_rejected_logps=references, nll_labels=nll
            )

        return model(ids[1], use_cache=False, compute=compute).loss

    return step


def perform(name: str, side: str, gradients: str) -> dict:
    """One measurement, in this process. Writes loss and gradients to a file."""
    case = CASES[name]
    model = make_model(case)
    compute = {"shared": shared_step, "two": two_step}[side](model, case)

    def step() -> float:
        loss = compute()
        loss.backward()
        return float(loss.detach())

    return timed(model, step, case.steps, gradients)


def timed(model, step: Callable[[], float], steps: int, gradients: str) -> dict:
    """Medians of so many steps after one that warms up. step: leaves gradients and gives the loss, which waits for a GPU."""
    seconds, processor, memory = [], [], []
    for i in range(1 + steps):
        model.zero_grad(set_to_none=True)
        with Peak() as peak:
            _start_gpu_peak()
            start, used = time.perf_counter(), time.process_time()
            value = step()
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - used)
        memory.append(_gpu_peak() if torch.cuda.is_available() else peak.bytes)
        if i == 0:
            saved = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
            torch.save((value, saved), gradients)
            del saved
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    times = {"seconds": statistics.median(seconds[1:]), "processor_seconds": statistics.median(processor[1:])}
    return times | {"peak_bytes": max(memory[1:]), "weight_bytes": weights}


def _start_gpu_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        _start_gpu_peak.before = torch.cuda.memory_allocated()


def _gpu_peak() -> int:
    return torch.cuda.max_memory_allocated() - _start_gpu_peak.before


class Study(NamedTuple):
    """Two sides of some cases, the slower first. module: whose --perform measures one; file: what results are called."""

    module: str
    file: str
    cases: dict[str, Case]
    sides: tuple[str, str]
    perform: Callable[[str, str, str], dict]
    table: Callable[[list[dict]], str]
    targets: dict[str, float]


def measure(study: Study, name: str, rounds: int, folder: Path) -> dict:
    """Both sides of a case, in alternation, each in a fresh process."""
    files = {side: folder / f"{name}-{side}.pt" for side in study.sides}
    runs: dict[str, list[dict]] = {side: [] for side in files}
    for _ in range(rounds):
        for side, file in files.items():
            try:
                runs[side].append(fresh(study.module, "--perform", name, side, str(file)))
            except RuntimeError as error:
                raise RuntimeError(f"{name}, {side}: {error}") from None
    slow, fast = study.sides
    error = compare(files[slow], files[fast])
    row = {
        "case": name,
        "shape": vars(study.cases[name]),
        "weight_bytes": runs[slow][0]["weight_bytes"],
        "error": error,
    }
    for side, results in runs.items():
        keys = ("seconds", "processor_seconds", "peak_bytes")
        row[side] = {key: statistics.median(r[key] for r in results) for key in keys}
        row[f"{side}_rounds"] = results
    row["faster"] = row[slow]["seconds"] / row[fast]["seconds"]
    row["less_processor_time"] = row[slow]["processor_seconds"] / row[fast]["processor_seconds"]
    row["memory"] = row[fast]["peak_bytes"] / row[slow]["peak_bytes"]
    return row


def compare(two: Path, shared: Path) -> float:
    """Largest difference of a gradient over its parameter's largest. RuntimeError if that is more than rounding."""
    (loss_a, a), (loss_b, b) = torch.load(two), torch.load(shared)
    error = max(float((a[n] - b[n]).abs().max() / a[n].abs().max()) for n in a)
    if a.keys() != b.keys() or not abs(loss_a - loss_b) <= 1e-5 * abs(loss_a) or not error <= 1e-3:
        raise RuntimeError(f"the two steps differ: losses {loss_a} and {loss_b}, gradients by {error:.1e}")
    return error


def table(rows: list[dict]) -> str:
    lines = [
        "| case | prefix + tails | model | two sequences | shared prefix | faster | memory of two | shared | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape, two, one = row["shape"], row["two"], row["shared"]
        lines.append(
            f"| {row['case']} | {shape['prefix']} + 2 x {shape['tail']} | {shape['layers']} x {shape['width']}, "
            f"V {shape['vocab']} | {two['seconds']:.3f} s | {one['seconds']:.3f} s | {row['faster']:.2f}x | "
            f"{two['peak_bytes'] / 2**20:.0f} MiB | {one['peak_bytes'] / 2**20:.0f} MiB | {row['memory']:.2f} |"
        )
    return "\n".join(lines)


def missed(rows: list[dict], targets: dict[str, float]) -> list[str]:
    """The targets that are not reached, in words: `faster` is at least its number, others at most theirs."""
    return [
        f"{row['case']}: {name} {row[name]:.2f}, {'at least' if name == 'faster' else 'at most'} {bound} required"
        for row in rows
        for name, bound in targets.items()
        if (row[name] < bound if name == "faster" else row[name] > bound)
    ]


STUDY = Study("benchmarks.training.shared_prefix", "shared-prefix", CASES, ("two", "shared"), perform, table, TARGETS)


def main(study: Study, about: str | None, arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(study.cases), choices=study.cases)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--perform", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.perform:
        print(json.dumps(study.perform(*options.perform)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(study, name, options.rounds, Path(folder)) for name in options.cases]
    result = stamp(rows=rows, rounds=options.rounds, targets=study.targets, missed=missed(rows, study.targets))
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{study.file}-{result['date'][:10]}-{host_class()}"
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(study.table(rows) + "\n")
    print("\n".join([study.table(rows), *result["missed"]]))
    return int(bool(result["missed"]))


if __name__ == "__main__":
    raise SystemExit(main(STUDY, __doc__))
