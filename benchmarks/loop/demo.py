"""The demo over several seeds: accuracy by length and perplexity of the base, of theta raised alone, and after each round.

A seed draws documents, questions and the order of training; the base model and the samples of the evaluation stay. With
--compare every seed also trains the other methods (examples/tiny/compare.yaml) on its pairs, and, as a control, NLL alone
on its documents, without any question or answer, for as many steps.

    python -m benchmarks.loop.demo [--seeds 3] [--rounds 1] [--recipe official | --compare] [--work runs/bench-demo]
        [--out benchmarks/results]

Writes DATE-demo-HOST.json (DATE-demo-official-HOST.json) with every number, mean and spread, and the recipe that was
followed; of the default recipe docs/pictures/demo.png, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

from longpo_ops.demo.compare import compare, draw
from longpo_ops.demo.run import evolution
from longpo_ops.evaluate import EvaluateRun, evaluate
from longpo_ops.evolve import Evolution, evolve, plan
from longpo_ops.recipes import DEFAULT, RECIPES
from longpo_ops.tiny.text import prepare

from ..stamp import RESULTS, ROOT, host_class, stamp

PICTURES = ROOT / "docs/pictures"
CONTROL_RATE = 7e-4  # the best of three on seed 0 (docs/log.md)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--recipe", choices=RECIPES, default=DEFAULT)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-demo")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.compare and options.recipe != DEFAULT:
        parser.error("--compare has learning rates for the default recipe")
    kind = "" if options.recipe == DEFAULT else f"-{options.recipe}"
    options.work = options.work.with_name(f"{options.work.name}{kind}")
    runs = [run(options.work / f"seed-{seed}", seed, options) for seed in range(options.seeds)]
    rows = summary([row | {"seed": seed} for seed, one in enumerate(runs) for row in one["rows"]], "label")
    content = stamp(recipe=runs[0]["recipes"], runs=runs, rows=rows)
    if options.compare:
        content["methods"] = methods([row for one in runs for row in one["methods"]])
        draw(content["methods"], PICTURES / "compare.png")
    if options.recipe == DEFAULT:
        draw_rows(rows, len(runs), PICTURES / "demo.png")
    path = options.out / f"{content['date'][:10]}-demo{kind}-{host_class()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))


def run(work: Path, seed: int, options: argparse.Namespace) -> dict:
    """One seed; what is finished is not done again."""
    wanted = evolution(work, options.rounds, seed, options.recipe)
    prepare(work, seed)
    result = evolve(wanted, lambda *_: None)
    told = {
        "seed": seed,
        "rows": [values(row) for row in result.rows],
        "stages": result.stages,
        "stopped": result.stopped,
    }
    told["recipes"] = result.recipes
    if options.compare:
        told["methods"] = compare(wanted, lambda *_: None)
        told["methods"] += control(wanted, told["methods"], CONTROL_RATE)
    return told


def control(wanted: Evolution, others: list[dict], rate: float) -> list[dict]:
    """Rows like those of `compare`: theta raised, and NLL on the first round's documents, one a step, nothing else."""
    from transformers import Trainer

    stages = {stage.kind: stage.run for stage in plan(wanted)}
    steps, out = max(row["step"] for row in others), Path(wanted.out) / f"compare/nll_documents-{rate:g}"
    training = {"learning_rate": rate, "max_steps": steps, "save_strategy": "no", "report_to": "none"}
    run = dataclasses.replace(stages["train"], output_dir=str(out), training=stages["train"].training | training)
    if not (out / "model.safetensors").exists():
        tokenizer, examples = run.load_tokenizer(), []
        for file in sorted(Path(stages["pairs"].documents[0]).glob("*.txt")):
            turn = [{"role": "user", "content": file.read_text(encoding="utf-8").strip()}]
            ids = tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]
            examples.append({"input_ids": ids, "labels": ids})
        trainer = Trainer(run.load_model(run.model, policy=True), run.config(), train_dataset=examples)
        trainer.processing_class = tokenizer
        trainer.train()
        trainer.save_model()
    return [
        {**others[0], "method": "nll_documents", "learning_rate": rate},
        scored(dataclasses.replace(stages["evaluate"], model=str(out), out=f"{out}-{steps}"), rate, steps),
    ]


def scored(run: EvaluateRun, rate: float, step: int) -> dict:
    """A row of the control at step `step`."""
    short, long = min(run.lengths), 1024
    scores = evaluate(dataclasses.replace(run, lengths=(short, long), perplexity_lengths=(short,)))
    numbers = {"long": scores.accuracy(long), "short": scores.accuracy(short), "perplexity": scores.perplexity[short]}
    return {"method": "nll_documents", "step": step, "learning_rate": rate} | numbers


def values(row: dict) -> dict:
    """A row of an evolution with the values of its numbers alone; all tasks of the demo are local."""
    numbers = {"accuracy": row["accuracy"]["local"], "perplexity": row["perplexity"]}
    return row | {kind: {length: each["value"] for length, each in found.items()} for kind, found in numbers.items()}


def summary(rows: list[dict], key: str) -> list[dict]:
    """Mean and standard deviation over seeds of accuracy and perplexity, a row per label."""
    found = []
    for label in dict.fromkeys(row[key] for row in rows):
        same = [row for row in rows if row[key] == label]
        one = {"label": label, "seeds": len(same)}
        for kind in ("accuracy", "perplexity"):
            for length in same[0][kind]:
                one.setdefault(kind, {})[length] = mean_and_spread([row[kind][length] for row in same])
        found.append(one)
    return found


def methods(rows: list[dict]) -> list[dict]:
    """Means over seeds of what `compare` measured, a row per method and step."""
    found = []
    for method, step in dict.fromkeys((row["method"], row["step"]) for row in rows):
        same = [row for row in rows if (row["method"], row["step"]) == (method, step)]
        one = {"method": method, "step": step, "learning_rate": same[0]["learning_rate"], "seeds": len(same)}
        for name in ("long", "short", "perplexity"):
            one[name], one[f"{name}_spread"] = mean_and_spread([row[name] for row in same])
        found.append(one)
    return found


def mean_and_spread(values: list[float]) -> list[float]:
    """Mean, and standard deviation between seeds."""
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def draw_rows(rows: list[dict], seeds: int, path: Path) -> None:
    """Accuracy by length, a line per row, bars of one standard deviation between seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for row, style in zip(rows, ("o--", "s:", "D-", "^:", "v-")):
        lengths = [int(length) for length in row["accuracy"]]
        means, spreads = zip(*row["accuracy"].values(), strict=True)
        axis.errorbar(lengths, means, yerr=spreads, fmt=style, capsize=3, label=row["label"])
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("tokens of the text that hides the answer")
    axis.set_ylabel("answered right")
    axis.set_title(f"a model that was made for 256 tokens, {seeds} seeds", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(rows: list[dict]) -> str:
    """Markdown: mean and spread by length."""
    columns = [(kind, length) for kind in ("accuracy", "perplexity") for length in rows[0][kind]]
    lines = [
        "| | " + " | ".join(f"{kind} {length}" for kind, length in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = (row[kind].get(length) for kind, length in columns)
        digits = {"accuracy": 2, "perplexity": 1}
        written = (
            f"{cell[0]:.{digits[kind]}f} ± {cell[1]:.{digits[kind]}f}" if cell else ""
            for cell, (kind, _) in zip(cells, columns)
        )
        lines.append(f"| {row['label']} | " + " | ".join(written) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
