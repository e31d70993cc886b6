"""Family by family: a step of the trainer, packed or separate as it comes, is that of full logits of separate sequences of the
untouched model, in log-probs, loss and every gradient."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longpo_ops.train.forward import shares_prefix

from ..attention.dense import TrueFloat64
from .step import errors, make, plain_step, step_of
from .tiny import VOCAB

SIZES = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
    pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
BALANCED = dict(output_router_logits=True, router_aux_loss_coef=0.3)
STATE = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=8)
LOCAL = dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"])
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.5], long_factor=[2.0, 4.0],
                original_max_position_embeddings=16)  # fmt: skip
GPT2 = dict(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip

FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=7),
    "qwen2": {},
    "qwen3": {},
    "gemma2": dict(query_pre_attn_scalar=4, attn_logit_softcapping=5.0, final_logit_softcapping=4.0, **LOCAL),
    "mixtral": dict(**EXPERTS),
    "mamba": dict(state_size=4, time_step_rank=4, conv_kernel=4),
    "falcon_mamba": dict(state_size=4, time_step_rank=4, conv_kernel=4),
    "qwen3_next": dict(**EXPERTS, shared_expert_intermediate_size=12, linear_num_value_heads=4, linear_num_key_heads=2,
                       linear_key_head_dim=4, linear_value_head_dim=4, layer_types=["linear_attention", "full_attention"],
                       **BALANCED),
    "falcon_h1": dict(**STATE, mamba_d_ssm=32),
    "bamba": dict(**STATE, attn_layer_indices=[1]),
    "lfm2": dict(layer_types=["conv", "full_attention"], block_ff_dim=24),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                  mamba_d_state=4, mamba_d_conv=4, mamba_dt_rank=4, use_mamba_kernels=False, **EXPERTS, **BALANCED),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], shared_intermediate_size=12, **STATE, **EXPERTS),
    "gpt2": GPT2,
    "gpt_neox": dict(rotary_pct=0.5),
    "opt": dict(ffn_dim=24, word_embed_proj_dim=16, dropout=0.0, activation_dropout=0.0, attention_dropout=0.0),
    "bloom": dict(n_layer=2, n_head=4),
    "phi": {},
    "phi3": dict(rope_parameters=LONGROPE),
    "gpt_oss": dict(**LOCAL, **EXPERTS),
    "llama4_text": dict(attention_chunk_size=8, intermediate_size_mlp=24, layer_types=["chunked_attention", "full_attention"],
                        no_rope_layers=[1, 0], moe_layers=[1], attn_temperature_tuning=False, **EXPERTS),
    "deepseek_v3": dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
                        n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, n_shared_experts=1,
                        num_key_value_heads=4, **EXPERTS),
    "glm4": {},
    "cohere2": dict(logit_scale=0.25, **LOCAL),
    "olmo3": dict(**LOCAL),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "granite": dict(logits_scaling=4.0, attention_multiplier=0.3, residual_multiplier=0.7),
    "starcoder2": dict(sliding_window=7, residual_dropout=0.0, embedding_dropout=0.0),
    "nemotron": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "stablelm": {},
    "exaone4": dict(**LOCAL),
    "ministral3": dict(),
}  # fmt: skip
# By states, convolutions, a mask of its own, layers that hand nothing on; of Phi-3 by a setting, as its
# frequencies depend on the length.
SEPARATE = (
    *("mamba", "falcon_mamba", "qwen3_next", "falcon_h1", "bamba", "lfm2", "jamba", "granitemoehybrid", "bloom"),
    *("nemotron", "stablelm", "phi3"),
)
# DeepSeek's router stays in float32. Llama 4's masks (vmap) know no mode, so norms and softmax do, too; Phi-3's
# frequencies are made anew within the mode.
ROUNDED = {"llama4_text": 1e-5, "phi3": 1e-7, "deepseek_v3": 1e-6}


def make_model(kind: str, attention: str = "eager"):
    """float64, every parameter random: fresh biases and sinks are zeros, which hide their loss."""
    config = AutoConfig.for_model(kind, **SIZES | FAMILIES[kind])
    config._experts_implementation = "eager"  # grouped products know no float64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_is_that_of_full_logits_of_separate_sequences(tmp_path, kind):
    policy = make_model(kind)
    plain = copy.deepcopy(policy).train()
    trainer = make(tmp_path, policy, separate=kind == "phi3")
    assert shares_prefix(policy) == (kind not in SEPARATE) == (not trainer.separate)
    with TrueFloat64() if kind != "llama4_text" else nullcontext():
        off = errors(step_of(trainer, policy.train()), plain_step(plain))
    assert len(off) > 8
    assert max(off.values()) <= ROUNDED.get(kind, 1e-9), max(off.items(), key=lambda told: told[1])


def test_separate_sequences_keep_a_soft_cap_that_pytorchs_attention_has_not(tmp_path):
    policy, plain = make_model("gemma2", "sdpa"), make_model("gemma2").train()
    assert policy.config._attn_implementation == "sdpa"
    trainer = make(tmp_path, policy, separate=True)
    with TrueFloat64():
        off = errors(step_of(trainer, policy.train()), plain_step(plain))
    assert max(off.values()) <= 1e-9, max(off.items(), key=lambda told: told[1])
