"""The published recipe's records by a plain script, written from its description alone: nothing of the generator is here.

    files --paragraphs, chunks--> questions about each --2 drawn--> answers from the chunk and the whole --> records

`ask(content)` is the model: one user message to one answer. Draws follow the rule in generate/steps.py. Beside the
wording three things are ours and not the recipe's: the draws, that outer whitespace of answers goes, and that LaTeX is told
by the name of the file.
"""

from __future__ import annotations

import gzip
import hashlib
import random
import re
from pathlib import Path

QUESTIONS, TURNS = 4, 2


def official_records(folder: Path, count, ask, prompts: Path, seed: int, sizes: dict) -> list[dict]:
    """count(text, special): tokens. prompts: folder of the wording. sizes: document, target, chunk, longest."""
    request = (prompts / "questions.txt").read_text().strip().replace("{count}", str(QUESTIONS))
    lead_ins = (prompts / "lead_ins.txt").read_text().split("\n")[:20]
    refusals = (prompts / "refusals.txt").read_text().split("\n")[:37]
    records = []
    for file in sorted(folder.iterdir()):
        text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
        if not sizes["document"] < count(text, False) < sizes["target"]:
            continue
        parts = sections(text) if ".tex" in file.name else paragraphs(text)
        chunks = gathered([(part, count(part, True)) for part in parts], sizes["chunk"], sizes["longest"])
        document, name = "\n\n\n".join(chunks), hashlib.sha256(text.encode()).hexdigest()[:32]
        turns = []
        for i, chunk in enumerate(chunks):
            questions = listed(ask(chunk + "\n\n" + request))
            if len(questions) == QUESTIONS:
                draw = random.Random(f"{seed}|{name}|{i}")
                question, lead_in = questions[draw.randrange(QUESTIONS)], lead_ins[draw.randrange(20)]
                if "\n\n" not in question:
                    turns.append((chunk, lead_in.replace("{question}", question)))
        if len(turns) > TURNS:
            turns = random.Random(f"{seed}|{name}|turns").sample(turns, TURNS)
        record = {"prompt": document, "short_prompts": [], "questions": [], "chosens": [], "rejecteds": []}
        for chunk, question in turns:
            chosen, rejected = ask(chunk + "\n\n" + question).strip(), ask(document + "\n\n" + question).strip()
            if meant(chosen, 0.9) and meant(rejected, 0.95) and not refused(chosen + "\n" + rejected, refusals):
                for column, value in zip(list(record)[1:], (chunk, question, chosen, rejected)):
                    record[column].append(value)
        if record["questions"]:
            records.append(record)
    return records


def paragraphs(text: str) -> list[str]:
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def sections(text: str) -> list[str]:
    begins = [m.start() for m in re.finditer(r"\\(section|subsection|subsubsection)\{", text, re.IGNORECASE)]
    return [text[begin:end].strip() for begin, end in zip(begins, [*begins[1:], len(text)])]


def gathered(parts: list[tuple[str, int]], least: int, most: int) -> list[str]:
    chunks, inside, tokens = [], [], 0
    for part, size in [*parts, ("", most + 1)]:  # what comes last ends the rest, and is dropped itself
        if tokens + size > most:
            if least <= tokens <= most:
                chunks.append(" ".join(inside))
            inside, tokens = [], 0
        inside.append(part)
        tokens += size
    return chunks


def listed(text: str) -> list[str]:
    """A mark is a number, a space or none, and signs. A question has a character at least, so the mark that follows
    another one at once is no mark: "in 1984? 2: Why?" goes on with "2: Why?".
    """
    marks = []
    for mark in re.finditer(r"\b\d+ *[:.!?-]+\s*", text):
        if mark.end() < len(text) and not (marks and mark.start() == marks[-1].end()):
            marks.append(mark)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [text[mark.end() : end].strip("*#.! \n") for mark, end in zip(marks, ends)]


def meant(answer: str, most: float) -> bool:
    words = "".join(sign for sign in answer.lower() if sign in "_" or sign.isalnum() or sign.isspace()).split()
    again = [word for word in words if words.count(word) > 1]
    long = [word for word in words if len(word) >= 3]
    return bool(words) and len(again) / len(words) <= most and len(long) >= 2


def refused(answers: str, refusals: list[str]) -> bool:
    return any(phrase in answers.lower() for phrase in refusals)
