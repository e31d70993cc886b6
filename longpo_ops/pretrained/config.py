"""The config of a model's text part, and one message that names the model for whatever cannot be loaded of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")  # of weights; auto is the one they are stored in


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Within it transformers loads a config, a tokenizer or weights of the model `name`. Raises ValueError if it cannot."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        why = f"its safetensors cannot be read ({error}); fetch the model again"
        raise ValueError(f"model {name!r} cannot be loaded: {why}") from error
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and type(error) is not Exception:  # which tokenizers raises
            raise
        why = " ".join(str(error).split()) + (
            "" if Path(name).exists() else " (no folder of that name is here, either)"
        )
        raise ValueError(f"model {name!r} cannot be loaded: {why}") from error


def read_config(name: str, trust_remote_code: bool = False):
    """The transformers config of a model; of one that also reads pictures or sound (Gemma 3 from 4B on, Mistral 3,
    Qwen2.5-VL, Llama 4) that of its text part, which says its sizes.

    Raises ValueError where there is none, and for a folder of adapters.
    """
    return text_config(read_whole_config(name, trust_remote_code))


def read_whole_config(name: str, trust_remote_code: bool = False):
    """The config as it is stored. Raises ValueError as read_config."""
    from transformers import AutoConfig

    adapters = Path(name) / "adapter_config.json"
    with loading(name):
        if adapters.is_file():
            base = json.loads(adapters.read_text("utf-8")).get("base_model_name_or_path")
            raise ValueError(
                f"it holds PEFT adapters of {base!r}, expected a whole model; merge them (merge_and_unload) and give "
                "the folder where the merged model was saved"
            )
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def text_config(whole):
    """The config of the text part, with what the whole says for all parts: dtype, tied embeddings, quantisation."""
    text = whole.get_text_config()
    if text is whole:
        return whole
    text = copy.deepcopy(text)
    for name in ("dtype", "tie_word_embeddings", "quantization_config"):
        if (value := getattr(whole, name, None)) is not None:
            setattr(text, name, value)
    text.name_or_path = whole.name_or_path
    return text


def replace_rope(config, rope: dict, length: int | None) -> None:
    """Put entries into the rope_parameters of a transformers config, the others stay, and let it read `length` tokens.

    Raises ValueError where the entries and those of the config make no whole.
    """
    before = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(entries, dict) for entries in before.values()):
        if not all(kind in before and isinstance(entries, dict) for kind, entries in rope.items()):
            kinds = ", ".join(before)
            raise ValueError(f"rope: {rope}; this model has entries by type of layer, expected some under {kinds}")
        rope = {kind: {**(before[kind] or {}), **entries} for kind, entries in rope.items()}
    config.rope_parameters = {**before, **rope}
    config.max_position_embeddings = max(config.max_position_embeddings, length or 0)
    try:
        config.validate_rope()
    except KeyError as error:
        raise ValueError(f"rope: {error.args[0]}") from None
