"""One document to candidate chunks, parted where its structure allows.

A chunk is a stretch [a, b) of the document that begins and ends at a break in its structure. Every break has a rank,
from a heading down to a space between words; the next chunk ends at the break of the highest rank, and among equals
at the last, that leaves it between `minimum` and `maximum` tokens. Tokens are counted in the document's own
tokenisation. A stretch without any break (a picture in base64) is left out, so no chunk ends inside a word.

Memory: the text, one byte per character, and 200 bytes per token while it is tokenised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

END, HEADING, BLOCK, PARAGRAPH, LINE, SENTENCE, WORD = 7, 6, 5, 4, 3, 2, 1
WIDE = r"\u2e80-\u9fff\uf900-\ufaff\uff00-\uff65"  # Chinese and Japanese: no spaces between words
BREAKS = (
    # A break lies where the match ends; later rules overrule earlier ones at the same place.
    (WORD, re.compile(rf"\s(?=\S)|[{WIDE}](?=[{WIDE}])")),
    (SENTENCE, re.compile(r"[.!?][\"'\u2019\u201d)\]]*\s+(?=\S)|[\u3002\uff01\uff1f][\u300d\u300f\u201d]*(?=\S)")),
    (LINE, re.compile(r"\n[ \t]*(?=\S)")),
    (PARAGRAPH, re.compile(r"\n[ \t]*\n\s*(?=\S)")),
    (HEADING, re.compile(r"(?:\A|\n)(?=[ \t]{0,3}#{1,6}[ \t]|[ \t]*\\(?:part|chapter|(?:sub)*section)\*?[\[{])")),
    (HEADING, re.compile(r"(?:\A|\n)(?=[ \t]*\S[^\n]*\n(?:={3,}|-{3,})[ \t]*(?:\n|\Z))")),
)
CODE = re.compile(
    r"^[ \t]*(?P<fence>```+|~~~+)[^\n]*\n.*?(?:^[ \t]*(?P=fence)[ \t]*$|\Z)"
    r"|^[ \t]*\\begin\{(?P<env>verbatim|lstlisting|minted|equation|align|table|figure)\*?\}"
    r".{0,20000}?\\end\{(?P=env)\*?\}",
    re.MULTILINE | re.DOTALL,
)


def find_breaks(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Places (n,) where a text may be parted, in order, and their ranks (n,).

    Inside a block of code only lines part.
    """
    ranks = np.zeros(len(text) + 1, dtype=np.int8)
    for rank, pattern in BREAKS:
        ranks[np.fromiter((match.end() for match in pattern.finditer(text)), np.int64)] = rank
    for block in CODE.finditer(text):
        inside = ranks[block.start() + 1 : block.end()]
        inside[(inside > WORD) & (inside < LINE)] = WORD
        inside[inside > LINE] = LINE
        ranks[block.start()] = max(BLOCK, ranks[block.start()])
    ranks[[0, -1]] = 0, END
    places = np.flatnonzero(ranks)
    return places, ranks[places]


@dataclass(frozen=True)
class Bounds:
    """How many tokens a chunk has, and the fast transformers tokenizer that counts them. Raises ValueError for bounds
    that make no sense and for a tokenizer that is not fast.

    A tokenizer's file may say that texts are cut or padded; its backend forgets that here, as it does in any call of
    the tokenizer that asks for neither.
    """

    tokenizer: object
    minimum: int
    maximum: int

    def __post_init__(self):
        if not 0 < self.minimum <= self.maximum:
            raise ValueError(f"chunks of {self.minimum} to {self.maximum} tokens; expected 0 < minimum <= maximum")
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"{type(self.tokenizer).__name__} gives no character offsets; load a fast tokenizer")
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()


class Chunker(Bounds):
    """Parts documents where their structure allows."""

    def starts(self, text: str) -> np.ndarray:
        """The character (n,) at which each of the n tokens starts."""
        encoded = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return np.fromiter((start for start, _ in encoded.offsets), np.int64, len(encoded.ids))

    def chunks(self, text: str, starts: np.ndarray) -> list[tuple[int, int, int]]:
        """Candidate chunks (first character, end, tokens), in order, disjoint, without outer whitespace."""
        places, ranks = find_breaks(text)
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
