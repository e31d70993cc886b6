import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longpo_ops.pretrained.own_attention import use_right_attention
from longpo_ops.pretrained.small import small_config


def loaded(kind: str, attention: str | None = None, **told):
    config = small_config(AutoConfig.for_model(kind, **told), window=5, layers=[0, 1])
    options = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_config(config, **options)


def test_a_soft_cap_is_not_left_out(caplog):
    model = loaded("gemma2")
    assert model.config._attn_implementation == "sdpa"
    with caplog.at_level(logging.WARNING):
        use_right_attention(model)
    assert model.config._attn_implementation == "eager" and "eager attention" in caplog.text
    eager = loaded("gemma2", "eager")
    eager.load_state_dict(model.state_dict())
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, eager(ids).logits)


@pytest.mark.parametrize("kind, told", [("llama", {}), ("gemma2", dict(attn_logit_softcapping=None)), ("mistral", {})])
def test_attention_that_is_right_stays(kind, told, caplog):
    model = loaded(kind, **told)
    use_right_attention(model)
    assert model.config._attn_implementation == "sdpa" and not caplog.text


def test_other_attention_stays():
    model = loaded("gemma2", "eager")
    use_right_attention(model)
    assert model.config._attn_implementation == "eager"
