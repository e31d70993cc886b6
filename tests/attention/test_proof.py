"""A model is taken where it is shown to give the numbers of separate sequences; each fault of attention shows, too."""

import contextlib

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from longpo_ops.attention import PrefixNotShared, proof, prove, registration, use_shared_prefix
from longpo_ops.attention.masks import Seen
from longpo_ops.pretrained.small import small_config

LOCAL = dict(sliding_window=4096, layer_types=["sliding_attention", "sliding_attention", "full_attention"])
KINDS = {
    "llama": dict(num_hidden_layers=3),
    "qwen2": dict(num_hidden_layers=3, use_sliding_window=True, **LOCAL),
    "gemma2": dict(num_hidden_layers=3, **LOCAL),
    "gpt_oss": dict(num_hidden_layers=2, num_local_experts=4),
    "llama4_text": dict(num_hidden_layers=4, num_local_experts=4, attn_temperature_tuning=False),
}


def empty(kind, **fields):
    """On the meta device: a proof needs no weights."""
    config = AutoConfig.for_model(kind, **(KINDS.get(kind, {}) | fields)).get_text_config()
    small = small_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small)
    model.config = config
    return model


@pytest.fixture
def anew(monkeypatch):
    monkeypatch.setattr(proof._prove, "known", {})


@pytest.mark.parametrize(
    ("kind", "seen"),
    {
        "llama": [Seen()] * 3,
        "qwen2": [Seen(window=4096)] * 2 + [Seen()],
        "gpt_oss": [Seen(window=128), Seen()],
        "llama4_text": [Seen(chunk=8192)] * 3 + [Seen()],
    }.items(),
)
def test_tells_what_each_layer_sees(kind, seen):
    shown = prove(empty(kind))
    assert shown.reason is None and list(shown.seen) == seen and shown.attention == ("self_attn",) * len(seen)
    assert shown.off < proof.TOLERANCE / 10


def test_the_16_bits_of_a_published_config_are_nothing_to_a_proof(anew):
    shown = prove(empty("qwen3_moe", num_hidden_layers=1, dtype="bfloat16"))
    assert shown.reason is None and shown.off < proof.TOLERANCE / 10


@pytest.mark.parametrize("width", [4096, 64, 8192])
def test_a_window_as_large_as_a_width_stays(width):
    shown = prove(empty("mistral", num_hidden_layers=1, hidden_size=4096, sliding_window=width))
    assert shown.seen == (Seen(window=width),)


def _attention_with(**changed):
    """A mutation of what attention is called with."""

    def mutate(monkeypatch):
        own = registration.shared_prefix_attention
        changes = lambda given: {name: change(given[name]) for name, change in changed.items()}  # noqa: E731
        monkeypatch.setattr(
            registration, "shared_prefix_attention", lambda *qkv, **given: own(*qkv, **(given | changes(given)))
        )

    return mutate


def _while_packed(change):
    """A mutation of the model, in force while it is packed."""

    def mutate(monkeypatch):
        own = registration.installed

        @contextlib.contextmanager
        def installed(model, shown):
            with own(model, shown), change(model):
                yield

        monkeypatch.setattr(registration, "installed", installed)

    return mutate


@contextlib.contextmanager
def _without_bias(model):
    biased = {m: m.bias for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None}
    for linear in biased:
        linear.bias = None
    yield
    for linear, bias in biased.items():
        linear.bias = bias


@contextlib.contextmanager
def _default_rope(model):
    rotary = model.model.rotary_emb
    before = rotary.inv_freq
    rotary.inv_freq = 1e4 ** -(torch.arange(len(before)) / len(before))
    yield
    rotary.inv_freq = before


MUTATIONS = {
    "a window of one row more": ("qwen2", {}, _attention_with(window=lambda w: w and w + 1)),
    "a window of one row less": ("gemma2", {}, _attention_with(window=lambda w: w and w - 1)),
    "no window": ("qwen2", {}, _attention_with(window=lambda w: None)),
    "no chunk": ("llama4_text", {}, _attention_with(chunk=lambda c: None)),
    "another chunk": ("llama4_text", {}, _attention_with(chunk=lambda c: c and c - 1)),
    "no sink": ("gpt_oss", {}, _attention_with(sinks=lambda s: None)),
    "no soft-cap": ("gemma2", {}, _attention_with(softcap=lambda s: None)),
    "another scale": ("llama", {}, _attention_with(scale=lambda s: 1.01 * s)),
    "no bias": ("qwen2", {}, _while_packed(_without_bias)),
    "default RoPE": (
        "llama",
        dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
        _while_packed(_default_rope),
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_fault_is_seen(mutation, anew, monkeypatch):
    kind, fields, mutate = MUTATIONS[mutation]
    mutate(monkeypatch)
    shown = prove(empty(kind, **fields))
    assert shown.reason is not None and "differ from those of its separate sequences" in shown.reason


def test_a_sink_without_gradient_is_seen(anew, monkeypatch):
    _attention_with(sinks=lambda s: None if s is None else s.detach())(monkeypatch)
    assert "gradients of" in prove(empty("gpt_oss")).reason


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        ("mamba", dict(num_hidden_layers=2), "MambaMixer passes on what earlier rows hold"),
        ("falcon_h1", dict(num_hidden_layers=2), "passes on what earlier rows hold"),
        (
            "lfm2",
            dict(num_hidden_layers=2, layer_types=["conv", "full_attention"]),
            "ShortConv passes on what earlier rows hold",
        ),
        ("bloom", dict(n_layer=2), "adds to its mask"),
        ("gpt2", dict(n_layer=2), "drops out 0.1 of its attention"),
        ("llama4_text", dict(attn_temperature_tuning=True), "rows behind 40,000 others than of the same rows alone"),
        ("stablelm", dict(num_hidden_layers=2), "does not hand what it is given on to its attention"),
        ("falcon", dict(num_hidden_layers=2), "attention of its own"),
        ("gemma3_text", dict(num_hidden_layers=2, use_bidirectional_attention=True), "neither causal, nor a window"),
    ],
)
def test_says_why_not(kind, fields, why):
    model = empty(kind, **fields)
    with pytest.raises(PrefixNotShared, match=why) as refused:
        use_shared_prefix(model)
    assert "separate sequences" in str(refused.value)


def test_a_body_without_a_head_is_refused_by_name():
    with pytest.raises(PrefixNotShared, match=r"LlamaModel has no head, .*give the causal LM that it is a part of"):
        use_shared_prefix(empty("llama").model)


def test_an_argument_that_nobody_knows_is_refused_by_name(anew, monkeypatch):
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaAttention.forward

    def forward(self, *args, **kwargs):
        return own(self, *args, **kwargs, position_bias=torch.zeros(1))

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    with pytest.raises(PrefixNotShared, match="LlamaAttention gives its attention position_bias"):
        use_shared_prefix(empty("llama"))


BY_ROW = {  # what a row's hidden state is multiplied by
    "its number, beyond a bound": (lambda layer, rows: 1 + rows // 8192, "40,000"),
    "the length of the call, beyond a bound": (
        lambda layer, rows: torch.full_like(rows, 1 + len(rows) // 8192),
        "40,000",
    ),
    "its number, in the last layer": (lambda layer, rows: 1 + rows * (layer == 2), "30"),
}


@pytest.mark.parametrize("what", BY_ROW)
def test_what_goes_by_the_number_of_a_row_is_refused(what, anew, monkeypatch):
    from transformers.models.llama import modeling_llama

    own, (factor, behind) = modeling_llama.LlamaAttention.forward, BY_ROW[what]

    def forward(self, hidden_states, **kwargs):
        return own(
            self, hidden_states * factor(self.layer_idx, torch.arange(hidden_states.shape[1]))[:, None], **kwargs
        )

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    with pytest.raises(PrefixNotShared, match=f"LlamaAttention computes other numbers of rows behind {behind} others"):
        use_shared_prefix(empty("llama"))


def test_windows_that_follow_from_the_number_of_a_layer_are_seen(anew, monkeypatch):
    from transformers.masking_utils import create_sliding_window_causal_mask
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaDecoderLayer.forward

    def forward(self, hidden_states, **kwargs):
        if self.self_attn.layer_idx % 2:
            given = dict(config=self.self_attn.config, inputs_embeds=hidden_states, past_key_values=None)
            kwargs["attention_mask"] = create_sliding_window_causal_mask(**given, attention_mask=None)
        return own(self, hidden_states, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    shown = prove(empty("llama", num_hidden_layers=4, sliding_window=4096))
    assert shown.reason is None and shown.seen == (Seen(), Seen(window=4096)) * 2


def test_a_call_with_such_an_argument_is_refused(anew):
    model = AutoModelForCausalLM.from_config(small_config(AutoConfig.for_model("llama", num_hidden_layers=1)))
    with use_shared_prefix(model), pytest.raises(ValueError, match="does not know tree_mask"):
        model(torch.arange(5)[None], tree_mask=torch.ones(1))


def test_a_window_that_changes_afterwards_is_refused():
    config = small_config(AutoConfig.for_model("mistral", num_hidden_layers=1), window=5)
    model = AutoModelForCausalLM.from_config(config)
    with use_shared_prefix(model):
        model.config.sliding_window = 6
        with pytest.raises(ValueError, match="window of 6, and had window 5"):
            model(torch.arange(9)[None])


def test_leaves_no_trace(anew):
    """Random numbers, dtype, and the registries' names under which models of users run."""
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert prove(empty("llama")).reason is None
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(3), expected)


def test_is_remembered(anew):
    first = prove(empty("llama"))
    assert prove(empty("llama")) is first and len(proof._prove.known) == 1
    assert prove(empty("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})) is not first
