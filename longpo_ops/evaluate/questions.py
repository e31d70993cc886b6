"""Question answering: a question, the documents that answer it, and others around them until the text is long.

    documents needed + related ones + any others, shuffled  ->  "Document 1:\n..", "Document 2:\n..", question

As in RULER: qa_1 asks SQuAD's questions (one paragraph is needed, the article's others come first), qa_2 HotpotQA's (ten
paragraphs belong to a question), in the file's order. Without a file both ask cloze questions about local text, qa_2 for
the words of two sentences from two paragraphs at once. A pool with fewer documents than fit goes round again, except the
needed ones.

Tests: tests/evaluate/test_tasks.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, cycle, islice
from random import Random

from .pools import Pool, Question
from .samples import Draft
from .sources import Texts
from .text import fill

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me "
    "the answer and do not output any other words.\n\nQuestion: {question}"
)
PREFILL = " Answer:"


@dataclass(frozen=True)
class QuestionAnswering:
    """RULER's qa_1 (source "squad") and qa_2 ("hotpotqa"). Its units are documents."""

    name: str
    source: str
    max_tokens: int = 32
    metric: str = "any"

    def least(self, number: int, length: int, texts: Texts) -> int:
        _, question = self._question(number, texts)
        return len(question.needed)

    def draft(self, seed: str, number: int, length: int, units: int, texts: Texts) -> Draft:
        (pool, question), random = self._question(number, texts), Random(seed)
        near = random.sample(question.related, len(question.related))
        taken = {*question.needed, *near}
        far = [i for i in range(len(pool.documents)) if i not in taken]
        random.shuffle(far)
        others = cycle(chain(near, far)) if near or far else ()
        numbers = [*question.needed, *islice(others, units - len(question.needed))]
        random.shuffle(numbers)
        entries = [f"Document {i}:\n{pool.documents[number]}" for i, number in enumerate(numbers, 1)]
        context = "\n\n".join(entries)
        depth = None
        if len(question.needed) == 1:
            depth = sum(len(entry) + 2 for entry in entries[: numbers.index(question.needed[0])]) / len(context)
        return Draft(fill(TEMPLATE, context=context, question=question.text), PREFILL, question.answers, depth)

    def _question(self, number: int, texts: Texts) -> tuple[Pool, Question]:
        given = texts.published.get(self.source)
        pool = given or texts.local
        if given is None and self.source == "hotpotqa":
            return pool, _both(pool, number)
        return pool, pool.questions[number % len(pool.questions)]


def _both(pool: Pool, number: int) -> Question:
    """The question for the words of two sentences."""
    first, second = (pool.questions[(2 * number + i) % len(pool.questions)] for i in range(2))
    sentences = [question.text.partition(": ")[2] for question in (first, second)]
    a, b = first.answers[0], second.answers[0]
    answers = tuple(f"{a}{between}{b}" for between in (", ", " and ", ", and ", " "))
    return Question(
        f"Which two words are missing here: {' and '.join(sentences)}", answers, first.needed + second.needed
    )
