"""Configs cut in width: what is no width stays, and the layers are those that were asked for."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longpo_ops.pretrained.small import small_config


def test_widths_shrink_and_the_rest_stays():
    config = AutoConfig.for_model("mistral", sliding_window=4096, hidden_size=4096, max_position_embeddings=4096)
    small = small_config(config)
    assert (small.hidden_size, small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (64, 4, 2, 16)
    assert (small.sliding_window, small.max_position_embeddings, small.num_hidden_layers) == (4096, 4096, 32)
    assert small.rope_parameters == config.rope_parameters and config.hidden_size == 4096


def test_windows_and_chunks_differ():
    assert small_config(AutoConfig.for_model("mistral", sliding_window=4096), window=5).sliding_window == 5
    assert small_config(AutoConfig.for_model("llama4_text"), window=5).attention_chunk_size == 6


@pytest.mark.parametrize(
    ("given", "kept"),
    {(32, 32): (4, 4), (32, 8): (4, 2), (32, 1): (4, 1), (2, 2): (2, 2)}.items(),
    ids=str,
)
def test_heads_share_keys_as_they_did(given, kept):
    heads, shared = given
    config = AutoConfig.for_model("llama", num_attention_heads=heads, num_key_value_heads=shared)
    small = small_config(config)
    assert (small.num_attention_heads, small.num_key_value_heads) == kept


def test_layers_are_those_asked_for():
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=12)
    small = small_config(config, layers=[4, 5])
    assert small.num_hidden_layers == 2 and small.layer_types == ["sliding_attention", "full_attention"]


def test_what_single_layers_override_goes_with_them():
    config = AutoConfig.for_model("gemma4_text", num_hidden_layers=12)
    assert [config.per_layer_config[i].head_dim for i in (4, 5)] == [256, 512]
    small = small_config(config, layers=[4, 11])
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small._heterogeneity_spec.per_layer_overrides == {0: {}, 1: {"head_dim": 32}}
    model = AutoModelForCausalLM.from_config(small)
    assert model(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["mamba2", "rwkv"])
def test_models_of_states_are_cut_as_well(kind):
    """Groups go with heads, and a width needs no heads to be one."""
    model = AutoModelForCausalLM.from_config(small_config(AutoConfig.for_model(kind), layers=[0, 1]))
    assert sum(p.numel() for p in model.parameters()) < 1e5
    assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_factors_of_rope_fit_the_smaller_heads():
    rope = dict(
        rope_type="longrope",
        rope_theta=1e4,
        factor=4.0,
        original_max_position_embeddings=4096,
        short_factor=[1.0] * 48,
        long_factor=[2.0] * 48,
    )
    small = small_config(AutoConfig.for_model("phi3", rope_parameters=rope, pad_token_id=0))
    model = AutoModelForCausalLM.from_config(small_config(small, layers=[0]))
    assert model(torch.arange(9)[None]).logits.isfinite().all()
