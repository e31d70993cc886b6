"""The command: its options, what it shows, its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.loop.openai_server import OpenAIServer
from longpo_ops.evaluate import TASKS, Scores, commands
from longpo_ops.evaluate import run as evaluation

APP = typer.Typer()
APP.command()(commands.evaluate)


@pytest.fixture
def call(world, tokenizer, tmp_path):
    """call(*words): the command with the tiny tokenizer."""

    def run(*words, out="out"):
        given = ["--model", tokenizer.name_or_path, "--out", tmp_path / out, *words]
        return CliRunner().invoke(APP, [str(word) for word in given])

    return run


def plain(done) -> str:
    return re.sub(r"[\s│]+", " ", done.output)


def test_one_command_measures_and_shows(call, world, tmp_path):
    with OpenAIServer() as server:
        words = (
            "--endpoint",
            server.url,
            "--length",
            160,
            "--length",
            96,
            "--needles",
            world / "needles",
            "--samples",
            2,
        )
        words += ("--texts", world / "text", "--perplexity", world / "held", "--perplexity-length", 50)
        done = call(*words)
        assert done.exit_code == 0, done.output
        assert len(server.seen) == 2 * 2 * 2 + 2
    for said in ("names *", "begun *", "not comparable with published scores", "Perplexity of held-out text", "see "):
        assert said in plain(done), said
    assert "names, 160 tokens" in plain(done) or "100%" in plain(done)  # the progress bar
    assert set(Scores.load(tmp_path / "out").tasks) == {"names", "begun"}  # --needles alone: those tasks
    assert json.loads((tmp_path / "out/run.json").read_text())["engine"] == "server"


def test_options_reach_the_run(call, world, monkeypatch):
    runs = []
    monkeypatch.setattr(evaluation, "evaluate", lambda run, progress: runs.append(run) or Scores())
    assert call("--length", 4096).exit_code == 0
    assert runs[0].tasks == tuple(TASKS) and runs[0].lengths == (4096,) and runs[0].engine == "transformers"
    assert call("--short", "official").exit_code == 0 and runs.pop().short == "official"
    done = call("--length", 4096, "--tasks", "vt, cwe", "--tasks", "names", "--needles", world / "needles", "--no-prefill",
                "--rope", '{"rope_theta": 1e7}', "--harness", "mmlu,arc_easy:5", "--judge", "http://h/v1", "--seed", 3,
                "--judge-model", "j", "--judge-key-variable", "K", "--published", "a", "--published", "b", "--questions", "q",
                "--dtype", "float32", "--engine", "vllm", "--engine-option", "max_num_seqs=2")  # fmt: skip
    assert done.exit_code == 0, done.output
    run = runs[1]
    assert (run.tasks, run.harness, run.published) == (("vt", "cwe", "names"), ("mmlu", "arc_easy:5"), ("a", "b"))
    assert run.rope == {"rope_theta": 1e7} and not run.prefill and run.engine_options == {"max_num_seqs": 2}
    assert (run.judge, run.judge_model, run.judge_key_variable) == ("http://h/v1", "j", "K")
    assert (run.engine, run.dtype, run.seed, run.questions) == ("vllm", "float32", 3, "q")
    assert call("--perplexity", world / "held", "--perplexity-length", 50).exit_code == 0 and runs[2].tasks == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to evaluate"),
        (("--perplexity", "x"), "no lengths for perplexity"),
        (("--length", "64", "--samples", "0"), "samples is 0"),
        (("--length", "64", "--rope", "{x"), "no valid JSON"),
        (("--length", "64", "--engine", "magic"), "expected one of"),
        (("--length", "64", "--tasks", "vtt"), "no task 'vtt'"),
        (("--short", "offical"), "short is 'offical'; expected official"),
    ],
)
def test_wrong_usage_is_code_2(words, message, call):
    done = call(*words)
    assert done.exit_code == 2 and message in plain(done)


def test_what_fails_says_what_to_do(call, world):
    with OpenAIServer() as server:
        pass
    done = call("--length", 160, "--needles", world / "needles", "--endpoint", server.url)
    assert isinstance(done.exception, OSError) and "no server answers" in str(done.exception)


def test_ctrl_c_is_code_130(call, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    done = call("--length", 160)
    assert done.exit_code == 130 and "run the same command again to go on" in plain(done)


def test_every_option_in_the_documentation_exists():
    import inspect

    text = (Path(commands.__file__).parents[2] / "docs/evaluate.md").read_text()
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(commands.evaluate).parameters} | {
        "--no-prefill"
    }
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--no-build-isolation"}
    assert len(used) > 12 and used - known == set()
