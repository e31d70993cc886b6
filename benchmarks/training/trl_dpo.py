"""FusedDPOTrainer beside TRL's own DPOTrainer: seconds of a step and peak memory of a training, in the same run.

    python -m benchmarks.training.trl_dpo                          a Llama of 4 layers of width 256, V = 32,000
    python -m benchmarks.training.trl_dpo --cases tiny --rounds 1

Both are given the same rows, model and DPOConfig (float32 on a CPU, one pair a step, gradient checkpointing as TRL has it by
default, references precomputed, AdamW), and differ in the name of the trainer alone. A measurement is a process of its own;
rounds alternate; seconds are the median over the steps after the first and then over rounds, peak memory is resident bytes at
the peak of train() beyond those before it: gradients, optimizer states, activations and logits. The losses of all steps are
compared each time, or nothing is reported. Not covered: GPUs, and what is computed before train().
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ..measure import Peak, fresh
from ..stamp import RESULTS, host_class, stamp

TARGETS = {"seconds": 0.2, "peak_bytes": 0.2}  # ours over TRL's, at most
SIDES = ("trl", "ours")


@dataclass(frozen=True)
class Case:
    """prompt, answer: tokens. The rest is a Llama's shape."""

    prompt: int
    answer: int
    width: int
    layers: int
    heads: int
    vocab: int
    steps: int  # timed ones, after one that warms up


CASES = {
    "dpo-2k": Case(prompt=2048, answer=64, width=256, layers=4, heads=8, vocab=32000, steps=4),
    "tiny": Case(prompt=128, answer=8, width=32, layers=2, heads=4, vocab=500, steps=2),
}


def make_tokenizer(vocab: int):
    """A word w7 is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = ["<pad>", "<unk>", "</s>"]
    words = {word: i for i, word in enumerate([*named, *(f"w{i}" for i in range(vocab - len(named)))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def make_rows(case: Case) -> list[dict[str, str]]:
    draw = random.Random(0)
    text = lambda n: " ".join(f"w{draw.randrange(case.vocab - 3)}" for _ in range(n))  # noqa: E731
    rows = range(1 + case.steps)
    return [
        {"prompt": text(case.prompt), **{s: f" {text(case.answer)} " for s in ("chosen", "rejected")}} for _ in rows
    ]


def make_model(case: Case):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=case.vocab,
            hidden_size=case.width,
            intermediate_size=case.width * 43 // 16,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            num_key_value_heads=case.heads // 2,
            max_position_embeddings=2 * (case.prompt + case.answer),
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def perform(name: str, side: str) -> dict:
    """One measurement, in this process."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from longpo_ops.integrations.trl import FusedDPOTrainer

    case, seconds = CASES[name], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, per_device_train_batch_size=1, report_to="none", max_length=None,
            num_train_epochs=1, learning_rate=1e-4, lr_scheduler_type="constant", save_strategy="no", logging_steps=1,
            disable_tqdm=True, precompute_ref_log_probs=True, dataloader_pin_memory=False,
        )  # fmt: skip
        rows, tokenizer = Dataset.from_list(make_rows(case)), make_tokenizer(case.vocab)
        cls = {"trl": DPOTrainer, "ours": FusedDPOTrainer}[side]
        trainer = cls(make_model(case), args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()])
        with Peak() as peak:
            trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": peak.bytes, "losses": losses}


def measure(name: str, rounds: int, run=None) -> dict:
    """Both sides of a case, in alternation, each in a fresh process. Raises RuntimeError where their losses differ."""
    run = run or (lambda side: fresh("benchmarks.training.trl_dpo", "--perform", name, side))
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            runs[side].append(run(side))
        compare(*(runs[side][-1]["losses"] for side in SIDES))
    row = {"case": name, "shape": asdict(CASES[name]), "rounds": runs}
    for key in TARGETS:
        theirs, ours = (statistics.median(each[key] for each in runs[side]) for side in SIDES)
        row[key] = {"trl": theirs, "ours": ours, "ratio": ours / theirs}
    return row


def compare(theirs: list[float], ours: list[float]) -> None:
    """Raises RuntimeError unless the losses of all steps are those of TRL but for rounding, which training adds up."""
    if len(theirs) != len(ours) or any(abs(a - b) > 2e-3 * max(1.0, abs(a)) for a, b in zip(theirs, ours, strict=True)):
        raise RuntimeError(f"the trainings differ: losses of TRL {theirs}, ours {ours}")


def table(rows: list[dict]) -> str:
    lines = [
        "| case | prompt + answers | model | TRL's step | FusedDPOTrainer's | ratio | TRL's peak | FusedDPOTrainer's | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape, time_, memory = row["shape"], row["seconds"], row["peak_bytes"]
        mib = {side: memory[side] / 2**20 for side in SIDES}
        lines.append(
            f"| {row['case']} | {shape['prompt']} + 2 x {shape['answer']} | {shape['layers']} x {shape['width']}, "
            f"V {shape['vocab']} | {time_['trl']:.2f} s | {time_['ours']:.2f} s | {time_['ratio']:.2f} | "
            f"{mib['trl']:,.0f} MiB | {mib['ours']:,.0f} MiB | {memory['ratio']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["dpo-2k"], choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--perform", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.perform:
        print(json.dumps(perform(*options.perform)))
        return 0
    rows = [measure(name, options.rounds) for name in options.cases]
    result = stamp(rows=rows, rounds=options.rounds, targets=TARGETS)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"trl-dpo-{result['date'][:10]}-{host_class()}"
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(table(rows) + "\n")
    print(table(rows))
    return int(any(row[key]["ratio"] > target for row in rows for key, target in TARGETS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
