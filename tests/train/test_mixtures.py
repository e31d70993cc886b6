"""Mixtures of experts: the loss of a step is that of separate sequences plus the load balancing of each pack's rows."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models import mixtral, qwen3_moe

from ..attention.dense import TrueFloat64, sequences
from .test_trainer import ONE_STEP, PAIRS, close
from .tiny import VOCAB, gradients, make_trainer, naive_loss

COEFFICIENT = 0.3
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.15, num_experts_per_tok=2,
    bos_token_id=None, eos_token_id=None, output_router_logits=True, router_aux_loss_coef=COEFFICIENT,
)  # fmt: skip
CONFIGS = {
    "mixtral": lambda: mixtral.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: qwen3_moe.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24),
}
BALANCE = {family: getattr(globals()[family], f"modeling_{family}").load_balancing_loss_func for family in CONFIGS}


def make_mixture(family: str, seed: int = 0):
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config._experts_implementation = "eager"  # grouped products know no float64
    return AutoModelForCausalLM.from_config(config).double()


def plain(model):
    """A copy without anything of ours; with a mask its load balancing mixes types, so it is asked for without one."""
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager").double()
    fresh.load_state_dict(model.state_dict())
    fresh.config.output_router_logits = False
    return fresh


def balance(family: str, model, pack) -> torch.Tensor:
    """The auxiliary loss of the routers' logits that separate sequences have at the rows of a pack."""
    layout = pack.batch.layout
    gates = [[None] * layout.length for _ in range(2)]
    for pair, places in zip(pack.pairs, sequences(layout), strict=True):
        for sequence, rows in zip((pair.chosen, *pair.rejected), places, strict=True):
            ids = torch.from_numpy(sequence.ids)[None]
            routers = model(ids, use_cache=False, output_router_logits=True).router_logits
            for layer, router in zip(gates, routers, strict=True):
                for row, logits in zip(rows, router, strict=True):
                    layer[row] = logits if layer[row] is None else layer[row]
    return BALANCE[family](tuple(torch.stack(layer) for layer in gates), 4, 2)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_steps_loss_and_gradients(tmp_path, family):
    """Two packs of one and of two pairs, accumulated: L = sum of the pairs' losses / 3 + c (A_1 + 2 A_2) / 3."""
    policy, reference = make_mixture(family), make_mixture(family, 1)
    truth_model, before = plain(policy), {name: p.detach().clone() for name, p in policy.named_parameters()}
    settings = ONE_STEP | dict(gradient_accumulation_steps=2, pack_tokens=130)
    trainer = make_trainer(tmp_path, "longpo", PAIRS, policy, reference, **settings)
    packs = list(trainer.train_dataset)
    assert [len(pack.pairs) for pack in packs] == [2, 1]
    with TrueFloat64():
        balances = [balance(family, truth_model, pack) for pack in packs]
        mean = sum(a * len(pack.pairs) for a, pack in zip(balances, packs, strict=True)) / len(PAIRS)
        truth = naive_loss("longpo", truth_model, plain(reference), PAIRS) + COEFFICIENT * mean
        truth.backward()
        trainer.train()
    for name, gradient in gradients(truth_model).items():
        close(policy.get_parameter(name), before[name] - settings["learning_rate"] * gradient)
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["aux_loss"] == pytest.approx(float(mean.detach()), rel=1e-6) and 1 < float(mean.detach()) < 4
    assert log["loss"] == pytest.approx(float(truth.detach()), rel=1e-6)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    def step(checkpointing):
        policy, settings = make_mixture("mixtral").float(), ONE_STEP | dict(gradient_checkpointing=checkpointing)
        trainer = make_trainer(tmp_path / str(checkpointing), "simpo", PAIRS, policy, pack_tokens=400, **settings)
        trainer.train()
        return trainer.state.log_history[0], dict(policy.named_parameters())

    (log, after), (plain_log, truth) = step(True), step(False)
    assert log["loss"] == plain_log["loss"] and log["aux_loss"] == plain_log["aux_loss"]
    for name, parameter in truth.items():
        torch.testing.assert_close(after[name], parameter, rtol=1e-6, atol=1e-8)


def test_without_router_logits_nothing_is_added(tmp_path):
    policy, reference = make_mixture("mixtral"), make_mixture("mixtral", 1)
    for model in (policy, reference):
        model.config.output_router_logits = False
    trainer = make_trainer(tmp_path, "longpo", PAIRS, policy, reference, pack_tokens=400)
    truth_model = plain(policy)
    with TrueFloat64():
        close(
            trainer.compute_loss(policy.train(), {"pack": trainer.train_dataset[0]}),
            naive_loss("longpo", truth_model, plain(reference), PAIRS),
        )


@pytest.mark.parametrize("family", CONFIGS)
def test_a_run_goes_on_with_the_experts_of_its_checkpoint(tmp_path, family):
    """Whose names in the files are not those of the model."""
    more = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
    }
    whole, again = (make_trainer(tmp_path, "sft_chosen", PAIRS, make_mixture(family), **more) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, weight), (_, of_whole) in zip(
        again.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(weight, of_whole), name
    again.restore(tmp_path / "checkpoint-1")
    assert not torch.equal(again.model.lm_head.weight, whole.model.lm_head.weight)
