"""The text model of a wrapper computes what the wrapper does, and is saved as what others load; it is refused otherwise."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    T5Config,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto import modeling_auto as auto

from longpo_ops.pretrained import load_model, read_config, save_text_model, text_config, text_part
from longpo_ops.pretrained.small import DEPTH
from longpo_ops.pretrained.text_part import check_text_part, check_whole, has_parts

from .tiny import CHATML, SIZES, THREE, WITH_PICTURES, change, llama, save

TINY = Path(__file__).parents[2] / "examples" / "tiny" / "model"
SHOWN = {  # kinds of wrappers, by what their text model is
    "aria_text": "aria",
    "exaone4": "exaone4_5",
    "gemma": "paligemma",
    "gemma3_text": "gemma3 shieldgemma2",
    "gemma4_text": "gemma4",
    "gemma4_unified_text": "gemma4_unified",
    "glm4_moe": "glm4v_moe",
    "granite": "granite_speech granite_speech_plus",
    "lfm2": "lfm2_vl",
    "llama": "deepseek_vl deepseek_vl_hybrid glmasr idefics3 janus llava llava_next llava_next_video smolvlm video_llava "
    "vipllava voxtral",
    "llama4_text": "llama4",
    "mistral": "idefics2 mistral3",
    "persimmon": "fuyu",
    "qwen2": "got_ocr2 internvl llava_onevision ovis2 pp_chart2table qwen2_5_omni_thinker qwen2_5_vl qwen2_audio qwen2_vl "
    "vibevoice_asr video_llama_3",
    "qwen3": "fun_asr_nano lighton_ocr qwen3_asr qwen3_vl",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_5_text": "minicpmv4_6 qwen3_5",
    "qwen3_moe": "qwen3_omni_moe_thinker qwen3_vl_moe",
    "qwen4_exp_text": "qwen4_exp",
}
REFUSED = {
    "cohere2_vision": "differ by",  # no logit_scale
    "instructblip": "missing 2 required positional arguments: 'pixel_values'",
    "florence2": "model.encoder",  # an encoder
    "minimax_m3_vl": "missing keys of its text part",
    "mllama": "no causal LM of type 'mllama_text_model'",
    "blip": "no causal LM of type 'blip_text_model'",
    "glm4v": "no causal LM of type 'glm4v_text'",
}


def wrappers() -> list[str]:
    kinds = {**auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    return sorted(kinds)


def shallow(part) -> None:
    """Two layers in each part."""
    values = vars(part)
    depth = next((values[name] for name in (*DEPTH, "depth") if isinstance(values.get(name), int)), None)
    for name, value in list(values.items()):
        if hasattr(value, "to_dict"):
            shallow(value)
        elif name in (*DEPTH, "depth") and value == depth:
            values[name] = 2
        elif isinstance(value, list) and len(value) == depth:
            values[name] = value[:2]


def published(kind: str):
    """A config as published for its kind, two layers deep."""
    whole = CONFIG_MAPPING[kind]()
    whole.name_or_path = kind
    text = whole.get_text_config()
    if kind.startswith(("qwen2_vl", "qwen2_5", "qwen3_vl", "glm4v")):
        text.rope_parameters = {**(text.rope_parameters or {}), "mrope_section": THREE["mrope_section"]}
    shallow(whole)
    return whole


def outcome(kind: str) -> str:
    """What becomes of a kind: the type of its text model, or why it is refused."""
    try:
        whole = published(kind)
        if not has_parts(whole):
            return "no wrapper"
        text = text_config(whole)
        if type(text) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
            return f"no causal LM of type {text.model_type!r}"
        check_text_part(whole)
    except (
        ValueError,
        ImportError,
        TypeError,
        AttributeError,
    ) as error:  # of its default config, or of a library that is not there
        return f"refused: {error}"
    return text.model_type


def test_every_wrapper_of_transformers_is_shown_or_refused():
    told = {kind: outcome(kind) for kind in wrappers()}
    expected = {kind: text for text, kinds in SHOWN.items() for kind in kinds.split()}
    came = {kind: text for kind, text in told.items() if " " not in text}
    assert came == {kind: text for kind, text in expected.items() if kind in told}
    for kind, why in REFUSED.items():
        assert why in told[kind], (kind, told[kind])


IDS = torch.randint(1, 704, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", WITH_PICTURES)
def test_a_text_model_gives_the_same_log_probs_and_is_saved_as_what_others_load(tmp_path, kind, caplog):
    whole, name = save(tmp_path / "whole", WITH_PICTURES[kind]()), str(tmp_path / "whole")
    config = read_config(name)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (704, 32, 2)
    with caplog.at_level(logging.INFO, "longpo_ops.pretrained"):
        text = load_model(name, config, "float32")
    assert f"its text model alone, a {type(text).__name__}, without" in caplog.text
    with torch.no_grad():
        expected = whole(IDS).logits.log_softmax(-1)
        assert (text(IDS).logits.log_softmax(-1) - expected).abs().max() < 1e-5
        Trainer(text, TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")).save_model()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(again) is type(text) and not has_parts(again.config)
        assert (again(IDS).logits.log_softmax(-1) - expected).abs().max() < 1e-5
    assert (
        dict(load_model(str(tmp_path / "out"), read_config(str(tmp_path / "out"))).named_parameters()).keys()
        == dict(text.named_parameters()).keys()
    )


def test_a_head_of_its_own_is_told_in_the_saved_config_where_the_whole_says_it_is_the_embedding(tmp_path):
    config = WITH_PICTURES["mistral3"]()
    config.tie_word_embeddings = False
    whole, name = save(tmp_path, config), change(tmp_path, None, tie_word_embeddings=True)
    text = load_model(name, read_config(name))
    assert text.config.tie_word_embeddings is False and torch.equal(text.lm_head.weight, whole.lm_head.weight)
    save(tmp_path / "tied", llama(tie_word_embeddings=True))
    assert load_model(str(tmp_path / "tied"), read_config(str(tmp_path / "tied"))).config.tie_word_embeddings


def test_what_is_saved_has_the_ids_that_end_texts_and_the_tokenizer_with_its_template(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = WITH_PICTURES["gemma3"]()
    config.text_config.vocab_size, config.text_config.eos_token_id = 1024, 7
    config.eos_token_id = [7, 9]
    save(tmp_path / "whole", config)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole/generation_config.json").unlink()
    folder = str(tmp_path / "text")
    save_text_model(str(tmp_path / "whole"), folder)
    assert json.loads((tmp_path / "text/generation_config.json").read_text())["eos_token_id"] == [7, 9]
    assert AutoConfig.from_pretrained(folder).model_type == "gemma3_text"
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML
    with pytest.raises(ValueError, match="holds weights, which would be overwritten"):
        save_text_model(str(tmp_path / "whole"), folder)


MUTATIONS = {  # what a text model would compute otherwise
    "its window": ("gemma3", lambda text: setattr(text, "sliding_window", text.sliding_window - 1)),
    "its angles": (
        "mistral3",
        lambda text: setattr(text, "rope_parameters", {"rope_type": "default", "rope_theta": 77.0}),
    ),
    "its soft-cap": ("gemma3", lambda text: setattr(text, "final_logit_softcapping", 1.0)),
    "its chunks": ("llama4", lambda text: setattr(text, "attention_chunk_size", 5)),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_text_model_that_computes_otherwise_is_refused(monkeypatch, what):
    kind, change = MUTATIONS[what]
    made = text_config

    def otherwise(whole):
        change(text := made(whole))
        return text

    monkeypatch.setattr(text_part, "text_config", otherwise)
    whole = WITH_PICTURES[kind]()
    whole.name_or_path = what
    whole.initializer_range = 0.5 + len(what)  # another config to what was shown before
    with pytest.raises(ValueError, match=f"(?s)model '{what}': its text part cannot be taken alone: .* differ by"):
        check_text_part(whole)


def test_what_is_no_text_model_of_its_own_is_refused_by_name(tmp_path):
    sizes = {name: value for name, value in SIZES.items() if value is not None}
    whole = CONFIG_MAPPING["mllama"](
        text_config=sizes | {"cross_attention_layers": [1], "pad_token_id": 0}, vision_config={"num_hidden_layers": 1}
    )
    whole.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no causal LM of type 'mllama_text_model'; give a text model, or one"):
        load_model(str(tmp_path), read_config(str(tmp_path)))
    T5Config(vocab_size=704, d_model=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(t5\) is an encoder with a decoder, .*; expected a causal LM"):
        load_model(str(tmp_path), read_config(str(tmp_path)))
    whole = WITH_PICTURES["gemma3"]()
    whole.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(
        ValueError, match=r"its text part is quantised \(quantization_config\).* give the model in 16 bits"
    ):
        check_text_part(whole)


def test_training_inside_the_whole_and_adapters_of_its_text_model_are_refused():
    whole = WITH_PICTURES["gemma3"]()
    whole.name_or_path = "G"
    with pytest.raises(ValueError, match=r"model 'G' \(gemma3\) has other parts .* is not there; --text-only"):
        check_whole(whole, text_only=False, lora_rank=0)
    with pytest.raises(ValueError, match=r"lora_rank=4: adapters .* save_text_model\('G', 'text-model'\)"):
        check_whole(whole, text_only=True, lora_rank=4)
    check_whole(whole, text_only=True, lora_rank=0)
    check_whole(llama(), text_only=False, lora_rank=4)
