"""MT-Bench (arXiv 2306.05685) from the file a user has: conversations of two questions, each answer rated by a judge.

    question.jsonl                 question_id, category, turns (two), reference (two, optional)
    reference_answer/gpt-4.jsonl   beside it, optional: question_id, choices[0].turns, used before `reference`

    question 1 --model--> answer 1;   question 1, answer 1, question 2 --model--> answer 2;   judge: 1 to 10 for each

Answers are drawn at the temperature that MT-Bench gives to a category, greedy where it is 0, up to 1,024 tokens. The judge
sees the conversation up to the answer it rates, and the references of math, reasoning and coding. Its instructions are
this library's wording. Not covered: comparisons of two models' answers. Memory: the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engines import Request, Sampling
from .answers import Answers
from .records import check_record, read_lines
from .samples import JUDGED, Counter, Sample

NAME, FILE, REFERENCES = "mt_bench", "question.jsonl", "reference_answer/gpt-4.jsonl"
TURNS, MOST, SPARE = ("first", "second"), 1024, 64
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
    ("extraction", "math", "coding", "reasoning"), 0.0
)
OTHER = 0.7  # the temperature of a category that is none of these
REFERENCED = ("math", "reasoning", "coding")


@dataclass(frozen=True)
class MTBench:
    """The file. records: question_id, category, turns, and reference: two texts or none."""

    records: tuple[dict, ...]
    name: str = NAME
    judged: bool = True
    tries: int = 1  # a rating that cannot be read is none, as published

    def check(self, room: int, counter: Counter, more: int = 0) -> None:
        """Raises ValueError where a conversation with its two answers and `more` tokens before each takes more than `room`."""
        for record in self.records:
            first, second = record["turns"]
            asked = counter.count(second, earlier=(("user", first), ("assistant", "")))
            if (needed := asked + 2 * (MOST + more) + SPARE) > room:
                raise ValueError(
                    f"{NAME}: question {record['question_id']} and its answers take up to {needed} tokens, there is room "
                    f"for {room}; expected --length of at least {needed}"
                )

    async def converse(self, number: int, answers: Answers, seed: int) -> list[tuple[Sample, str | None]]:
        """A question's two samples and answers. None for one whose request failed or that was cut off inside the reasoning,
        and for one that would follow it."""
        record, earlier, found = self.records[number], (), []
        temperature = TEMPERATURES.get(record["category"], OTHER)
        sampling = Sampling(MOST, temperature, seed=seed if temperature else None)
        for turn, question in enumerate(record["turns"]):
            sample, text = self._sample(record, turn), None
            if len(earlier) == 2 * turn:
                told = await answers.generate(sample.id, Request(question, sampling, earlier=earlier))
                if told is not None:
                    text = told["text"].strip()
                    earlier += ("user", question), ("assistant", text)
            elif found[0][0].id in answers.cut:
                answers.cut.add(sample.id)
            found.append((sample, text))
        return found

    def _sample(self, record: dict, turn: int) -> Sample:
        references = record["reference"][turn : turn + 1]
        return Sample(
            f"{NAME}/{record['question_id']}/{turn + 1}",
            NAME,
            0,
            record["turns"][turn],
            references=tuple(filter(None, references)),
            max_tokens=MOST,
            metric=JUDGED,
        )

    def judge_prompts(self, texts: Sequence[str | None]) -> list[tuple[str, str] | None]:
        """What the judge is asked about each answer, in the order of `converse`, and its name in the journal."""
        prompts = []
        for i, record in enumerate(self.records):
            for turn in range(len(TURNS)):
                said = texts[2 * i : 2 * i + turn + 1]
                name = f"{self._sample(record, turn).id}/judge"
                prompts.append(None if None in said else (name, judge_prompt(record, said)))
        return prompts

    def parts(self, values: list) -> dict[str, list]:
        """What is averaged: all values, and those of each turn."""
        return {NAME: values} | {f"{NAME}/{turn}": values[i::2] for i, turn in enumerate(TURNS)}

    def units(self, name: str, values: list) -> list[float]:
        """Of a part: its values; of all of them a question's mean, as its two answers hang together."""
        step = len(TURNS) if name == NAME else 1
        groups = ([value for value in values[i : i + step] if value is not None] for i in range(0, len(values), step))
        return [sum(group) / len(group) for group in groups if group]


def read_mt_bench(file: Path) -> MTBench:
    """Raises ValueError for a file in another format, and for a question that comes twice."""
    beside, known, records = _references(file.parent / REFERENCES), set(), []
    for record, where in read_lines(file):
        check_record(record, {"question_id": (int, str), "category": str, "turns": list}, where)
        number, turns = record["question_id"], _pair(record["turns"], f"{where}: turns")
        if not all(turns):
            raise ValueError(f"{where}: turns has an empty question; expected two questions")
        if number in known:
            raise ValueError(f"{where}: question_id {number!r} comes twice")
        known.add(number)
        told = _pair(record["reference"], f"{where}: reference") if record.get("reference") else ()
        told = beside.get(number, told) if record["category"] in REFERENCED else ()
        records.append({"question_id": number, "category": record["category"], "turns": turns, "reference": told})
    return MTBench(tuple(records))


def _references(file: Path) -> dict[int | str, tuple[str, str]]:
    """Answers of reference by question; none without the file."""
    found = {}
    for record, where in read_lines(file) if file.is_file() else ():
        check_record(record, {"question_id": (int, str), "choices": list}, where)
        choice = record["choices"][0] if record["choices"] else None
        check_record(choice, {"turns": list}, f"{where}: choices[0]")
        found[record["question_id"]] = _pair(choice["turns"], f"{where}: turns")
    return found


def _pair(values: object, where: str) -> tuple[str, str]:
    """Two texts; a number is one."""
    if not isinstance(values, list) or len(values) != len(TURNS):
        raise ValueError(f"{where} is {str(values)[:80]}; expected a list of two texts")
    if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, str | int | float)]:
        raise ValueError(f"{where} has {str(wrong[0])[:80]}; expected a list of two texts")
    first, second = map(str, values)
    return first, second


# -- the judge ---------------------------------------------------------------------------------------------------------

GRADE = (
    "You grade the last answer that an AI assistant gave in the conversation below. Be impartial, and do not let an "
    "answer's length decide. A good answer does what the user asked for, is right and to the point, goes as deep as the "
    "question needs and, where something is to be written, is written well."
)
COMPARE = " A reference answer is there: compare the assistant's answer with it, find every mistake, and grade by them."
FOLLOW = " The earlier answer was graded before; it matters here only as far as the last question builds on it."
FORM = (
    " First say in a few sentences what is good and what is not. Then end with one whole rating from 1 (useless) to 10 "
    '(could not be better), strictly in this form: "[[rating]]", for example "[[5]]".'
)


def judge_prompt(record: dict, answers: Sequence[str]) -> str:
    """What the judge is asked about the last of these answers to a record's questions."""
    references = record["reference"][: len(answers)]
    parts = [GRADE + COMPARE * any(references) + FOLLOW * (len(answers) > 1) + FORM]
    for i, answer in enumerate(answers):
        last = i == len(answers) - 1
        parts.append(f"[User]\n{record['turns'][i]}")
        if references and references[i]:
            parts.append(f"[Reference answer]\n{references[i]}")
        parts.append(f"[Assistant's answer{' to be graded' if last else ''}]\n{answer}")
    return "\n\n".join([*parts, "[End of the conversation]"])
