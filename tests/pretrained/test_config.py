"""Configs of published models are taken, impossible ones refused by their fields' names; RoPE entries and their places."""

import json

import pytest
import torch
from transformers import AutoConfig, Gemma3TextConfig, Qwen2Config, Qwen2MoeConfig

from longpo_ops.attention import use_shared_prefix
from longpo_ops.engines.settings import EngineSettings
from longpo_ops.pretrained import BrokenModel, build_empty, load_model, read_config, replace_rope
from longpo_ops.train.run import TrainRun

from .published import PUBLISHED
from .tiny import SIZES, WITH_PICTURES, llama, save

YARN = {"rope_type": "yarn", "rope_theta": 1e4}


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


@pytest.mark.parametrize("model", PUBLISHED)
def test_configs_of_published_models_are_taken_and_built(model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[model]))
    config = read_config(str(tmp_path))
    assert config.vocab_size > 1000
    build_empty(config)


@pytest.mark.parametrize("model", PUBLISHED)
def test_what_transformers_saves_of_published_models_is_taken(model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[model]))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    again = read_config(str(tmp_path))
    assert again.vocab_size > 1000


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_none(window, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "mistral", "sliding_window": window}))
    assert read_config(str(tmp_path)).sliding_window is None


def test_a_window_that_no_layer_has_stays_as_the_model_needs_it(tmp_path):
    """transformers saves Qwen2-MoE with a window of 0, makes a mask of it for no layer, and fails where there is none."""
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    expected = save(tmp_path, Qwen2MoeConfig(**SIZES | experts))
    model, ids = load_model(str(tmp_path), read_config(str(tmp_path))), torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)
    with use_shared_prefix(model) as shared:
        assert shared is not None


@pytest.mark.parametrize(
    "files, message",
    [
        ([], "the folder holds nothing, and no config.json; fetch the model again"),
        (["m-q4.gguf"], r"the folder holds m-q4.gguf, and no config.json; .*gguf_file='m-q4.gguf'.*save_pretrained"),
        (None, r"it is a file, expected the folder of a model; .*gguf_file='model.gguf'"),
    ],
)
def test_what_is_no_folder_of_a_model_is_told_with_what_it_holds(files, message, tmp_path):
    for name in ["model.gguf"] if files is None else files:
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(BrokenModel, match=f"config.json: {message}"):
        read_config(str(tmp_path if files is not None else tmp_path / "model.gguf"))


def test_the_numbers_of_a_model_with_parts_are_those_of_its_text_part(tmp_path):
    told = WITH_PICTURES["gemma3"]().to_dict() | {"max_position_embeddings": 1200.0}
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert read_config(str(tmp_path)).max_position_embeddings == SIZES["max_position_embeddings"]
    told["text_config"]["num_attention_heads"] = 0
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(BrokenModel, match="num_attention_heads=0: expected a whole number from 1"):
        read_config(str(tmp_path))


def test_the_numbers_of_remote_code_are_left_alone(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from transformers import PreTrainedConfig\n\n\nclass Mine(PreTrainedConfig):\n    model_type = 'mine'\n"
    )
    told = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Mine"},
        "vocab_size": 704,
        "n_heads": [4, 0],
        "factor": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(told | {"intermediate_size": 1.5}))
    assert read_config(str(tmp_path), trust_remote_code=True).intermediate_size == 1.5


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads=0: expected a whole number from 1 to"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000: expected a whole number from 1 to 8,192"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: expected a divisor of num_attention_heads, which is 4"),
        ({"sliding_window": -16}, "sliding_window=-16: expected a whole number from -1 to"),
        ({"hidden_size": "32"}, "hidden_size='32': expected a whole number"),
        ({"hidden_size": None}, "hidden_size=None: .*expected int, got NoneType .*; mend the file"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]: TypeError"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf: expected a number from 0 to 1"),
        ({"attention_dropout": -1}, "attention_dropout=-1: expected a number from 0 to 1"),
        ({"rope_parameters": []}, r"rope_parameters=\[\]: expected an object, or null"),
        ({"rope_parameters": YARN}, "rope_parameters=.*: KeyError: .*Missing required keys .*'factor'"),
        (
            {"rope_parameters": YARN | {"factor": -4.0}},
            "rope_parameters: factor=-4.0: expected a finite number above 0",
        ),
        ({"rope_parameters": YARN | {"factor": "four"}}, "rope_parameters: factor='four': expected a finite number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_parameters: rope_theta=nan"),
        ({"dtype": "float31"}, "dtype='float31': AttributeError"),
        ({"dtype": "int8"}, "dtype=torch.int8: expected one of float32, bfloat16, float16"),
        ({"eos_token_id": ["a"]}, r"eos_token_id=\['a'\]: .*Field 'eos_token_id' with value"),
        ({"quantization_config": "int4"}, "quantization_config='int4': AttributeError"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 5}, "layer_types=.*num_hidden_layers"),
    ],
)
def test_what_no_model_can_have_is_refused_by_the_name_of_its_field(entries, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama(architectures=["LlamaForCausalLM"]).to_dict() | entries))
    with pytest.raises(BrokenModel, match=f"(?s)model '{tmp_path}' cannot be loaded: config.json: {message}"):
        read_config(str(tmp_path))


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"hidden_act": "siluu"}, "hidden_act='siluu' is no activation that transformers has"),
        (
            {"rope_parameters": {"rope_type": "yarm", "rope_theta": 1e4}},
            "rope_type='yarm' is no RoPE that transformers has",
        ),
        ({"pad_token_id": 5000}, "no model is built of it, pad_token_id=5000: .*Padding_idx must be within"),
    ],
)
def test_what_no_model_is_built_of_is_named(entries, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama().to_dict() | entries))
    with pytest.raises(BrokenModel, match=rf"config\.json: {message}"):
        build_empty(read_config(str(tmp_path)))
