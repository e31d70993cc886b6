"""`longpo plan`: its defaults, the table, the picture, JSON, and what it says where nothing fits."""

import dataclasses
import json

import pytest
import torch

from longpo_ops.memory.optimizer import OPTIMS, AdamW
from longpo_ops.memory.plan import weights_of
from longpo_ops.memory.plan_report import allocator_advice

from .models import small


def test_the_commands_defaults_are_those_of_training():
    import inspect

    from longpo_ops.memory.commands import plan
    from longpo_ops.train import LongPOConfig

    ours = {name: parameter.default for name, parameter in inspect.signature(plan).parameters.items()}
    theirs = {field.name: field.default for field in dataclasses.fields(LongPOConfig)}
    assert ours["accumulation"] == theirs["gradient_accumulation_steps"]
    assert ours["max_grad_norm"] == theirs["max_grad_norm"]
    assert ours["allow_lossy"] == theirs["allow_lossy"]
    assert OPTIMS[ours["optim"]] is OPTIMS[theirs["optim"]] is AdamW


def run(*arguments: str):
    import typer
    from typer.testing import CliRunner

    from longpo_ops.memory.commands import plan

    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    config = small()
    config.save_pretrained(tmp_path / "model")
    return tmp_path


def test_command_prints_a_table_and_draws(folder):
    limits = ("--device-gib", "0.2", "--host-gib", "1", "--device-reserve-gib", "0", "--host-reserve-gib", "0")
    result = run("--model", str(folder / "model"), "--length", "4096", *limits, "--picture", str(folder / "plan.png"))
    assert result.exit_code == 0, result.output
    for text in ("derived, not measured", "weights", "optimizer states", "layer inputs", "seconds", "fits"):
        assert text in result.output, text
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_command_says_what_is_missing(folder):
    result = run(
        "--model", str(folder / "model"), "--length", "4096", "--device-gib", "0.01", "--device-reserve-gib", "0"
    )
    assert result.exit_code == 1 and "device is short of" in result.output
    assert run("--model", str(folder / "model"), "--length", "0").exit_code == 2


@pytest.mark.parametrize(
    ("older", "newer", "told"),
    [
        (None, None, "PYTORCH_ALLOC_CONF=expandable_segments:True"),
        (None, "expandable_segments:True", None),
        ("max_split_size_mb:128,expandable_segments:True", None, None),
        (None, "expandable_segments:False", "PYTORCH_ALLOC_CONF=expandable_segments:False,expandable_segments:True"),
        (
            "backend:native",
            "expandable_segments:True",
            "PYTORCH_CUDA_ALLOC_CONF=backend:native,expandable_segments:True",
        ),
    ],
)
def test_the_allocator_setting_that_a_plan_rests_on_is_told_where_it_is_off(older, newer, told, monkeypatch, folder):
    for name, value in (("PYTORCH_CUDA_ALLOC_CONF", older), ("PYTORCH_ALLOC_CONF", newer)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert allocator_advice() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    advice = allocator_advice()
    assert advice is None if told is None else f"set {told} in the environment" in advice
    result = run("--model", str(folder / "model"), "--length", "512", "--device-gib", "8")
    assert ("Allocator: the plan leaves 2 GiB" in result.output) == (told is not None), result.output


def test_command_writes_json(folder):
    result = run(
        *("--model", str(folder / "model"), "--length", "4096", "--device-gib", "1", "--json"),
        *("--device-reserve-gib", "0"),
    )
    told = json.loads(result.output)
    assert told["derived"] is True and told["peak_bytes"] == sum(told["peak"].values())


def test_command_plans_for_the_optimizer_it_is_told(folder):
    given = ("--model", str(folder / "model"), "--length", "512", "--device-gib", "8")
    adamw, rmsprop = (json.loads(run(*given, "--json", *more).output) for more in ((), ("--optim", "rmsprop")))
    total = weights_of(small()).total
    assert adamw["peak"]["optimizer states"] == 8 * total and rmsprop["peak"]["optimizer states"] == 4 * total
    assert (adamw["optim"], rmsprop["optim"]) == ("adamw_torch", "rmsprop")
    told = run(*given, "--optim", "rmsprop", "--allow-lossy", "states").output
    assert "RMSprop with float32 states and residue master" in told
    assert "8-bit optimizer states are not to be had with rmsprop" in told
    other = run(*given, "--optim", "sgd")
    assert other.exit_code == 2 and "optim='sgd': expected one of adamw_torch" in " ".join(other.output.split())


def words(text: str) -> str:
    return " ".join(text.split())


def test_command_compares_every_split_of_several_gpus(folder):
    given = ("--model", str(folder / "model"), "--length", "1024", "--device-gib", "1", "--device-reserve-gib", "0")
    result = run(*given, "--gpus", "8", "--accumulation", "2")
    assert result.exit_code == 0, result.output
    told = words(result.output)
    for text in (
        "8 GPUs, every split (derived, not measured)",
        "1 x 8",
        "chosen",
        "refused",
        "8 x 1: sequence_parallel=8: the attention has 4 query and 2 kv heads",
        "sequence parallel 1 x data parallel 8, numbers of one GPU, 16 of them a step",
        "tokens/s of all GPUs",
        "FSDP2",
        "16 bytes a weight (2 weight, 2 master, 8 states, 4 gradient), sharded over 8 GPUs (mixed_precision no: several packs",
        "Assumed: a GPU sends 300 GB/s to the 7 others of its machine and 45 GB/s to other machines",
    ):
        assert text in told, (text, told)
    shared = words(run(*given, "--gpus", "4", "--sequence-parallel", "4").output)
    assert "every split" not in shared and "sequence parallel 4 x data parallel 1" in shared and "Ulysses" in shared


def test_several_gpus_in_json(folder):
    given = ("--model", str(folder / "model"), "--length", "1024", "--device-gib", "1", "--json")
    given += ("--device-reserve-gib", "0", "--accumulation", "1")
    told = json.loads(run(*given, "--gpus", "16", "--gpus-per-node", "4", "--between-gb-s", "1").output)
    assert [s["sequence_parallel"] for s in told["splits"]] == [1, 2, 4, 8, 16]
    assert [s["fits"] for s in told["splits"]] == [True, True, True, False, False]
    assert told["mesh"]["cards"] == 16 and told["sent_per_pack"]["FSDP2"] == weights_of(small()).total * 6 * 15 // 16
    assert told["bytes_per_weight"] == {"weight": 2, "master": 2, "states": 8, "gradient": 2}
    wide = json.loads(run(*given, "--gpus", "4", "--mixed-precision", "bf16").output)
    assert wide["bytes_per_weight"] == {"weight": 4, "master": 0, "states": 8, "gradient": 4}
    alone = json.loads(run(*given).output)
    assert alone["splits"] == [] and alone["sent_per_pack"] == {} and alone["mesh"]["cards"] == 1
    assert alone == json.loads(run(*given, "--gpus", "1", "--mixed-precision", "no", "--gpus-per-node", "2").output) | {
        "mesh": alone["mesh"]
    }


def test_gpus_of_a_machine_share_its_host(folder):
    given = ("--model", str(folder / "model"), "--length", "512", "--device-gib", "8", "--host-gib", "128")
    for gpus, share in ((("--gpus", "4"), "32.0"), (("--gpus", "16", "--gpus-per-node", "2"), "64.0")):
        assert f"of {share}: fits" in run(*given, *gpus, "--sequence-parallel", "1").output


def test_what_several_gpus_cannot_do_is_a_wrong_usage(folder):
    given = ("--model", str(folder / "model"), "--length", "4096", "--device-gib", "1", "--device-reserve-gib", "0")
    for more, message in (
        (
            ("--gpus", "8", "--sequence-parallel", "3"),
            "sequence_parallel=3: expected a divisor of the number of GPUs, 8",
        ),
        (("--sequence-parallel", "2"), "sequence_parallel=2: expected a divisor of the number of GPUs, 1"),
        (("--gpus", "8", "--sequence-parallel", "8"), "the attention has 4 query and 2 kv heads"),
        (("--gpus", "2", "--online"), "online with gpus=2"),
        (("--gpus", "2", "--mixed-precision", "fp8"), "mixed_precision='fp8': expected one of no, fp16, bf16"),
        (("--gpus", "0"), "cards=0: expected an int >= 1"),
    ):
        result = run(*given, *more)
        assert result.exit_code == 2 and message in words(result.output.replace("│", "")), (more, result.output)
    none = run(*given[:4], "--device-gib", "0.001", "--device-reserve-gib", "0", "--gpus", "2")
    assert none.exit_code == 1 and "no split of sequence_parallel x data_parallel fits" in none.output
