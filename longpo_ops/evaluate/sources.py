"""Where the prose and the questions of tasks come from.

RULER's prose is a set of essays that it downloads. Here it is Python's own documentation (`pydoc_data.topics`, 110
thousand tokens or so), or the files a user names.

Tests: tests/evaluate/test_tasks.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..documents.listing import Listing, find_files, read_documents
from .pools import Pool, local_pool, read_pools
from .text import Prose

LARGEST = 16_000_000  # characters read of the user's files: more than the longest context holds


@dataclass(frozen=True)
class Texts:
    """Where prose and questions come from.

    sources: files, folders or globs of texts in any format that documents come in; none: Python's documentation.
    questions: a JSON file in SQuAD's or HotpotQA's published format, or a folder of such files; None: cloze questions
    about the texts. Read when first needed; raises ValueError for what cannot be read.
    """

    sources: tuple[str, ...] = ()
    questions: str | None = None

    @property
    def documents(self) -> tuple[str, ...]:
        """The texts, as they are."""
        return self._read[0]

    @property
    def left_out(self) -> list[tuple[str, int]]:
        """Files that gave no text: why, and how many."""
        return self._read[1].left_out()

    @cached_property
    def _read(self) -> tuple[tuple[str, ...], Listing]:
        listing, texts, size = Listing(), [], 0
        if not self.sources:
            from pydoc_data.topics import topics

            return tuple(topics[name] for name in sorted(topics)), listing
        for document in read_documents(find_files(self.sources), listing):
            if document.text.strip():
                texts.append(document.text)
                size += len(document.text)
            if size > LARGEST:
                break
        if not texts:
            reasons = ", ".join(reason for reason, _ in listing.left_out()) or "empty"
            raise ValueError(f"no text in {', '.join(self.sources)} ({reasons}); expected files with readable text")
        return tuple(texts), listing

    @cached_property
    def prose(self) -> Prose:
        """The texts one after another, with their line breaks."""
        return Prose.read("".join(f"\n\n{text.strip()}" for text in self.documents))

    @cached_property
    def essay(self) -> Prose:
        """The same with a single space wherever there is whitespace, as RULER has its essays."""
        words = (" " + word.lstrip() if word[0].isspace() else word for word in self.prose.words)
        return Prose(tuple(words), self.prose.sentences)

    @cached_property
    def published(self) -> dict[str, Pool]:
        """The pools of the user's questions, by format: "squad", "hotpotqa"."""
        return {} if self.questions is None else read_pools(self.questions)

    @cached_property
    def local(self) -> Pool:
        """The pool of questions made from the texts."""
        return local_pool(self.documents)
