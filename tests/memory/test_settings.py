"""Memory settings in the trainer: the same training, chosen by hand or by the planner, and resumed."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from longpo_ops.memory.optimizer import AdamW, RMSprop, split
from longpo_ops.memory.plan import HOST_RESERVE, Machine, Settings, Work, predict
from longpo_ops.memory.settings import Memory, machine_here
from longpo_ops.memory.trace import trace
from longpo_ops.train import LongPOConfig, checks

from ..train.tiny import make_model, make_pair, make_trainer

PAIRS = [make_pair(seed, turns=1) for seed in range(8)]
RUN = dict(max_steps=4, learning_rate=1e-2, warmup_steps=0, gradient_accumulation_steps=1, max_grad_norm=0.0, seed=3)


def trained(folder, memory=None, dtype=torch.float32, resume=None, **options):
    """-> weights after training, and the trainer."""
    policy, reference = make_model(0, dtype), make_model(1, dtype)
    trainer = make_trainer(folder, "longpo", PAIRS, policy, reference, **RUN | {"memory": memory} | options)
    trainer.train(resume_from_checkpoint=resume)
    return [p.detach().clone() for p in policy.parameters()], trainer


def off(ours, theirs) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True))


OURS = {"states": "float32"}


def test_offload_trains_bitwise_alike(tmp_path):
    plain, _ = trained(tmp_path / "plain", OURS)
    moved, trainer = trained(tmp_path / "moved", OURS | {"offload": True, "host_bytes": 256 << 20})
    assert off(moved, plain) == 0
    assert not trainer.args.gradient_checkpointing  # offload has taken its place


def test_everything_together_trains_alike(tmp_path):
    plain, _ = trained(tmp_path / "plain", OURS, dtype=torch.float64)
    every = {"tile_rows": 7, "offload": True, "host_bytes": 256 << 20, "save_attention": True, "step_in_backward": True}
    together, _ = trained(tmp_path / "every", OURS | every, dtype=torch.float64)
    start = [p.detach() for p in make_model(0, torch.float64).parameters()]
    assert off(together, plain) < 1e-6 * off(plain, start)


def test_optimizer_is_torchs_with_the_same_groups(tmp_path):
    ours, trainer = trained(tmp_path / "ours", OURS, weight_decay=0.1)
    theirs, _ = trained(tmp_path / "theirs", None, weight_decay=0.1)
    assert isinstance(trainer.optimizer.optimizer, AdamW)
    assert off(ours, theirs) <= 1e-6


def test_rmsprop_is_torchs_bitwise_on_float32_weights(tmp_path):
    options = dict(optim="rmsprop", optim_args="alpha=0.9, eps=1e-6", weight_decay=0.1)
    ours, trainer = trained(tmp_path / "ours", OURS, **options)
    theirs, other = trained(tmp_path / "theirs", None, **options)
    assert isinstance(trainer.optimizer.optimizer, RMSprop)
    assert type(other.optimizer.optimizer) is torch.optim.RMSprop
    assert off(ours, theirs) == 0


class OnCopies(torch.optim.RMSprop):
    """torch's RMSprop on float32 copies of 16-bit weights, which are rounded back after each step."""

    def __init__(self, weights, **options):
        self.weights = list(weights)
        super().__init__([p.detach().float().flatten() for p in self.weights], **options)

    def step(self, closure=None):
        copies = self.param_groups[0]["params"]
        for copy, weight in zip(copies, self.weights, strict=True):
            copy.grad = weight.grad.float().flatten()
        super().step()
        for copy, weight in zip(copies, self.weights, strict=True):
            split(copy.clone(), weight.detach().view(-1), torch.empty(copy.shape, dtype=torch.int16))


def test_fit_trains_with_rmsprop_as_torch_does_on_float32_masters_and_resumes_bitwise(tmp_path, caplog):
    caplog.set_level(logging.INFO, "longpo_ops.train")
    options = dict(dtype=torch.bfloat16, learning_rate=1e-4, save_steps=2, save_strategy="steps")
    ours, trainer = trained(tmp_path / "ours", fit="auto", optim="rmsprop", **options)
    assert isinstance(trainer.optimizer.optimizer, RMSprop)
    assert "RMSprop with float32 states and residue master" in caplog.text  # the plan counts its states
    again, _ = trained(
        tmp_path / "ours", fit="auto", optim="rmsprop", resume=str(tmp_path / "ours" / "checkpoint-2"), **options
    )
    assert off(again, ours) == 0
    policy = make_model(0, torch.bfloat16)
    extra = {"optimizers": (OnCopies(policy.parameters(), lr=1e-4), None)}
    settings = RUN | {"learning_rate": 1e-4}
    make_trainer(
        tmp_path / "torch", "longpo", PAIRS, policy, make_model(1, torch.bfloat16), extra=extra, **settings
    ).train()
    assert off(ours, [p.detach() for p in policy.parameters()]) == 0
    assert off(ours, [p.detach() for p in make_model(0, torch.bfloat16).parameters()]) > 0


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    trained(tmp_path, OURS, save_steps=2, save_strategy="steps")
    with pytest.raises(ValueError, match=r"state of .*'AdamW'.*: expected .*'RMSprop'"):
        trained(tmp_path, OURS, optim="rmsprop", resume=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("argument", ["optimizers", "optimizer_cls_and_kwargs"])
def test_one_optimizer_is_given(tmp_path, argument):
    """The trainer's own arguments say another one than memory does: none of the two is left out in silence."""
    policy, reference = make_model(0, torch.float32), make_model(1, torch.float32)
    given = {"optimizers": (torch.optim.SGD(policy.parameters(), lr=1e-3), None)}
    given["optimizer_cls_and_kwargs"] = torch.optim.SGD, {"lr": 1e-3}
    extra = {argument: given[argument]}
    trainer = make_trainer(tmp_path, "longpo", PAIRS, policy, reference, extra=extra, **RUN, memory=OURS)
    with pytest.raises(ValueError, match="optimizers, optimizer_cls_and_kwargs: the trainer was given an optimizer"):
        trainer.train()


def test_16_bit_weights_keep_their_dtype_and_resume_bitwise(tmp_path, caplog):
    caplog.set_level(logging.INFO, "longpo_ops.train")
    options = dict(dtype=torch.bfloat16, learning_rate=1e-6, gradient_accumulation_steps=2, max_grad_norm=1.0)
    whole, trainer = trained(tmp_path / "whole", OURS, **options)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert {p.grad_dtype for p in trainer.model.parameters()} == {torch.float32}
    assert "16 bytes a weight (2 weight, 2 master, 8 states, 4 gradient)" in caplog.text
    trained(tmp_path / "half", OURS, **options, save_steps=2, save_strategy="steps")
    checkpoint = str(tmp_path / "half" / "checkpoint-2")
    again, _ = trained(tmp_path / "half", OURS, resume=checkpoint, **options)
    assert off(again, whole) == 0


def test_fit_chooses_and_keeps_what_it_chose(tmp_path):
    _, trainer = trained(tmp_path, fit="auto")
    kept = json.loads((tmp_path / "memory.json").read_text())
    assert Memory.from_settings(kept) == trainer.memory
    assert trainer.memory.states == "float32"  # this little model fits any machine
    (tmp_path / "memory.json").write_text(json.dumps(kept | {"tile_rows": 5}))
    _, trainer = trained(tmp_path, fit="auto", save_strategy="steps", save_steps=4)
    assert trainer.memory.tile_rows is None  # no checkpoint was made with it: planned anew
    (tmp_path / "memory.json").write_text(json.dumps(kept | {"tile_rows": 5}))
    _, trainer = trained(tmp_path, fit="auto", resume=str(tmp_path / "checkpoint-4"))
    assert trainer.memory.tile_rows == 5


def test_a_plan_becomes_its_settings():
    config = make_model(0).config
    work = Work(config, 64, dtype=torch.float32)
    settings = Settings(tile_rows=16, offload=True, kept=1, on_host=1, attention_layers=1, states="8bit")
    memory = Memory.from_plan(predict(work, settings, Machine(1 << 30, 1 << 30)))
    assert memory.device_bytes == trace(config, 64, 16, torch.float32).input
    assert memory.host_bytes == 2 * (16 << 20)
    assert (memory.tile_rows, memory.save_attention, memory.states) == (16, True, "8bit")


def test_this_machine():
    here = machine_here(torch.device("cpu"))
    assert here.device_bytes > 0 and here.host_bytes == 0


def test_a_stated_host_is_taken_at_its_word(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=79 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    device = torch.device("cuda")
    here, stated = machine_here(device), machine_here(device, host_bytes=1 << 50)
    assert here.host_bytes < 1 << 45 and here.host_reserve == HOST_RESERVE // 2  # the system has had its part
    assert stated.host_bytes == 1 << 50 and stated.host_reserve == HOST_RESERVE
    assert here.device_bytes == 79 << 30 and here.device_memory == 3.0e12
    card.name = "NVIDIA H200"
    assert machine_here(device).device_memory == Machine(1).device_memory == 4.15e12
    assert machine_here(torch.device("cpu"), host_bytes=1 << 50).device_bytes == 1 << 50


def test_the_host_that_a_run_states_reaches_its_plan(tmp_path, monkeypatch):
    seen, real = [], checks.machine_here
    monkeypatch.setattr(checks, "machine_here", lambda *a, **k: seen.append(k) or real(*a, **k))
    trained(tmp_path, fit="auto", host_bytes=8 << 30)
    assert seen == [{"host_bytes": 8 << 30}]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"memory": {"tiles": 3}}, "memory: tiles unknown, expected some of tile_rows"),
        ({"memory": {"store": "int4"}}, "store='int4'"),
        ({"memory": {"tile_rows": 0}}, "memory: tile_rows=0, expected at least 1"),
        ({"memory": {"offload": True, "device_bytes": -1}}, "memory: device_bytes=-1, expected at least 0"),
        ({"memory": {"offload": True, "host_bytes": "80 GiB"}}, "memory: host_bytes='80 GiB': expected int"),
        ({"memory": {"step_in_backward": True}}, "set states to float32 or 8bit"),
        ({"memory": OURS | {"step_in_backward": True}}, "max_grad_norm=1.0 needs all gradients"),
        ({"memory": OURS | {"step_in_backward": True}, "max_grad_norm": 0, "fp16": True}, "fp16 scales the loss"),
        ({"memory": OURS, "fit": "auto"}, "expected one of the two"),
        ({"fit": "best"}, "expected 'off' or 'auto'"),
        ({"fit": "auto", "allow_lossy": "some"}, "allow_lossy='some': expected one of nothing, states, all"),
        ({"allow_lossy": "states"}, "allow_lossy='states' is of fit='auto'"),
        ({"host_bytes": 1 << 30}, "host_bytes=1073741824 is of fit='auto'"),
        ({"fit": "auto", "host_bytes": 0}, "host_bytes=0: expected a whole number of at least 1"),
        (
            {"memory": OURS, "optim": "adafactor"},
            "optim='adafactor': expected one of adamw_torch, .*, rmsprop, as memory",
        ),
        ({"fit": "auto", "optim": "sgd"}, "optim='sgd': expected one of"),
        ({"memory": OURS, "optim": "lion_32bit"}, "optim='lion_32bit': expected one of"),
        ({"memory": {"states": "8bit"}, "optim": "adamw_bnb_8bit"}, "optim='adamw_bnb_8bit': expected one of"),
        ({"memory": {"states": "8bit"}, "optim": "rmsprop"}, "states='8bit': RMSprop has float32 states only"),
        (
            {"memory": OURS, "optim_args": "beta1=0.5"},
            "optim_args='beta1=0.5': beta1 .*it takes adam_beta1, adam_beta2",
        ),
        ({"memory": OURS, "adam_beta1": 1.5}, r"betas=\(1.5, 0.999\): expected"),
        ({"fit": "auto", "optim_target_modules": "all-linear"}, "optim_target_modules='all-linear': adamw_torch"),
        ({"fit": "auto", "optim": "rmsprop", "adam_epsilon": 1e-6}, "adam_epsilon=1e-06: rmsprop does not look at it"),
        (
            {"fit": "auto", "optim": "rmsprop", "optim_args": "momentum=0.9"},
            "momentum is not of rmsprop here; it takes alpha",
        ),
        ({"memory": OURS, "optim": "rmsprop", "optim_args": "centered=true"}, "centered is not of rmsprop here"),
        ({"memory": OURS, "optim": "rmsprop", "optim_args": "alpha=much"}, "'much', expected a number"),
        (
            {"memory": OURS, "optim": "rmsprop", "optim_args": "alpha=1.5"},
            "alpha=1.5: expected a number, 0 <= alpha < 1",
        ),
        ({"fit": "auto", "host_bytes": "80 GB"}, "host_bytes='80 GB': expected a whole number of at least 1"),
    ],
)
def test_refusals(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        LongPOConfig(output_dir=str(tmp_path), gradient_accumulation_steps=1, **settings)
