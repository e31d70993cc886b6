"""Which heads each rank takes: a partition, even where it can be, refused where it cannot. Exchanges: tests/parallel."""

import pytest
from transformers import AutoConfig, LlamaConfig
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaForCausalLM

from longpo_ops.attention import check_heads, check_ranks, exchanged_numbers, head_plan

HEADS = [(32, 8), (28, 4), (12, 2), (8, 8), (6, 2), (3, 1), (40, 8), (64, 8), (16, 16), (7, 1), (12, 3)]


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_every_number_of_ranks_up_to_the_heads_parts_them(heads, kv_heads):
    group = heads // kv_heads
    for ranks in range(1, heads + 1):
        plan = head_plan(heads, kv_heads, ranks)
        assert [head for share in plan for head in share.heads] == list(range(heads))
        assert {kv for share in plan for kv in share.kv_heads} == set(range(kv_heads))
        for share in plan:  # what the attention needs: as many query heads to each kv head, and theirs
            assert len(share.heads) % len(share.kv_heads) == 0
            each = len(share.heads) // len(share.kv_heads)
            assert [head // group for head in share.heads] == [kv for kv in share.kv_heads for _ in range(each)]
        sizes = [len(share.heads) for share in plan]
        if heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0):
            assert set(sizes) == {heads // ranks}


def test_published_models_are_shared_out_as_told():
    assert [len(share.heads) for share in head_plan(28, 4, 8)] == [3, 4] * 4  # Qwen2.5-7B
    assert {(len(share.heads), len(share.kv_heads)) for share in head_plan(64, 8, 16)} == {(4, 1)}  # Qwen2.5-72B
    assert {(len(share.heads), len(share.kv_heads)) for share in head_plan(32, 8, 8)} == {(4, 1)}  # Llama 3.1 8B


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_the_formula_is_the_plans_mean_over_ranks(heads, kv_heads):
    """Every rank sends its rows of all heads but its own, and all rows but its own of its heads' output."""
    rows, size = 1000, 16
    for ranks in range(1, heads + 1):
        plan = head_plan(heads, kv_heads, ranks)
        counts = [len(share.heads) + 2 * len(share.kv_heads) for share in plan]
        sent = sum(rows * size * (sum(counts) - count) for count in counts)
        sent += sum(rows * (ranks - 1) * size * len(share.heads) for share in plan)
        assert sent / ranks == pytest.approx(exchanged_numbers(rows, heads, kv_heads, size, ranks))


def test_more_ranks_than_heads_are_refused_with_the_numbers():
    config = LlamaConfig(hidden_size=48, num_attention_heads=12, num_key_value_heads=2)
    check_heads(config, 12)
    for ranks in (13, 16):
        with pytest.raises(ValueError, match=rf"sequence_parallel={ranks}: .* 12 query and 2 kv heads.* at most 12"):
            check_heads(config, ranks)
    with pytest.raises(ValueError, match="sequence_parallel"):
        check_heads(config, 0)
    with pytest.raises(ValueError, match="7 query heads and 2 kv heads"):
        head_plan(7, 2, 2)


def test_rope_that_depends_on_the_length_is_refused_over_ranks():
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=11)
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=8, rope_parameters=rope))
    check_ranks(model, 1)
    with pytest.raises(ValueError, match=r"RoPE of type dynamic .* sequence_parallel=1"):
        check_ranks(model, 2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=8))
    check_ranks(model, 4)
    with pytest.raises(ValueError, match="at most 4"):
        check_ranks(model, 5)


@pytest.mark.parametrize("config", [Gemma3TextConfig(), AutoConfig.for_model("qwen3_moe")], ids=lambda c: c.model_type)
def test_heads_of_every_kind_of_config_are_found(config):
    check_heads(config, config.num_attention_heads)
    with pytest.raises(ValueError, match=f"{config.num_attention_heads} query"):
        check_heads(config, config.num_attention_heads + 1)
