"""config.json of published models as their folders have it, old names of fields and odd values included, with two layers."""

from __future__ import annotations

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _llama(**more) -> dict:
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", hidden_size=4096, intermediate_size=14336,
        num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=2, rms_norm_eps=1e-05, vocab_size=128256,
        max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16",
        bos_token_id=128000, eos_token_id=128001,
    ) | more  # fmt: skip


def _qwen(kind: str, **more) -> dict:
    return dict(
        architectures=[f"{kind.capitalize()}ForCausalLM"], model_type=kind, hidden_act="silu", hidden_size=3584,
        intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=2, rms_norm_eps=1e-06,
        vocab_size=152064, max_position_embeddings=32768, rope_theta=1000000.0, tie_word_embeddings=False,
        torch_dtype="bfloat16", bos_token_id=151643, eos_token_id=151645, attention_dropout=0.0, max_window_layers=28,
        sliding_window=131072, use_sliding_window=False, initializer_range=0.02, use_cache=True,
    ) | more  # fmt: skip


PUBLISHED = {
    "llama 1": _llama(
        num_key_value_heads=32, vocab_size=32000, pad_token_id=-1, bos_token_id=1, eos_token_id=2, max_position_embeddings=2048,
        intermediate_size=11008, rms_norm_eps=1e-06, torch_dtype="float16", max_sequence_length=2048,
    ),
    "llama 2": _llama(
        num_key_value_heads=32, vocab_size=32000, bos_token_id=1, eos_token_id=2, max_position_embeddings=4096,
        intermediate_size=11008, rope_scaling=None, pretraining_tp=1, torch_dtype="float16",
    ),
    "llama 3": _llama(attention_bias=False, attention_dropout=0.0, pretraining_tp=1, rope_scaling=None),
    "llama 3.1": _llama(
        eos_token_id=[128001, 128008, 128009], max_position_embeddings=131072, mlp_bias=False,
        rope_scaling={**LLAMA3, "rope_type": "llama3"},
    ),
    "llama 3.2": _llama(
        hidden_size=2048, head_dim=64, tie_word_embeddings=True, max_position_embeddings=131072,
        rope_scaling={**LLAMA3, "factor": 32.0, "rope_type": "llama3"},
    ),
    "llama 4's angles": _llama(
        rope_scaling={**LLAMA3, "factor": 16.0, "high_freq_factor": 1.0, "rope_type": "llama3"},
        max_position_embeddings=10485760,
    ),
    "llama 2 linear": _llama(rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=10000),
    "llama 2 yarn": _llama(
        rope_scaling={"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "finetuned": True},
        max_position_embeddings=131072,
    ),
    "llama dynamic": _llama(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "smollm2": _llama(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2, rope_theta=100000, rope_interleaved=False,
        is_llama_config=True, rope_scaling=None,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
    ),
    "smollm3": _llama(
        model_type="smollm3", architectures=["SmolLM3ForCausalLM"], hidden_size=2048, intermediate_size=11008,
        num_attention_heads=16, num_key_value_heads=4, layer_types=["full_attention"] * 2, no_rope_layers=[1, 0],
        no_rope_layer_interval=4, use_sliding_window=False, sliding_window=None, max_window_layers=28, rope_theta=5000000.0,
        max_position_embeddings=65536, pad_token_id=128004,
    ),
    "mistral 0.1": _llama(
        model_type="mistral", vocab_size=32000, sliding_window=4096, rope_theta=10000.0, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=32768,
    ),
    "mistral nemo": _llama(
        model_type="mistral", hidden_size=5120, head_dim=128, vocab_size=131072, sliding_window=None, rope_theta=1000000.0,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=1024000,
    ),
    "mixtral": _llama(
        model_type="mixtral", vocab_size=32000, num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.02,
        output_router_logits=False, sliding_window=None, bos_token_id=1, eos_token_id=2, rope_theta=1000000.0,
    ),
    "qwen2": _qwen("qwen2"),
    "qwen2.5 yarn": _qwen(
        "qwen2", rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    ),
    "qwen2 of integers": _qwen("qwen2", rope_theta=1000000, eos_token_id=[151645, 151643], sliding_window=32768),
    "qwen2-moe": _qwen(
        "qwen2_moe", hidden_size=2048, num_attention_heads=16, num_key_value_heads=16, num_experts=60, num_experts_per_tok=4,
        moe_intermediate_size=1408, shared_expert_intermediate_size=5632, norm_topk_prob=False, decoder_sparse_step=1,
        vocab_size=151936,
    ),
    "qwen3": _qwen(
        "qwen3", hidden_size=4096, head_dim=128, num_attention_heads=32, num_key_value_heads=8, vocab_size=151936,
        attention_bias=False, rope_scaling=None, sliding_window=None, max_window_layers=36, max_position_embeddings=40960,
    ),
    "qwen3-moe": _qwen(
        "qwen3_moe", hidden_size=2048, head_dim=128, num_attention_heads=32, num_key_value_heads=4, vocab_size=151936,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, mlp_only_layers=[], sliding_window=None,
        rope_scaling=None, router_aux_loss_coef=0.001, norm_topk_prob=True,
    ),
    "gemma 1": dict(
        architectures=["GemmaForCausalLM"], model_type="gemma", hidden_act="gelu", hidden_activation=None, head_dim=256,
        hidden_size=2048, intermediate_size=16384, num_attention_heads=8, num_key_value_heads=1, num_hidden_layers=2,
        rms_norm_eps=1e-06, rope_theta=10000.0, vocab_size=256000, max_position_embeddings=8192, bos_token_id=2,
        eos_token_id=1, pad_token_id=0, torch_dtype="bfloat16",
    ),
    "gemma 2": dict(
        architectures=["Gemma2ForCausalLM"], model_type="gemma2", hidden_act="gelu_pytorch_tanh", head_dim=256,
        hidden_activation="gelu_pytorch_tanh", hidden_size=2304, intermediate_size=9216, num_attention_heads=8,
        num_key_value_heads=4, num_hidden_layers=2, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, sliding_window=4096, sliding_window_size=4096, cache_implementation="hybrid",
        rms_norm_eps=1e-06, rope_theta=10000.0, vocab_size=256000, max_position_embeddings=8192, bos_token_id=2,
        eos_token_id=[1, 107], pad_token_id=0, torch_dtype="bfloat16",
    ),
    "gemma 3 1b": dict(
        architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", hidden_activation="gelu_pytorch_tanh", head_dim=256,
        hidden_size=1152, intermediate_size=6912, num_attention_heads=4, num_key_value_heads=1, num_hidden_layers=2,
        query_pre_attn_scalar=256, attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=512,
        sliding_window_pattern=6, cache_implementation="hybrid", rms_norm_eps=1e-06, rope_theta=1000000,
        rope_local_base_freq=10000, rope_scaling=None, vocab_size=262144, max_position_embeddings=32768, bos_token_id=2,
        eos_token_id=[1, 106], pad_token_id=0, torch_dtype="bfloat16",
    ),
    "gemma 3 4b": dict(
        architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", boi_token_index=255999, eoi_token_index=256000,
        eos_token_id=[1, 106], image_token_index=262144, initializer_range=0.02, mm_tokens_per_image=256,
        text_config=dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=2,
                         rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window=1024),
        torch_dtype="bfloat16",
        vision_config=dict(hidden_size=1152, image_size=896, intermediate_size=4304, model_type="siglip_vision_model",
                           num_attention_heads=16, num_hidden_layers=2, patch_size=14, vision_use_head=False),
    ),
    "phi 1.5": dict(
        architectures=["PhiForCausalLM"], model_type="phi", hidden_act="gelu_new", hidden_size=2048, intermediate_size=8192,
        num_attention_heads=32, num_key_value_heads=None, num_hidden_layers=2, layer_norm_eps=1e-05, vocab_size=51200,
        max_position_embeddings=2048, partial_rotary_factor=0.5, qk_layernorm=False, resid_pdrop=0.0, embd_pdrop=0.0,
        rope_theta=10000.0, rope_scaling=None, bos_token_id=None, eos_token_id=None, torch_dtype="float16",
    ),
    "phi 3 longrope": dict(
        architectures=["Phi3ForCausalLM"], model_type="phi3", hidden_act="silu", hidden_size=3072, intermediate_size=8192,
        num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=2, rms_norm_eps=1e-05, vocab_size=32064,
        max_position_embeddings=131072, original_max_position_embeddings=4096, rope_theta=10000.0, sliding_window=262144,
        rope_scaling={"type": "longrope", "short_factor": [1.05] * 48, "long_factor": [1.03] * 24 + [64.1] * 24},
        bos_token_id=1, eos_token_id=32000, pad_token_id=32000, resid_pdrop=0.0, embd_pdrop=0.0, torch_dtype="bfloat16",
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    ),
    "phi 4 mini": dict(
        architectures=["Phi3ForCausalLM"], model_type="phi3", hidden_act="silu", hidden_size=3072, intermediate_size=8192,
        num_attention_heads=24, num_key_value_heads=8, num_hidden_layers=2, rms_norm_eps=1e-05, vocab_size=200064,
        max_position_embeddings=131072, original_max_position_embeddings=4096, rope_theta=10000.0, sliding_window=262144,
        partial_rotary_factor=0.75, tie_word_embeddings=True,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1] * 24 + [47.7] * 24},
        bos_token_id=199999, eos_token_id=199999, pad_token_id=199999, torch_dtype="bfloat16",
    ),
    "gpt2": dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", activation_function="gelu_new", n_embd=768, n_head=12, n_layer=2,
        n_ctx=1024, n_positions=1024, n_inner=None, vocab_size=50257, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1,
        layer_norm_epsilon=1e-05, bos_token_id=50256, eos_token_id=50256, summary_first_dropout=0.1, summary_type="cls_index",
        summary_activation=None, summary_proj_to_labels=True, task_specific_params={"text-generation": {"do_sample": True}},
    ),
    "neox": dict(
        architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox", hidden_act="gelu", hidden_size=2048, rotary_pct=0.25,
        intermediate_size=8192, num_attention_heads=8, num_hidden_layers=2, layer_norm_eps=1e-05, vocab_size=50304,
        max_position_embeddings=2048, rotary_emb_base=10000, use_parallel_residual=True, attention_dropout=0.0,
        hidden_dropout=0.0, classifier_dropout=0.1, bos_token_id=0, eos_token_id=0, torch_dtype="float16",
    ),
    "falcon": dict(
        architectures=["FalconForCausalLM"], model_type="falcon", hidden_size=4544, num_attention_heads=71, num_hidden_layers=2,
        num_kv_heads=71, multi_query=True, new_decoder_architecture=False, parallel_attn=True, bias=False, alibi=False,
        hidden_dropout=0.0, attention_dropout=0.0, layer_norm_epsilon=1e-05, vocab_size=65024, bos_token_id=11,
        eos_token_id=11, apply_residual_connection_post_layernorm=False, torch_dtype="bfloat16",
    ),
    "granite": _llama(
        model_type="granite", architectures=["GraniteForCausalLM"], hidden_size=2048, intermediate_size=8192, vocab_size=49155,
        attention_multiplier=0.015625, embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22,
        attention_dropout=0.1, bos_token_id=0, eos_token_id=0, pad_token_id=0, rope_theta=10000000.0, rope_scaling=None,
    ),
    "cohere": dict(
        architectures=["CohereForCausalLM"], model_type="cohere", hidden_act="silu", hidden_size=8192, intermediate_size=22528,
        num_attention_heads=64, num_key_value_heads=64, num_hidden_layers=2, layer_norm_eps=1e-05, logit_scale=0.0625,
        vocab_size=256000, max_position_embeddings=8192, model_max_length=131072, rope_theta=8000000.0, use_qk_norm=False,
        bos_token_id=5, eos_token_id=255001, pad_token_id=0, torch_dtype="float16",
    ),
    "cohere 2": dict(
        architectures=["Cohere2ForCausalLM"], model_type="cohere2", hidden_act="silu", head_dim=128, hidden_size=4096,
        intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=2, layer_norm_eps=1e-05,
        logit_scale=0.25, vocab_size=256000, max_position_embeddings=8192, rope_theta=50000, sliding_window=4096,
        sliding_window_pattern=4, order_of_interleaved_layers="local_attn_first", position_embedding_type="rope_gptj",
        rotary_pct=1.0, use_gated_activation=True, bos_token_id=5, eos_token_id=255001, pad_token_id=0,
        torch_dtype="bfloat16",
    ),
    "olmo": _llama(
        model_type="olmo", architectures=["OlmoForCausalLM"], num_key_value_heads=32, intermediate_size=11008,
        vocab_size=50304, clip_qkv=None, eos_token_id=50279, pad_token_id=1, bos_token_id=None, rope_theta=10000.0,
        rope_scaling=None, max_position_embeddings=2048, torch_dtype="float32",
    ),
    "olmo 2": _llama(
        model_type="olmo2", architectures=["Olmo2ForCausalLM"], num_key_value_heads=32, intermediate_size=11008,
        vocab_size=100352, eos_token_id=100257, pad_token_id=100277, bos_token_id=None, rope_scaling=None,
        rms_norm_eps=1e-06, max_position_embeddings=4096, torch_dtype="float32",
    ),
    "starcoder 2": dict(
        architectures=["Starcoder2ForCausalLM"], model_type="starcoder2", hidden_act="gelu_pytorch_tanh", hidden_size=3072,
        intermediate_size=12288, num_attention_heads=24, num_key_value_heads=2, num_hidden_layers=2, norm_epsilon=1e-05,
        norm_type="layer_norm", mlp_type="default", layer_norm_epsilon=1e-05, residual_dropout=0.0, embedding_dropout=0.0,
        attention_dropout=0.0, vocab_size=49152, max_position_embeddings=16384, rope_theta=999999.4420358813,
        sliding_window=4096, use_bias=True, bos_token_id=0, eos_token_id=0, torch_dtype="bfloat16",
    ),
    "stablelm": dict(
        architectures=["StableLmForCausalLM"], model_type="stablelm", hidden_act="silu", hidden_size=2560,
        intermediate_size=6912, num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=2, layer_norm_eps=1e-05,
        partial_rotary_factor=0.25, rope_pct=0.25, rope_theta=10000, vocab_size=50304, max_position_embeddings=4096,
        use_qkv_bias=False, bos_token_id=0, eos_token_id=0, torch_dtype="bfloat16",
    ),
    "opt": dict(
        architectures=["OPTForCausalLM"], model_type="opt", activation_function="relu", hidden_size=768, ffn_dim=3072,
        word_embed_proj_dim=768, num_attention_heads=12, num_hidden_layers=2, dropout=0.1, attention_dropout=0.0,
        activation_dropout=0.0, layerdrop=0.0, do_layer_norm_before=True, vocab_size=50272, max_position_embeddings=2048,
        bos_token_id=2, eos_token_id=2, pad_token_id=1, prefix="</s>", torch_dtype="float16",
    ),
    "bloom": dict(
        architectures=["BloomForCausalLM"], model_type="bloom", hidden_size=1024, n_layer=2, num_attention_heads=16,
        n_inner=None, offset_alibi=100, seq_length=2048, layer_norm_epsilon=1e-05, attention_dropout=0.0, hidden_dropout=0.0,
        attention_softmax_in_fp32=True, masked_softmax_fusion=True, skip_bias_add=True, vocab_size=250880, bos_token_id=1,
        eos_token_id=2, pad_token_id=3, unk_token_id=0,
    ),
    "mamba": dict(
        architectures=["MambaForCausalLM"], model_type="mamba", hidden_act="silu", d_inner=1536, d_model=768, hidden_size=768,
        intermediate_size=1536, n_layer=2, num_hidden_layers=2, conv_kernel=4, expand=2, state_size=16, time_step_rank=48,
        time_step_floor=0.0001, time_step_max=0.1, layer_norm_epsilon=1e-05, rms_norm=True, vocab_size=50280,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, torch_dtype="float32",
    ),
    "deepseek 3": dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", hidden_act="silu", hidden_size=1024,
        intermediate_size=2048, moe_intermediate_size=256, num_attention_heads=16, num_key_value_heads=16,
        num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4,
        n_group=4, topk_group=2, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, rms_norm_eps=1e-06, rope_theta=10000, vocab_size=129280, max_position_embeddings=163840,
        rope_scaling={"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                      "original_max_position_embeddings": 4096, "type": "yarn"},
        scoring_func="sigmoid", topk_method="noaux_tc", routed_scaling_factor=2.5, num_nextn_predict_layers=1, ep_size=1,
        aux_loss_alpha=0.001, seq_aux=True, bos_token_id=0, eos_token_id=1, torch_dtype="bfloat16",
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    ),
    "gpt-oss": dict(
        architectures=["GptOssForCausalLM"], model_type="gpt_oss", hidden_act="silu", head_dim=64, hidden_size=2880,
        intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=2, num_local_experts=4,
        num_experts_per_tok=4, experts_per_token=4, layer_types=["sliding_attention", "full_attention"],
        initial_context_length=4096, sliding_window=128, swiglu_limit=7.0, rms_norm_eps=1e-05, rope_theta=150000,
        rope_scaling={"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                      "rope_type": "yarn", "truncate": False},
        vocab_size=201088, max_position_embeddings=131072, attention_bias=True, eos_token_id=200002, pad_token_id=199999,
    ),
}  # fmt: skip
