"""RoPE that depends on the length of a call: packs that would change a sequence's numbers are refused, others are right."""

import pytest
import torch
from transformers.models.gemma3 import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from longpo_ops.attention import check_rope, rope_depends_on_length, use_shared_prefix
from longpo_ops.train import LongPOConfig, LongPOTrainer
from tests.train.tiny import make_model as make_policy
from tests.train.tiny import make_pair

from .dense import make_layout, positions, sequences

ORIGINAL = 32  # positions
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(vocab_size=61, head_dim=8, initializer_range=0.3)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, factor=4.0, original_max_position_embeddings=ORIGINAL)
LONGROPE |= dict(short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 4.0, 8.0])
STEADY = [
    dict(rope_type="default", rope_theta=1e4),
    dict(rope_type="linear", rope_theta=1e4, factor=2.0),
    dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=ORIGINAL),
]
SHORT, UNEVEN, LONG = make_layout((20, 12, 6)), make_layout((20, 30, 6)), make_layout((40, 20, 6))


def make_model(rope, seed=0):
    torch.manual_seed(seed)
    context = ORIGINAL if rope["rope_type"] == "dynamic" else 4 * ORIGINAL
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=context, rope_parameters=rope)).double().eval()


def make_ids(layout):
    ids = torch.randint(61, (1, layout.length), generator=torch.Generator().manual_seed(1))
    for pair in layout.pairs:
        for start, _ in pair.tails[1:]:
            ids[0, start] = ids[0, pair.prefix_end - 1]
    return ids


def packed(model, layout):
    with torch.no_grad(), use_shared_prefix(model):
        inputs = dict(position_ids=positions(layout), shared_prefix_layout=layout, use_cache=False)
        return model(make_ids(layout), **inputs).logits[0]


def assert_equals_separate(rope, layout, model):
    rows = packed(model, layout)
    for sequence in (sequence for pair in sequences(layout) for sequence in pair):
        with torch.no_grad():
            alone = make_model(rope)(make_ids(layout)[:, sequence], use_cache=False).logits[0]
        torch.testing.assert_close(rows[sequence], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=lambda rope: rope["rope_type"])
def test_refuses_a_pack_whose_sequences_get_other_frequencies(rope):
    model = make_model(rope)
    assert rope_depends_on_length(model)
    with pytest.raises(
        ValueError, match=f"type {rope['rope_type']} .* one of 25 positions and one of 50 get different"
    ):
        packed(model, UNEVEN)
    with pytest.raises(ValueError, match="separate sequences"):
        check_rope(model, positions(UNEVEN), UNEVEN)


@pytest.mark.parametrize(("rope", "layout"), [(DYNAMIC, SHORT), (LONGROPE, SHORT), (LONGROPE, LONG)])
def test_takes_packs_whose_sequences_get_the_same(rope, layout):
    assert_equals_separate(rope, layout, make_model(rope))


def test_a_pack_forgets_the_calls_before_it():
    """transformers keeps the frequencies of the longest call so far, up to the next one within the context."""
    model, pair = make_model(DYNAMIC), make_layout((20, 16))
    packed(model, make_layout((30, 60)))
    assert_equals_separate(DYNAMIC, pair, model)


@pytest.mark.parametrize("rope", STEADY, ids=lambda rope: rope["rope_type"])
def test_takes_any_pack_where_frequencies_are_the_same_at_any_length(rope):
    model = make_model(rope)
    assert not rope_depends_on_length(model)
    assert_equals_separate(rope, UNEVEN, model)


def test_looks_at_every_kind_of_layer():
    kinds = {"full_attention": DYNAMIC, "sliding_attention": STEADY[0]}
    layers = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=64)
    config = Gemma3TextConfig(**SIZES, **layers, max_position_embeddings=ORIGINAL, rope_parameters=kinds)
    model = Gemma3ForCausalLM(config).eval()
    packed(model, SHORT)
    with pytest.raises(ValueError, match="type default, dynamic depends"):
        packed(model, UNEVEN)


def test_the_trainer_refuses_before_it_trains(tmp_path):
    pairs = [make_pair(seed, document=40, answer=9) for seed in range(3)]

    def start(objective):
        policy = make_policy(rope_theta=1e4)
        policy.config.rope_parameters, policy.config.max_position_embeddings = DYNAMIC, 16
        policy.model.rotary_emb = type(policy.model.rotary_emb)(config=policy.config)
        LongPOTrainer(policy, LongPOConfig(output_dir=str(tmp_path), objective=objective, use_cpu=True), pairs)

    with pytest.raises(ValueError, match="RoPE of type dynamic depends on the length"):
        start("simpo")
    start("sft_chosen")
