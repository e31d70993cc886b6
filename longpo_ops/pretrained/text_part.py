"""The text model of a published wrapper: a model that also reads pictures or sound (Gemma 3, Llama 4, Qwen-VL).

    whole(ids, no picture) = text(ids)    for all ids, where the text model has the wrapper's own weights of its text part

is not taken on trust. Before a text model is loaded, its wrapper is built with a text part of small width and the very
settings, other parts without memory; every weight of the text part is random; these weights, under the names that a saved
wrapper has, are loaded as those of the real one will be; and the logits of both must be equal. So a wrapper that places tokens
otherwise, masks otherwise, scales its logits, or whose layers read more than text (Mllama's read pictures across) is refused,
whatever its name.

    text type has a causal LM        it is that (Gemma3ForCausalLM)
    it has none, and PLAIN has one   its text computes as a published text model: of equal positions in time, height and width
                                     the RoPE of Qwen-VL is that of Qwen

Cost: about a second of a processor for 34 layers, once for a config. Not covered: wrappers that are quantised, or whose code is
their own (trust_remote_code): both are refused.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from .loading import BrokenModel, explain
from .probe import Refused, build, difference, randomise, remembered
from .small import WIDTH, small_config

# How checkpoints of models with several parts name those of the text part, and how the text part does.
NAMES = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
}
NORMALISED = {"norm_topk_prob": True}  # the shares of the chosen experts, as Qwen-VL's own code has it
PLAIN = {  # of text parts that have no causal LM: the type of the text model that computes the same, and what it must be told
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen2_5_omni_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", NORMALISED),
    "qwen3_omni_moe_text": ("qwen3_moe", NORMALISED),
    "glm4v_moe_text": ("glm4_moe", {}),
}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARED = ("dtype", "tie_word_embeddings", "quantization_config", *IDS)  # what a whole says for all of its parts
ROWS, WINDOW = 40, 8  # of the proof
ERROR = 1e-4  # of logits in float32, to the largest


def has_parts(whole) -> bool:
    """Whether a transformers config is one of a wrapper."""
    return whole.get_text_config() is not whole


def text_config(whole):
    """The config of the text model, with what the whole says for all parts: dtype, tied embeddings, quantisation, ids that
    begin and end texts."""
    text = whole.get_text_config()
    if text is whole:
        return whole
    text = _plain(copy.deepcopy(text))
    for name in SHARED:
        value = getattr(whole, name, None)
        if value is not None and (name not in IDS or _has_rows(value, text)):
            setattr(text, name, list(value) if isinstance(value, tuple) else value)
    text.name_or_path = whole.name_or_path
    return text


def _has_rows(ids: int | list[int], text) -> bool:
    """Whether the text part has embeddings for all."""
    return all(0 <= each < text.vocab_size for each in (ids if isinstance(ids, list | tuple) else [ids]))


def _plain(text):
    """The config under the type that has a causal LM."""
    from transformers import CONFIG_MAPPING

    if text.model_type not in PLAIN:
        return text
    kind, more = PLAIN[text.model_type]
    told, known = text.to_dict(), CONFIG_MAPPING[kind]()
    told = {name: value for name, value in told.items() if hasattr(known, name) and name != "model_type"}
    rope = told.get("rope_parameters") or {}
    told["rope_parameters"] = {name: value for name, value in rope.items() if not name.startswith("mrope_")}
    return CONFIG_MAPPING[kind].from_dict(told | more)


def check_whole(whole, text_only: bool, lora_rank: int) -> None:
    """Raises ValueError for a model to be trained with other parts than text, or with adapters that would fit none that others
    load."""
    if not has_parts(whole):
        return
    name = whole.name_or_path
    if not text_only:
        raise ValueError(
            f"model {name!r} ({whole.model_type}) has other parts beside its text model, and training inside of it is not "
            "there; --text-only (text_only: true) trains its text model, and saves that alone"
        )
    if lora_rank:
        raise ValueError(
            f"lora_rank={lora_rank}: adapters of the text model alone would not fit {name!r}, by whose name they would be "
            'loaded; save the text model first, and train that: python -c "from longpo_ops.pretrained import save_text_model; '
            f"save_text_model({name!r}, 'text-model')\""
        )


def check_text_part(whole) -> None:
    """Raises BrokenModel for a wrapper whose text model was not shown to compute what the wrapper does."""
    if getattr(whole, "quantization_config", None):
        raise BrokenModel(
            f"model {whole.name_or_path!r}: its text part is quantised (quantization_config), and cannot be taken out of a "
            "whole that is; give the model in 16 bits"
        )
    kind = _class_of(whole)
    if kind is None:
        why = f"transformers {_version()} has no model of type {whole.model_type!r} to compare it with"
    else:
        why = _refusal(kind, whole)
    if why:
        raise BrokenModel(
            f"model {whole.name_or_path!r}: its text part cannot be taken alone: {why}; expected a model whose text part "
            "computes the same without the others (Gemma 3, Mistral 3, Llama 4, Qwen3-VL): give one, or a text model"
        )


@remembered
def _refusal(kind: type, whole) -> str | None:
    """Why the text part of a config is not taken; None where it was shown."""
    try:
        with torch.no_grad():
            small = _small(whole)
            model = _build(kind, small)
            ids = _ids(small)
            expected = model(input_ids=ids, use_cache=False).logits
            text = _text_of(model, small)
            came = text(input_ids=ids, use_cache=False).logits
    except ImportError:
        raise
    except Refused as refused:
        return str(refused)
    except Exception as error:  # of any kind: of a model that was never tried
        return f"{kind.__name__} without its other parts fails: {explain(error)}"
    _, off = difference({"logits": came}, {"logits": expected})
    if not off < ERROR:
        return f"{type(text).__name__} and {kind.__name__} differ by {off:.1e} of the largest logit on the same text"
    return None


def _version() -> str:
    import transformers

    return transformers.__version__


def _class_of(whole) -> type | None:
    from transformers.models.auto import modeling_auto as auto

    for mapping in (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING):
        if type(whole) in mapping:
            return mapping[type(whole)]
    return None


def _small(whole):
    """The whole, whose text part is of small width, in float32."""
    small, real = copy.deepcopy(whole), whole.get_text_config()
    text = small_config(whole, window=WINDOW) if real.hidden_size > WIDTH else copy.deepcopy(real)
    for name, value in vars(whole).items():
        if value is real:
            small.__dict__[name] = text
        elif name in ("hidden_size", "vocab_size"):  # said a second time
            small.__dict__[name] = getattr(text, name)
    for each in (small, text):
        each.dtype, each.quantization_config = torch.float32, None
        if hasattr(each, "tie_word_embeddings"):
            each.tie_word_embeddings = False  # a head of its own shows more
    return small


def _build(kind: type, small) -> nn.Module:
    """A wrapper whose text part has random weights; its other parts have none."""
    model = build(kind, small, device="meta")
    for get in (model.get_decoder, model.get_output_embeddings):  # the former may hold the latter
        if (part := get()) is None or part is model:
            raise ValueError("no part of it is told to be the text part")
        name = next(name for name, module in model.named_modules() if module is part)
        if any(p.is_meta for p in model.get_submodule(name).parameters()):
            new = (
                nn.Linear(part.in_features, part.out_features, part.bias is not None)
                if isinstance(part, nn.Linear)
                else None
            )
            new = type(part)(part.config) if new is None else new
            randomise(new)
            model.set_submodule(name, new.eval())
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(
                    torch.empty(0)
                )  # on the device that a wrapper takes its own for
    return model


def _text_of(model: nn.Module, small) -> nn.Module:
    """The text model with the wrapper's weights, by way of the names under which a wrapper is saved."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.core_model_loading import revert_weight_conversion

    config = text_config(small)
    weights = {name: weight for name, weight in model.state_dict().items() if weight.numel() and not weight.is_meta}
    saved = revert_weight_conversion(model, weights)
    text, found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=saved, key_mapping=NAMES, dtype=torch.float32, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := found[what]:
            raise ValueError(f"{what.replace('_', ' ')} of its text part: {', '.join(map(str, sorted(names)[:3]))}")
    return text.eval()


def _ids(small) -> torch.Tensor:
    """-> (1, ROWS) int64, of no token that stands for a picture."""
    told = [
        v for part in (small, small.get_text_config()) for k, v in vars(part).items() if re.search("token|index", k)
    ]
    taken: set[Any] = {
        each for value in told for each in (value if isinstance(value, list) else [value]) if type(each) is int
    }
    free = torch.tensor([i for i in range(small.get_text_config().vocab_size) if i not in taken])
    return free[torch.randint(len(free), (1, ROWS))]
