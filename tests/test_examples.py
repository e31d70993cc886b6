"""The examples run; `accelerate launch` makes of each of examples/launch what its first lines say."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from benchmarks.loop.openai_server import OpenAIServer, Reply, sentence
from longpo_ops.data import Pair, Turn, join_context, read_pairs, write_pairs

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("bare_loop", "answer_groups", "transformers_trainer", "trl_dpo", "answers"):
        sys.modules.pop(name, None)


def test_the_bare_loop_learns(capsys):
    losses = importlib.import_module("bare_loop").main(steps=20)
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    margins = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert margins[0] == 0 and margins[-1] > 0


def test_groups_of_answers_learn(capsys):
    rewards = importlib.import_module("answer_groups").main(steps=16)
    assert len(rewards) == 16 and sum(rewards[-3:]) > sum(rewards[:3]) + 0.5
    assert "rows 287 of 2640" in capsys.readouterr().out  # the document and each question once


def test_the_trainer_learns():
    losses = importlib.import_module("transformers_trainer").main(steps=10)
    assert len(losses) == 10 and losses[-1] < losses[0]


def test_the_trl_trainer_learns():
    module = importlib.import_module("trl_dpo")
    losses = module.main(str(module.TINY), None, steps=3)
    assert len(losses) == 3 and losses[-1] < losses[0]


def one_pair(i: int) -> Pair:
    turns = (Turn(f"Who is it, {j}?", f"Ann {i} is here.", "before", ("before, too",)) for j in range(2))
    return Pair(f"harbour {i}", f"Harbour {i}. " * 40, tuple(turns))


def cut_one_off(number, seen):
    """One answer of five pairs' ends too early."""
    cut = {"choices": [{"message": {"content": "Ann is"}, "finish_reason": "length"}]}
    asked = seen.body["messages"][0]["content"]
    return Reply(body=cut) if asked == join_context("Ann 3 is here.", "Who is it, 1?") else None


def check_answered(pairs: list[Pair]) -> None:
    assert [each.id for each in pairs] == [f"harbour {i}" for i in (0, 1, 2, 4)]
    for each in pairs:
        for turn in each.turns:
            assert turn.chosen == sentence(join_context(turn.chunk, turn.instruction))
            assert turn.rejected == (sentence(join_context(each.document, turn.instruction)),)


def test_requests_for_new_answers_make_pairs(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "ray"))
    answers, pairs = importlib.import_module("answers"), [one_pair(i) for i in range(5)]
    with OpenAIServer(cut_one_off) as server:

        def ask(row: dict) -> dict:
            body = answers.payload(row, model="little", tokens=64)["payload"]
            return answers.answer(
                row | {"http_response": httpx.post(f"{server.url}/chat/completions", json=body).json()}
            )

        given = {row["key"]: row for row in map(ask, answers.questions(pairs))}
        assert len(given) == len(server.seen) == 5 * 2 * 2
    check_answered(list(answers.answered(pairs, given)))


def test_ray_asks_for_new_answers(tmp_path):
    """Where ray is installed. One request fails once."""
    pytest.importorskip("ray.data.llm")  # `ray` alone may be the folder of the example
    write_pairs(map(one_pair, range(5)), tmp_path / "pairs.jsonl")
    with OpenAIServer(lambda number, seen: Reply(503) if number == 3 else cut_one_off(number, seen)) as server:
        words = ["--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "new.jsonl", "--url", server.url]
        done = subprocess.run(
            [sys.executable, EXAMPLES / "ray/answers.py", *words, "--model", "little", "--at-once", "2"],
            env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "20 answers, 4 pairs in" in done.stdout and len(server.seen) == 20 + 1
    check_answered(list(read_pairs(tmp_path / "new.jsonl")))


# File: processes, machines, processes that share a pack, environment that decides what is trained.
SHARDED = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
}
ZERO3 = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
LAUNCHES = {
    "ddp": (8, 1, 1, {"ACCELERATE_MIXED_PRECISION": "no"}),
    "fsdp2": (8, 1, 1, SHARDED),
    "fsdp2-sp8": (8, 1, 8, SHARDED),
    "fsdp2-2-nodes": (16, 2, 8, SHARDED),
    "zero3": (8, 1, 1, ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}),
}


def launched(name: str, *options: str):
    """What `accelerate launch` starts: its arguments and the environment of a process, by accelerate's own functions."""
    file = EXAMPLES / "launch" / f"{name}.yaml"
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(file), *options, "-m", "longpo_ops.cli", "train"])
    for section in (part for part in yaml.safe_load(file.read_text()).values() if isinstance(part, dict)):
        assert not [key for key in section if not hasattr(args, key)]  # accelerate passes over a name it does not know
    args, defaults, _ = _validate_launch_command(args)
    if not args.use_deepspeed:
        return args, prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return args, prepare_deepspeed_cmd_env(args)[1]


def test_every_launch_file_is_tested():
    assert {file.stem for file in (EXAMPLES / "launch").iterdir()} == set(LAUNCHES)


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_file_starts_what_it_says(name, monkeypatch):
    processes, machines, shared, expected = LAUNCHES[name]
    second = ("--machine_rank", "1", "--main_process_ip", "10.0.0.1", "--main_process_port", "29555") * (machines - 1)
    args, environment = launched(name, *second)
    assert (args.num_processes, args.num_machines, args.nproc_per_node) == (processes, machines, "8")
    assert {key: environment.get(key) for key in expected} == expected
    if machines > 1:
        assert (args.nnodes, args.node_rank, args.rdzv_backend, args.rdzv_endpoint) == (
            "2",
            1,
            "static",
            "10.0.0.1:29555",
        )
    for key in environment.keys() - os.environ.keys():
        monkeypatch.setenv(key, environment[key])
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == ("fsdp2" in name)
    assert (environment.get("ACCELERATE_USE_DEEPSPEED") == "true") == (name == "zero3")
    if "fsdp2" in name:
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert ("ACCELERATE_USE_PARALLELISM_CONFIG" in environment) == (shared > 1)
    if shared > 1:
        mesh = ParallelismConfig()
        assert (mesh.cp_size, mesh.dp_shard_size, mesh.total_size) == (shared, processes // shared, processes)


def test_options_of_the_command_line_come_before_those_of_the_file():
    """As the files' first lines say, for another number of GPUs."""
    args, environment = launched("fsdp2-sp8", "--num_processes", "4", "--parallelism_config_cp_size", "4")
    assert (args.nproc_per_node, environment["PARALLELISM_CONFIG_CP_SIZE"]) == ("4", "4")
    assert launched("ddp", "--num_processes", "2")[0].nproc_per_node == "2"
