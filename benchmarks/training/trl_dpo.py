"""A step of DPO by TRL's DPOTrainer and by ours: seconds, peak memory and errors against float64, in the same run.

    python -m benchmarks.training.trl_dpo                          a Llama of 4 layers of width 256, V = 32,000
    python -m benchmarks.training.trl_dpo --cases tiny --rounds 3
    python -m benchmarks.training.trl_dpo --docs                   writes the table into docs/measured.md, too

    DPOTrainer        TRL's: chosen and rejected as rows of a batch, padded, the document in both; its fused head
    FusedDPOTrainer   the same with one name changed (integrations/trl.py): the document once, 6 N H V
    LongPOTrainer     ours alone (train/): objective=dpo, references computed before the first step
    flash-pref        its FlashDPOTrainer over the last TRL and transformers it takes, in an environment of its own
                      (requirements/flash.txt); on a CPU it shares the MLPs alone, as sharing attention takes flash-attn

All are given the same rows in the same order, model and options (float32 on a CPU, one pair a step, gradient checkpointing,
references precomputed, AdamW). A measurement is a process of its own; rounds alternate; seconds are the median over the steps
after the first and then over rounds, peak memory is resident bytes at the peak of train() beyond those before it: gradients,
optimizer states, activations and logits. The losses of all steps are compared with TRL's each time, or nothing is reported.
Errors are of the first step, against plain PyTorch in float64: the log-probs of both answers, summed (the further one off, in
nats), and the norm of the gradient. Not covered: GPUs, and what is computed before train().

Tests: tests/benchmarks/training/test_trl_dpo.py.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ..measure import Peak, fresh
from ..stamp import RESULTS, ROOT, host_class, stamp

TRL, FUSED, LONGPO, FLASH = SIDES = ("DPOTrainer", "FusedDPOTrainer", "LongPOTrainer", "flash-pref")
TRUTH = "float64"
TARGETS = {  # of TRL's, at most
    FUSED: {"seconds": 0.2, "peak_bytes": 0.2},
    LONGPO: {"seconds": 1 / 8, "peak_bytes": 0.15},
}
MEASURES = ("seconds", "processor_seconds", "peak_bytes")  # the second says more where a machine is shared
BETA, EOS = 0.1, 2


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
            eos_token_id=EOS,
            pad_token_id=0,
        )
    )


def token_ids(tokenizer, row: dict[str, str], side: str) -> tuple[list[int], int]:
    """The ids of prompt, answer and its end, as TRL makes them, and of how many tokens the prompt is."""
    prompt, answer = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", side))
    return [*prompt, *answer, EOS], len(prompt)


def perform(name: str, side: str) -> dict:
    """One measurement, in this process."""
    case, seconds, processor = CASES[name], [], []
    if side == TRUTH:
        return truth(case)
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter(), time.process_time()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - self.began[0])
            processor.append(time.process_time() - self.began[1])

    with tempfile.TemporaryDirectory() as folder:
        common = dict(
            output_dir=folder, use_cpu=True, bf16=False, per_device_train_batch_size=1, gradient_accumulation_steps=1,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, report_to="none",
            num_train_epochs=1, learning_rate=1e-4, lr_scheduler_type="constant", warmup_steps=0, save_strategy="no",
            logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = make_trainer(case, side, common)
        trainer.add_callback(Clock())
        trainer._get_train_sampler = lambda *data: SequentialSampler(trainer.train_dataset)
        with Peak() as peak:
            trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    first = {"logps": [steps[0][f"logps/{role}"] for role in ("chosen", "rejected")], "norm": steps[0]["grad_norm"]}
    told = {"seconds": statistics.median(seconds[1:]), "processor_seconds": statistics.median(processor[1:])}
    told["peak_bytes"] = peak.bytes
    return told | {"losses": [row["loss"] for row in steps], "first": first}


def make_trainer(case: Case, side: str, common: dict):
    tokenizer, rows, model = make_tokenizer(case.vocab), make_rows(case), make_model(case)
    if side == LONGPO:
        return longpo_trainer(tokenizer, rows, model, common)
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**common, max_length=None, precompute_ref_log_probs=True, beta=BETA)
    if side == FLASH:
        from flash_pref import FlashDPOTrainer as cls

        args.max_prompt_length = None  # 512 where nothing is said
    elif side == FUSED:
        from longpo_ops.integrations.trl import FusedDPOTrainer as cls
    else:
        cls = DPOTrainer
    return cls(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def longpo_trainer(tokenizer, rows: list[dict[str, str]], model, common: dict):
    import copy

    import numpy as np

    from longpo_ops.data import TokenizedPair, TokenSequence
    from longpo_ops.train import LongPOConfig, LongPOTrainer

    def sequence(row: dict[str, str], side: str) -> TokenSequence:
        ids, prompt = token_ids(tokenizer, row, side)
        labels = np.array(ids)
        labels[:prompt] = -100
        return TokenSequence(np.array(ids), labels)

    pairs = []
    for i, row in enumerate(rows):
        chosen, rejected = (sequence(row, side) for side in ("chosen", "rejected"))
        pairs.append(
            TokenizedPair(str(i), chosen, (rejected,), (chosen,), ((rejected,),))
        )  # the reference reads the same
    args = LongPOConfig(**common, objective="dpo", objective_options={"beta": BETA})
    return LongPOTrainer(model, args, pairs, reference_model=copy.deepcopy(model))


def truth(case: Case) -> dict:
    """The first step's summed log-probs (chosen, rejected) and its gradient's norm: plain PyTorch in float64."""
    import torch
    import torch.nn.functional as F

    tokenizer, row, model, logps = make_tokenizer(case.vocab), make_rows(case)[0], make_model(case).double(), []
    for side in ("chosen", "rejected"):
        ids, prompt = token_ids(tokenizer, row, side)
        states = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, prompt - 1 : -1]
        answer = torch.tensor(ids[prompt:])
        logps.append(model.lm_head(states).log_softmax(-1).gather(1, answer[:, None]).sum())
    rewards = [BETA * (logp - logp.detach()) for logp in logps]  # the reference is the policy before its first step
    (-F.logsigmoid(rewards[0] - rewards[1])).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return {"logps": [logp.item() for logp in logps], "norm": norm.item()}


def measure(name: str, rounds: int, flash: Path) -> dict:
    """All sides of a case, in alternation, each in a fresh process; flash-pref's by the interpreter of its environment. Raises
    RuntimeError where losses differ from TRL's, or ours or TRL's failed."""

    def run(side: str, python: str = sys.executable) -> dict:
        return fresh("benchmarks.training.trl_dpo", "--perform", name, side, python=python)

    runs: dict[str, list[dict]] = {side: [] for side in SIDES[:3]}
    row = {"case": name, "shape": asdict(CASES[name]), "truth": run(TRUTH), "sides": {}}
    if flash.exists():
        try:
            runs[FLASH] = [run(FLASH, str(flash))]
        except RuntimeError as error:
            row["sides"][FLASH] = {"status": f"failed: {error}"}
    else:
        row["sides"][FLASH] = {"status": "not installed: requirements/flash.txt says how"}
    for _ in range(rounds):
        for side in SIDES[:3]:
            runs[side].append(run(side))
            compare(side, runs[TRL][-1]["losses"], runs[side][-1]["losses"])
    for side, told in runs.items():
        compare(side, runs[TRL][0]["losses"], told[0]["losses"])
        row["sides"][side] = summary(told, runs[TRL], row["truth"])
    return row


def summary(told: list[dict], theirs: list[dict], true: dict) -> dict:
    """Medians over rounds, each as a multiple of TRL's, and the first step's errors."""
    medians = {key: statistics.median(run[key] for run in told) for key in MEASURES}
    ratios = {key: value / statistics.median(run[key] for run in theirs) for key, value in medians.items()}
    first = told[0]["first"]
    errors = {
        "logps": max(abs(a - b) for a, b in zip(first["logps"], true["logps"], strict=True)),
        "norm": abs(first["norm"] / true["norm"] - 1),
    }
    return medians | {"of_trl": ratios, "errors": errors, "rounds": told}


def compare(side: str, theirs: list[float], losses: list[float]) -> None:
    """Raises RuntimeError unless the losses of all steps are those of TRL but for rounding, which training adds up."""
    same = len(theirs) == len(losses)
    if not same or any(abs(a - b) > 2e-3 * max(1.0, abs(a)) for a, b in zip(theirs, losses, strict=True)):
        raise RuntimeError(f"the trainings differ: losses of TRL {theirs}, of {side} {losses}")


def missed(row: dict) -> list[str]:
    """Which targets, in words."""
    return [
        f"{row['case']}: {side}: {key} is {row['sides'][side]['of_trl'][key]:.3f} of TRL's, at most {most:.3f} wanted"
        for side, targets in TARGETS.items()
        for key, most in targets.items()
        if row["sides"][side]["of_trl"][key] > most
    ]


COLUMNS = (
    "prompt + answers",
    "model",
    "trainer",
    "step",
    "of TRL's",
    "peak",
    "of TRL's",
    "log-probs off by",
    "norm off by",
)


def table(rows: list[dict]) -> str:
    """Markdown: a line per trainer."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        shape = row["shape"]
        lead = (
            f"| {shape['prompt']} + 2 x {shape['answer']} | {shape['layers']} x {shape['width']}, V {shape['vocab']} |"
        )
        for side in SIDES:
            told = row["sides"][side]
            if "status" in told:
                lines.append(f"{lead} {side} | {told['status'].replace('|', '/')} | | | | | |")
                continue
            ratios, errors = told["of_trl"], told["errors"]
            lines.append(
                f"{lead} {side} | {told['seconds']:.2f} s | {ratios['seconds']:.3f} | {told['peak_bytes'] / 2**20:,.0f} MiB "
                f"| {ratios['peak_bytes']:.3f} | {errors['logps']:.0e} nats | {errors['norm']:.0e} |"
            )
    return "\n".join(lines)


def into_docs(result: dict, name: str, root: Path = ROOT) -> None:
    """The table of a result into docs/measured.md, between its markers, beside where it comes from."""
    from ..gpu.report import MEASURED, between

    machine, versions = result["hardware"], result["versions"]
    where = f"{result['date'][:10]}, {machine['processor']}, {machine['cores']} cores"
    told = f"`{result['command']}`: {where}, torch {versions['torch']}, trl {versions['trl']}; "
    told += f"[{name}.json](../benchmarks/results/{name}.json)."
    page = root / MEASURED
    page.write_text(between(page.read_text(), "trl-dpo", f"{told}\n\n{table(result['rows'])}", MEASURED))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["dpo-2k"], choices=CASES)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--flash", type=Path, default=ROOT / ".venv-flash/bin/python", help="flash-pref's interpreter")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/measured.md")
    parser.add_argument("--perform", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.perform:
        print(json.dumps(perform(*options.perform)))
        return 0
    rows = [measure(name, options.rounds, options.flash) for name in options.cases]
    result = stamp(rows=rows, targets=TARGETS)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"trl-dpo-{result['date'][:10]}-{host_class()}"
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(table(rows) + "\n")
    if options.docs:
        into_docs(result, name)
    print(table(rows), *(line for row in rows for line in missed(row)), sep="\n")
    return int(any(missed(row) for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
