"""What a model does to its head's products is measured: whole families, whatever their configs call it, and refusals."""

import logging

import pytest
import torch
import transformers
from accelerate import cpu_offload
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longpo_ops import attach, detach, linear_logprobs
from longpo_ops.ops import head

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
BERT = {name: SIZES[name] for name in SIZES if not name.endswith(("os_token_id", "_value_heads", "_dim"))}
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, depth=1,
    num_heads=2, out_hidden_size=32, deepstack_visual_indexes=[0],
)  # fmt: skip
# model: its config, and the softcap and scale that its logits have.
MODELS = {
    "Llama": (SIZES, None, 1.0),
    "Gemma2": (SIZES | dict(final_logit_softcapping=2.0), 2.0, 1.0),
    "Gemma3": (SIZES | dict(final_logit_softcapping=1.5, sliding_window=8), 1.5, 1.0),
    "Cohere": (SIZES | dict(logit_scale=0.3), None, 0.3),
    "Granite": (SIZES | dict(logits_scaling=3.0), None, 1 / 3),
    "HyperCLOVAX": (SIZES | dict(logits_scaling=3.0), None, 3.0),
    "FalconH1": (
        SIZES | dict(lm_head_multiplier=0.4, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
        None,
        0.4,
    ),
    "RecurrentGemma": (
        {n: v for n, v in SIZES.items() if n != "head_dim"}
        | dict(logits_soft_cap=2.5, lru_width=32, num_hidden_layers=3),
        2.5,
        1.0,
    ),
    "ModernBertDecoder": (BERT, None, 1.0),
    "BertLMHeadModel": (BERT | dict(is_decoder=True), None, 1.0),
    "Llama4": (SIZES | dict(intermediate_size_mlp=48, num_local_experts=2), None, 1.0),
    "Qwen3Next": (  # causal up to rounding: its chunks sum in another order
        SIZES
        | dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
        | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
        | dict(layer_types=["linear_attention", "full_attention"]),
        None,
        1.0,
    ),
    "Mixtral": (SIZES | dict(num_local_experts=4), None, 1.0),
}
# A wrapper of text and images: its text config's settings, and the softcap that its logits have.
WRAPPERS = {
    "Gemma3": (dict(final_logit_softcapping=2.0), None),  # which its wrapper leaves out
    "Gemma4": (
        dict(final_logit_softcapping=2.0, vocab_size_per_layer_input=61, hidden_size_per_layer_input=8),
        2.0,
    ),
    "Mistral3": (dict(model_type="mistral"), None),
    "Qwen3VL": ({}, None),
}


def build(cls, settings, spread=0.3):
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, spread)
    return model


def tokens():
    return torch.randint(3, 60, (2, 14), generator=torch.Generator().manual_seed(1))


def own_logps(model):
    with torch.no_grad():
        logits = model(input_ids=tokens()).logits[:, :-1].double()
    return logits.log_softmax(-1).gather(-1, tokens()[:, 1:, None])[..., 0]


def attached_logps(model):
    labels = tokens()[:, 1:]
    with torch.no_grad():
        return model(
            input_ids=tokens(),
            compute=lambda hidden, head: head(
                hidden[:, :-1].flatten(0, 1), labels.flatten(), loss=linear_logprobs
            ).view(labels.shape),
        )


def map_of(model):
    """softcap and scale that a loss gets."""
    options = model(input_ids=tokens(), compute=lambda h, head: head(h, (), loss=lambda *a, **options: options))
    return options["softcap"], options["scale"]


def compare(model):
    truth = own_logps(model)
    attach(model)
    torch.testing.assert_close(attached_logps(model).double(), truth, rtol=1e-5, atol=2e-5)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_any_map_of_the_logits_is_found(name):
    settings, softcap, scale = MODELS[name]
    cls = getattr(transformers, name if hasattr(transformers, name) else f"{name}ForCausalLM")
    model = compare(build(cls, settings))
    assert map_of(model) == (pytest.approx(softcap), pytest.approx(scale))


@pytest.mark.parametrize("name", WRAPPERS)
def test_models_of_text_and_images(name):
    settings, softcap = WRAPPERS[name]
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    model = compare(build(cls, dict(text_config=SIZES | settings, vision_config=VISION)))
    assert map_of(model) == (softcap, pytest.approx(1.0))


class Mapped(LlamaForCausalLM):
    """Any soft-cap and scale, with logits in any dtype."""

    softcap, scale, dtype = None, 1.0, torch.float64

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        logits = out.logits.to(self.dtype) * self.scale
        out.logits = logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("softcap", "scale"), [(1e5, 1.0), (30.0, 1e-4), (1e9, 1.0), (1e12, 1e-2)])
def test_soft_caps_far_beyond_the_logits(softcap, scale, dtype):
    model = build(Mapped, SIZES)
    model.softcap, model.scale, model.dtype = softcap, scale, dtype
    assert map_of(compare(model)) == (pytest.approx(softcap), pytest.approx(scale))


def test_a_soft_cap_between_what_is_measured_and_what_makes_no_difference_is_refused():
    model = build(Mapped, SIZES)
    model.softcap = 1e18
    with pytest.raises(ValueError, match="makes more of its head's products"):
        attach(model)
    model.softcap = 1e25
    assert map_of(compare(model)) == (None, 1.0)


CHANGES = {
    "Gemma2": ("config.final_logit_softcapping", 0.5, (0.5, 1.0)),
    "RecurrentGemma": ("config.logits_soft_cap", 0.5, (0.5, 1.0)),
    "Cohere": ("logit_scale", 0.9, (None, 0.9)),
    "Granite": ("config.logits_scaling", 0.5, (None, 2.0)),
    "HyperCLOVAX": ("config.logits_scaling", 0.5, (None, 0.5)),
    "FalconH1": ("model.lm_head_multiplier", 1.5, (None, 1.5)),
}


def put(model, path, value):
    owner, _, name = path.rpartition(".")
    setattr(getattr(model, owner) if owner else model, name, value)


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_change_later_are_measured_again(name):
    path, value, changed = CHANGES[name]
    settings, softcap, scale = MODELS[name]
    model = attach(build(getattr(transformers, f"{name}ForCausalLM"), settings))
    assert map_of(model) == (pytest.approx(softcap), pytest.approx(scale))
    put(model, path, value)
    assert map_of(model) == (pytest.approx(changed[0]), pytest.approx(changed[1]))
    ours = attached_logps(model).double()
    torch.testing.assert_close(ours, own_logps(detach(model)), rtol=1e-5, atol=2e-5)


def test_settings_of_a_text_model_in_a_wrapper_and_a_constant_of_ones_own():
    settings, _ = WRAPPERS["Gemma4"]
    both = dict(text_config=SIZES | settings, vision_config=VISION)
    model = attach(build(transformers.Gemma4ForConditionalGeneration, both))
    model.config.get_text_config().final_logit_softcapping = None
    assert map_of(model) == (None, pytest.approx(1.0))

    class Scaled(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("logit_scale", torch.tensor(2.0))

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * self.logit_scale
            return out

    model = attach(build(Scaled, SIZES))
    model.load_state_dict(model.state_dict() | {"logit_scale": torch.tensor(3.0)})
    assert map_of(model) == (None, 3.0)


def test_what_stays_or_comes_again_is_not_measured_again(caplog):
    model, seen = attach(build(transformers.Gemma2ForCausalLM, SIZES)), []
    model.model.register_forward_hook(lambda module, args, output: seen.append(output[0].shape[:2] == (3, 8)))
    for _ in range(3):
        model(tokens(), compute=lambda hidden, head: None)
        model.train(not model.training)
    assert sum(seen) == 0
    with caplog.at_level(logging.DEBUG, "longpo_ops"):
        for flag in (False, True, False, True):
            model.config.use_cache = flag
            model(tokens(), compute=lambda hidden, head: None)
    assert sum(seen) == 2
    assert "Gemma2ForCausalLM is measured again, as it has other use_cache" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}  # it made no difference
    with caplog.at_level(logging.INFO, "longpo_ops"):
        model.config.final_logit_softcapping = 7.0
        model(tokens(), compute=lambda hidden, head: None)
    assert "as it has other final_logit_softcapping: Probed(softcap=7.0, scale=1.0" in caplog.text
    assert sum(seen) == 4
    attach(detach(model), check=False, softcap=30.0)
    model.config.final_logit_softcapping = 0.5
    assert map_of(model) == (30.0, 1.0) and sum(seen) == 4


def test_a_change_that_cannot_be_reproduced_is_refused():
    model = attach(build(shaped(lambda z: z), SIZES))
    model.config.final_logit_softcapping, model.__class__ = 1.0, shaped(SHAPES["clamp"])
    with pytest.raises(ValueError, match="Shaped makes more of its head's products"):
        model(tokens(), compute=lambda hidden, head: None)


class Between(LlamaForCausalLM):
    """Divides hidden states before the head, as MiniCPM 3 does."""

    def forward(self, input_ids, **kwargs):
        out = self.model(input_ids, **kwargs)
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(out[0] / 7))


def test_what_happens_before_the_head_reaches_the_loss():
    model = compare(build(Between, SIZES))
    with pytest.raises(ValueError, match="compute is missing: Between has no body whose hidden states"):
        model(tokens())


def test_a_soft_cap_shows_though_logits_are_small():
    """Logits of 0.01 under a soft-cap of 30 or 31: no comparison of log-probs could see it."""
    for cap in (30.0, 31.0):
        model = build(transformers.Gemma2ForCausalLM, SIZES | dict(final_logit_softcapping=cap), spread=0.002)
        assert map_of(attach(model)) == (cap, 1.0)


def test_bfloat16_has_the_same_map():
    model = build(transformers.GraniteForCausalLM, SIZES | dict(logits_scaling=3.0)).bfloat16()
    assert map_of(attach(model)) == (None, pytest.approx(1 / 3))


def shaped(function):
    """A Llama whose logits go through a function."""

    class Shaped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = function(out.logits)
            return out

    return Shaped


def without_column(logits):
    logits = logits.clone()
    logits[..., 5] = -1e9
    return logits


SHAPES = {
    "clamp": lambda z: z.clamp(-2, 2),
    "another soft-cap": lambda z: 2 * (z / 2).atan(),
    "a bias": lambda z: z + 0.01,
    "a masked token": without_column,
    "columns swapped": lambda z: z.roll(1, -1),
    "probabilities": lambda z: z.softmax(-1),
    "a scale that depends on size": lambda z: z * (1 + 0.01 * (z.abs() > 1)),
    "fewer tokens": lambda z: z[..., :-3],
}


@pytest.mark.parametrize("name", SHAPES)
def test_other_maps_are_refused(name):
    with pytest.raises(ValueError, match=r"Shaped .*use PreferenceHead with its hidden states, or attach"):
        attach(build(shaped(SHAPES[name]), SIZES))


class Normed(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1))


def test_a_head_that_is_more_than_its_weight_is_refused():
    model = build(LlamaForCausalLM, SIZES)
    model.lm_head.__class__ = Normed
    with pytest.raises(ValueError, match="log-probs of LlamaForCausalLM by its head's weight differ from its own by"):
        attach(model)


def test_a_head_that_is_called_twice_or_never_is_refused():
    class Twice(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) and super().forward(*args, **kwargs)

    class Never(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            hidden = self.model(input_ids, **kwargs)[0]
            return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)

    with pytest.raises(ValueError, match="forward of Twice calls its head several times"):
        attach(build(Twice, SIZES))
    with pytest.raises(ValueError, match="forward of Never does not call its head"):
        attach(build(Never, SIZES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_look_ahead_are_refused(dtype, monkeypatch):
    with pytest.raises(ValueError, match="BertLMHeadModel is an encoder"):
        attach(build(transformers.BertLMHeadModel, BERT).to(dtype))
    monkeypatch.setattr(head, "_check_parts", lambda causal, check: None)  # where nothing says so, it shows
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal: other tokens later on change hidden states"):
        attach(build(transformers.BertLMHeadModel, BERT).to(dtype))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForMaskedLM"])
def test_masked_models_are_refused(name):
    """As they are made, two layers in bfloat16 look ahead by less than rounding."""
    with pytest.raises(ValueError, match=f"{name} fills in masked tokens"):
        attach(getattr(transformers, name)(getattr(transformers, name).config_class(**BERT)).bfloat16())


def test_a_scale_that_is_trained_is_refused():
    class Scaled(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.logit_scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * self.logit_scale
            return out

    model = build(Scaled, SIZES)
    with pytest.raises(ValueError, match="Scaled trains what it makes of its head's products"):
        attach(model)
    model.logit_scale.requires_grad_(False)
    assert map_of(attach(model)) == (None, 2.0)


def test_weights_that_are_no_numbers_are_told_as_such():
    model = build(LlamaForCausalLM, SIZES)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="hidden states of LlamaForCausalLM are NaN or infinite"):
        attach(model)


def test_a_body_that_is_called_by_its_parts():
    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32
    )
    model = attach(transformers.OPTForCausalLM(config))
    assert model(torch.arange(9)[None], use_cache=False).last_hidden_state.shape == (1, 9, 32)


def test_encoders_with_decoders_are_refused():
    t5 = dict(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder with a decoder"):
        attach(build(transformers.T5ForConditionalGeneration, t5))


def test_nothing_of_the_model_or_of_random_numbers_changes():
    model = build(transformers.Gemma2ForCausalLM, SIZES).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = {name: p._version for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    detach(attach(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert {name: p._version for name, p in model.named_parameters()} == weights
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


def test_two_forwards_of_24_tokens():
    model, seen = build(LlamaForCausalLM, SIZES), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    attach(model)
    assert [ids.shape for ids in seen] == [(3, 8), (3, 8)]
    assert not (seen[0] == SIZES["pad_token_id"]).any()
    attach(detach(model), check=False)
    assert len(seen) == 2


def test_without_the_check_softcap_and_scale_are_as_given():
    model = build(transformers.Gemma2ForCausalLM, SIZES | dict(final_logit_softcapping=2.0))
    truth = own_logps(model)
    with pytest.raises(ValueError, match=r"softcap=2\.0, scale=1\.0: measured with check=True"):
        attach(model, softcap=2.0)
    attach(model, check=False, softcap=2.0)
    torch.testing.assert_close(attached_logps(model).double(), truth, rtol=1e-5, atol=2e-5)


# -- where it cannot be measured yet -----------------------------------------------------------------------------------


def assign(model, loaded):
    """Weights and buffers of a model that was built on meta."""
    model.load_state_dict(loaded.state_dict(), assign=True)
    for name, buffer in loaded.named_buffers():
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer)
    model.eval()


def test_weights_that_come_later_are_measured_at_the_first_call():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.Gemma2Config(**SIZES, final_logit_softcapping=2.0))
        encoder = transformers.BertLMHeadModel(transformers.BertConfig(**BERT))
    loaded = build(transformers.Gemma2ForCausalLM, SIZES | dict(final_logit_softcapping=2.0))
    truth = own_logps(loaded)
    assign(attach(model), loaded)
    torch.testing.assert_close(attached_logps(model).double(), truth, rtol=1e-5, atol=2e-5)
    with pytest.raises(ValueError, match="BertLMHeadModel is an encoder"):
        attach(encoder)


def test_a_model_that_cannot_run_here_is_measured_at_the_first_call(caplog):
    class Elsewhere(LlamaForCausalLM):
        here = False

        def forward(self, *args, **kwargs):
            if not self.here:
                raise RuntimeError("no such kernel on this device")
            return super().forward(*args, **kwargs)

    model = build(Elsewhere, SIZES)
    with caplog.at_level(logging.WARNING, "longpo_ops"):
        attach(model)
    assert "Elsewhere does not run on a few tokens here (RuntimeError: no such kernel" in caplog.text
    with pytest.raises(ValueError, match=r"Elsewhere cannot be checked, .*no such kernel.*check=False"):
        attached_logps(model)
    model.here = True
    assert map_of(model) == (None, 1.0)


def test_weights_that_accelerate_brings_in_when_they_are_needed():
    model = build(LlamaForCausalLM, SIZES | dict(tie_word_embeddings=False))
    truth = own_logps(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    compare_with = attach(model)
    torch.testing.assert_close(attached_logps(compare_with).double(), truth, rtol=1e-5, atol=2e-5)


def test_special_tokens_are_not_drawn():
    config = LlamaConfig(**SIZES | dict(pad_token_id=0, eos_token_id=[7, 8], bos_token_id=9))
    seen = []
    model = LlamaForCausalLM(config)
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attach(model)
    assert not torch.isin(torch.cat(seen), torch.tensor([0, 7, 8, 9])).any()
