"""One document to the published recipe's chunks: whole paragraphs, gathered in order.

    text --blank lines, or LaTeX sections--> paragraphs --gathered while they fit--> chunks --JOIN--> the long document

A paragraph has as many tokens as the tokenizer gives it alone, special tokens included, so a token that begins every
text counts once per paragraph; a chunk has the sum of its paragraphs. What is gathered ends before the paragraph that
would lead beyond `maximum`, which begins the next one, and is dropped where it has fewer than `minimum` tokens. So is a
paragraph longer than `maximum`. The long document is the chunks alone: what was dropped is not in it.

Memory: the text twice, and its encoding by the tokenizer's backend, 200 bytes per token while it is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

from .chunks import Bounds

JOIN = "\n\n\n"  # between the chunks of a long document
BLANK = re.compile(r"\n{2,}")
SECTION = re.compile(r"\\(?:sub)*section\{[^}]*\}", re.IGNORECASE)


def is_latex(name: str) -> bool:
    """Whether a file of this name is LaTeX, packed or not: .tex, .tex.gz, .tex.zst."""
    path = PurePosixPath(name.lower())
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix == ".tex"


@dataclass(frozen=True)
class Gatherer(Bounds):
    """Gathers chunks of `minimum` to `maximum` tokens. sections: LaTeX, parted where a section begins instead of at
    blank lines; what stands before the first one is no part of it. Raises ValueError for bounds that make no sense and
    for a tokenizer that is not fast.
    """

    sections: bool = False

    def paragraphs(self, text: str) -> list[str]:
        """The paragraphs, or sections, of a text without outer whitespace; none is empty."""
        pieces = split_sections(text) if self.sections else BLANK.split(text)
        return [piece for piece in map(str.strip, pieces) if piece]

    def gather(self, text: str) -> list[tuple[str, int]]:
        """The chunks of a text, in order, and their tokens. A chunk is its paragraphs with one space between them."""
        paragraphs = self.paragraphs(text)
        encoded = self.tokenizer.backend_tokenizer.encode_batch_fast(paragraphs, add_special_tokens=True)
        return [
            (" ".join(paragraphs[first:end]), tokens)
            for first, end, tokens in runs([len(one.ids) for one in encoded], self.maximum)
            if self.minimum <= tokens <= self.maximum
        ]

    def part(self, text: str) -> tuple[str, list[tuple[int, int, int]]]:
        """The long document made of a text, and its chunks (first character, end, tokens) in it."""
        chunks, spans, begin = self.gather(text), [], 0
        for chunk, tokens in chunks:
            spans.append((begin, begin + len(chunk), tokens))
            begin += len(chunk) + len(JOIN)
        return JOIN.join(chunk for chunk, _ in chunks), spans


def split_sections(text: str) -> list[str]:
    """The sections of LaTeX, from one title to the next."""
    closed = text.rfind("}") + 1  # behind it no title ends, and each place would be looked at to the end of the text
    begins = [match.start() for match in SECTION.finditer(text, 0, closed)]
    return [text[begin:end] for begin, end in pairwise([*begins, len(text)])]


def runs(counts: list[int], maximum: int) -> Iterator[tuple[int, int, int]]:
    """Stretches [first, end) of counts and their sums, each as long as its sum is at most `maximum`; a count above it
    is a stretch of its own.
    """
    first = total = 0
    for i, count in enumerate(counts):
        if i > first and total + count > maximum:
            yield first, i, total
            first, total = i, 0
        total += count
    if counts:
        yield first, len(counts), total
