"""Family by family: a step of the trainer, packed or separate as it comes, is that of full logits of separate sequences of the
untouched model, in log-probs, loss and every gradient."""

import copy
import inspect
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from longpo_ops.train.forward import shares_prefix

from ..attention.dense import TrueFloat64
from .test_trainer import close
from .tiny import VOCAB, gradients, make_pair, make_trainer

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
PAIRS = [make_pair(1, turns=2, document=9, answer=3), make_pair(2, turns=1, rejected=2, document=16, answer=3)]
REFERENCE = (-3.0, -4.0)


def make_model(kind: str, seed: int = 0):
    """float64, every parameter random: fresh biases and sinks are zeros, which hide their loss."""
    config = AutoConfig.for_model(kind, **SIZES | FAMILIES[kind])
    config._experts_implementation = "eager"  # grouped products know no float64
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def alone(model, sequence):
    """-> (T, V) log-probs and the auxiliary loss."""
    takes = inspect.signature(type(model).forward).parameters
    out = model(torch.from_numpy(sequence.ids)[None], **{"use_cache": False} if "use_cache" in takes else {})
    return F.log_softmax(out.logits[0].double(), -1), getattr(out, "aux_loss", None)


def truth_of(model, pairs):
    """-> LongPO's loss as published (beta 0.1, lambda 0.01), the summed log-probs, auxiliary losses and lengths."""
    losses, sums, balances = [], [], []
    for pair in pairs:
        ours = []
        for sequence in (pair.chosen, *pair.rejected):
            logps, balance = alone(model, sequence)
            ids, labels = torch.from_numpy(sequence.ids)[1:], torch.from_numpy(sequence.labels)[1:]
            tokens = logps[:-1].gather(1, ids[:, None])[:, 0]
            if not ours:
                nll = -tokens[torch.from_numpy(sequence.nll_labels)[1:] != -100].mean()
            ours.append(tokens[labels != -100].sum())
            balances.append((balance, len(sequence)))
        margins = [(ours[0] - REFERENCE[0]) - (each - REFERENCE[1]) for each in ours[1:]]
        losses.append(0.01 * -F.logsigmoid(0.1 * torch.stack(margins)).mean() + nll)
        sums.append(torch.stack(ours))
    return torch.stack(losses).mean(), sums, balances


def with_reference(pair):
    return replace(pair, ref_chosen_logp=REFERENCE[0], ref_rejected_logps=(REFERENCE[1],) * len(pair.rejected))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_is_that_of_full_logits_of_separate_sequences(tmp_path, kind):
    policy = make_model(kind)
    plain = copy.deepcopy(policy).train()
    settings = dict(reference="data", pack_tokens=400, gradient_checkpointing=False, separate=kind == "phi3")
    trainer = make_trainer(tmp_path, "longpo", [with_reference(p) for p in PAIRS], policy, **settings)
    assert shares_prefix(policy) == (kind not in SEPARATE) == (not trainer.separate)
    (pack,) = trainer.train_dataset
    budget = ROUNDED.get(kind, 1e-9)
    with TrueFloat64() if kind != "llama4_text" else nullcontext():
        truth, sums, balances = truth_of(plain, PAIRS)
        if balances[0][0] is not None:
            tokens = sum(length for _, length in balances)
            truth = truth + 0.3 * sum(balance * length for balance, length in balances) / tokens
        truth.backward()
        loss, metrics = trainer._loss(policy.train(), pack, 2.0)
        loss.backward()
    close(metrics["logps/chosen"][0], sum(each[0] for each in sums), budget)
    close(metrics["logps/rejected"][0], sum(each[1:].sum() for each in sums), budget)
    close(loss, truth, budget)
    ours, theirs = gradients(policy), gradients(plain)
    assert ours.keys() == theirs.keys() and len(theirs) > 5
    for name in theirs:
        close(ours[name], theirs[name], budget)
