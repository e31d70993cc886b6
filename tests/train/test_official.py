"""Step for step: the trainer under the published recipe, on official rows, against the paper's equations on full logits.

made text -> rows with the official sets' columns, on disk -> train(TrainRun(recipe="official")) in float64
                                                          -> Eq. 12-14 pair by pair, torch's optimizer, clipping, cosine
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from longpo_ops.train.run import TrainRun, train

from ..attention.dense import TrueFloat64
from .tiny import ROOT, write_home

X, END = -100, "<|eot_id|>"
STEPS, RATE, THETA = 5, 3e-4, 1e6
WORDS = (ROOT / "LICENSE").read_text().split()

# -- official rows -----------------------------------------------------------------------------------------------------


def columns(tokenizer, turns: list[tuple[str, str]]) -> dict[str, list[int]]:
    """A conversation in the official columns: labels are answers with their ends, lm_labels all but role markers."""
    columns = {"input_ids": [], "labels": [], "lm_labels": []}

    def add(text: str, in_labels: bool, in_lm_labels: bool) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for name, kept in (("input_ids", True), ("labels", in_labels), ("lm_labels", in_lm_labels)):
            columns[name] += ids if kept else [X] * len(ids)

    add("<|begin_of_text|>", False, False)
    for user, answer in turns:
        add("<|start_header_id|>user<|end_header_id|>\n\n", False, False)
        add(user, False, True)
        add(END + "<|start_header_id|>assistant<|end_header_id|>\n\n", False, False)
        add(answer + END, True, True)
    return columns | {"attention_mask": [1] * len(columns["input_ids"])}


def padded(rows: list[dict[str, list[int]]], pad: int) -> dict[str, list[list[int]]]:
    """Short inputs of a record as the official sets store them: a row per turn, all as long as the longest."""
    fill = {"input_ids": pad, "labels": X, "attention_mask": 0}
    longest = max(len(row["input_ids"]) for row in rows)
    return {name: [row[name] + [value] * (longest - len(row[name])) for row in rows] for name, value in fill.items()}


def official_row(tokenizer, rng: random.Random, turns: int) -> dict[str, list]:
    def words(least: int, most: int) -> str:
        start = rng.randrange(len(WORDS) - most)
        return " ".join(WORDS[start : start + rng.randint(least, most)])

    chunks = [words(8, 20) for _ in range(turns)]
    questions = [f"As told above, what follows {words(1, 3)}?" for _ in range(turns)]
    row = {}
    for kind in ("chosen", "rejected"):
        answers = [words(2, 14) for _ in range(turns)]
        users = ["\n\n\n".join(chunks) + "\n\n" + questions[0], *questions[1:]]
        short = [columns(tokenizer, [(f"{c}\n\n{q}", a)]) for c, q, a in zip(chunks, questions, answers, strict=True)]
        row |= {f"{kind}_{n}": v for n, v in columns(tokenizer, list(zip(users, answers, strict=True))).items()}
        row |= {f"ref_{kind}_{n}": v for n, v in padded(short, tokenizer.eos_token_id).items()}
    return row


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A float64 model with gradients that are clipped, and rows for five steps of eight pairs of one to three turns."""
    home = write_home(tmp_path_factory.mktemp("home"), torch.float64)
    model = load(home)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() == 2):
            weight *= 5
    model.save_pretrained(home / "model")
    tokenizer, rng = AutoTokenizer.from_pretrained(home / "model"), random.Random(0)
    rows = [official_row(tokenizer, rng, turns=1 + i % 3) for i in range(8 * STEPS)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), home / "official.parquet")
    return home


@pytest.fixture(scope="module")
def rows(home) -> list[dict]:
    """The rows as they are on disk, and what the frozen reference says of their short inputs."""
    rows, reference = pa.parquet.read_table(home / "official.parquet").to_pylist(), load(home)
    with TrueFloat64():
        refs = [{kind: reference_sum(reference, row, kind) for kind in ("chosen", "rejected")} for row in rows]
    return [row | {"refs": ref} for row, ref in zip(rows, refs, strict=True)]


def load(home: Path, theta: float | None = None) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(home / "model", dtype=torch.float64, attn_implementation="eager")
    if theta is not None:
        model.config.rope_parameters = model.config.rope_parameters | {"rope_theta": theta}
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


# -- the paper's equations -----------------------------------------------------------------------------------------------


def logps(model, ids: list[int], labels: list[int]) -> torch.Tensor:
    """log p of the labelled tokens, each from the row before it."""
    ids, labels = torch.tensor([ids]), torch.tensor(labels[1:])
    rows = F.log_softmax(model(ids, torch.ones_like(ids), use_cache=False).logits[0, :-1], -1)
    return rows[labels != X, labels[labels != X]]


def reference_sum(reference, row: dict[str, list], kind: str) -> float:
    """log pi_S of all turns, each behind its own short input, without its padding."""
    names = ("input_ids", "labels", "attention_mask")
    turns = zip(*(row[f"ref_{kind}_{name}"] for name in names), strict=True)
    with torch.no_grad():
        return sum(float(logps(reference, ids[: sum(m)], labels[: sum(m)]).sum()) for ids, labels, m in turns)


def pair_loss(policy, row: dict, beta: float, nll_tokens: str) -> torch.Tensor:
    """Eq. 12-14 of one pair: (3,) its preference loss, the mean NLL of its chosen sequence, and 0.01 of the one plus the
    other."""
    chosen, rejected = (
        logps(policy, row[f"{kind}_input_ids"], row[f"{kind}_labels"]).sum() - ref for kind, ref in row["refs"].items()
    )
    preference = -F.logsigmoid(beta * (chosen - rejected))
    counted = row["chosen_lm_labels" if nll_tokens == "contents" else "chosen_input_ids"]
    nll = -logps(policy, row["chosen_input_ids"], counted).mean()
    return torch.stack([preference, nll, 0.01 * preference + nll])


def steps_by_hand(home: Path, rows: list[dict], make_optimizer, beta: float, nll_tokens: str, warmup: int):
    """-> the policy after five steps of eight pairs, the three losses (5, 3) and the gradients' norms (5,)."""
    policy = load(home, THETA)
    optimizer, losses, norms = make_optimizer(policy.parameters()), [], []
    for step in range(STEPS):
        done = (step - warmup) / (STEPS - warmup)
        rate = RATE * (step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done)))
        optimizer.param_groups[0]["lr"] = rate
        batch = rows[8 * step : 8 * step + 8]
        mean = torch.stack([pair_loss(policy, row, beta, nll_tokens) for row in batch]).mean(0)
        optimizer.zero_grad()
        mean[2].backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in policy.parameters()))
        for p in policy.parameters():
            p.grad *= min(1.0, 1.0 / (norm + 1e-6))
        optimizer.step()
        losses.append(mean.detach())
        norms.append(norm)
    return policy, torch.stack(losses), torch.tensor(norms, dtype=torch.float64)


CASES = {
    "command line": ({}, lambda p: torch.optim.RMSprop(p, RATE, alpha=0.99, eps=1e-8), 0.01, "all", 0),
    "paper": (
        {"optim": "adamw_torch", "objective_options": {"beta": 0.1}, "warmup_steps": 0.3, "nll_tokens": "contents"},
        lambda p: torch.optim.AdamW(p, RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0), 0.1, "contents", 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_five_steps_are_those_of_the_papers_equations(home, rows, tmp_path, case):
    """The reference reads the short inputs at its own theta, the policy the long ones at a raised one."""
    given, make_optimizer, beta, nll_tokens, warmup = CASES[case]
    own = {name: value for name, value in given.items() if name == "nll_tokens"}
    training = {name: value for name, value in given.items() if name not in own}
    training |= {"learning_rate": RATE, "train_sampling_strategy": "sequential", "use_cpu": True, "disable_tqdm": True}
    training |= {"gradient_checkpointing": False, "reference_cache": str(home / "reference")}
    data = {"model": str(home / "model"), "data": str(home / "official.parquet"), "output_dir": str(tmp_path)}
    run = TrainRun(**data, recipe="official", rope_theta=THETA, training=training | {"save_strategy": "no"}, **own)
    assert run.title.startswith("official with changes (learning_rate")
    with TrueFloat64():
        policy, losses, norms = steps_by_hand(home, rows, make_optimizer, beta, nll_tokens, warmup)
        trainer = train(run)
    logged = [row for row in trainer.state.log_history if "preference_loss" in row]
    ours = torch.tensor([[r[n] for n in ("preference_loss", "nll_loss", "loss")] for r in logged], dtype=torch.float64)
    torch.testing.assert_close(ours, losses, rtol=1e-10, atol=0)
    torch.testing.assert_close(norms.new_tensor([row["grad_norm"] for row in logged]), norms, rtol=1e-10, atol=0)
    assert norms.max() > 1.0  # clipped
    before, after = load(home).state_dict(), trainer.model.state_dict()
    for name, weight in policy.state_dict().items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-10 * float(weight.abs().max()))
        assert float((weight - before[name]).abs().max()) > RATE
    assert losses[-1, 2] < losses[0, 2]


def padded_nll(policy, row: dict, length: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p of each token of the chosen sequence after its first, and of its padding up to `length`, which the released
    trainer counts as tokens."""
    ids = row["chosen_input_ids"]
    padded = ids + [pad] * (length - len(ids))
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids))])
    rows = F.log_softmax(policy(torch.tensor([padded]), mask, use_cache=False).logits[0, :-1], -1)
    return (-rows[torch.arange(length - 1), padded[1:]]).split([len(ids) - 1, length - len(ids)])


@torch.no_grad()
def test_padding_that_counts_is_the_one_difference_of_the_published_nll(home, rows):
    """The released trainer pads chosen and rejected to one length and takes the mean over pad tokens, too. With m of them
    after n counted tokens its NLL is ours plus m / (n + m) of (the pads' mean NLL - ours); without padding it is ours.
    """
    policy, seen = load(home, THETA), {True: 0, False: 0}
    pad = AutoTokenizer.from_pretrained(home / "model").eos_token_id
    with TrueFloat64():
        for row in rows[:12]:
            length = max(len(row["chosen_input_ids"]), len(row["rejected_input_ids"]))
            tokens, pads = padded_nll(policy, row, length, pad)
            published, ours = torch.cat([tokens, pads]).mean(), pair_loss(policy, row, 0.01, "all")[1]
            m, n = len(pads), len(tokens)
            more = m / (n + m) * (pads.mean() - ours) if m else 0.0
            torch.testing.assert_close(published, ours + more, rtol=1e-10, atol=0)
            assert m == 0 or abs(published / ours - 1) > 1e-4
            seen[m > 0] += 1
    assert min(seen.values()) >= 3
