"""Tokens of long texts, counted in pieces."""

from __future__ import annotations

import random

import pytest

from longpo_ops.documents import tokens
from longpo_ops.documents.tokens import fast_backend, token_starts, tokens_alone
from tests.engines import tiny


def marked():
    """A tokenizer that puts a mark in front of every text, as SentencePiece's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator([tiny.document(i) for i in range(2)], trainers.BpeTrainer(vocab_size=300))
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(params=["bytes", "marked"])
def backend(request, tokenizer):
    return fast_backend(tokenizer if request.param == "bytes" else marked())


def text_of(seed: int) -> str:
    draw = random.Random(seed)
    words = [
        "The wind",
        "boats",
        "\n",
        "\n",
        "\n\n",
        "x = 1\n",
        "风",
        "é",
        ".\n",
        " ",
        "  ",
        "\t",
        "Ann walked.\n",
        "\n\n\n",
    ]
    return "".join(draw.choice(words) + draw.choice(["", " "]) for _ in range(3000))


def test_pieces_have_the_tokens_of_the_whole(backend, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 300)
    monkeypatch.setattr(tokens, "BATCH", 4)
    for text in (text_of(0), text_of(1), "word " * 1000, ""):
        whole = [start for start, _ in backend.encode(text, add_special_tokens=False).offsets]
        assert token_starts(backend, text).tolist() == whole
    assert len(tokens._seams(backend, text_of(0))) > 5
    assert tokens._seams(backend, "word" * 1000) == []


def test_a_stretch_has_the_tokens_of_a_text_of_its_own(backend):
    text = text_of(2)
    starts, draw = token_starts(backend, text), random.Random(3)
    for _ in range(50):
        begin = draw.randrange(len(text) - 400)
        end = begin + draw.randrange(200, 400)
        stretch = text[begin:end]
        begin, end = begin + len(stretch) - len(stretch.lstrip()), begin + len(stretch.rstrip())
        alone = len(backend.encode(text[begin:end], add_special_tokens=False).ids)
        assert tokens_alone(backend, text, begin, end, starts) == alone
