"""Our engine as the model of lm-evaluation-harness, against that package's own; and what is said without it."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from longpo_ops.engines.transformers import TransformersEngine
from longpo_ops.evaluate import EvaluateRun, evaluate
from tests.engines import tiny

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
ONLY = dict(tasks=(), needles=None, lengths=())
YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{target}"
num_fewshot: 0
target_delimiter: ""
metadata: {{version: 1.0}}
{more}
"""
CHOICE = 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}, {metric: exact_match}]'
UNTIL = 'generation_kwargs: {max_gen_toks: 12, until: [" of", "."]}\nmetric_list: [{metric: exact_match}]'
ROLLING = "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"


def test_without_the_package_it_is_named(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "longpo_ops.evaluate.harness", raising=False)
    monkeypatch.setattr(TransformersEngine, "_load", lambda self: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"need the package lm_eval .*pip install 'longpo_ops\[evaluate\]'"):
        evaluate(settings(harness=("mmlu",), **ONLY))


@pytest.fixture
def files(tmp_path, model) -> tuple[str, ...]:
    """A task of each kind, on local data; half of the targets are what the model says itself."""
    import asyncio

    from transformers import AutoTokenizer

    from longpo_ops.engines import Request, Sampling

    tokens, engine = AutoTokenizer.from_pretrained(model), TransformersEngine(str(model))
    prompts = []
    for i in range(6):
        message = [{"role": "user", "content": f"{tiny.document(i, 2)}\n\n{tiny.QUESTIONS[i % 4]}"}]
        text = tokens.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        prompts.append(text + tiny.NAMES[i])  # the harness moves space at the end of a context into the continuation

    async def ask() -> list[str]:
        await engine.start()
        ids = [tuple(tokens(prompt)["input_ids"]) for prompt in prompts]
        return [
            answer.text for answer in await engine.batch([Request("", Sampling(4), prompt_ids=each) for each in ids])
        ]

    said = asyncio.run(ask())
    rows = []
    for i, (prompt, text) in enumerate(zip(prompts, said)):
        right = text if i % 2 else " at the wind"
        choices = [right, " rings the bell", " home"]
        rows.append(
            {"text": prompt, "target": right, "choices": choices, "label": i % 3, "page": tiny.document(i + 3, 3)}
        )
        rows[-1]["until"] = right
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "choice": ("multiple_choice", "{{label}}", CHOICE),
        "greedy": ("loglikelihood", "{{target}}", "metric_list: [{metric: acc}, {metric: perplexity}]"),
        "until": ("generate_until", "{{until}}", UNTIL),
        "rolling": ("loglikelihood_rolling", "{{page}}", ROLLING),
    }
    for name, (kind, target, more) in kinds.items():
        text = YAML.format(name=f"tiny_{name}", file=tmp_path / "rows.jsonl", kind=kind, target=target, more=more)
        if name == "rolling":
            text = text.replace('doc_to_text: "{{text}}"', 'doc_to_text: ""')
        (tmp_path / f"{name}.yaml").write_text(text)
    return tuple(str(tmp_path / f"{name}.yaml") for name in kinds)


@pytest.fixture
def run(settings, files, monkeypatch, tmp_path) -> EvaluateRun:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return settings(harness=files, **ONLY)


@installed
def test_numbers_are_those_of_the_packages_own_model(run, files, model):
    from lm_eval import simple_evaluate

    from longpo_ops.evaluate.harness import known_tasks

    calls, generate = [], TransformersEngine._generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "_generate", lambda *args: calls.append(1) or generate(*args))
        scores = evaluate(run)
        first = len(calls)
        assert first >= 6 and evaluate(run).harness == scores.harness and len(calls) == first  # all from the journal
    given = dict(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        device="cpu",
        batch_size=1,
        task_manager=known_tasks(),
    )
    truth = simple_evaluate(**given, tasks=list(files), log_samples=False, bootstrap_iters=0)["results"]
    assert set(scores.harness) == {"tiny_choice", "tiny_greedy", "tiny_until", "tiny_rolling"} == set(truth)
    for task, metrics in truth.items():
        compared = {name: value for name, value in metrics.items() if "," in name and "stderr" not in name}
        assert compared
        for name, value in compared.items():
            assert scores.details[task][name] == pytest.approx(value, rel=1e-4), (task, name)
    assert scores.harness["tiny_choice"] == truth["tiny_choice"]["acc,none"]
    assert 0 < scores.harness["tiny_greedy"] < 1  # greedy continuations are told from others
    assert scores.counts == {} and scores.complete


@installed
def test_contexts_that_are_too_long_are_counted_and_said(run, files, settings, world):
    from dataclasses import replace

    scores = evaluate(
        replace(run, harness=files[:1], perplexity=(str(world / "held"),), perplexity_lengths=(64,), samples=1)
    )
    assert scores.counts["harness"]["cut"] >= 6 and "lost their beginning" in str(scores.notes)
    assert "tiny_choice" in scores.harness and "lm-evaluation-harness" in (settings().out and str(scores.notes))


@installed
def test_names_that_do_not_exist_and_data_that_cannot_be_had(run, settings, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"has no task mmluu; see `lm-eval ls tasks`"):
        evaluate(settings(harness=("mmluu",), **ONLY))
    (tmp_path / "rows.jsonl").unlink()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "another"))
    with pytest.raises(ValueError, match=r"lm-evaluation-harness cannot load .*choice.yaml"):
        evaluate(run)


@installed
def test_requests_that_fail_are_counted(run, files, settings, tokenizer):
    from benchmarks.loop.openai_server import OpenAIServer, Reply

    with OpenAIServer(lambda number, seen: Reply(400, {"error": "no"}) if number == 3 else None) as server:
        given = dict(endpoints=(server.url,), concurrency=1, harness=files[3:4], **ONLY | {"lengths": (400,)})
        with pytest.raises(ValueError, match=r"does not say how many tokens it reads .* give a --length"):
            evaluate(settings(**given | {"lengths": ()}))
        scores = evaluate(settings(**given))
        assert all(seen.path.endswith("/v1/completions") and seen.body["echo"] for seen in server.seen)
    assert scores.counts["harness"]["failed"] == 1 and "1 requests failed" in str(scores.notes)
