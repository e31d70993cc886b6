"""Model folders broken in one way each, made from a whole one of a few KB: tables of what is put where.

cases()    name -> what it does to the folder
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .tiny import CHATML, SIZES

END = "<|im_end|>"
DROP = object()  # in place of a value: the field is missing
KINDS = {
    "null": None, "text": "text", "zero": 0, "negative": -1, "fraction": 1.5, "list": [], "dict": {}, "huge": 10**12,
    "nan": float("nan"), "infinite": float("inf"), "true": True, "missing": DROP,
}  # fmt: skip
FIELDS = (
    *("architectures", "model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_hidden_layers", "vocab_size", "intermediate_size", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("rope_parameters", "rope_scaling", "rope_theta", "dtype", "torch_dtype", "tie_word_embeddings", "attention_bias"),
    *("quantization_config", "auto_map", "initializer_range", "eos_token_id", "bos_token_id", "pad_token_id"),
    *("attention_dropout", "layer_types", "sliding_window", "use_cache", "transformers_version", "id2label"),
)
ROPES = {
    "yarn without factor": {"rope_type": "yarn", "rope_theta": 1e4},
    "yarn negative": {"rope_type": "yarn", "rope_theta": 1e4, "factor": -4.0},
    "yarn text": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "four"},
    "yarn null": {"rope_type": "yarn", "rope_theta": 1e4, "factor": None},
    "yarn betas of text": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": "fast"},
    "linear without factor": {"rope_type": "linear", "rope_theta": 1e4},
    "linear zero": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0},
    "linear list": {"rope_type": "linear", "rope_theta": 1e4, "factor": [4.0]},
    "linear nan": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")},
    "dynamic without factor": {"rope_type": "dynamic", "rope_theta": 1e4},
    "llama3 without factors": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0},
    "llama3 texts": {"rope_type": "llama3", "rope_theta": 1e4, "factor": "8", "low_freq_factor": "1",
                     "high_freq_factor": "4", "original_max_position_embeddings": "64"},
    "llama3 equal factors": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 4.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "longrope without lists": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0},
    "longrope short lists": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0],
                             "long_factor": [2.0], "original_max_position_embeddings": 64},
    "longrope texts": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": ["a"] * 4,
                       "long_factor": ["b"] * 4, "original_max_position_embeddings": 64},
    "unknown": {"rope_type": "spiral", "rope_theta": 1e4},
    "type of list": {"rope_type": ["yarn"], "rope_theta": 1e4},
    "type of null": {"rope_type": None, "rope_theta": 1e4},
    "theta text": {"rope_type": "default", "rope_theta": "10000"},
    "theta zero": {"rope_type": "default", "rope_theta": 0},
    "theta negative": {"rope_type": "default", "rope_theta": -1e4},
    "theta missing": {"rope_type": "default"},
    "theta null": {"rope_type": "default", "rope_theta": None},
    "partial of text": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": "half"},
    "by unknown layers": {"round_attention": {"rope_type": "default", "rope_theta": 1e4}},
    "list of dicts": [{"rope_type": "default", "rope_theta": 1e4}],
}  # fmt: skip
CONFIGS = {
    "heads do not divide": {"num_key_value_heads": 3},
    "odd head": {"head_dim": 7},
    "no architecture of that name": {"architectures": ["NoSuchModel"]},
    "an encoder": {"model_type": "bert", "architectures": ["BertModel"]},
    "another family": {"model_type": "gpt2"},
    "unknown activation": {"hidden_act": "siluu"},
    "activation of another kind": {"hidden_act": ["silu"]},
    "unknown dtype": {"dtype": "float31"},
    "dtype that is no number": {"dtype": "nn"},
    "integer dtype": {"dtype": "int8"},
    "old dtype": {"dtype": DROP, "torch_dtype": "torch.float99"},
    "layer types of another length": {"model_type": "qwen3", "layer_types": ["full_attention"] * 5},
    "layer types unknown": {"model_type": "qwen3", "layer_types": ["round_attention"] * 2},
    "layer types of numbers": {"model_type": "qwen3", "layer_types": [1, 2]},
    "layer types a text": {"model_type": "qwen3", "layer_types": "full_attention"},
    "window of text": {"model_type": "mistral", "sliding_window": "many"},
    "window negative": {"model_type": "mistral", "sliding_window": -16},
    "window zero": {"model_type": "mistral", "sliding_window": 0},
    "experts text": {"model_type": "mixtral", "num_local_experts": "8"},
    "more experts used than there are": {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 4},
    "no experts": {"model_type": "mixtral", "num_local_experts": 0},
    "quantised by nobody": {"quantization_config": {"quant_method": "magic"}},
    "quantised without method": {"quantization_config": {"bits": 4}},
    "quantised text": {"quantization_config": "int4"},
    "quantised to 99 bits": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": "yes"}},
    "map to code that is not there": {"model_type": "mine", "auto_map": {"AutoConfig": "config_mine.Mine"}},
    "map of another kind": {"model_type": "mine", "auto_map": ["config_mine.Mine"]},
    "text config of text": {"model_type": "gemma3", "text_config": "text"},
    "text config a list": {"model_type": "gemma3", "text_config": [1]},
    "text config of broken fields": {"model_type": "gemma3", "text_config": {"hidden_size": "x"}},
    "vision config of numbers": {"model_type": "gemma3", "text_config": {}, "vision_config": 7},
    "padding beyond the vocabulary": {"pad_token_id": 10**6},
    "end beyond the vocabulary": {"eos_token_id": 10**6},
    "end negative": {"eos_token_id": -7},
    "ends of text": {"eos_token_id": ["a", "b"]},
    "ends of lists": {"eos_token_id": [[1], [2]]},
    "eps of text": {"rms_norm_eps": "1e-6"},
    "eps of another text": {"rms_norm_eps": "small"},
    "eps of a list": {"rms_norm_eps": [1e-6]},
    "sizes of text": {"hidden_size": "32", "intermediate_size": "48"},
    "layers that are no multiple": {"num_hidden_layers": 2.5},
    "heads that are text": {"num_attention_heads": "4"},
    "positions of text": {"max_position_embeddings": "64"},
    "experimental attention": {"attn_implementation": "no_such", "_attn_implementation": "no_such"},
    "chunked feed forward": {"chunk_size_feed_forward": 3},
    "output of a tuple": {"return_dict": False},
    "output of hidden states": {"output_hidden_states": True},
    "labels a number": {"id2label": 5},
    "pruned heads": {"pruned_heads": {"0": "x"}},
    "names that are numbers": {"1": 2, "": 3},
    "fields of methods": {"to_dict": 1, "get_text_config": 2},
    "a private field": {"_name_or_path": 5},
    "a commit of another kind": {"_commit_hash": {}},
    "per-layer settings": {"per_layer_config": {"0": {"hidden_size": 5}}},
}
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
         "chat_template.jinja", "model.safetensors", "model.safetensors.index.json", "adapter_config.json",
         "added_tokens.json", "vocab.json", "processor_config.json")  # fmt: skip
CONTENTS = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"5",
    "a text": b'"text"',
    "an empty dict": b"{}",
    "a dict of lists": b'{"a": [1, 2], "model": [], "weight_map": []}',
    "no JSON": b"{'a': 1,}",
    "nested": b"[" * 20000 + b"]" * 20000,
    "binary": bytes(range(256)) * 8,
    "not UTF-8": b'{"a": "\xff\xfe\xfa"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "nul bytes": b"\0" * 512,
    "a page": b"<!DOCTYPE html><html><body>404</body></html>",
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 5\n",
}
TOKENIZER = {  # path in tokenizer.json -> other values
    ("model",): (None, 5, [], {}, {"type": "BPE"}, {"type": "Magic", "vocab": {}}),
    ("model", "vocab"): (None, [], {"a": "b"}, {"a": -1}, {"a": 2**40}, {}),
    ("model", "merges"): (5, ["a"], [["a", "b", "c"]], [["zz", "yy"]], "a b"),
    ("added_tokens",): (5, {}, [5], [{}], [{"id": "x", "content": "y"}], [{"id": 10**9, "content": END, "special": True}]),
    ("normalizer",): (5, {"type": "Magic"}, {"type": "Replace"}, {"type": "Precompiled", "precompiled_charsmap": "!"}),
    ("pre_tokenizer",): ([], {"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Removed"}, None),
    ("decoder",): ("x", {"type": "Magic"}, None),
    ("post_processor",): (
        7,
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {"x": 1}},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}], "pair": [],
         "special_tokens": {}},
    ),
    ("truncation",): (5, {"max_length": -1}, {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}),
    ("padding",): (5, {"strategy": {"Fixed": 8}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
                       "pad_to_multiple_of": None},),
    ("version",): ("9.0", 1),
}  # fmt: skip
TOKENIZER_CONFIG = {
    "tokenizer_class": (5, None, "NoSuchTokenizer", [], "LlamaTokenizer", "BertTokenizer", "GPT2Tokenizer"),
    "eos_token": (5, [], {}, {"content": 5}, {"content": END, "lstrip": "x"}, "<never seen>", None),
    "bos_token": (5, [], "<never seen>"),
    "pad_token": (5, [], "<never seen>"),
    "unk_token": (5, {"a": 1}),
    "model_max_length": ("long", [], -1, None, 10**30),
    "chat_template": (5, {}, [], [{"name": "default"}], [{"name": 5, "template": 7}], [5], ""),
    "added_tokens_decoder": (
        5,
        [],
        {"x": {"content": "y"}},
        {"5": "y"},
        {"999999": {"content": "<far>", "special": True}},
    ),
    "additional_special_tokens": (5, "x", [5], [{}], {"a": "b"}),
    "extra_special_tokens": (5, ["x"], {"a": 5}),
    "clean_up_tokenization_spaces": ("no", []),
    "padding_side": ("up", 5),
    "truncation_side": ("down",),
    "auto_map": (5, {"AutoTokenizer": ["x.Y", None]}, {"AutoTokenizer": 5}),
    "processor_class": (5, "NoSuchProcessor"),
    "backend": (5, "magic"),
    "add_bos_token": ("x",),
    "name_or_path": (5,),
    "legacy": ("x",),
}
GENERATION = {
    "eos_token_id": ("x", [], [10**9], -5, {}, [None], 1.5),
    "temperature": ("hot", -1, float("nan"), []),
    "top_k": ("x", -5),
    "max_length": ("x", -1, 0),
    "max_new_tokens": ("x", -1),
    "do_sample": ("x", True),
    "num_beams": (0, "x", 4),
    "num_return_sequences": (3,),
    "pad_token_id": ("x", -3),
    "cache_implementation": ("magic", 5),
    "repetition_penalty": ("x", -1.0, 0),
    "no_repeat_ngram_size": (2, "x"),
    "bad_words_ids": (5, [[10**9]]),
    "suppress_tokens": ("x", [10**9]),
    "forced_eos_token_id": (10**9,),
    "watermarking_config": (5,),
    "compile_config": (5,),
    "stop_strings": (5, ["x"]),
    "prompt_lookup_num_tokens": (3,),
    "transformers_version": (5,),
}
TEMPLATES = {
    "a huge range": "{% for i in range(10**9) %}x{% endfor %}" + CHATML,
    "ranges in ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}"
    + CHATML,
    "a repeated text": "{% set x = 'x' * 10**10 %}" + CHATML,
    "a text doubled": "{% set n = namespace(x='xxxxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
    + CHATML,
    "a huge power": "{% set x = 9 ** (9 ** 9) %}" + CHATML,
    "a wide format": "{{ '%1000000000d' % 5 }}" + CHATML,
    "a wide centre": "{{ 'x'.center(10**9) }}" + CHATML,
    "a list repeated": "{% set x = [0] * 10**9 %}" + CHATML,
    "a product of loops": "{% for i in 'x' * 50000 %}{% for j in 'x' * 50000 %}{% endfor %}{% endfor %}" + CHATML,
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + CHATML,
    "wide recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}" + CHATML,
    "an include": "{% include 'other' %}" + CHATML,
    "an import": "{% import 'other' as o %}" + CHATML,
    "a parent": "{% extends 'other' %}" + CHATML,
    "an unknown function": "{{ no_such() }}" + CHATML,
    "an unknown filter": "{{ messages | no_such }}" + CHATML,
    "an unknown test": "{{ messages is no_such }}" + CHATML,
    "no such attribute": "{{ messages[0].content.no_such.more }}" + CHATML,
    "an unsafe attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML,
    "a change": "{{ messages.append(1) }}" + CHATML,
    "division by zero": "{{ 1 / 0 }}" + CHATML,
    "an index beyond": "{{ messages[99].content }}" + CHATML,
    "text and number": "{{ 'a' + 1 }}" + CHATML,
    "a wrong call": "{{ range('a') }}" + CHATML,
    "it refuses": "{{ raise_exception('never') }}",
    "not closed": "{% for m in messages %}{{ m.content }}",
    "unknown statement": "{% frobnicate %}",
    "nothing": " ",
    "plain text": "Hello",
    "contents twice": "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    "contents escaped": "{% for m in messages %}{{ m.content | e }}{{ eos_token }}{% endfor %}",
    "an unpacked message": "{% for a, b in messages %}{{ a }}{% endfor %}",
    "a message as JSON": "{{ messages | tojson }}",
    "nested too deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "an endless filter": "{{ 'x' | indent(10**9) }}" + CHATML,
    "slices of nothing": "{{ messages | batch(0) | list }}" + CHATML,
}


def make(folder: Path) -> None:
    """A whole folder: a Llama of two layers, a tokenizer of bytes, ChatML."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=["<|im_start|>"]
    )
    fast.chat_template = CHATML
    torch.manual_seed(0)
    sizes = SIZES | dict(
        vocab_size=len(fast), hidden_size=16, intermediate_size=24, head_dim=4, eos_token_id=fast.eos_token_id
    )
    LlamaForCausalLM(LlamaConfig(**sizes, dtype="float32")).save_pretrained(folder)
    fast.save_pretrained(folder)


def cases(seed: int = 0) -> dict[str, Callable[[Path], None]]:
    """All ways to break a folder, by name. seed: of those that cut or change bytes at random."""
    found: dict[str, Callable] = {}
    for field in FIELDS:
        for kind, value in KINDS.items():
            found[f"config {field} {kind}"] = _entries("config.json", **{field: value})
    for name, rope in ROPES.items():
        found[f"rope {name}"] = _entries("config.json", rope_parameters=rope)
        found[f"old rope {name}"] = _entries("config.json", rope_parameters=DROP, rope_scaling=rope, rope_theta=1e4)
    found |= {f"config: {name}": _entries("config.json", **entries) for name, entries in CONFIGS.items()}
    for file in FILES:
        for name, content in CONTENTS.items():
            found[f"{file} {name}"] = lambda folder, file=file, content=content: (folder / file).write_bytes(content)
        found[f"{file} is a folder"] = lambda folder, file=file: _as_folder(folder / file)
        found[f"{file} is a broken link"] = lambda folder, file=file: _as_link(folder / file, "nowhere")
        found[f"{file} is a link to itself"] = lambda folder, file=file: _as_link(folder / file, file)
        found[f"{file} is missing"] = lambda folder, file=file: (folder / file).unlink(missing_ok=True)
    for path, values in TOKENIZER.items():
        for i, value in enumerate(values):
            found[f"tokenizer {'.'.join(path)} {i}"] = lambda folder, path=path, value=value: _put(
                folder / "tokenizer.json", path, value
            )
    for file, table in (("tokenizer_config.json", TOKENIZER_CONFIG), ("generation_config.json", GENERATION)):
        for field, values in table.items():
            for i, value in enumerate(values):
                found[f"{file} {field} {i}"] = _entries(file, **{field: value})
    for name, template in TEMPLATES.items():
        found[f"template {name}"] = lambda folder, template=template: (folder / "chat_template.jinja").write_text(
            template
        )
    found |= _weights() | _random(seed)
    return found


def _entries(file: str, **entries) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        told = json.loads((folder / file).read_text()) | entries
        (folder / file).write_text(json.dumps({name: value for name, value in told.items() if value is not DROP}))

    return change


def _put(file: Path, path: tuple[str, ...], value) -> None:
    whole = json.loads(file.read_text())
    inner = whole
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    file.write_text(json.dumps(whole))


def _as_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _as_link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _weights() -> dict[str, Callable[[Path], None]]:
    def header(change: Callable[[dict], object]):
        def rewrite(folder: Path) -> None:
            file = folder / "model.safetensors"
            raw = file.read_bytes()
            size = struct.unpack("<Q", raw[:8])[0]
            told = json.loads(raw[8 : 8 + size])
            told = change(told) or told
            text = json.dumps(told).encode()
            file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

        return rewrite

    def tensors(change: Callable[[dict], dict]):
        def rewrite(folder: Path) -> None:
            file = folder / "model.safetensors"
            save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, metadata={"format": "pt"})

        return rewrite

    def index(content) -> Callable[[Path], None]:
        def rewrite(folder: Path) -> None:
            (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
            (folder / "model.safetensors.index.json").write_text(json.dumps(content))

        return rewrite

    first = "model.embed_tokens.weight"
    shard = "model-00001-of-00002.safetensors"
    return {
        "weights cut in the header": lambda f: _cut(f / "model.safetensors", 40),
        "weights cut in the data": lambda f: _cut(f / "model.safetensors", -100),
        "weights with a huge header": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        "weights of an unknown dtype": header(lambda h: h[first].update(dtype="Q7")),
        "weights of another shape in the header": header(lambda h: h[first].update(shape=[1, 1])),
        "weights of a shape of text": header(lambda h: h[first].update(shape="big")),
        "weights that overlap": header(lambda h: h[first].update(data_offsets=[0, 8])),
        "weights without offsets": header(lambda h: h[first].pop("data_offsets") and None),
        "weights whose header is a list": header(lambda h: [1, 2]),
        "weights without metadata": header(lambda h: h.pop("__metadata__") and None),
        "weights of another framework": header(lambda h: h.update(__metadata__={"format": "mlx"})),
        "weights with metadata of numbers": header(lambda h: h.update(__metadata__={"format": 5})),
        "weights of integers": tensors(lambda w: {k: v.to(torch.int32) for k, v in w.items()}),
        "weights of booleans": tensors(lambda w: {k: v > 0 for k, v in w.items()}),
        "weights of 8-bit floats": tensors(lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()}),
        "weights of complex numbers": tensors(lambda w: {k: v.to(torch.complex64) for k, v in w.items()}),
        "one of integers": tensors(lambda w: w | {first: w[first].to(torch.int64)}),
        "flat weights": tensors(lambda w: {k: v.flatten() for k, v in w.items()}),
        "transposed weights": tensors(lambda w: {k: v.T if v.ndim == 2 else v for k, v in w.items()}),
        "weights of size zero": tensors(lambda w: {k: v[:0] for k, v in w.items()}),
        "weights of size one": tensors(lambda w: {k: v.flatten()[0] for k, v in w.items()}),
        "no weights": tensors(lambda w: {}),
        "weights of NaN": tensors(lambda w: {k: v * float("nan") for k, v in w.items()}),
        "weights far too large": tensors(lambda w: {k: v * 1e37 for k, v in w.items()}),
        "index without a map": index({"metadata": {}}),
        "index a list": index([1]),
        "index map a list": index({"metadata": {}, "weight_map": [shard]}),
        "index map to numbers": index({"metadata": {}, "weight_map": {first: 5}}),
        "index map to null": index({"metadata": {}, "weight_map": {first: None}}),
        "index map empty": index({"metadata": {}, "weight_map": {}}),
        "index to a missing shard": index({"metadata": {}, "weight_map": {first: "model-00002-of-00002.safetensors"}}),
        "index to a folder above": index({"metadata": {}, "weight_map": {first: "../../x.safetensors"}}),
        "index to a config": index({"metadata": {}, "weight_map": {first: "config.json"}}),
        "index without metadata": index({"weight_map": {first: shard}}),
        "index of some": index({"metadata": {}, "weight_map": {first: shard}}),
    }


def _random(seed: int) -> dict[str, Callable[[Path], None]]:
    """Cut and changed bytes, at places drawn once."""
    rng, found = random.Random(seed), {}
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
                 "model.safetensors"):  # fmt: skip
        for i in range(4):
            share, byte = rng.random(), rng.randrange(256)
            found[f"{file} cut {i}"] = lambda folder, file=file, share=share: _cut_share(folder / file, share)
            found[f"{file} byte {i}"] = lambda folder, file=file, share=share, byte=byte: _flip(
                folder / file, share, byte
            )
    return found


def _cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def _cut_share(file: Path, share: float) -> None:
    _cut(file, int(share * file.stat().st_size))


def _flip(file: Path, share: float, byte: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[int(share * len(raw))] = byte
    file.write_bytes(raw)
