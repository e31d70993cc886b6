"""Our engine as the model of lm-evaluation-harness, against that package's own; and what is said without it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.engines.transformers import TransformersEngine
from longpo_ops.evaluate import EvaluateRun, Scores, compare, evaluate
from longpo_ops.evaluate.kept import VALUES, read_lines
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
    for asked in ({"harness": ("mmlu",)}, {"short": "official"}):
        with pytest.raises(ValueError, match=r"need the package lm_eval .*pip install 'longpo_ops\[evaluate\]'"):
            evaluate(settings(**asked, **ONLY))


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

    calls, answer = [], TransformersEngine._answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "_answer", lambda *args: calls.append(1) or answer(*args))
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
    assert "harness" not in scores.counts and scores.complete  # nothing failed, nothing was cut


@installed
def test_numbers_have_their_own_error_bars_and_questions_are_kept_to_be_compared(run, files, tmp_path):
    scores = evaluate(run)
    assert all(scores.counts[f"harness/{name}"] == {"questions": 6} for name in scores.harness)
    assert scores.intervals
    for name, (low, high) in scores.intervals.items():
        task = name.removeprefix("harness/")
        error = scores.details[task][f"{scores.harness_settings[task]['metric']}_stderr,none"]
        assert (high - low) / 2 == pytest.approx(1.959964 * error)
    kept = read_lines(Path(run.out) / VALUES, ("of", "id", "asked", "value"))
    values = [line["value"] for line in kept if line["of"] == "harness/tiny_choice"]
    assert len(values) == 6 and sum(values) / 6 == scores.harness["tiny_choice"]
    assert not any("rolling" in line["of"] for line in kept)  # a perplexity is no mean over its questions
    rows = {row.what: row for row in compare(run.out, shutil.copytree(run.out, tmp_path / "other")).rows}
    assert (rows["tiny_choice"].paired, rows["tiny_choice"].ties, rows["tiny_rolling"].paired) == (True, 6, False)
    assert (rows["tiny_choice"].more_is_better, rows["tiny_rolling"].more_is_better) == (True, False)
    assert {row.verdict for row in rows.values()} == {"no difference can be shown"}


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
    with OpenAIServer(lambda number, seen: Reply(400, {"error": "no"}) if number == 3 else None) as server:
        given = dict(endpoints=(server.url,), concurrency=1, harness=files[3:4], **ONLY | {"lengths": (400,)})
        with pytest.raises(ValueError, match=r"does not say how many tokens it reads .* give a --length"):
            evaluate(settings(**given | {"lengths": ()}))
        scores = evaluate(settings(**given))
        assert all(seen.path.endswith("/v1/completions") and seen.body["echo"] for seen in server.seen)
    assert scores.counts["harness"]["failed"] == 1 and "1 requests failed" in str(scores.notes)
    lost = "no finite tiny_rolling word_perplexity,none, tiny_rolling bits_per_byte,none, last: the engine refused: 400"
    assert lost in str(scores.notes) and not scores.complete and "tiny_rolling" not in scores.harness
    assert scores.details["tiny_rolling"]["bits_per_byte,none"] is None and Scores.load(settings().out) == scores


# -- shots and metrics -------------------------------------------------------------------------------------------------

SHOWN = """
    shown: {folder}/shown.jsonl
test_split: test
fewshot_split: shown"""
GROUP = """
group: tiny_group
task: [tiny_free, tiny_more]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1.0}
"""


@pytest.fixture
def shown(files, tmp_path) -> Path:
    """A folder with choice.yaml as before, but with four examples of its own to be shown, and with further files."""
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()][:4]
    lines = (json.dumps(row | {"text": f"Example {i} is here:", "label": 0}) + "\n" for i, row in enumerate(rows))
    (tmp_path / "shown.jsonl").write_text("".join(lines))
    bare = (tmp_path / "choice.yaml").read_text()
    (tmp_path / "bare.yaml").write_text(bare.replace("tiny_choice", "tiny_bare").replace("num_fewshot: 0\n", ""))
    fixed = bare.replace("\ntest_split: test", SHOWN.format(folder=tmp_path)).replace("tiny_choice", "tiny_fixed")
    (tmp_path / "fixed.yaml").write_text(fixed)
    free = fixed.replace("tiny_fixed", "tiny_free").replace("num_fewshot: 0\n", "")
    (tmp_path / "free.yaml").write_text(free)
    (tmp_path / "more.yaml").write_text(free.replace("tiny_free", "tiny_more"))
    (tmp_path / "group.yaml").write_text(GROUP)
    return tmp_path


@installed
def test_prompts_hold_so_many_shots_and_numbers_say_so(run, settings, shown, tokenizer, model, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from longpo_ops.evaluate import harness

    manager = TaskManager(include_path=str(shown), include_defaults=False)  # a group is known by its name only
    monkeypatch.setattr(harness, "known_tasks", lambda: manager)
    free = str(shown / "free.yaml")
    said = Reply(200, {"choices": [{"text": " no", "finish_reason": "length"}]})
    with OpenAIServer(lambda number, seen: None if seen.body.get("echo") else said) as server:
        asked = (f"{free}:3:acc_norm", free, "tiny_group:2:acc")
        scores = evaluate(settings(endpoints=(server.url,), harness=asked, **ONLY | {"lengths": (4096,)}))
        prompts = {tokenizer.decode(seen.body["prompt"]) for seen in server.seen if seen.body.get("echo")}
    counts = Counter(len(re.findall(r"Example \d is here:", prompt)) for prompt in prompts)
    assert counts == {3: 18, 0: 18, 2: 18}  # 6 questions of 3 choices; the group's tasks ask the same
    named = {
        name: {each: settings[each] for each in ("shots", "metric")}
        for name, settings in scores.harness_settings.items()
    }
    assert named == {
        "tiny_free:3:acc_norm": {"shots": 3, "metric": "acc_norm"}, "tiny_free": {"shots": 0, "metric": "acc"},
        "tiny_group:2:acc": {"shots": 2, "metric": "acc"}, "tiny_free:2:acc": {"shots": 2, "metric": "acc"},
        "tiny_more:2:acc": {"shots": 2, "metric": "acc"},
    }  # fmt: skip
    assert set(scores.harness) == set(scores.harness_settings) and Scores.load(settings().out) == scores
    assert scores.harness["tiny_free:3:acc_norm"] == scores.details["tiny_free:3:acc_norm"]["acc_norm,none"]
    assert "| tiny_free:3:acc_norm | 3 | acc_norm |" in (Path(settings().out) / "results.md").read_text()
    wide = {"rope": {"rope_theta": 5e4}, "out": str(shown / "own")}
    own = evaluate(settings(harness=(f"{free}:3:acc_norm",), **wide, **ONLY | {"lengths": (4096,)}))
    args = {"pretrained": str(model), "dtype": "float32"}
    given = dict(model="hf", model_args=args, device="cpu", batch_size=1, task_manager=manager)
    truth = simple_evaluate(**given, tasks=[free], num_fewshot=3, log_samples=False, bootstrap_iters=0)
    assert own.harness == {"tiny_free:3:acc_norm": truth["results"]["tiny_free"]["acc_norm,none"]}


@installed
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("free.yaml:5", "tiny_free: 5 shots; it has 4 examples to show"),
        ("fixed.yaml:2", "tiny_fixed: 2 shots; the task itself sets 0"),
        ("bare.yaml:2", "tiny_bare: 2 shots; it has no examples but those that are asked"),
        ("free.yaml:2:f1", "tiny_free has no metric f1; expected one of acc, acc_norm, exact_match"),
        ("group.yaml", "group.yaml has no line task: NAME; .* a group is asked for by its name"),
        ("gone.yaml:2", "gone.yaml cannot be read"),
    ],
)
def test_shots_and_metrics_that_cannot_be_had_are_refused_before_anything_is_asked(
    asked, message, run, settings, shown
):
    first = str(shown / "choice.yaml")
    with OpenAIServer() as server:
        with pytest.raises(ValueError, match=message):
            given = dict(endpoints=(server.url,), harness=(first, str(shown / asked)), **ONLY | {"lengths": (400,)})
            evaluate(settings(**given))
        assert server.seen == []


@installed
def test_the_set_is_refused_by_name_where_its_data_cannot_be_had(run, settings):
    with pytest.raises(
        ValueError, match=r"lm-evaluation-harness cannot load mmlu .*; its data sets come from the network"
    ):
        evaluate(settings(short="official", **ONLY))
