"""Policy and reference compute alike: where both read the same with the same weights, rewards and KL begin at 0, exactly."""

import logging
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from longpo_ops.train import METHODS
from longpo_ops.train.arithmetic import Arithmetic
from longpo_ops.train.reference import model_digest

from .tiny import make_model, make_pair, make_trainer


def short_is_long(seed):
    pair = make_pair(seed, turns=1, document=40, answer=9)
    return replace(pair, ref_chosen=(pair.chosen,), ref_rejected=tuple((r,) for r in pair.rejected))


PAIRS = [short_is_long(seed) for seed in range(2)]
OFFLOADED = {"offload": True, "host_bytes": 256 << 20}
SETTINGS = {
    "float32": (torch.float32, {}),
    "float32 under autocast": (torch.float32, {"bf16": True}),
    "bfloat16, small steps": (torch.bfloat16, {"learning_rate": 5e-7}),
    "bfloat16, large steps": (torch.bfloat16, {"learning_rate": 1e-3}),
    "bfloat16, LoRA": (torch.bfloat16, {}),
    "bfloat16, our optimizer": (torch.bfloat16, {"memory": {"states": "float32", "tile_rows": 16} | OFFLOADED}),
    "bfloat16, tiles": (torch.bfloat16, {"memory": {"tile_rows": 16}}),
}
COMPARING = [name for name, method in METHODS.items() if method.reference]
CASES = [(name, setting) for name in ("longpo", "dpo", "sft_constraint") for setting in SETTINGS]
CASES += [(name, "bfloat16, small steps") for name in COMPARING if (name, "float32") not in CASES]


def compared(folder, name, dtype, lora=False, **settings):
    """What compares policy and reference: evaluated before training, and logged of the first step."""
    policy, reference = make_model(0, dtype), make_model(0, dtype)
    if lora:
        adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        policy, reference = get_peft_model(policy, adapters), None
    settings = {"max_steps": 1, "gradient_accumulation_steps": 2} | settings
    trainer = make_trainer(folder, name, PAIRS, policy, reference, PAIRS, **settings)
    evaluated = trainer.evaluate()
    trainer.train()
    rows = evaluated, trainer.state.log_history[0]
    return [
        v
        for row in rows
        for n, v in row.items()
        if n.endswith(("rewards/chosen", "rewards/rejected", "rewards/anchor", "kl"))
    ]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_rewards_begin_at_0(tmp_path, name, setting):
    dtype, settings = SETTINGS[setting]
    reference = ("online", "precompute")[CASES.index((name, setting)) % 2]  # seven settings: each meets both
    seen = compared(tmp_path, name, dtype, "LoRA" in setting, reference=reference, **settings)
    assert len(seen) == {"kl": 2, "pair": 4, "triples": 6}["kl" if METHODS[name].constraint else METHODS[name].sequence]
    assert set(seen) == {0.0}


def test_what_a_reference_said_in_another_arithmetic_is_not_used(tmp_path):
    def folders(**settings):
        models = make_model(0, torch.float32), make_model(1, torch.float32)
        make_trainer(tmp_path, "longpo", PAIRS, *models, reference="precompute", **settings)
        return len(list((tmp_path / "reference").iterdir()))

    assert [folders(), folders(bf16=True), folders(memory={"tile_rows": 16}), folders(bf16=True)] == [1, 2, 3, 3]
    model = make_model()
    kinds = [Arithmetic(), Arithmetic(torch.bfloat16), Arithmetic(torch.float16), Arithmetic(tile_rows=8)]
    assert len({model_digest(model, arithmetic=kind) for kind in kinds}) == 4


def test_a_reference_of_wider_weights_than_the_policys_is_told(tmp_path, caplog):
    policy, reference = make_model(0, torch.bfloat16), make_model(0, torch.float32)
    with caplog.at_level(logging.WARNING, "longpo_ops.train"):
        make_trainer(tmp_path, "longpo", PAIRS, policy, reference, learning_rate=1e-3)
    assert "weights are torch.float32, the policy's torch.bfloat16: rewards do not begin at 0" in caplog.text


def test_an_autocast_that_a_reference_cannot_follow_is_refused():
    with pytest.raises(ValueError, match="mixed_precision='fp8'"):
        Arithmetic.of_run("fp8", None)
