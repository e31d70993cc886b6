"""Pools of questions with the documents that answer them: from published files, or made from local text.

    squad, hotpotqa    JSON files in the published formats; in HotpotQA's ten paragraphs belong to a question
    cloze              'Which word is missing here: "Lambda expressions are used to create ____ functions."'

where the word is in one paragraph only, and no other sentence reads like this one beside its word. Memory: the documents,
and one file while it is read.

Tests: tests/evaluate/test_tasks.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from random import Random

from ..text import read_text
from .text import Prose

DOCUMENT_WORDS, SENTENCE_WORDS = range(20, 121), range(8, 41)  # of what cloze questions are made from
DOCUMENTS = 20_000  # at most: a million tokens and more
BLANK = "____"
LONG_WORD = re.compile(r"(?<![\w'-])[A-Za-z]{5,}(?![\w'-])")


@dataclass(frozen=True)
class Question:
    """needed, related: numbers of documents."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pool:
    """Questions and all documents."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


# -- files -------------------------------------------------------------------------------------------------------------


def read_pools(path: str | Path) -> dict[str, Pool]:
    """{"squad": .., "hotpotqa": ..}, as many of them as a JSON file or a folder of JSON files has.

    Raises ValueError for a file that is no JSON or in neither format, and for two of the same.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no questions in {path}; expected SQuAD's or HotpotQA's JSON file")
    found: dict[str, Pool] = {}
    for file in files:
        try:
            content = json.loads(read_text(file))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as JSON: {error}") from error
        name = "hotpotqa" if isinstance(content, list) else "squad"
        if name in found:
            raise ValueError(f"{file}: a second file in the format of {name}; name one of them")
        try:
            pool = (_hotpotqa if name == "hotpotqa" else _squad)(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{file} is neither SQuAD's JSON ({{data: [{{paragraphs: [{{context, qas}}]}}]}}) nor HotpotQA's "
                f"([{{question, answer, context}}]): {type(error).__name__} {error}"
            ) from error
        if not pool.questions:
            raise ValueError(f"{file} has no question with an answer")
        found[name] = pool
    return found


def _squad(content: dict) -> Pool:
    paragraphs = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in content["data"]]
    numbers = {text: i for i, text in enumerate(sorted({text for texts in paragraphs for text in texts}))}
    questions = []
    for article, texts in zip(content["data"], paragraphs):
        members = dict.fromkeys(numbers[text] for text in texts)
        for paragraph in article["paragraphs"]:
            own = numbers[paragraph["context"]]
            related = tuple(member for member in members if member != own)
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                if answers and not asked.get("is_impossible", False):
                    questions.append(Question(asked["question"], answers, (own,), related))
    return Pool(tuple(questions), tuple(numbers))


def _hotpotqa(content: list) -> Pool:
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in record["context"]] for record in content]
    numbers = {text: i for i, text in enumerate(sorted({text for texts in contexts for text in texts}))}
    questions = (
        Question(record["question"], (record["answer"],), tuple(dict.fromkeys(numbers[text] for text in texts)))
        for record, texts in zip(content, contexts)
    )
    return Pool(tuple(questions), tuple(numbers))


# -- questions from local text -----------------------------------------------------------------------------------------


def local_pool(texts: Sequence[str]) -> Pool:
    """Cloze questions about the paragraphs of texts, one per paragraph that has a word of its own.

    Raises ValueError where there are fewer than two.
    """
    blocks = (" ".join(block.split()) for text in texts for block in re.split(r"\n\s*\n", text))
    blocks = dict.fromkeys(block for block in blocks if len(block.split()) in DOCUMENT_WORDS)
    documents = tuple(islice(blocks, DOCUMENTS))
    words = Counter(word for document in documents for word in set(re.findall(r"\w+", document.lower())))
    gaps = [list(_gaps(document)) for document in documents]
    sentences = Counter(sentence for found in gaps for sentence, _ in found)
    questions = []
    for number, (document, found) in enumerate(zip(documents, gaps)):
        own = Counter(re.findall(r"\w+", document.lower()))
        sure = [gap for gap in found if own[gap[1].lower()] == words[gap[1].lower()] == sentences[gap[0]] == 1]
        if sure:
            sentence, word = max(sure, key=lambda gap: len(gap[1]))
            questions.append(Question(f'Which word is missing here: "{sentence}"', (word,), (number,)))
    if len(questions) < 2:
        raise ValueError(
            "the texts have too few paragraphs to make questions from (20 to 120 words, parted by empty lines, with a "
            "sentence that has a word of its own); name further texts, or a file of questions"
        )
    Random(0).shuffle(questions)  # or the first samples would all be about the first text
    return Pool(tuple(questions), documents)


def _gaps(document: str) -> Iterator[tuple[str, str]]:
    """Every (sentence with a long word left out, word) of a document on one line."""
    prose = Prose.read(document)
    for first, last in pairwise([*prose.sentences, len(prose.words)]):
        sentence = "".join(prose.words[first:last]).strip()
        if len(sentence.split()) in SENTENCE_WORDS:
            for word in LONG_WORD.finditer(sentence):
                yield sentence[: word.start()] + BLANK + sentence[word.end() :], word[0]
