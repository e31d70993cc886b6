"""A tokenizer that gives back the text it was given, with ids that the model has embeddings for.

    text -> ids -> text      letters, digits and single spaces must return: refused otherwise
                             whatever else does not (white space, case, accents, scripts) is reported as a warning

A tokenizer may hold more tokens than the embedding has rows (Gemma 3 1B: 262,145 and 262,144; a padding token that nobody
added a row for): that is refused only where such a token is one of the plain vocabulary, begins or ends a sequence, or is
written by the chat template. Texts that name another one are refused where they are read.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from .loading import BrokenModel, check_files, loading
from .template import CONVERSATIONS, check_template, render

log = logging.getLogger("longpo_ops.pretrained")

# One of these at least is in a folder with a tokenizer.
FILES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "*tokenization*.py", "tekken.json")
NEEDED = "The quick brown fox jumps over 13 lazy dogs and PACKS MY BOX WITH five dozen liquor jugs 24567890 times"
REPORTED = {
    "runs of spaces": "two  three   four",
    "line breaks": "one\ntwo\n\nthree\r\nfour",
    "tabs": "one\ttwo\n\t\tthree",
    "upper case": "Ann Lives IN Rome",
    "punctuation": "Stop, she said: \"No!\" (it's me); 3.5 - 2 = 1.5? #1 @ 50% & $9 * ~ ^ | ` ' _",
    "code": "def f(x):\n    return {x[0]: '<a>\\n'}  # x != 0",
    "accents": "caf\u00e9 na\u00efve \u00fcber \u0159eka \u00f1and\u00fa",
    "combining characters": "cafe\u0301 u\u0308ber",
    "compatibility forms": "\ufb01ne \uff11\uff12 \u00bd \u00b2 \u2122",
    "typographic marks": "\u201cquoted\u201d \u2018so\u2019 \u2013 \u2014 \u2026 \u20ac \u00a7",
    "mathematics": "\u2200x \u2208 \u211d: \u2211 x \u2264 \u221e \u2192 \u2207f",
    "emoji": "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "Greek": "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "Cyrillic": "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0457\u0436\u0430\u043a",
    "Hebrew": "\u05e2\u05d1\u05e8\u05d9\u05ea",
    "Arabic": "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "Devanagari": "\u0939\u093f\u0928\u094d\u0926\u0940",
    "Thai": "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "Chinese": "\u4e2d\u6587\u8bed\u8a00",
    "Japanese": "\u65e5\u672c\u8a9e\u304b\u306a\u30ab\u30ca",
    "Korean": "\ud55c\uad6d\uc5b4",
}


def load_tokenizer(name: str, trust_remote_code: bool = False, vocab_size: int | None = None):
    """The tokenizer of a model, with its own chat template or its processor's. vocab_size: rows of its embedding, where
    there is one here.

    Raises BrokenModel, a ValueError, if it cannot be loaded, loses letters, digits or spaces, or writes ids beyond the
    embedding, and for a chat template that runs away (template.py).
    """
    from transformers import AutoTokenizer

    with loading(name, lambda: _where(Path(name))):
        check_files(name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _template_of_processor(name)
        lost = check_round_trip(name, tokenizer)
        check_template(name, tokenizer)
        if vocab_size is not None:
            check_ids(name, tokenizer, vocab_size)
    if lost:
        _warn_once(f"{name}: its tokenizer does not give back as they were: {'; '.join(lost)}")
    return tokenizer


def _where(folder: Path) -> str:
    """What could not be read; of a folder that was saved without it, what to do."""
    if not folder.is_dir() or any(file.is_file() for pattern in FILES for file in folder.glob(pattern)):
        return "its tokenizer"
    return (
        "the folder holds no tokenizer: save the one that the model was trained with beside it "
        "(AutoTokenizer.from_pretrained(base).save_pretrained(folder))"
    )


def _template_of_processor(name: str) -> str | dict | None:
    """The chat template of a model that also sees, where its processor has it (chat_template.json). None where there is none,
    and where that cannot be asked."""
    from transformers.processing_utils import ProcessorMixin

    try:
        told, _ = ProcessorMixin.get_processor_dict(name)
    except OSError:  # of a hub that does not answer
        return None
    if (template := told.get("chat_template")) is not None:
        log.info("%s: its tokenizer has no chat template, its processor's is taken", name)
    return template


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def check_round_trip(name: str, tokenizer) -> list[str]:
    """-> what of REPORTED a tokenizer does not give back, with an example each. Raises ValueError for NEEDED."""
    came = round_trip(tokenizer, NEEDED)
    if came.casefold() != NEEDED.casefold():
        raise BrokenModel(
            f"model {name!r}: its tokenizer ({type(tokenizer).__name__}) does not give its own text back: {NEEDED!r} "
            f"became {came!r}; expected letters, digits and spaces to stay. Its files do not fit together "
            "(tokenizer_class in tokenizer_config.json, or the config's model_type, against tokenizer.json): mend them"
        )
    given = {kind: (text, round_trip(tokenizer, text)) for kind, text in REPORTED.items()}
    return [f"{kind} ({text!r} becomes {came!r})" for kind, (text, came) in given.items() if came != text]


def round_trip(tokenizer, text: str) -> str:
    """What is left of a text between two words. SentencePiece puts a space before a text and takes one away after it."""
    ids = tokenizer(f"a {text} b", add_special_tokens=False)["input_ids"]
    came = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip(" ")
    return came.removeprefix("a").removeprefix(" ").removesuffix("b").removesuffix(" ")


def check_ids(name: str, tokenizer, vocab_size: int) -> None:
    """Raises ValueError for a tokenizer whose ids do not all have a row of the embedding; the module says which matter."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    written = {id for id in vocabulary.values() if id not in added} | _written(tokenizer)
    if beyond := sorted(id for id in written if id >= vocab_size):
        tokens = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(beyond[:4]))) + (", ..." if beyond[4:] else "")
        raise BrokenModel(
            f"model {name!r}: its tokenizer has {max(vocabulary.values()) + 1} tokens, its embedding {vocab_size} rows; "
            f"{tokens} would have none. Give the tokenizer that belongs to the model, or resize the model "
            "(model.resize_token_embeddings) and save it beside this tokenizer"
        )


def _written(tokenizer) -> set[int]:
    """Ids that stand in every text: those of the chat template, beginning and end of sequence."""
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    if not getattr(tokenizer, "chat_template", None):
        return ids
    for messages, more in CONVERSATIONS:
        try:
            text = render(tokenizer, messages, more)
        except ValueError:  # said where conversations are formatted
            continue
        ids |= set(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids
