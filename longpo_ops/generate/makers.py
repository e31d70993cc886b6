"""What a recipe does that no number says: how documents are parted, when turns are drawn, how lists are read.

|                  | default                         | official                                               |
|------------------|---------------------------------|--------------------------------------------------------|
| the long input   | the document                    | its chunks, three newlines between them                |
| a chunk ends     | where the structure allows      | between paragraphs (LaTeX: sections), joined by spaces |
| asked about      | chunks that were drawn before   | all; turns are drawn among those whose lists count     |
| a list counts    | half of the questions at least  | as many questions as wanted, each behind a number      |
| else             | it is asked for again, once     | the chunk is left out                                  |
| filtered by      | filters.Filters                 | filters.PublishedFilters                               |
| `length` bounds  | document, questions and answers | the document                                           |
| a longer text    | is cut                          | is left out                                            |

Tests: tests/generate/test_run.py, tests/generate/test_official.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ..documents.chunks import Chunker
from ..documents.listing import Document
from ..documents.paragraphs import Gatherer, is_latex
from ..engines import Completion
from ..recipes import DEFAULT, OFFICIAL
from .filters import Filters, PublishedFilters
from .questions import parse_marked, parse_questions

LATEX = re.compile(r"\\begin\{document\}|\A\s*\\section\{")  # a record has no file name that tells


@dataclass(frozen=True)
class Parted:
    """A document as it is laid out: the long input, its tokens, and its chunks in it (first character, end, tokens)."""

    text: str
    tokens: int
    chunks: list[tuple[int, int, int]]


class Parting:
    """Parts documents by their structure, with a fast tokenizer. Raises ValueError for bounds that make no sense."""

    def __init__(self, tokenizer, minimum: int, maximum: int):
        self.tokenizer, self.bounds = tokenizer, (minimum, maximum)
        self.chunker = Chunker(tokenizer, minimum, maximum)

    def starts(self, text: str) -> np.ndarray:
        """The character (n,) at which each of the n tokens starts."""
        return self.chunker.starts(text)

    def __call__(self, document: Document, starts: np.ndarray, breaks=None, tokens: int | None = None) -> Parted:
        """breaks: of a text that was cut, found already (chunks.Chunker); tokens: as a text of its own, `starts` by default."""
        chunks = self.chunker.chunks(document.text, starts, breaks)
        return Parted(document.text, len(starts) if tokens is None else tokens, chunks)


class PublishedParting(Parting):
    """Gathers paragraphs, or sections of LaTeX, and joins what was gathered to the long input."""

    def __call__(self, document: Document, starts: np.ndarray, breaks=None, tokens: int | None = None) -> Parted:
        sections = is_latex(document.source) or LATEX.search(document.text) is not None
        gatherer = Gatherer(self.tokenizer, *self.bounds, sections=sections)
        text, chunks = gatherer.part(document.text)
        return Parted(text, sum(tokens for *_, tokens in chunks), chunks)


@dataclass(frozen=True)
class Maker:
    """fits_answers: `length` holds questions and answers beside the document. asks_all: turns are drawn after asking.
    cuts: longer texts become several documents.
    """

    parting: type[Parting]
    filters: type[Filters]
    fits_answers: bool
    asks_all: bool
    cuts: bool

    def questions(self, pool: Completion, count: int) -> list[str] | str:
        """The questions of a list, or why it does not count. One of them is drawn: half of those wanted are choice enough,
        and more than a question that came by in a text."""
        if self.asks_all:
            return parse_marked(pool.text, count) or "unparsable question list"
        found = parse_questions(pool.text, count, pool.finish)
        if 2 * len(found) >= count:
            return found
        return "questions: cut off" if pool.finish == "length" else "questions: too few" if found else "questions: none"

    def counts(self, question: str) -> bool:
        """Whether a drawn question can be put: the published post-processing loses those with a blank line inside."""
        return not (self.asks_all and "\n\n" in question)


MAKERS = {
    DEFAULT: Maker(Parting, Filters, fits_answers=True, asks_all=False, cuts=True),
    OFFICIAL: Maker(PublishedParting, PublishedFilters, fits_answers=False, asks_all=True, cuts=False),
}
