"""Several forwards before one backward, as separate sequences have: DDP and FSDP2 by two ranks give one process's weights."""

import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..train.tiny import VOCAB, make_model, make_pair, make_trainer
from .ranks import gpus_of_cpus, run_ranks

PAIRS = [make_pair(i, turns=1, document=12 + 3 * i, rejected=1 + (i == 2)) for i in range(4)]
STEP = dict(
    max_steps=2, optim="sgd", learning_rate=0.1, warmup_steps=0, lr_scheduler_type="constant", max_grad_norm=1.0, seed=3,
    reference="precompute", pack_tokens=110, separate=True,
)  # fmt: skip
OFFLOAD = {"offload": True, "host_bytes": 1 << 26}
CASES = {
    "DDP, Gemma 3": ("gemma3_text", dict(gradient_checkpointing=False)),
    "DDP, checkpointing": ("llama", dict(gradient_checkpointing=True)),
    "DDP, offload": ("llama", dict(memory=OFFLOAD)),
    "FSDP2, checkpointing": ("llama", dict(fsdp=True, gradient_checkpointing=True)),
    "FSDP2, offload": ("llama", dict(fsdp=True, memory=OFFLOAD)),
}


def policy_of(kind: str):
    """Gemma 3's embedding keeps a buffer for its backward, which DDP would write over at the next forward."""
    if kind == "llama":
        return make_model()
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, head_dim=4, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **sizes)).double()


def trained(folder, ranks: int, kind: str = "llama", **settings):
    """-> how far each weight has moved, and the losses."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # what the trainer before left
    policy = policy_of(kind)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    settings = STEP | {"gradient_accumulation_steps": 2 // ranks} | settings
    trainer = make_trainer(folder, "longpo", PAIRS, policy, make_model(1), **settings)
    trainer.train()
    assert len(trainer.train_dataset[0].batch.layout.pairs) > 2
    moved = {name: whole(p) - before[name] for name, p in trainer.model.named_parameters()}
    return moved, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def whole(parameter):
    return getattr(parameter, "full_tensor", lambda: parameter)().detach().clone()


def by_two(folder, kind: str):
    cases = {case: given for case, given in CASES.items() if case.startswith(kind)}
    return {case: trained(folder / case, 2, model, **settings) for case, (model, settings) in cases.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    ranks = tuple(
        zip(*(run_ranks(by_two, 2, tmp_path_factory.mktemp("two"), kind, **how) for kind, how in HOW.items()))
    )
    return [ddp | fsdp for ddp, fsdp in ranks]


HOW = {"DDP": dict(environment={"ACCELERATE_USE_CPU": "true"}), "FSDP2": dict(prelude=gpus_of_cpus)}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder, plain = tmp_path_factory.mktemp("one"), dict(gradient_checkpointing=False)
    return {kind: trained(folder / kind, 1, kind, **plain) for kind in ("llama", "gemma3_text")}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(one, two, case):
    truth, losses = one[CASES[case][0]]
    for of_rank in two:
        moved, logged = of_rank[case]
        assert logged == pytest.approx(losses, rel=1e-5)
        for name, change in truth.items():
            error, largest = float((moved[name] - change).abs().max()), float(change.abs().max())
            assert largest > 0 and error <= 1e-5 * largest, name
