"""Tiles by structure: what is proved equals the model's own, kind by kind of layer, and what is not true is not proved."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.configuration_llama import LlamaConfig

from longpo_ops.memory import tile_layers, tile_proof
from longpo_ops.memory.tile_proof import prove
from longpo_ops.memory.tiling import explain_tiling
from longpo_ops.pretrained.probe import randomise
from longpo_ops.pretrained.small import small_config

LENGTH, ROWS = 23, 7
WHOLE = {  # structure: which layers to take of the real depth
    "phi3": [0],  # fused q, k, v and gate, up
    "granite": [0],  # multipliers
    "cohere": [0],  # attention and MLP side by side
    "gpt_neox": [0],  # the same, fused, biases, partial rotary
    "olmo2": [0],  # norms after
    "glm4": [0],  # norms around
    "smollm3": [2, 3],  # without RoPE in between
    "gpt2": [0],  # learnt positions
    "mixtral": [0],
    "qwen3_moe": [0],
    "gpt_oss": [0, 1],  # sinks
    "deepseek_v3": [0, 1, 2, 3],  # latent attention, dense and experts
    "llama4_text": [0, 3],  # norm after rotary, chunks
}
OPTIONS = {"llama4_text": dict(attn_temperature_tuning=False)}  # which goes by the numbers of rows
PARTS = {
    "falcon": ([0], {"mlp", "input_layernorm"}),  # attention of its own code
    "qwen3_next": ([2, 3], {"mlp", "input_layernorm", "post_attention_layernorm"}),  # linear attention
}


def make_model(kind, layers, **options):
    """In float64, every parameter random. options: of the small config."""
    config = small_config(AutoConfig.for_model(kind), window=5, layers=layers)
    for name, value in options.items():
        setattr(config, name, value)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float64)
    randomise(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def run(model, checkpointing, **options):
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(60, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    out = model(ids, use_cache=False, **options)
    loss = out.logits.logsumexp(-1).sum() + out.logits[..., 0].square().mean()
    if options:
        loss = loss + 100 * out.aux_loss
    loss.backward()
    results = {"logits": out.logits} | ({"aux": out.aux_loss} if options else {})
    return {n: x.detach() for n, x in results.items()} | {n: p.grad for n, p in model.named_parameters()}


def check(ours, expected):
    assert ours.keys() == expected.keys()
    most = max(float(x.abs().max()) for x in expected.values() if x is not None)
    for name, b in expected.items():
        a = torch.zeros_like(b) if ours[name] is None and b is not None else ours[name]
        if b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(float(b.abs().max()), 0.01 * most), msg=name)


@pytest.mark.parametrize("kind", [*WHOLE, *PARTS])
def test_tiled_structures_equal_their_own(kind):
    layers, parts = PARTS.get(kind, (WHOLE.get(kind), None))
    model = make_model(kind, layers, **OPTIONS.get(kind, {}))
    expected = run(model, False)
    with tile_layers(model, ROWS) as handle:
        tiled = handle.proof.layers
        assert all(part.split for part in tiled) if parts is None else set(tiled[0].modules) == parts, handle.proof
        assert handle.proof.last and "rows" not in str(handle.proof)
        check(run(model, False), expected)
        check(run(model, True), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_router_logits_and_their_loss_are_of_all_rows(kind, checkpointing):
    model = make_model(kind, [0, 1])
    expected = run(model, False, output_router_logits=True)
    with tile_layers(model, ROWS):
        check(run(model, checkpointing, output_router_logits=True), expected)
        shapes = [
            x.shape for x in model(torch.zeros(1, LENGTH, dtype=torch.int64), output_router_logits=True).router_logits
        ]
    assert shapes == [(LENGTH, 4)] * 2
    without = run(model, False)
    router = next(name for name in without if "gate.weight" in name)
    assert not torch.allclose(without[router], expected[router])  # the loss was there


# --- what is not true is not proved -----------------------------------------------------------------------------------


def mutant(change):
    """A Llama whose layers' forward is `change`, of the layer, its own forward and what it is called with."""

    class Layer(modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            return change(self, super().forward, hidden_states, **kwargs)

    class Causal(modeling_llama.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers = torch.nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))

    return Causal


def passed_on(layer, own, x, **kwargs):
    """The first layer leaves something for the others, past what they are called with."""
    if layer.self_attn.layer_idx == 0:
        layer.self_attn.config.left = x.mean(1, keepdim=True)
        return own(x, **kwargs)
    return own(x, **kwargs) + layer.self_attn.config.left


MUTANTS = {
    "shift": lambda layer, own, x, **kwargs: own(x + x.roll(1, 1), **kwargs),
    "mean": lambda layer, own, x, **kwargs: own(x, **kwargs) + x.mean(1, keepdim=True),
    "length": lambda layer, own, x, **kwargs: own(x, **kwargs) * x.shape[1],
    "running sum": lambda layer, own, x, **kwargs: own(x, **kwargs) + x.cumsum(1),
    "batch": lambda layer, own, x, **kwargs: own(x, **kwargs) + x.sum() / 100,
    "twice": lambda layer, own, x, **kwargs: own(own(x, **kwargs), **kwargs),
    "place": lambda layer, own, x, **kwargs: own(x + torch.arange(x.shape[1], dtype=x.dtype)[:, None], **kwargs),
    "other layers": passed_on,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_layers_whose_rows_see_each_other_are_not_split(name):
    """Their norms and MLP still are tiled."""
    proof = prove(mutant(MUTANTS[name]), LlamaConfig(num_hidden_layers=2, vocab_size=64))
    assert not any(part.split for part in proof.layers), proof
    if name != "other layers":
        assert set(proof.layers[0].modules) == {"mlp", "input_layernorm", "post_attention_layernorm"}
        assert all(part.why for part in proof.layers)


def test_an_mlp_that_sees_other_rows_is_not_tiled(monkeypatch):
    own = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda self, x: own(self, x) + own(self, x).mean(1, keepdim=True)
    )
    proof = prove(
        mutant(lambda layer, own, x, **kwargs: own(x, **kwargs)), LlamaConfig(num_hidden_layers=1, vocab_size=64)
    )
    assert proof.layers[0].modules == ("input_layernorm", "post_attention_layernorm")


def wrong(split, what):
    if what == "another projection":
        return replace(split, projection="q_proj")
    if what == "gradients left out":
        return replace(split, before=split.known)
    return replace(split, both=frozenset(), before=split.before - {"self_attn.v_proj"}, known=split.known)


@pytest.mark.parametrize("what", ["another projection", "gradients left out", "gradients in the wrong part"])
def test_a_wrong_split_is_not_proved(what, monkeypatch):
    find = tile_proof._find_split
    monkeypatch.setattr(tile_proof, "_find_split", lambda *args: wrong(find(*args), what))
    config = LlamaConfig(num_hidden_layers=1, vocab_size=64, attention_bias=True)
    proof = prove(mutant(lambda layer, own, x, **kwargs: own(x, **kwargs)), config)
    assert proof.layers[0].split is None and "rows depend" in proof.layers[0].why


def test_refusals_name_the_model_and_what_stands_against_it():
    config = AutoConfig.for_model("xlm", n_layers=1, emb_dim=16, n_heads=2, n_words=61)
    with pytest.raises(
        ValueError, match=r"XLMWithLMHeadModel \(model type 'xlm'\).* no layers that.* leave tile_rows out"
    ):
        tile_layers(AutoModelForCausalLM.from_config(config))
    assert not explain_tiling(config)


def test_a_config_that_lies_about_its_layers():
    model = make_model("phi3", [0, 1])
    del model.model.layers[1]
    with pytest.raises(ValueError, match="it has 1 layers, its config says 2"):
        tile_layers(model)


def test_proofs_are_remembered_and_leave_random_numbers_alone():
    config = LlamaConfig(num_hidden_layers=1, vocab_size=62)
    torch.manual_seed(3)
    first, number = prove(modeling_llama.LlamaForCausalLM, config), torch.rand(1)
    torch.manual_seed(3)
    assert prove(modeling_llama.LlamaForCausalLM, config) is first and torch.equal(torch.rand(1), number)


def test_a_layer_that_goes_by_the_number_of_a_row_beyond_a_bound_is_not_tiled_whole():
    """Llama 4 scales the queries of layers without RoPE by their row's, from row 8,192 on."""
    config = AutoConfig.for_model("llama4_text", num_hidden_layers=4, num_local_experts=4)
    chunked, full = explain_tiling(config).layers[2:]
    assert chunked.split and full.split is None and "feed_forward" in full.modules
