"""The config of a model's text part, and what can be known from it to fail: before a model is built, by the field's name.

transformers checks the kinds of fields (a text in place of a number); it builds models of zero heads, of a RoPE of negative
base and of eps that is infinite, or tries to build ones of 10^12 layers. These are refused here. Fields that no config of
transformers has, those of remote code, are left alone, as are those of the other parts of a model that also sees or hears.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..kinds import shown
from .loading import check_files, loading, quiet
from .text_part import text_config

DTYPES = ("auto", "float32", "bfloat16", "float16")  # of weights; auto is the one they are stored in
LARGEST = {  # of sizes, by all their names; what is beyond would be built for hours, or out of memory
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 2**13),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "head_dim"), 2**16),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "vocab_size"), 2**28),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), 2**48),
}
LEAST = {"sliding_window": -1}  # of sizes, where it is not 1; a window of 0 or -1 is none
SHARE = re.compile(r"(.*_)?(eps(ilon)?|(dropout|pdrop)(_prob)?)$")
ROPE = (
    *("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor", "attention_factor"),
    *("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
)


def read_config(name: str, trust_remote_code: bool = False):
    """The transformers config of a model; of one that also reads pictures or sound that of its text model (text_part.py).

    Raises BrokenModel, a ValueError, where there is none, for fields that no model can be built of, and for a folder of
    adapters.
    """
    return text_config(read_whole_config(name, trust_remote_code))


def read_whole_config(name: str, trust_remote_code: bool = False):
    """The config as it is stored. Raises BrokenModel, a ValueError, as read_config."""
    from transformers import AutoConfig, PreTrainedConfig

    adapters = Path(name) / "adapter_config.json"
    with loading(name, "config.json"):
        _check_folder(Path(name))
        if adapters.is_file():
            base = json.loads(adapters.read_text("utf-8")).get("base_model_name_or_path")
            raise ValueError(
                f"it holds PEFT adapters of {base!r}, expected a whole model; merge them (merge_and_unload) and give "
                "the folder where the merged model was saved"
            )
        check_files(name)
        told, _ = PreTrainedConfig.get_config_dict(name)
        _check_numbers(told)
    with loading(name, lambda: f"config.json{_blamed(told)}"):
        whole = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with loading(name, "config.json"):
        text = whole.get_text_config()
        _check_config(text)
    if hasattr(text, "sliding_window") and (text.sliding_window or 0) < 1 and _reads_window(text):
        text.sliding_window = None  # the libraries would mask all of a window of 0
    return whole


def _reads_window(config) -> bool:
    """Whether any layer has the config's window. Qwen2-MoE makes a mask of a window of 0 for none of its layers, and fails
    without one."""
    return "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])


def _check_folder(path: Path) -> None:
    """Raises ValueError for a file in the place of a folder, and for a folder that holds other than transformers' files."""
    if path.is_file():
        raise ValueError(f"it is a file, expected the folder of a model; {_advice([path])}")
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        found = sorted(path.iterdir())
        held = ", ".join(file.name for file in found[:4]) + (", ..." if found[4:] else "")
        raise ValueError(f"the folder holds {held or 'nothing'}, and no config.json; {_advice(found)}")


def _advice(files: list[Path]) -> str:
    """How to come to a folder that is read."""
    if gguf := [file.name for file in files if file.suffix == ".gguf"]:
        return (
            f"AutoModelForCausalLM and AutoTokenizer read a GGUF file (from_pretrained(folder, gguf_file={gguf[0]!r})), and "
            "save_pretrained(another_folder) of both writes what is read here"
        )
    return "fetch the model again, or save it with its config (model.save_pretrained(folder))"


def _check_numbers(told: dict[str, Any]) -> None:
    """Raises ValueError for entries of config.json that transformers would take, and no model can have. Of a model with
    parts those of its text part; of remote code none, as its fields may mean anything."""
    from transformers import CONFIG_MAPPING

    kind, part = told.get("model_type"), told.get("text_config")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        return
    part = part if isinstance(part, dict) else told
    for field, expected in _wrong_numbers(part):
        raise ValueError(f"{field}={shown(part[field])}: expected {expected}; mend the file, or fetch the model again")


def _wrong_numbers(told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """-> fields, and what was expected of each."""
    for field, value in told.items():
        number, least = type(value) in (int, float), LEAST.get(field, 1)
        if field in LARGEST and (isinstance(value, str | float) or (number and not least <= value <= LARGEST[field])):
            yield field, f"a whole number from {least} to {LARGEST[field]:,}"
        elif SHARE.match(field) and number and not 0 <= value < 1:
            yield field, "a number from 0 to 1"
        elif field in ("rope_parameters", "rope_scaling") and not isinstance(value, dict | None):
            yield field, "an object, or null"
        elif field in ROPE and not _is_positive(value):
            yield field, "a finite number above 0"
    heads, shared = told.get("num_attention_heads"), told.get("num_key_value_heads")
    if type(heads) is type(shared) is int and heads % shared:
        yield "num_key_value_heads", f"a divisor of num_attention_heads, which is {heads}"


def _is_positive(value: Any) -> bool:
    """Whether a number is one, finite and above 0; a list if all of its numbers are. None is left to the model's default."""
    if isinstance(value, list):
        return all(each is not None and _is_positive(each) for each in value)
    return value is None or (type(value) in (int, float) and 0 < value < math.inf)


def _blamed(told: dict[str, Any]) -> str:
    """The field without which a config can be made, and its value: what was wrong with a whole that cannot be."""
    from transformers import CONFIG_MAPPING

    kind = told.get("model_type")
    if not isinstance(kind, str | None):
        return f": model_type={shown(kind)}"
    for field in told if kind in CONFIG_MAPPING and kind is not None else ():
        try:
            with quiet():
                CONFIG_MAPPING[kind].from_dict({k: v for k, v in told.items() if k != field})
        except Exception:  # another one is to blame
            continue
        return f": {field}={shown(told[field])}"
    return ""


def _check_config(config) -> None:
    """Raises ValueError for a config that transformers made and no model can be built of."""
    if type(getattr(config, "vocab_size", None)) is not int:
        raise ValueError("vocab_size is missing; expected the rows of the model's embedding")
    dtype = config.dtype
    if not isinstance(dtype, torch.dtype | None) or (dtype and (not dtype.is_floating_point or dtype.itemsize < 2)):
        raise ValueError(f"dtype={shown(config.dtype)}: expected one of {', '.join(DTYPES[1:])}")
    check_rope(config)


def check_rope(config) -> None:
    """Raises ValueError for entries of the config's rope_parameters with which angles are no numbers."""
    rope = getattr(config, "rope_parameters", None) or {}
    for entries in [each for each in rope.values() if isinstance(each, dict)] or [rope]:
        for name in ROPE:
            if not _is_positive(value := entries.get(name)):
                raise ValueError(f"rope_parameters: {name}={shown(value)}: expected a finite number above 0")
        low, high = entries.get("low_freq_factor"), entries.get("high_freq_factor")
        if low and high and high < low:  # equal ones have no band between them, as published
            raise ValueError(f"rope_parameters: high_freq_factor={high}: expected at least low_freq_factor, {low}")
        for name in ("short_factor", "long_factor"):
            if isinstance(factors := entries.get(name), list) and len(factors) == 1:  # which torch spreads over all
                raise ValueError(f"rope_parameters: {name}={factors}: expected a factor for each pair of columns")


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
        check_rope(config)
    except KeyError as error:
        raise ValueError(f"rope: {error.args[0]}") from None
