"""Adapters on bodies of 8 bits: the numbers of the same weights in float64, whole runs, and what is refused by name."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longpo_ops.memory.tiling import tile_layers
from longpo_ops.pretrained import explain_zeros, load_model, plain_parts, read_config
from longpo_ops.train.adapters import add_adapters
from longpo_ops.train.checks import check_model, refuse_sharing
from longpo_ops.train.config import LongPOConfig
from longpo_ops.train.reference import model_digest
from longpo_ops.train.run import TrainRun

from ..attention.dense import TrueFloat64
from ..pretrained.tiny import change
from .test_mixtures import make_mixture
from .test_mixtures import plain as plain_mixture
from .test_trainer import PAIRS, close
from .tiny import VOCAB, gradients, make_trainer, naive_loss, run_settings, run_tiny, write_home, write_lines

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(head_dim=8, initializer_range=0.15, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None)
KINDS = {"llama": {}, "qwen3": {"tie_word_embeddings": True}}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """As write_home has it; same.jsonl: two pairs whose short inputs are the long ones."""
    home = write_home(tmp_path_factory.mktemp("home"))
    records = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()][:2]
    for record in records:
        record["document"] = record["turns"][0]["chunk"] = record["document"][:200]
    write_lines(home / "same.jsonl", records)
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    for kind, more in KINDS.items():
        made(kind, home / kind, vocab_size=len(tokenizer), **more)
        tokenizer.save_pretrained(home / kind)
    return home


def made(kind: str, folder: Path, **more) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | more)).save_pretrained(folder)
    return str(folder)


def int8(folder) -> nn.Module:
    return load_model(str(folder), read_config(str(folder)), "auto", False, "int8")


def dequantised(model: nn.Module) -> nn.Module:
    """A plain model of the same numbers in float64."""
    config = AutoConfig.for_model(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    fresh = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            parts = plain_parts(weight)
            whole = parts[0].double() if len(parts) == 1 else parts[0].double() * parts[1].double()
            fresh.get_parameter(name).copy_(whole)
    return fresh


def with_adapters(model: nn.Module, **options) -> nn.Module:
    """Adapters of the same numbers whatever the dtype of the model."""
    model = add_adapters(model, 4, **options).double()
    generator = torch.Generator().manual_seed(3)
    for weight in (w for w in model.parameters() if w.requires_grad):
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return model


def gradients_of(trainer, policy, tile_rows=None) -> dict[str, torch.Tensor]:
    policy.train()
    with TrueFloat64(), tile_layers(policy, tile_rows) if tile_rows else nullcontext():
        trainer.compute_loss(policy, {"pack": trainer.train_dataset[0]}).backward()
    return gradients(policy)


@pytest.mark.parametrize("tile_rows", [None, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_adapters_are_those_on_the_dequantised_weights(tmp_path, kind, tile_rows):
    base = int8(made(kind, tmp_path / "model", vocab_size=VOCAB, **KINDS[kind]))
    reference = dequantised(base)
    truth_model, policy = with_adapters(dequantised(base)), with_adapters(base)
    assert all("Int8Tensor" in type(m.base_layer.weight).__name__ for m in policy.modules() if hasattr(m, "lora_A"))
    trainer = make_trainer(tmp_path, "longpo", PAIRS, policy, pack_tokens=400)
    with TrueFloat64():
        naive_loss("longpo", truth_model, reference, PAIRS).backward()
    ours, theirs = gradients_of(trainer, policy, tile_rows), gradients(truth_model)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * 2
    for name in theirs:
        close(ours[name], theirs[name], 1e-6 if tile_rows else 1e-9)  # norms are run again in float32, in the backward


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_begins_at_its_reference_goes_on_where_it_stopped_and_others_read_its_adapters(home, tmp_path, kind):
    more = dict(model=str(home / kind), data=str(home / "same.jsonl"), quantization="int8", lora_rank=4)
    more |= dict(learning_rate=1e-2, lr_scheduler_type="constant", warmup_steps=0, save_steps=1)
    more |= dict(memory={"tile_rows": 64, "offload": True}, gradient_accumulation_steps=1, num_train_epochs=2)
    whole = run_tiny(home, tmp_path / "whole", max_steps=3, **more)
    first = whole.state.log_history[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0 and first["grad_norm"] > 0
    assert whole.state.log_history[2]["loss"] < first["loss"]
    ours = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    others = PeftModel.from_pretrained(int8(home / kind), tmp_path / "whole").state_dict()
    for name, weight in ours.items():
        assert torch.equal(others[name.replace(".weight", ".default.weight")], weight)
    assert any("lora_B" in name and bool(weight.any()) for name, weight in ours.items())
    if kind == "qwen3":
        run_tiny(home, tmp_path / "parts", max_steps=1, **more)
        run_tiny(home, tmp_path / "parts", max_steps=3, **more)
        theirs = load_file(tmp_path / "parts" / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_that_is_stored_so_needs_no_setting_and_its_digest_sees_codes_and_scales(home, tmp_path):
    model = int8(home / "qwen3")
    model.save_pretrained(tmp_path / "stored")
    AutoTokenizer.from_pretrained(home / "model").save_pretrained(tmp_path / "stored")
    settings = run_settings(home, tmp_path / "out", model=str(tmp_path / "stored"), lora_rank=4)
    run = TrainRun.from_settings(settings)
    check_model(run, run.config())
    policy = run.load_model(run.model, policy=True)
    stored = policy.get_base_model()
    assert explain_zeros(policy) is None and not any(
        p.requires_grad for n, p in policy.named_parameters() if "lora" not in n
    )
    config, told = run.read_config(run.model), []
    told.append(model_digest(policy, config))
    assert told[0] == model_digest(run.load_model(run.model, policy=True), config)
    for part in plain_parts(stored.model.layers[1].mlp.up_proj.base_layer.weight)[:2]:
        with torch.no_grad():
            part[3] += 1
        told.append(model_digest(policy, config))
    assert len(set(told)) == 3
    for more, message in (
        ({"lora_rank": 0}, "its weights are quantised, which steps of full fine-tuning cannot move; set lora_rank"),
        ({"quantization": "int8"}, "quantised already .torchao.; leave the setting out"),
    ):
        run = TrainRun.from_settings(settings | more)
        with pytest.raises(ValueError, match=message):
            check_model(run, run.config())
    with pytest.raises(ValueError, match="which one process alone holds whole"):
        refuse_sharing(True, LongPOConfig(output_dir=str(tmp_path), use_cpu=True, fsdp=True, reference="data"))


STORED = {
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        "quantised .fp8., through which transformers trains no",
    ),
    "mxfp4": ({"quant_method": "mxfp4"}, "quantised .mxfp4.*dequantize=True"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quantised .gptq., which transformers cannot load here: .*optimum"),
    "awq": ({"quant_method": "awq", "bits": 4}, "quantised .awq., which transformers cannot load here: .*gptqmodel"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors"},
        "quantised .compressed-tensors., which .*cannot load",
    ),
    "unknown": ({"quant_method": "of my own"}, "quantised .of my own., which transformers cannot load here"),
}


@pytest.mark.parametrize("kind", STORED)
def test_what_cannot_be_trained_is_refused_before_a_weight_is_read(home, tmp_path, kind, monkeypatch):
    stored, message = STORED[kind]
    (tmp_path / "config.json").write_text((home / "llama/config.json").read_text())
    folder = change(tmp_path, quantization_config=stored)  # which holds no weights
    run = TrainRun.from_settings(run_settings(home, tmp_path / "out", model=folder, lora_rank=4))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        check_model(run, run.config())


def test_a_head_that_is_quantised_is_refused(home, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = int8(home / "llama")
    quantize_(model.lm_head, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="Leave lm_head out of quantisation"):
        make_trainer(tmp_path, "longpo", PAIRS, add_adapters(model, 2))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quantization": "int8"}, "quantization='int8': of adapters, and lora_rank is 0; set lora_rank"),
        ({"lora_alpha": 8.0, "use_rslora": True}, "lora_alpha=8.0, use_rslora=True: of adapters, and lora_rank is 0"),
        (
            {"quantization": "int4", "lora_rank": 4},
            "need a package .mslk., and PEFT trains no adapters on them; expected 'nf4'",
        ),
        ({"quantization": "int7", "lora_rank": 4}, "quantization='int7': expected one of none, int8, nf4"),
        ({"lora_dropout": 1.0, "lora_rank": 4}, "lora_dropout=1.0: expected a number from 0 to 1"),
        ({"modules_to_save": "lm_head", "lora_rank": 4}, "setting 'modules_to_save' is none of TrainRun"),
    ],
)
def test_settings_that_make_no_sense(home, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        TrainRun.from_settings(run_settings(home, tmp_path, **more))


@pytest.mark.skipif("__import__('transformers').utils.is_bitsandbytes_available()", reason="for a machine without it")
def test_four_bits_say_what_they_need(home, tmp_path):
    run = TrainRun.from_settings(run_settings(home, tmp_path, quantization="nf4", lora_rank=4))
    with pytest.raises(ValueError, match=r"(?s)cannot load here: .*pip install -U bitsandbytes"):
        check_model(run, run.config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": "q_proj,dense"},
            "no layer is named 'dense'; expected all-linear, or some of k_proj",
        ),
        ({"target_modules": "lm_head"}, "'lm_head' is the head or an embedding"),
        ({"target_modules": "embed_tokens"}, "'embed_tokens' is the head or an embedding"),
        (
            {"target_parameters": "q_proj.weight"},
            "no fused weight is named 'q_proj.weight'; expected some of mlp.experts.down_",
        ),
        (
            {"target_parameters": "mlp.experts.down_proj", "dropout": 0.1},
            "lora_dropout=0.1 with lora_target_parameters",
        ),
    ],
)
def test_targets_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(make_mixture("qwen3_moe"), 2, **options)


EXPERTS = "mlp.experts.gate_up_proj,mlp.experts.down_proj"


@pytest.mark.parametrize("options", [{}, {"target_modules": "q_proj,v_proj", "target_parameters": EXPERTS}])
def test_fused_experts_are_trained(tmp_path, options):
    """By name, and in Qwen's mixtures by "all-linear", which PEFT has mean what it meant before experts were fused."""
    base = make_mixture("qwen3_moe")
    base.config.output_router_logits = False
    reference, truth = plain_mixture(base), with_adapters(plain_mixture(base), **options)
    policy = with_adapters(base, **options)
    trainer = make_trainer(tmp_path, "longpo", PAIRS, policy, pack_tokens=400)
    with TrueFloat64():
        naive_loss("longpo", truth, reference, PAIRS).backward()
    ours, theirs = gradients_of(trainer, policy), gradients(truth)
    assert ours.keys() == theirs.keys() and sum("experts" in name for name in ours) == 2 * 2 * 2
    for name in theirs:
        close(ours[name], theirs[name], 1e-9)


EXPERTS_OF = {
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
}


@pytest.mark.parametrize("kind", EXPERTS_OF)
def test_what_is_told_of_fused_experts_is_true_of_the_adapters_that_were_made(kind, caplog):
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **SIZES | EXPERTS_OF[kind] | {"vocab_size": VOCAB})
    )
    with caplog.at_level(logging.INFO):
        adapted = add_adapters(base, 2)
    made = sum("experts" in name and "lora_A" in name for name, _ in adapted.named_parameters())
    told = "4 fused weights of experts get no adapters, as they are no linear layers: name them to train them, too "
    told += f"(lora_target_parameters={','.join(sorted(EXPERTS.split(',')))})"
    assert (told in caplog.text) == (kind in ("gpt_oss", "qwen2_moe"))
    assert ("PEFT also makes adapters on mlp.experts.down_proj" in caplog.text) == (made > 0) == (kind == "qwen3_moe")
    assert "fused" not in caplog.text or kind != "lfm2"
    if kind == "qwen3_moe":
        with pytest.raises(
            ValueError, match=r"lora_dropout=0.1: PEFT makes no such adapters .*expected names of layers"
        ):
            add_adapters(make_mixture(kind), 2, dropout=0.1)


def test_a_run_trains_the_fused_experts_that_it_was_told(home, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    folder = made("gpt_oss", tmp_path / "model", vocab_size=len(tokenizer), **EXPERTS_OF["gpt_oss"])
    tokenizer.save_pretrained(folder)
    named = dict(lora_target_modules="q_proj", lora_target_parameters=EXPERTS, lora_rank=2, learning_rate=1e-2)
    ended = run_tiny(home, tmp_path / "out", model=folder, max_steps=1, warmup_steps=0, **named)
    assert ended.state.log_history[0]["grad_norm"] > 0
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    moved = {name for name, weight in ours.items() if "lora_B" in name and weight.any()}
    assert sum("experts" in name for name in moved) == 2 * 2 and sum("q_proj" in name for name in moved) == 2
    others = PeftModel.from_pretrained(load_model(folder, read_config(folder)), tmp_path / "out").state_dict()
    assert all(torch.equal(others[name.replace(".weight", ".default.weight")], ours[name]) for name in ours)
