"""One document to candidate chunks, parted where its structure allows.

A chunk is a stretch [a, b) of the document that begins and ends at a break in its structure (structure.py). Every break has a
rank, from a heading down to a space between words; the next chunk ends at the break of the highest rank, and among equals
at the last, that leaves it between `minimum` and `maximum` tokens. Tokens are counted in the document's own
tokenisation. A stretch without any break (a picture in base64) is left out, so no chunk ends inside a word.

Memory: the text, one byte per character, and 200 bytes per token while it is tokenised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .structure import HEADING, find_breaks
from .tokens import fast_backend, token_starts


@dataclass(frozen=True)
class Bounds:
    """How many tokens a chunk has, and the fast transformers tokenizer that counts them. Raises ValueError for bounds
    that make no sense and for a tokenizer that is not fast.
    """

    tokenizer: object
    minimum: int
    maximum: int

    def __post_init__(self):
        if not 0 < self.minimum <= self.maximum:
            raise ValueError(f"chunks of {self.minimum} to {self.maximum} tokens; expected 0 < minimum <= maximum")
        fast_backend(self.tokenizer)


class Chunker(Bounds):
    """Parts documents where their structure allows."""

    def starts(self, text: str) -> np.ndarray:
        """The character (n,) at which each of the n tokens starts."""
        return token_starts(self.tokenizer.backend_tokenizer, text)

    def chunks(
        self, text: str, starts: np.ndarray, breaks: tuple[np.ndarray, np.ndarray] | None = None
    ) -> list[tuple[int, int, int]]:
        """Candidate chunks (first character, end, tokens), in order, disjoint, without outer whitespace. breaks: the text's
        places and ranks where they are known already (structure.find_breaks).
        """
        places, ranks = find_breaks(text) if breaks is None else breaks
        ranks = np.minimum(ranks, HEADING)  # among headings the last one in reach
        tokens = np.searchsorted(starts, places)  # tokens before each break
        found, begin, done = [], 0, 0
        while done + self.minimum <= len(starts):
            first = int(np.searchsorted(tokens, done + self.minimum))
            last = int(np.searchsorted(tokens, done + self.maximum, side="right"))
            if first < last:
                window = ranks[first:last]
                best = first + int(np.flatnonzero(window == window.max())[-1])
                end = int(places[best])
                if piece := text[begin:end].strip():
                    start = text.index(piece[0], begin)
                    found.append((start, start + len(piece), int(tokens[best]) - done))
            else:  # nothing to break at: go on behind the stretch
                best = min(first, len(places) - 1)
            begin, done = int(places[best]), int(tokens[best])
        return found
