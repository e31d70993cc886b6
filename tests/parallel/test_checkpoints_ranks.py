"""Checkpoints and final models under FSDP2: killed and gone on with by other numbers of processes, whole at the end, refused.

One run of five steps changes hands at every kill: 2 processes, then 4 that share rows two by two, then one without FSDP, then
2 again. It ends with the numbers of a run that one process made in one go.
"""

import json
import os
import signal
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longpo_ops.train import checkpoints
from longpo_ops.train.checkpoints import check_checkpoint, last_checkpoint
from longpo_ops.train.reference import ReferenceStore

from ..processes import CLI, killed_in
from ..processes import run as run_process
from ..train.tiny import make_model, make_pair, make_trainer, run_settings, run_tiny, write_home
from .ranks import RanksFailed, gpus_of_cpus, run_ranks

RUN = dict(max_steps=5, save_steps=1, learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=0, save_total_limit=2)
PACKS = 4  # a step
NUMBERS = ("step", "loss", "grad_norm", "learning_rate", "nll_loss", "preference_loss", "rewards/margins", "pairs")
PAIRS = [make_pair(i, document=12 + 3 * i) for i in range(6)]


def forget_fsdp() -> None:
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # what the trainer before left


def losses(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [[row[name] for name in NUMBERS] for row in history if "loss" in row]


def whole_weights(model):
    named = model.named_parameters()
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in named}


def error_of(function, *arguments, **settings) -> str:
    forget_fsdp()
    try:
        function(*arguments, **settings)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


# -- the run that changes hands ----------------------------------------------------------------------------------------


def leg(home, output, killed_at, settings):
    """The run goes on; rank 0 is killed between the last rank's last byte of a checkpoint and its rename."""
    real, settings = checkpoints.publish, RUN | settings

    def publish(written, place):
        if place.name == f"checkpoint-{killed_at}":
            os.kill(os.getpid(), signal.SIGKILL)
        real(written, place)

    checkpoints.publish = publish
    trainer = run_tiny(home, output, **settings)
    forget_fsdp()
    again = run_tiny(home, output, **settings)  # it is done, and left alone
    others = error_of(run_tiny, home, output, **(settings | {"gradient_accumulation_steps": 1}))
    return whole_weights(trainer.model), whole_weights(again.model), again.state.global_step, others


TWO = {"fsdp": True, "gradient_accumulation_steps": PACKS // 2}
FOUR = {"sequence_parallel": 2, "gradient_accumulation_steps": PACKS // 2}
ONE = {"gradient_accumulation_steps": PACKS}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("home"), dtype=torch.float64)


@pytest.fixture(scope="module")
def handed_on(home, tmp_path_factory):
    """-> the folder of the run, what the ranks that ended it returned, and the last checkpoint after each kill."""
    output, left = tmp_path_factory.mktemp("runs") / "handed-on", []

    def look():
        check_checkpoint(last := last_checkpoint(output))
        assert (output / ".partial").is_dir()
        left.append((os.path.basename(last), os.path.isdir(f"{last}/pytorch_model_fsdp_0")))

    for ranks, killed_at, settings in ((2, 3, TWO), (4, 4, FOUR)):
        with pytest.raises(RanksFailed) as failed:
            run_ranks(leg, ranks, home, output, killed_at, settings, prelude=gpus_of_cpus)
        assert "exit code -9" in failed.value.told[0], failed.value
        look()
    settings = run_settings(home, output, **(RUN | ONE))
    arguments = ["train", *(f"--set={name}={json.dumps(value)}" for name, value in settings.items())]
    done = run_process(killed_in("longpo_ops.train.checkpoints", "publish", "checkpoint-5") + CLI, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert f"going on from {output / 'checkpoint-3'}" in done.stderr
    look()
    return output, run_ranks(leg, 2, home, output, None, TWO, prelude=gpus_of_cpus), left


def test_a_kill_before_the_rename_leaves_the_checkpoint_before_it(handed_on):
    assert handed_on[2] == [("checkpoint-2", True), ("checkpoint-3", True), ("checkpoint-4", False)]
    assert [path.name for path in checkpoints.checkpoints(handed_on[0])] == ["checkpoint-4", "checkpoint-5"]
    assert not (handed_on[0] / ".partial").exists()


def test_a_run_of_2_then_4_then_1_then_2_processes_equals_one_process_in_one_go(handed_on, home, tmp_path):
    output, ended, _ = handed_on
    start = whole_weights(AutoModelForCausalLM.from_pretrained(home / "model"))
    alone = whole_weights(run_tiny(home, tmp_path, **RUN, **ONE).model)
    expected = losses(tmp_path)
    assert [row[0] for row in expected] == [1, 2, 3, 4, 5]
    for row, row_alone in zip(losses(output), expected, strict=True):
        assert row == pytest.approx(row_alone, rel=1e-9, abs=1e-9)
    for weights, *_ in ended:
        for name, weight in alone.items():
            moved = (weight - start[name]).norm()
            assert moved > 0 and (weights[name] - weight).norm() <= 1e-6 * moved, name


def test_its_folder_holds_plain_weights_bitwise_those_of_the_shards(handed_on):
    output, ended, _ = handed_on
    model, found = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(found.values()) and model.dtype == torch.float64
    for weights, *_ in ended:
        assert weights.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(weights[name], weight) for name, weight in model.named_parameters())


def test_a_finished_run_comes_back_whole(handed_on, home):
    output, ended, _ = handed_on
    for weights, again, step, _ in ended:
        assert step == 5 and all(torch.equal(again[name], weight) for name, weight in weights.items())
    alone = run_tiny(home, output, **RUN, **ONE)
    assert all(torch.equal(p, ended[0][0][name]) for name, p in alone.model.named_parameters())


def test_another_number_of_packs_a_step_is_refused_with_what_to_set(handed_on, home):
    output, ended, _ = handed_on
    for *_, refused in ended:
        assert "packs_per_step=4 became 2: with 2 processes" in refused
        assert "set gradient_accumulation_steps to 2 to keep it" in refused
    told = error_of(run_tiny, home, output, **RUN, gradient_accumulation_steps=3)
    assert "packs_per_step=4 became 3: with 1 process set gradient_accumulation_steps to 4" in told


# -- what two processes leave, and refuse ------------------------------------------------------------------------------


def left_by(folder, kind, objective="longpo", lora=False, **settings):
    """A short run of the library's trainer -> its weights, whole; the folder has the same in files."""
    forget_fsdp()
    policy = make_model(dtype=settings.pop("dtype", torch.float64), **settings.pop("shape", {}))
    if lora:
        policy = with_adapters(policy)
    settings = {"fsdp": True, "max_steps": 1, "learning_rate": 1e-3, "gradient_accumulation_steps": 1} | settings
    trainer = make_trainer(folder / kind, objective, PAIRS, policy, reference="data", **settings)
    trainer.train()
    trainer.save_model(str(folder / kind))
    return whole_weights(trainer.model)


def with_adapters(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).to(model.dtype)
