"""Weights that are all there: what a checkpoint holds is compared with what its config asks for.

transformers fills a parameter that a checkpoint lacks with random numbers, and leaves out a tensor that it has no place
for. Here either is a ValueError, found twice: from the headers of the safetensors, before a weight is read, by
transformers' own loading of empty tensors (its renamings, its lists of keys that may be missing or left out, tied heads
among them); and after loading. Weights that are NaN or infinite are refused after loading, one pass over them where they
are. A model that also reads pictures or sound is loaded as its text model alone (text_part.py), which must be whole; the other
parts are left out.

Not covered: names of a hub whose files are not here yet, weights that are stored quantised, and all weights where accelerate is
not installed (transformers loads no empty tensors without it), are compared after loading only.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import torch

from ..kinds import shown
from .config import DTYPES, read_config, read_whole_config
from .loading import loading, quiet
from .quantised import NONE, plain_parts, quantization_options
from .text_part import NAMES, check_text_part, has_parts
from .tokenizer import load_tokenizer

log = logging.getLogger("longpo_ops.pretrained")

ZEROS_READ = 2**20  # numbers at a time
SHOWN = 4  # names of weights in a message; the others are counted


def build_empty(config, trust_remote_code: bool = False, **options):
    """The causal LM of a config on the meta device. Raises ValueError where transformers has none for it, or cannot build it.

    options: as of from_config.
    """
    from transformers import AutoModelForCausalLM

    require_causal_lm(config)
    with loading(config.name_or_path, lambda: _cannot_build(config)), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)


def _cannot_build(config) -> str:
    """What of a config a model is not built of, as far as it can be told."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    names = ("hidden_act", "hidden_activation", "activation_function")
    unknown = [f"{name}={value!r}" for name in names if (value := getattr(config, name, None)) and value not in ACT2FN]
    if unknown:
        return f"config.json: {unknown[0]} is no activation that transformers has"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope.get("rope_type"), *(each.get("rope_type") for each in rope.values() if isinstance(each, dict))]
    if unknown := set(kinds) - {None, "default", *ROPE_INIT_FUNCTIONS}:
        return f"config.json: rope_type={unknown.pop()!r} is no RoPE that transformers has"
    pad = getattr(config, "pad_token_id", None)
    return "config.json: no model is built of it" + (f", pad_token_id={pad}" if pad is not None else "")


def require_causal_lm(config) -> None:
    """Raises ValueError for a config that transformers has no causal LM for, such as the text part of Mllama, and for an
    encoder with a decoder, whose decoder transformers would build alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model {config.name_or_path!r} ({config.model_type}) is an encoder with a decoder, which has no log-probs of a "
            "text alone; expected a causal LM"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        raise ValueError(
            f"model {config.name_or_path!r}: transformers has no causal LM of type {config.model_type!r}; give a text "
            "model, or one whose text part has a causal LM of its own (Gemma 3, Mistral 3, Llama 4, Qwen3-VL)"
        )


def check_weights(name: str, config, dtype: str = "auto", trust_remote_code: bool = False, quantization: str = NONE):
    """Compares the headers of a model's safetensors with what its config asks for -> the model on the meta device, in full
    precision.

    name, config, dtype, quantization: as in load_model. Raises ValueError, naming some and counting the others, for weights
    that are missing, of other shapes, or unknown; and for weights that cannot be, or be made, quantised here.
    """
    from transformers.modeling_utils import load_state_dict
    from transformers.utils import is_accelerate_available

    model = build_empty(config, trust_remote_code)
    with loading(name):
        quantization_options(config, quantization, _given_dtype(dtype))
        files = None if getattr(config, "quantization_config", None) else _files(name)
        if files is None or not is_accelerate_available():
            return model
        headers, parts = {}, _parts(name, trust_remote_code)
        for file in files:
            headers |= load_state_dict(str(file), map_location="meta")
        options = dict(state_dict=headers, device_map={"": "meta"}, dtype=_torch_dtype(dtype))
        _refuse_kinds(headers, model)
        with quiet(bar=False):
            model, found = _loaded(type(model), None, config=config, **options, **parts)
        _refuse(found, model, bool(parts))
        _tell_tied(model)
    model.config.name_or_path = name  # from_pretrained was given none
    return model


def load_model(name: str, config, dtype: str = "auto", trust_remote_code: bool = False, quantization: str = NONE):
    """The causal LM `name` under a config (read_config's, perhaps changed) on the CPU, from safetensors.

    dtype: one of DTYPES. quantization: how its linear layers but the head are stored, one of quantised.SCHEMES; bitsandbytes
    puts them on the GPU where there is one.

    Raises ValueError for weights that are not whole (check_weights), NaN or infinite, or 0 throughout, and where the
    environment tells transformers to leave them at 0 on all processes but one.
    """
    from transformers import AutoModelForCausalLM

    _refuse_empty_processes()
    check_weights(name, config, dtype, trust_remote_code, quantization)
    with loading(name), quiet(bar=True):
        parts = _parts(name, trust_remote_code)
        model, found = _loaded(
            AutoModelForCausalLM,
            name,
            config=config,
            dtype=_torch_dtype(dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **parts,
            **quantization_options(config, quantization, _given_dtype(dtype)),
        )
        _refuse(found, model, bool(parts))
        _tell_tied(model)
        _refuse_not_finite(model)
        if told := explain_zeros(model):
            raise ValueError(f"{told}; fetch the model again")
    if parts:
        model._weight_conversions = None  # it is saved as the text model that it is, not under the checkpoint's names
        others = sorted({key.split(".")[0] for key in found["unexpected_keys"]})
        log.info("%s: its text model alone, a %s, without %s", name, type(model).__name__, ", ".join(others))
    return model


def save_text_model(name: str, folder: str, trust_remote_code: bool = False) -> None:
    """The text model of a model that also reads pictures or sound, with its tokenizer, chat template and ids that end texts, as
    a folder that AutoModelForCausalLM loads. Raises ValueError as load_model, and for a folder that holds weights."""
    if list(Path(folder).glob("*.safetensors")):
        raise ValueError(f"folder {folder!r} holds weights, which would be overwritten; give another")
    config = read_config(name, trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code, config.vocab_size)
    load_model(name, config, trust_remote_code=trust_remote_code).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tell_tied(model) -> None:
    """transformers keeps embedding and head apart where a checkpoint has both and its config says that they are one (that of a
    whole says so for Mistral 3 unless told otherwise). A config saved with it would let others drop the head."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False


def check_stored_head(name: str, model) -> None:
    """Raises ValueError for a model, empty as check_weights gives it, whose head (a tied one: embedding) is stored quantised,
    which no loss could read. Told by the headers of a model with a quantization_config; of a name of a hub whose files are
    not here yet only once they are loaded."""
    from transformers.modeling_utils import load_state_dict

    if getattr(model.config, "quantization_config", None) is None:
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    names = [path for path, module in model.named_modules() if module is head or (tied and module is embedding)]
    with loading(name):
        headers = {}
        for file in _files(name) or ():
            headers |= load_state_dict(str(file), map_location="meta")
        wrong = []
        for key, stored in headers.items():
            owned = [part for part in names if f".{part}." in f".{key}"]
            plain = stored.is_floating_point() and stored.itemsize > 1 and key.rpartition(".")[2] in ("weight", "bias")
            wrong += [key] if owned and not plain else []
        if wrong:
            raise ValueError(
                f"its head is stored quantised ({_some(wrong)}), and a loss needs its numbers: save the model again with "
                "lm_head (and a tied embedding) left out of quantisation (llm_int8_skip_modules, modules_to_not_convert)"
            )


def _loaded(kind, name: str | None, **options):
    """-> a model, and what from_pretrained tells of weights that do not fit, for _refuse."""
    try:
        return kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise ValueError(
            "some weights that make one weight of the model (the experts of a layer, say) are missing or differ in shape: "
            "fetch the model again"
        ) from error


def _parts(name: str, trust_remote_code: bool) -> dict:
    """What from_pretrained needs to load the text part of a model that has others. Raises ValueError for one that is no text
    model by itself."""
    whole = read_whole_config(name, trust_remote_code)
    if not has_parts(whole):
        return {}
    check_text_part(whole)
    return {"key_mapping": NAMES}


def _torch_dtype(dtype: str):
    return _given_dtype(dtype) or "auto"


def _given_dtype(dtype: str) -> torch.dtype | None:
    return None if dtype == "auto" else getattr(torch, dtype)


def _files(name: str) -> list[Path] | None:
    """The safetensors of a folder, or of a hub's name as far as they were fetched before."""
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    def find(file: str) -> Path | None:
        if Path(name).is_dir():
            return path if (path := Path(name) / file).is_file() else None
        return Path(path) if isinstance(path := try_to_load_from_cache(name, file), str) else None

    if (single := find(SAFE_WEIGHTS_NAME)) is not None:
        return [single]
    if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is None:
        if Path(name).is_dir():
            kinds = (".bin", ".pt", ".pth", ".gguf", ".safetensors")
            others = ", ".join(sorted(path.name for path in Path(name).iterdir() if path.suffix in kinds))
            raise ValueError(
                f"it holds {others or 'no weights'}, expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}; load it with "
                "transformers where it is from, and model.save_pretrained(folder) writes safetensors"
            )
        return None
    where = json.loads(index.read_text("utf-8")).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(
            f"{index.name}: weight_map={shown(where)}: expected names of weights with those of their files; fetch it again"
        )
    shards = sorted(set(where.values()))
    paths = [find(shard) for shard in shards]
    if missing := [shard for shard, path in zip(shards, paths, strict=True) if path is None]:
        if Path(name).is_dir():
            raise ValueError(f"{', '.join(missing)} of its {len(shards)} files of weights missing; fetch it again")
        return None
    return paths


def _refuse_kinds(headers: dict, model) -> None:
    """Raises ValueError for weights that are no numbers of 16 bits or more, which transformers would turn into some."""
    names = {name for name, _ in model.named_parameters()}
    kinds = {
        name: t.dtype for name, t in headers.items() if name in names and (not t.is_floating_point() or t.itemsize < 2)
    }
    if kinds:
        came = ", ".join(sorted({str(kind) for kind in kinds.values()}))
        raise ValueError(
            f"{len(kinds)} weights are of {came} ({_some(kinds)}), and its config has no quantization_config; expected "
            f"{', '.join(DTYPES[1:])}: fetch the model again"
        )


def _refuse(found: dict, model, text_only: bool) -> None:
    """Raises ValueError for what from_pretrained tells of weights that do not fit."""
    own = {key.removeprefix("model.").split(".")[0] for key in model.state_dict()}
    unexpected = found["unexpected_keys"]
    if text_only:
        unexpected = [key for key in unexpected if key.removeprefix("model.").split(".")[0] in own]
    shapes = [f"{key} {tuple(came)} for {tuple(wanted)}" for key, came, wanted in found["mismatched_keys"]]
    wrong = {"missing": found["missing_keys"], "of another shape": shapes, "unknown to its config": unexpected}
    told = [f"{len(names)} weights are {what} ({_some(names)})" for what, names in wrong.items() if names]
    if told:
        raise ValueError(
            f"{'; '.join(told)}; expected those of a {type(model).__name__} as its config has it: fetch the model again, "
            "or mend its config"
        )


def _refuse_not_finite(model) -> None:
    """Raises ValueError for weights with NaN or infinity."""
    wrong = [name for name, weight in model.state_dict().items() if not all(map(_is_finite, plain_parts(weight)))]
    if wrong:
        raise ValueError(f"{len(wrong)} weights hold NaN or infinity ({_some(wrong)}); fetch the model again")


def _is_finite(part: torch.Tensor) -> bool:
    """Codes of a quantised weight are finite."""
    if part.is_floating_point() and part.itemsize > 1 and part.device.type != "meta" and part.numel():
        return bool(torch.stack(part.aminmax()).isfinite().all())
    return True


def _refuse_empty_processes() -> None:
    """Raises ValueError where transformers would load zeros in all processes of a machine but the first: accelerate hands out
    the weights of the model that trains afterwards, and of no other, such as a reference."""
    switches = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    on = all(os.environ.get(switch, "").lower() in ("1", "true", "yes", "y", "t", "on") for switch in switches)
    if on and (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"FSDP_CPU_RAM_EFFICIENT_LOADING is on, under which {processes} processes would hold models of zeros, all but the "
            "first of each machine, and a reference stays one: set fsdp_cpu_ram_efficient_loading to false in the launcher's "
            "file (fsdp_config), or the variable to false"
        )


def explain_zeros(model) -> str | None:
    """Which parts of a model hold nothing but zeros, and so compute nothing and never train: its embedding, its head, all
    matrices of a layer. None where there are none; adapters, whose zeros are a beginning, are not looked at. Reads little
    more than the first numbers of each."""
    adapters = hasattr(model, "get_base_model")
    matrices: dict[str, list[torch.Tensor]] = {}
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and weight.device.type != "meta" and not (adapters and weight.requires_grad):
            layer = re.match(r".*?\.\d+(?=\.)", name)  # the outermost list: of experts' too, the layer
            matrices.setdefault(layer[0] if layer else name, []).append(weight)
    empty = [name for name, weights in matrices.items() if not any(map(_has_number, weights))]
    return f"{len(empty)} parts of it hold nothing but zeros ({_some(empty)})" if empty else None


def _has_number(weight: torch.Tensor) -> bool:
    """Whether any is not 0. Shards are taken for such, as rows of zeros may fill one."""
    if hasattr(weight, "to_local"):
        return True
    numbers = plain_parts(weight.detach())[0]
    return any(bool(part.any()) for part in numbers.reshape(-1).split(ZEROS_READ))


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
