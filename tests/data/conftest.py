"""Small tokenizers with the special tokens and the documented chat formats of five model families."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from longpo_ops.data import Pair, Turn

TEMPLATES = Path(__file__).with_name("templates")
FAMILIES = {  # bos, eos, further special tokens
    "mistral": ("<s>", "</s>", []),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "qwen2_5": (None, "<|im_end|>", ["<|im_start|>"]),
    "qwen3": (None, "<|im_end|>", ["<|im_start|>"]),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
}
TEXT = [
    "The quick brown fox jumps over the lazy dog. What does the fox do? It jumps over the dog.\n\n",
    "In the harbour of the old town there are 42 boats, and the captain of each one keeps a log.\n",
    "[INST] user model assistant system [/INST] You are a helpful assistant.\n\n  indented text; a, b: c! ",
]


def train_bytes() -> Tokenizer:
    """Byte-level BPE, words split off with their leading space, as in Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def train_spaces() -> Tokenizer:
    """BPE over characters, spaces marked, bytes for the unknown: as sentencepiece makes for Mistral and Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fuse = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(fuse)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator((text.replace("\n", "") for text in TEXT), trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = description["added_tokens"][:1]  # bytes are ordinary tokens
    return Tokenizer.from_str(json.dumps(description))


@pytest.fixture(scope="session")
def base_tokenizers() -> dict[str, Tokenizer]:
    return {"bytes": train_bytes(), "spaces": train_spaces()}


@pytest.fixture(scope="session")
def make_tokenizer(base_tokenizers):
    """make_tokenizer(family, chat_template=None): a new transformers tokenizer in that family's format."""
    from transformers import PreTrainedTokenizerFast

    def make(family: str, chat_template: str | None = None, **kwargs):
        bos, eos, special = FAMILIES[family]
        kind = "spaces" if family in ("mistral", "gemma") else "bytes"
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=copy.deepcopy(base_tokenizers[kind]),
            **{"bos_token": bos, "eos_token": eos, "additional_special_tokens": special} | kwargs,
        )
        tokenizer.add_tokens(["<think>", "</think>"] if family == "qwen3" else [])
        tokenizer.chat_template = chat_template or (TEMPLATES / f"{family}.jinja").read_text().rstrip("\n")
        return tokenizer

    return make


@pytest.fixture
def pair() -> Pair:
    """Two turns, one rejected answer each; answers that begin alike."""
    return Pair(
        id="boats",
        document="In the harbour there are 42 boats.\n\nThe captain keeps a log.\n",
        turns=(
            Turn("How many boats?", "There are 42 boats.", "There are 42 boats.", ("There are many.",)),
            Turn("Who keeps a log?", "The captain keeps a log.", "The captain does.", ("The captain of the dog.",)),
        ),
    )
