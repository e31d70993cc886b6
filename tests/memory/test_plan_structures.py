"""Plans of models whose layers differ, or are mixtures of experts: what is counted, what is real, and what is refused."""

import pytest
import torch

from longpo_ops.memory.plan import ERROR, Settings, Work, predict
from longpo_ops.memory.search import fit
from longpo_ops.memory.structure import first_layers, weights_of, window_of
from longpo_ops.memory.trace import read_config, trace

from .models import small
from .test_plan import GIB, ROWS, machine, measured

EXPERTS = {
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=96),
}
DENSE_FIRST = dict(
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, q_lora_rank=32, kv_lora_rank=32, v_head_dim=16,
    qk_nope_head_dim=16, qk_rope_head_dim=16, n_group=2, topk_group=1, num_key_value_heads=4, first_k_dense_replace=1,
    head_dim=16,
)  # fmt: skip


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_peak_of_a_mixture(kind):
    work = Work(small(kind, **EXPERTS[kind], num_hidden_layers=2), ROWS, dtype=torch.float32, workspace_bytes=8 << 20)
    predicted = predict(work, Settings(), machine(GIB)).peak.total
    real = measured(work, Settings())
    assert abs(predicted / real - 1) < ERROR, (predicted, real)


def test_products_of_a_mixture_are_those_of_the_experts_that_a_row_goes_to():
    t = trace(small("qwen3_moe", **EXPERTS["qwen3_moe"]), 512)
    attention, router, expert = 128 * (128 + 2 * 64 + 128), 128 * 16, 3 * 128 * 96
    assert t.forward_flops == 2 * 512 * (attention + router + 4 * expert)
    assert t.backward_flops == 3 * t.forward_flops


def test_every_expert_is_held_and_a_token_meets_some():
    for name, active in (("qwen3-30b-a3b", 3.35), ("mixtral-8x7b", 12.88)):
        work = Work(read_config(name), 1024, accumulation=1)
        plan, total = predict(work, Settings(), machine(GIB)), work.weights.total
        assert plan.peak.parts["optimizer states"] == 8 * total and plan.peak.parts["weights"] == 2 * total
        assert round(plan.active / 1e9, 2) == active


def test_layers_that_differ_are_planned_by_kind():
    config = small("deepseek_v3", **DENSE_FIRST)
    w = weights_of(config)
    assert w.kinds == (0, 1, 1, 1) and w.counts == {0: 1, 1: 3} and w.each[0] < w.each[1] == w.each[3]
    dense, mixture = (trace(config, 512, layer=i) for i in (0, 1))
    assert dense.forward_flops != mixture.forward_flops and dense.pair_flops == 2 * 4 * (32 + 16)
    plan = predict(Work(config, 512, accumulation=1, workspace_bytes=8 << 20), Settings(), machine(GIB))
    gradients = {phase.name: phase.parts["gradients"] for phase in plan.phases}
    assert gradients["backward 0"] - gradients["backward 1"] == 2 * w.each[1]
    assert gradients["embedding"] - gradients["backward 0"] == 2 * w.each[0]


def test_windows_and_chunks_are_those_of_each_layer():
    alternating = small("gemma3_text", num_hidden_layers=7, sliding_window=16)
    assert [window_of(alternating, i) for i in range(7)] == [16] * 5 + [None, 16]
    assert weights_of(alternating).kinds == (0, 0, 0, 0, 0, 5, 0)
    chunked = small("llama4_text", attention_chunk_size=64, num_local_experts=2, intermediate_size_mlp=384)
    assert [window_of(chunked, i) for i in range(4)] == [32, 32, 32, None]
    assert [window_of(small("mistral", sliding_window=w), 0) for w in (None, 8)] == [None, 8]
    slow, fast = (
        predict(Work(small("gemma2", sliding_window=n), 4096), Settings(), machine(GIB)).seconds["forward"]
        for n in (4096, 64)
    )
    assert fast < slow


def test_lists_of_layers_are_cut_with_the_layers():
    config = first_layers(small("gemma3_text", num_hidden_layers=7), 3)
    assert config.num_hidden_layers == len(config.layer_types) == 3


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("qwen3_next", {}, "layer 0 .*carries a state from token to token.*set memory by hand"),
        ("lfm2", {"layer_types": ["full_attention", "conv"] * 2}, "layer 1 .*carries a state from token to token"),
        ("mixtral", {"output_router_logits": True}, "with output_router_logits.*set it to false"),
    ],
)
def test_a_structure_that_is_not_known_is_refused(kind, more, message):
    config = small(kind, **more)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fit(Work(config, 512), machine(GIB))


def test_a_model_without_checkpointing_is_refused(monkeypatch):
    from transformers import LlamaForCausalLM

    config = small(hidden_size=96)
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be planned: it has no gradient checkpointing"):
        weights_of(config)
