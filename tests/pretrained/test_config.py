"""RoPE entries of real models, and what becomes of them in a config."""

import pytest
from transformers import Gemma3TextConfig, Qwen2Config

from longpo_ops.engines.settings import EngineSettings
from longpo_ops.pretrained import replace_rope
from longpo_ops.train.run import TrainRun


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5},
        {"rope_type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "truncate": False},
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [4.0], "short_mscale": 1.0, "long_mscale": 1.2},
        {"rope_type": "default", "mrope_section": [16, 24, 24], "mrope_interleaved": True},
        {"rope_type": "yarn", "factor": 16.0, "llama_4_scaling_beta": 0.1},
        {"rope_type": "dynamic", "alpha": 1000.0},
        {"type": "linear", "factor": 2.0},
        {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_theta": 1e4}},
    ],
)
def test_entries_of_published_models_are_taken(rope):
    assert EngineSettings(model="m", rope=rope).rope == rope


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"theta": 1e6}, "theta is none of its entries; did you mean rope_theta"),
        ({"full_attention": {"rope_theta": -1}}, "rope_theta is -1"),
        ({"full_attention": {"rope_type": "linaer"}}, "rope_type is 'linaer'"),
    ],
)
def test_entries_that_no_model_reads_are_refused(rope, message):
    with pytest.raises(ValueError, match=message):
        EngineSettings(model="m", rope=rope)


def test_entries_are_put_beside_those_that_stay():
    config = Qwen2Config(max_position_embeddings=64)
    replace_rope(config, {"rope_theta": 5e4}, 128)
    assert config.rope_parameters == {"rope_theta": 5e4, "rope_type": "default"}
    assert config.max_position_embeddings == 128


def test_entries_by_type_of_layer_change_their_own_type_only():
    config = Gemma3TextConfig(num_hidden_layers=2, max_position_embeddings=64)
    before = {kind: dict(entries) for kind, entries in config.rope_parameters.items()}
    replace_rope(config, {"full_attention": {"rope_type": "linear", "factor": 8.0}}, None)
    assert config.rope_parameters["sliding_attention"] == before["sliding_attention"]
    assert config.rope_parameters["full_attention"] == before["full_attention"] | {"rope_type": "linear", "factor": 8.0}
    assert config.max_position_embeddings == 64


@pytest.mark.parametrize("rope", [{"rope_theta": 1e7}, {"linear_attention": {"rope_theta": 1e7}}])
def test_entries_without_a_type_of_layer_are_refused_where_the_model_has_such_types(rope):
    with pytest.raises(ValueError, match="by type of layer, expected some under sliding_attention, full_attention"):
        replace_rope(Gemma3TextConfig(num_hidden_layers=2), rope, None)


def test_a_base_for_all_layers_is_refused_in_training_too(tmp_path):
    Gemma3TextConfig(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    run = TrainRun(model=str(tmp_path / "model"), data="pairs", output_dir=str(tmp_path / "out"), rope_theta=1e7)
    with pytest.raises(ValueError, match="by type of layer"):
        run.load_model(run.model, policy=True)
