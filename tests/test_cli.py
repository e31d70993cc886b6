"""The command line: exit codes, settings from file and options, dry run, one line for a failure."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from longpo_ops import cli
from longpo_ops.cli import app

from .pretrained.tiny import CHATML
from .processes import CLI, Started, longpo
from .train.tiny import write_home

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny" / "model"
RAISED = '{"rope_theta": 1e6}'


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = write_home(tmp_path_factory.mktemp("home"))
    settings = {"model": str(home / "model"), "data": str(home / "pairs.jsonl"), "use_cpu": True, "max_steps": 2}
    (home / "run.yaml").write_text(yaml.safe_dump(settings) + "learning_rate: 1e-4\nobjective_options: {beta: 5e-1}\n")
    return home


def in_process(*arguments):
    return CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(app, [*map(str, arguments)])


def test_a_run_from_a_file_with_overrides_exits_with_0(home, tmp_path):
    done = longpo(
        "train", "--config", home / "run.yaml", "--output-dir", tmp_path, "--objective", "simpo", "--max-steps", 1
    )
    assert done.returncode == 0, done.stderr
    assert "8 of 8 records kept" in done.stderr and "100%" in done.stderr  # the report, the progress bar
    assert "rewards/margins" in done.stdout and (tmp_path / "model.safetensors").exists()
    card = (tmp_path / "README.md").read_text()
    assert "SimPO(preference_weight=1.0, beta=0.5" in card and "| learning rate | 0.0001, cosine |" in card


def test_ctrl_c_exits_with_130_and_the_run_goes_on(home, tmp_path):
    arguments = ("train", "--config", home / "run.yaml", "--output-dir", tmp_path, "--set", "save_steps=1")
    process = Started(CLI, *arguments, "--max-steps", 100_000)
    while not list(tmp_path.glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.1)
    second = in_process(*arguments, "--max-steps", 100_000)  # which would write into the same checkpoints
    assert re.search(rf"another run is at work in {tmp_path} \(process {process.pid} on ", str(second.exception))
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and "run the same command again to go on" in error and "Traceback" not in error
    steps = max(int(folder.name.partition("-")[2]) for folder in tmp_path.glob("checkpoint-*"))
    done = longpo(*arguments, "--max-steps", steps + 1, "--set", "logging_steps=1")
    assert done.returncode == 0 and f"going on from {tmp_path}/checkpoint-{steps}" in done.stderr


def test_a_failed_run_exits_with_1_and_says_why_in_a_line(home, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"id": "r-1", "document": "text"}\n')
    done = longpo("train", "--config", home / "run.yaml", "--data", tmp_path, "--output-dir", tmp_path / "out")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "pairs.jsonl:1, record 'r-1', turns: missing field" in line and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("a tensor of 8 GiB")])
def test_running_out_of_memory_exits_with_1_and_says_what_to_do(error, monkeypatch, capsys):
    def fails():
        raise error

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    said = capsys.readouterr().err
    assert str(error) in said and "--fit auto" in said
    monkeypatch.setattr(cli, "app", lambda: torch.zeros(2) @ torch.zeros(3))  # a bug keeps its traceback
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        cli.main()


def test_a_dry_run_prints_counts_lengths_and_settings_and_trains_nothing(home, tmp_path):
    arguments = (
        "--config",
        home / "run.yaml",
        "--output-dir",
        tmp_path,
        "--set",
        "pack_tokens=5000",
        "--rope-theta",
        "1e7",
        "--recipe",
        "official",
        "--set",
        "save_strategy=no",
    )
    done = in_process("train", *arguments, "--dry-run")
    assert done.exit_code == 0, done.output
    told = dict(re.findall(r"^(\w[\w ]*?)  +(.+)$", done.stdout, re.MULTILINE))
    assert told["sequences"] == "packed: a prefix is shared"
    separate = in_process("train", *arguments, "--separate", "--dry-run")
    assert told["pairs"] == "8" and int(told["tokens of packs"]) < int(told["tokens of separate sequences"])
    alone = dict(re.findall(r"^(\w[\w ]*?)  +(.+)$", separate.stdout, re.MULTILINE))
    assert alone["sequences"] == "separate: separate=True" and "tokens of packs" not in alone
    assert alone["tokens of separate sequences"] == told["tokens of separate sequences"]
    assert alone["optimizer steps"] == told["optimizer steps"] == "2"
    assert int(told["shortest sequence"]) <= int(told["median sequence"]) <= int(told["longest sequence"])
    assert told["recipe"] == "official with changes (learning_rate, max_steps, objective_options, pack_tokens)"
    expected = {
        "objective": "longpo",
        "learning_rate": "0.0001",
        "nll_tokens": "all",
        "pack_tokens": "5000",
        "rope_theta": "10000000.0",
        "save_strategy": "no",
    }
    assert expected.items() <= told.items()
    assert told["objective_options"] == "{'beta': 0.5, 'preference_weight': 0.01}"
    assert not (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--objective", "ppo"], "expected one of longpo"),
        (["--learning-rate", "fast"], "Input should be a valid number"),
        (["--colour", "red"], "No such option"),
        (["--set", "pack_tokens"], "expected name=value"),
        (["--set", "rows=5"], "is none of TrainRun"),
        (["--set", "max_steps=abc"], "expected int"),
        (["--set", "max_grad_norm=.nan"], "max_grad_norm=nan: expected a finite number"),
        (["--set", "num_train_epochs=0", "--set", "max_steps=-1"], "num_train_epochs=0: expected more than 0"),
        (["--set", "objective_options={beta: -1}"], "expected beta > 0"),
        (["--set", "objective_options=3"], "objective_options=3: expected dict"),
        (["--set", "memory=[1]"], "memory=[1]: expected dict"),
        (["--config", "nowhere.yaml"], "no such file"),
        (["--on-bad-record", "drop"], "expected one of raise, skip"),
        (["--template-kwargs", "[1]"], "expected names and values"),
        (["--set", "template_kwargs=3"], "template_kwargs=3: expected dict"),
        (["--set", "template_kwargs={date: 2024-07-26}"], "date=datetime.date(2024, 7, 26): expected a JSON value"),
        (["--recipe", "paper"], "recipe is 'paper'; expected one of default, official"),
    ],
)
def test_wrong_usage_exits_with_2_and_no_traceback(home, tmp_path, arguments, message):
    done = in_process("train", "--config", home / "run.yaml", "--output-dir", tmp_path, *arguments)
    assert done.exit_code == 2, done.output
    assert message in " ".join(re.sub("[│\n]", " ", done.output).split()) and "Traceback" not in done.output


def test_variables_of_the_chat_template_are_the_template_s(home, tmp_path):
    for given in (["--template-kwargs", '{"thinking": false}'], ["--set", "template_kwargs={thinking: false}"]):
        done = in_process("train", "--config", home / "run.yaml", "--output-dir", tmp_path, "--dry-run", *given)
        assert isinstance(done.exception, ValueError) and "does not read thinking, so" in str(done.exception)


def test_missing_settings_are_named(tmp_path):
    done = in_process("train", "--output-dir", tmp_path)
    assert done.exit_code == 2 and "model, data missing" in done.output


@pytest.mark.parametrize(
    "text, message",
    [(b"- a\n- b", "expected names and values"), (b"a: [", "no valid YAML"), (b"\xff", "no valid YAML")],
)
def test_files_that_are_no_settings_are_refused(tmp_path, text, message):
    (tmp_path / "run.yaml").write_bytes(text)
    done = in_process("train", "--config", tmp_path / "run.yaml")
    assert done.exit_code == 2 and message in done.output


def test_help_tells_what_there_is():
    for arguments, words in (["--help"], ["train"]), (["train", "--help"], ["--config", "--dry-run", "--set"]):
        done = in_process(*arguments)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", done.output)
        assert done.exit_code == 0 and all(word in plain for word in words)


def lossy(folder: Path) -> None:
    """A Llama class over byte-level files loses every space."""
    change(folder, "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


def large(folder: Path) -> None:
    """Two special tokens and a ChatML template; the embedding was not resized."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def incomplete(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def another(folder: Path) -> None:
    change(folder, "config.json", num_hidden_layers=4)


def change(folder: Path, file: str, **entries) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | entries))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lossy, "does not give its own text back"),
        (large, "its tokenizer has 1026 tokens, its embedding 1024 rows"),
        (incomplete, r"1 weights are missing \(model.layers.1.self_attn.q_proj.weight\)"),
        (another, r"9 weights are missing \(model.layers.3"),
    ],
)
def test_a_model_whose_parts_do_not_fit_is_refused_by_every_command(home, tmp_path, spoil, message):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    spoil(model)
    (tmp_path / "text.txt").write_text((ROOT / "LICENSE").read_text()[:2000])
    evaluation = ("--perplexity", tmp_path / "text.txt", "--perplexity-length", 64, "--samples", 1)
    sizes = ("--length", 1024, "--min-document", 64, "--min-chunk", 48, "--max-chunk", 128, "--question-tokens", 80)
    generation = (
        "--documents",
        tmp_path / "text.txt",
        *sizes,
        "--answer-tokens",
        24,
        "--rope",
        RAISED,
        "--short-rope",
        RAISED,
    )
    for words in (
        ("train", "--config", home / "run.yaml", "--output-dir", tmp_path / "trained"),
        ("train", "--config", home / "run.yaml", "--output-dir", tmp_path / "trained", "--dry-run"),
        ("evaluate", "--out", tmp_path / "evaluated", *evaluation),
        ("generate", "--out", tmp_path / "generated", *generation),
    ):
        done = in_process(*words, "--model", model)
        assert done.exit_code == 1 and re.search(message, str(done.exception)), (words, done.output, done.exception)
