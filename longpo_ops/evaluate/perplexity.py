"""Perplexity of held-out text by length.

    windows of exactly L tokens, [bos] + L - b tokens of one text      (b = 1 where the tokenizer begins texts so, else 0)
    perplexity(L) = exp(-mean log p(token | those before it in its window))    over all tokens of all windows but the first

Windows follow each other without overlap; no window spans two texts, so texts shorter than L are left out and counted.
Of more windows than wanted, those that are spread evenly over the texts are taken. Memory: the texts' token ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..documents.listing import Listing, find_files, read_documents
from .intervals import Interval, of_numbers

MOST = 700  # nats a token: exp of more is no float64


@dataclass(frozen=True)
class Windows:
    """Windows of one length, each (length,) token ids; texts that gave some, texts that were too short, and files that
    gave no text: why, and how many."""

    length: int
    ids: tuple[np.ndarray, ...]
    texts: int
    shorter: int
    left_out: tuple[tuple[str, int], ...] = ()


def read_windows(sources: Sequence[str], lengths: Sequence[int], most: int, tokenizer) -> list[Windows]:
    """At most `most` windows of every length. Raises ValueError where no text is long enough for one of them."""
    listing, texts = Listing(), []
    for document in read_documents(find_files(sources), listing):
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        texts.append(np.array(ids, dtype=np.int32))
    if not texts:
        reasons = ", ".join(reason for reason, _ in listing.left_out()) or "empty"
        raise ValueError(
            f"no text for perplexity in {', '.join(sources)} ({reasons}); expected files with readable text"
        )
    begin, left_out = beginning(tokenizer), tuple(listing.left_out())
    found = (_windows(texts, length, most, begin) for length in sorted(set(lengths)))
    return [replace(each, left_out=left_out) for each in found]


def beginning(tokenizer) -> list[int]:
    """[bos] where the tokenizer begins every text with it, else []."""
    found = tokenizer("", verbose=False)["input_ids"][:1]
    return list(found) if found == [tokenizer.bos_token_id] else []


def _windows(texts: list[np.ndarray], length: int, most: int, begin: list[int]) -> Windows:
    if length < 2:
        raise ValueError(f"perplexity at {length} tokens; expected at least 2")
    step = length - len(begin)
    places = [(number, at) for number, ids in enumerate(texts) for at in range(0, len(ids) - step + 1, step)]
    if not places:
        longest = max(map(len, texts)) + len(begin)
        raise ValueError(
            f"no text is long enough for perplexity at {length} tokens: the longest has {longest}; give longer texts, "
            "or set --perplexity-length"
        )
    taken = [places[i * len(places) // most] for i in range(most)] if len(places) > most else places
    ids = tuple(np.concatenate([begin, texts[number][at : at + step]]).astype(np.int32) for number, at in taken)
    return Windows(length, ids, len({n for n, _ in places}), len(texts) - len({n for n, _ in places}))


async def measure(windows: Windows, answers, tell) -> tuple[float | None, dict[str, int], dict[int, float]]:
    """-> the perplexity, None where every window failed; the counts; and the nats a token of every window that did not fail, by
    its number. tell(tokens) follows every window. A window fails whose request does, as one with a log-prob that is none."""

    async def score(item: tuple[int, np.ndarray]) -> float | None:
        found = await answers.score(f"perplexity/{windows.length}/{item[0]}", item[1])
        tell(windows.length)
        return None if found is None or found[0] < -MOST * (windows.length - 1) else found[0]

    scored, tokens = await answers.each(enumerate(windows.ids), score), windows.length - 1
    sums = [found for found in scored if found is not None]
    counts = {"windows": len(windows.ids), "failed": len(windows.ids) - len(sums)}
    counts |= {"texts": windows.texts, "shorter": windows.shorter}
    nats = {number: -found / tokens for number, found in enumerate(scored) if found is not None}
    return math.exp(-math.fsum(sums) / (len(sums) * tokens)) if sums else None, counts, nats


def interval_of_perplexity(nats: Sequence[float]) -> Interval | None:
    """95 % of the perplexity of windows with so many nats a token: exp of the interval of their mean; None where a single
    window, or numbers beyond float64, give none."""
    found = of_numbers(nats)
    return None if found is None or found[1] > MOST else (math.exp(found[0]), math.exp(found[1]))
