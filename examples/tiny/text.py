"""The tiny model's world: real prose, the documentation that every Python carries, with facts planted in it.

prose       paragraphs of pydoc_data.topics; the last 12 % of every topic are held out
a fact      " The code: heron 4821." behind a sentence; every animal has one code in a text
a question  "What is the code of heron?" or "Which code belongs to heron?", answered by repeating the fact
a list      "List 2 questions." about the facts of a text, answered by one of each, numbered
"""

from __future__ import annotations

import argparse
import re
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from random import Random

import yaml

HELD_OUT = 0.12
TASK = yaml.safe_load(Path(__file__).with_name("codes.yaml").read_text(encoding="utf-8"))
FACT, KEYS, DIGITS = TASK["needle"], tuple(TASK["keys"]), TASK["value"]["digits"]
QUESTIONS = (TASK["question"], "Which code belongs to {key}?")
LISTED, LIST = 2, "List 2 questions."
DOCUMENTS = {"documents-1k": (140, (1750, 2150)), "documents-2k": (70, (3600, 4400))}  # number, characters


def answer(key: str, value: str) -> str:
    """What a right answer says."""
    return FACT.format(key=key, value=value).strip()


def questions(keys: Sequence[str]) -> str:
    """A numbered list of questions, each worded in its own way: a small model repeats itself where the words do."""
    asked = [wording.format(key=key) for wording, key in zip(QUESTIONS, keys, strict=True)]
    return "\n".join(f"{i}. {question}" for i, question in enumerate(asked, 1))


def prose() -> tuple[list[str], list[str]]:
    """-> the texts to train on and the held-out ones: one of each per topic, paragraphs parted by an empty line."""
    from pydoc_data.topics import topics

    train, held_out = [], []
    for name in sorted(topics):
        blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", topics[name])]
        blocks = [block for block in (re.sub(r"[*=\-~^+|]{4,}", "", block).strip() for block in blocks) if block]
        ends = list(accumulate(map(len, blocks)))
        cut = bisect(ends, (1 - HELD_OUT) * ends[-1])
        train.append("\n\n".join(blocks[:cut]))
        held_out.append("\n\n".join(blocks[cut:]))
    return [text for text in train if text], [text for text in held_out if text]


def draw_facts(count: int, random: Random) -> list[tuple[str, str]]:
    """Different keys, each with a code."""
    return [(key, "".join(random.choices("0123456789", k=DIGITS))) for key in random.sample(KEYS, count)]


def plant(text: str, facts: Sequence[tuple[str, str]], random: Random) -> str:
    """The text with facts behind sentences, spread evenly: one in each of as many equal parts of the text."""
    ends = [match.end() for match in re.finditer(r"[.:;!?](?=\s)", text)] or [len(text)]
    pieces, begin = [], 0
    for i, (key, value) in enumerate(facts):
        wanted = (i + random.random()) / len(facts) * len(text)
        end = max(begin, min(ends, key=lambda e: abs(e - wanted)))
        pieces += [text[begin:end], FACT.format(key=key, value=value)]
        begin = end
    return "".join([*pieces, text[begin:]])


def write_documents(folder: Path, count: int, characters: tuple[int, int], seed: int = 0, apart: int = 220) -> None:
    """`count` text files of training prose of so many characters, a fact in every `apart` of them."""
    folder.mkdir(parents=True, exist_ok=True)
    random, text = Random(f"documents {seed}"), "\n\n".join(prose()[0])
    for i in range(count):
        size = random.randint(*characters)
        begin = text.index(" ", random.randrange(len(text) - size - 100)) + 1
        passage = plant(text[begin : begin + size], draw_facts(size // apart, random), random)
        (folder / f"document-{i:04d}.txt").write_text(passage + "\n", encoding="utf-8")


def write_held_out(file: Path) -> None:
    """The held-out prose, one text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(prose()[1]) + "\n", encoding="utf-8")


def prepare(out: Path, seed: int = 0) -> None:
    """Write the documents and the held-out text below `out`. Raises OSError where that cannot be."""
    for i, (name, (count, characters)) in enumerate(DOCUMENTS.items()):
        write_documents(out / name, count, characters, seed=2 * seed + i)
    write_held_out(out / "held-out" / "held-out.txt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the tiny evolution's documents and held-out text.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prepare(options.out, options.seed)
