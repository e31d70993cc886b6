"""Where the tokens of a text start: long texts in pieces, with the counts of the whole.

    text --seams: places at which the tokenizer parts anyway--> pieces --batches, side by side--> starts

A place is a seam if encoding 64 characters on both sides together gives the tokens of encoding each side alone. What a
tokenizer's words are is decided by the characters around them, so the pieces then have the tokens of the whole. Where no
seam is found the text is encoded in one go.

Pieces are encoded side by side where there are cores for it. On two, which are often one core's threads, that saves no time
and costs a seventh more of it.

Memory: 8 bytes per token, and 200 bytes per token of one batch (a million characters).
"""

from __future__ import annotations

import os
import re
from itertools import pairwise

import numpy as np

PIECE, BATCH, AROUND, TRIES = 1 << 12, 256, 64, 8
CORES = 4  # from how many on pieces are encoded side by side
LIKELY = re.compile(r"(?<=\w)(?= \w)|(?<=\S\n)(?=\S)|(?<=[\u3002\uff0c])(?=\w)")  # between words, lines, clauses


def fast_backend(tokenizer):
    """What encodes for a fast transformers tokenizer. Raises ValueError for one that is not fast.

    A tokenizer's file may say that texts are cut or padded; its backend forgets that here, as it does in any call of
    the tokenizer that asks for neither.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; load a fast tokenizer")
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


def token_starts(backend, text: str) -> np.ndarray:
    """The character (n,) int64 at which each of the n tokens of a text starts."""
    places, side_by_side = [0, *_seams(backend, text), len(text)], (os.cpu_count() or 1) >= CORES
    pieces = [(begin, end) for begin, end in pairwise(places)] if text else []
    found = [np.empty(0, np.int64)]
    for first in range(0, len(pieces), BATCH):
        batch = pieces[first : first + BATCH]
        texts = [text[begin:end] for begin, end in batch]
        if side_by_side and len(texts) > 1:
            encoded = backend.encode_batch(texts, add_special_tokens=False)
        else:  # no threads are woken
            encoded = (backend.encode(one, add_special_tokens=False) for one in texts)
        for (begin, _), one in zip(batch, encoded):
            found.append(begin + np.fromiter((start for start, _ in one.offsets), np.int64, len(one.ids)))
    return np.concatenate(found)


def tokens_alone(backend, text: str, begin: int, end: int, starts: np.ndarray) -> int:
    """How many tokens a stretch of a text has when it is a text of its own. starts: of the whole text's tokens."""
    return (
        int(np.searchsorted(starts, end) - np.searchsorted(starts, begin))
        + _more(backend, text[begin : begin + AROUND], text[max(0, begin - AROUND) : begin], "")
        + _more(backend, text[max(begin, end - AROUND) : end], "", text[end : end + AROUND])
    )


def _seams(backend, text: str) -> list[int]:
    """Places some PIECE apart that divide no token."""
    found, at, failed = [], PIECE, 0
    while at < len(text) - PIECE and failed < TRIES:
        match = LIKELY.search(text, at, at + PIECE)
        if match is None:
            at += PIECE
        elif _is_seam(backend, text, match.end()):
            found.append(match.end())
            at, failed = match.end() + PIECE, 0
        else:
            at, failed = match.end() + 1, failed + 1
    return found


def _is_seam(backend, text: str, at: int) -> bool:
    before, behind = text[max(0, at - AROUND) : at], text[at : at + AROUND]
    return _ids(backend, before + behind) == _ids(backend, before) + _ids(backend, behind)


def _more(backend, text: str, before: str, behind: str) -> int:
    """How many more tokens a text has alone than between two others."""
    offsets = backend.encode(before + text + behind, add_special_tokens=False).offsets
    within = sum(len(before) <= start < len(before) + len(text) for start, _ in offsets)
    return len(_ids(backend, text)) - within


def _ids(backend, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids
