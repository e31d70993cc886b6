"""Checkpoints that are not whole are refused before a weight is read; those that are load, with the numbers they had."""

import json
import os

import pytest
import torch

from longpo_ops.pretrained import check_weights, load_model, read_config

from .tiny import WITH_PICTURES, change, llama, mixtral, save

PROJECTION = "model.layers.1.self_attn.q_proj.weight"


def without(*parts):
    return lambda weights: {name: w for name, w in weights.items() if not any(part in name for part in parts)}


def half(weights):
    return dict(list(weights.items())[::2])


def renamed(weights):
    return {f"net.{name}": w for name, w in weights.items()}


INCOMPLETE = {
    "one missing": (without(PROJECTION), {}, rf"1 weights are missing \({PROJECTION}\)"),
    "half missing": (half, {}, r"10 weights are missing \(.* and 6 more\)"),
    "none there": (lambda _: {"x": torch.ones(2)}, {}, r"21 weights are missing .*; 1 .* unknown to its config \(x\)"),
    "renamed": (renamed, {}, "21 weights are missing .*; 21 weights are unknown"),
    "untied without a head": (without("lm_head"), {}, r"1 weights are missing \(lm_head.weight\)"),
    "a layer more": (None, {"num_hidden_layers": 3}, r"9 weights are missing \(model.layers.2"),
    "a layer fewer": (None, {"num_hidden_layers": 1}, r"9 weights are unknown to its config \(model.layers.1"),
    "biases": (None, {"attention_bias": True}, r"8 weights are missing \(model.layers.0.self_attn.k_proj.bias"),
    "another family": (None, {"model_type": "qwen2"}, "6 weights are missing .* Qwen2ForCausalLM"),
    "another shape": (None, {"intermediate_size": 64}, r"6 weights are of another shape \(.*\(32, 48\) for \(32, 64\)"),
    "another vocabulary": (None, {"vocab_size": 700}, r"2 weights are of another shape"),
}


@pytest.mark.parametrize("kind", INCOMPLETE)
def test_a_checkpoint_that_is_not_whole_is_refused_from_its_headers(tmp_path, kind):
    weights, config, message = INCOMPLETE[kind]
    save(tmp_path, llama())
    name = change(tmp_path, weights, **config)
    for load in (check_weights, load_model):
        with pytest.raises(ValueError, match=f"(?s){tmp_path}.*{message}"):
            load(name, read_config(name))


@pytest.mark.parametrize("left", ["pytorch_model.bin", "model-q4.gguf", "consolidated.safetensors", None])
def test_a_folder_without_safetensors_is_told_what_to_do(tmp_path, left):
    save(tmp_path, llama())
    (tmp_path / "model.safetensors").unlink()
    if left:
        torch.save({}, tmp_path / left)
    told = rf"(?s){tmp_path}.*it holds {left or 'no weights'}, expected model\.safetensors .*save_pretrained\(folder\) writes"
    for load in (check_weights, load_model):
        with pytest.raises(ValueError, match=told):
            load(str(tmp_path), read_config(str(tmp_path)))


def test_what_headers_cannot_show_is_seen_after_loading(tmp_path, monkeypatch):
    """A model whose files cannot be looked at before: they come from a hub."""
    monkeypatch.setattr("longpo_ops.pretrained.weights._files", lambda name: None)
    save(tmp_path, llama())
    for weights, config, message in INCOMPLETE.values():
        if weights is None:
            name = change(tmp_path, None, **llama().to_dict() | config)
            with pytest.raises(ValueError, match=f"(?s){message}"):
                load_model(name, read_config(name))
    name = change(tmp_path, without(PROJECTION), **llama().to_dict())
    with pytest.raises(ValueError, match="1 weights are missing"):
        load_model(name, read_config(name))


def test_a_lost_expert_and_a_lost_file_are_refused(tmp_path):
    save(tmp_path / "experts", mixtral())
    check_weights(str(tmp_path / "experts"), read_config(str(tmp_path / "experts")))
    name = change(tmp_path / "experts", without("experts.2.w1"))
    with pytest.raises(ValueError, match="the experts of a layer"):
        check_weights(name, read_config(name))
    save(tmp_path / "shards", llama(), max_shard_size="50KB")
    name, (first, *others) = str(tmp_path / "shards"), sorted((tmp_path / "shards").glob("*.safetensors"))
    load_model(name, read_config(name))
    os.remove(first)
    with pytest.raises(ValueError, match=f"{first.name} of its {1 + len(others)} files of weights missing"):
        check_weights(name, read_config(name))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite_are_refused(tmp_path, dtype, value):
    def spoil(weights):
        weights[PROJECTION][3, 4] = value
        return {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}

    save(tmp_path, llama())
    name = change(tmp_path, spoil, dtype=dtype)
    with pytest.raises(ValueError, match=rf"1 weights hold NaN or infinity \({PROJECTION}\)"):
        load_model(name, read_config(name))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_numbers_of_16_bits_are_refused_from_their_headers(tmp_path, dtype):
    save(tmp_path, llama())
    name = change(tmp_path, lambda weights: weights | {PROJECTION: weights[PROJECTION].to(dtype)})
    with pytest.raises(
        ValueError, match=rf"(?s){tmp_path}.*1 weights are of {dtype} \({PROJECTION}\), and its config has no"
    ):
        check_weights(name, read_config(name))


@pytest.mark.parametrize("where", [None, [], {}, {PROJECTION: 5}])
def test_an_index_of_another_shape_is_refused(tmp_path, where):
    save(tmp_path, llama(), max_shard_size="50KB")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(
        ValueError, match=r"index\.json: weight_map=.*: expected names of weights with those of their files"
    ):
        check_weights(str(tmp_path), read_config(str(tmp_path)))


def test_what_may_be_missing_or_left_out_is(tmp_path):
    """Tied heads, and the rotary buffers that old checkpoints hold: transformers' own lists."""
    model = save(tmp_path, llama(tie_word_embeddings=True))
    name = change(
        tmp_path, lambda w: w | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    )
    loaded = load_model(name, read_config(name))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_empty_model_has_the_dtype_that_the_loaded_one_has(tmp_path):
    save(tmp_path, llama(dtype="bfloat16"))
    name = str(tmp_path)
    for dtype in ("auto", "float32", "float16"):
        empty, loaded = (load(name, read_config(name), dtype) for load in (check_weights, load_model))
        assert {p.device.type for p in empty.parameters()} == {"meta"}
        assert empty.dtype == loaded.dtype
        assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}


def test_the_text_part_of_a_model_that_sees_must_be_whole(tmp_path):
    lost = "language_model.model.layers.1.mlp.up_proj.weight"
    save(tmp_path, WITH_PICTURES["gemma3"]())
    name = change(tmp_path, without(lost))
    with pytest.raises(ValueError, match=r"1 weights are missing \(model.layers.1.mlp.up_proj.weight\)"):
        check_weights(name, read_config(name))
    name = change(tmp_path, lambda w: w | {lost: torch.ones(48, 32), lost.replace("1", "2"): torch.ones(48, 32)})
    with pytest.raises(ValueError, match=r"1 weights are unknown to its config \(model.layers.2.mlp.up_proj.weight\)"):
        check_weights(name, read_config(name))


@pytest.mark.parametrize(
    ("emptied", "told"),
    [
        (["lm_head.weight"], r"1 parts of it hold nothing but zeros \(lm_head.weight\)"),
        (["model.layers.1."], r"1 parts of it hold nothing but zeros \(model.layers.1\)"),
        ([""], r"4 parts of it hold nothing but zeros \(lm_head.weight, model.embed_tokens.weight, model.layers.0, "),
        (
            ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"],
            None,
        ),  # a layer that begins as the identity
    ],
)
def test_parts_of_zeros_are_refused(tmp_path, emptied, told):
    save(tmp_path, llama())
    zeroed = lambda name, w: torch.zeros_like(w) if any(name.startswith(part) for part in emptied) else w  # noqa: E731
    name = change(tmp_path, lambda weights: {n: zeroed(n, w) for n, w in weights.items()})
    if told is None:
        load_model(name, read_config(name))
    else:
        with pytest.raises(ValueError, match=f"(?s){tmp_path}.*{told}"):
            load_model(name, read_config(name))


def test_a_setting_that_leaves_processes_with_zeros_is_refused(tmp_path, monkeypatch):
    save(tmp_path, llama())
    for switch in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(switch, "True")
    load_model(str(tmp_path), read_config(str(tmp_path)))  # one process has all weights
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"under which 2 processes .* set fsdp_cpu_ram_efficient_loading to false"):
        load_model(str(tmp_path), read_config(str(tmp_path)))
