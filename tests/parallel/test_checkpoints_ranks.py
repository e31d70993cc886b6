"""Checkpoints and final models under FSDP2: killed and gone on with by other numbers of processes, whole at the end, refused.

One run of five steps changes hands at every kill: 2 processes, then 4 that share rows two by two, then one without FSDP, then
2 again. It ends with the numbers of a run that one process made in one go.
"""

import json
import os
import re
import signal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longpo_ops.pretrained import load_model, read_config
from longpo_ops.train import checkpoints
from longpo_ops.train.checkpoints import check_checkpoint, last_checkpoint
from longpo_ops.train.run import TrainRun, prepare
from longpo_ops.train.states import MODEL_FOLDER, read_dcp

from ..processes import CLI, killed_in
from ..processes import run as run_process
from ..train.tiny import make_model, make_pair, make_trainer, run_settings, run_tiny, write_home
from .ranks import RanksFailed, gpus_of_cpus, run_ranks

RUN = dict(
    max_steps=5, save_steps=1, learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=0, save_total_limit=2
)
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


def make(folder, policy=None, reference=None, objective="sft_chosen", **settings):
    forget_fsdp()
    settings = {
        "fsdp": True,
        "reference": "precompute",
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
    } | settings
    return make_trainer(folder, objective, PAIRS, policy or make_model(), reference, PAIRS, **settings)


def tied(folder):
    trainer = make(folder, make_model(tie_word_embeddings=True), max_steps=1)
    trainer.train()
    trainer.save_model()
    return whole_weights(trainer.model)


def with_adapters(folder):
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).double()
    trainer = make(folder, policy, max_steps=1)
    trainer.train()
    trainer.save_model()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    return {name: weight for name, weight in whole_weights(trainer.model).items() if name in trained}


def in_bfloat16(folder):
    """A run of 16-bit weights, which keeps float32 ones while it trains."""
    forget_fsdp()
    home = folder.parent / "half"
    if dist.get_rank() == 0:
        write_home(home, dtype=torch.bfloat16)
    dist.barrier()
    trainer = run_tiny(
        home, folder, max_steps=1, learning_rate=1e-4, objective="sft_chosen", fsdp=True, optim="adamw_torch"
    )
    return whole_weights(trainer.model)


def best_of_three(folder):
    """The first is the best, as the largest loss is asked for; one checkpoint is kept."""
    more = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    trainer = make(folder, max_steps=3, load_best_model_at_end=True, greater_is_better=True, **more)
    trainer.train()
    trainer.save_model()
    return whole_weights(trainer.model)


def reference_logps(folder):
    store = make(folder, reference=make_model(1), objective="longpo").reference
    return [store.logps(pair) for pair in PAIRS]


def other_packs(folder):
    """The library's trainer has no run.json: what a checkpoint holds says it."""
    make(folder, max_steps=1, save_strategy="steps", save_steps=1).train()
    again = make(folder, max_steps=2, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))


def zeros(wanted: int, **shape):
    """A model that on rank `wanted` is what transformers loads where another process has the weights."""
    model = make_model(1, **shape)
    for parameter in model.parameters() if dist.get_rank() == wanted else ():
        parameter.data.zero_()
    return model


def empty_layer(folder):
    policy = make_model()
    for parameter in policy.model.layers[1].parameters():
        parameter.data.zero_()
    make(folder, policy)


def loaded_in_one_process(folder):
    os.environ["ACCELERATE_USE_FSDP"] = os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    try:
        load_model(str(folder.parent / "half" / "model"), read_config(str(folder.parent / "half" / "model")))
    finally:
        del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]


def begin(output, **more):
    """A run of two processes without a model or data: nothing is read before what they must have alike is compared."""
    prepare(TrainRun.from_settings(run_settings(output / "nothing", output, fsdp=True, **more)))


LEFT = {"tied": tied, "adapters": with_adapters, "bfloat16": in_bfloat16, "best": best_of_three}
REFUSED = {
    "packs": other_packs,
    "folders": lambda folder: make(folder / str(dist.get_rank())),
    "folders of a run": lambda folder: begin(folder.parent / "folders" / str(dist.get_rank())),
    "settings of a run": lambda folder: begin(folder, learning_rate=1e-3 * (1 + dist.get_rank())),
    "reference of zeros": lambda folder: make(folder, reference=zeros(1), objective="longpo"),
    "policy of zeros": lambda folder: make(folder, zeros(0, tie_word_embeddings=True)),
    "layer of zeros": empty_layer,
    "loaded in one process": loaded_in_one_process,
    "whole checkpoints": lambda folder: make(folder, fsdp_config={"state_dict_type": "FULL_STATE_DICT"}),
    "no optimizer": lambda folder: make(folder, save_only_model=True),
    "version 1": lambda folder: make(folder, fsdp_config={"version": 1}),
}
SAID = {
    "packs": r"checkpoint-1 is of a run with 2 packs a step, and this one has 4: with 2 processes .* set "
    "gradient_accumulation_steps to 1",
    "folders": r"1 of 2 processes, process 1 the first, do not see .*a folder that all machines share",
    "folders of a run": r"1 of 2 processes, process 1 the first, do not see .*a folder that all machines share",
    "settings of a run": r"ranks hold different learning_rate \(rank 0: 0.001; rank 1: 0.002\)",
    "reference of zeros": r"process 1: reference_model: 4 parts of it hold nothing but zeros \(lm_head.weight, .*"
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "policy of zeros": r"process 0: model: 3 parts of it hold nothing but zeros \(model.embed_tokens.weight, ",
    "layer of zeros": r"process 0: model: 1 parts .* \(model.layers.1\); process 1: model: 1 parts",
    "loaded in one process": "2 processes would hold models of zeros.*fsdp_cpu_ram_efficient_loading to false",
    "whole checkpoints": "fsdp_state_dict_type=FULL_STATE_DICT: expected SHARDED_STATE_DICT",
    "no optimizer": "save_only_model=True with FSDP",
    "version 1": "fsdp_version=1: expected 2",
}


def by_two(folder):
    weights = {name: function(folder / name) for name, function in LEFT.items()}
    said = {name: error_of(function, folder / name.replace(" ", "-")) for name, function in REFUSED.items()}
    return weights, said, reference_logps(folder / "reference-2")


def by_four(folder):
    return reference_logps(folder / "reference-4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    return run_ranks(by_two, 2, folder, prelude=gpus_of_cpus)


@pytest.mark.parametrize("case", ["tied", "bfloat16", "best"])
def test_the_folder_at_the_end_is_whole_and_bitwise_what_the_ranks_hold(two, folder, case):
    model, found = AutoModelForCausalLM.from_pretrained(folder / case, output_loading_info=True)
    assert not any(found.values())
    assert model.dtype == (torch.bfloat16 if case == "bfloat16" else torch.float64)
    names = dict(model.named_parameters())
    assert load_file(folder / case / "model.safetensors").keys() == names.keys()  # a tied head once
    for weights, *_ in two:
        assert weights[case].keys() == names.keys()
        assert all(torch.equal(weights[case][name], weight) for name, weight in names.items())


def test_the_folder_of_adapters_holds_them_alone(two, folder):
    kept = load_file(folder / "adapters" / "adapter_model.safetensors")
    assert "task_type" in json.loads((folder / "adapters" / "adapter_config.json").read_text())
    for weights, *_ in two:
        named = {name.replace(".default", ""): weight for name, weight in weights["adapters"].items()}
        assert named.keys() == kept.keys() and all(torch.equal(kept[name], weight) for name, weight in named.items())
        assert any(weight.any() for name, weight in kept.items() if "lora_B" in name)


def test_the_best_checkpoint_is_kept_and_loaded_from_its_shards(two, folder):
    (kept,) = checkpoints.checkpoints(folder / "best")
    assert kept.name == "checkpoint-1"
    best = read_dcp(kept / MODEL_FOLDER)["model"]
    assert all(torch.equal(best[name], weight) for weights, *_ in two for name, weight in weights["best"].items())


@pytest.mark.parametrize("case", REFUSED)
def test_both_processes_refuse_alike(two, case):
    said = {each[1][case].replace(f"folders/{rank}", "folders") for rank, each in enumerate(two)}
    assert len(said) == 1
    assert re.search(SAID[case], *said), said


def test_reference_logps_are_bitwise_those_of_one_process_on_two_and_four(two, folder, tmp_path):
    alone = make_trainer(tmp_path, "longpo", PAIRS, make_model(), make_model(1), reference="precompute").reference
    expected = [alone.logps(pair) for pair in PAIRS]
    assert len(set(expected)) == len(PAIRS)
    for logps in [each[2] for each in two] + run_ranks(by_four, 4, folder, prelude=gpus_of_cpus):
        assert logps == expected
