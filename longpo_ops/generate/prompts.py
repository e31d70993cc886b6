"""What the model is asked, and the phrase lists: files under prompts/RECIPE/ that a user can replace one by one.

questions.txt        the request for a pool of questions; {count} stands for their number
questions_again.txt  the same once more, where what came was no list; the official recipe asks once. A folder with
                     questions.txt alone asks with that again
questions_json.txt   goes behind the first where the engine holds an answer to a JSON schema
judge.txt            what a judge is asked; {text}, {question} and {answer} stand for what it judges; of all recipes
lead_ins.txt         one way of putting a question per line; {question} stands for it
refusals.txt         one phrase of a refusal per line, compared without case
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from ..recipes import DEFAULT, check_recipe
from ..text import read_text

FOLDER = Path(__file__).with_name("prompts")
JUDGE = "judge.txt"
JUDGED = re.compile(r"\{(text|question|answer)\}")
ASKING = FIRST, AGAIN, JSON = ("questions.txt", "questions_again.txt", "questions_json.txt")
NAMES = (*ASKING, "lead_ins.txt", "refusals.txt", JUDGE)


@dataclass(frozen=True)
class Prompts:
    """The files. `load` takes each from a folder of the user's, or the recipe's own where it is not there."""

    questions: str
    lead_ins: tuple[str, ...]
    refusals: tuple[str, ...]
    again: str = ""
    json: str = ""
    judge: str = ""

    @classmethod
    def load(cls, folder: str | Path | None = None, recipe: str = DEFAULT) -> Prompts:
        """Raises ValueError for a recipe that is none, a folder with none of the files or one that the recipe does not use,
        and a file that is empty or lacks its placeholder.
        """
        own = FOLDER / check_recipe(recipe)
        folder = own if folder is None else Path(folder)
        shared = {JUDGE: FOLDER / JUDGE}
        if (folder / FIRST).is_file() and (own / AGAIN).is_file():
            shared[AGAIN] = folder / FIRST  # a wording of the user's is asked again as it is
        if not any((folder / name).is_file() for name in NAMES):
            raise ValueError(f"no prompt files in {folder}; expected any of {', '.join(NAMES)}")
        texts = {}
        for name in NAMES:
            if not (fallback := shared.get(name, own / name)).is_file():
                if (folder / name).is_file():
                    raise ValueError(f"{folder / name}: recipe {recipe!r} asks nothing with it; remove it")
                continue
            file = folder / name if (folder / name).is_file() else fallback
            texts[name] = read_text(file).strip()
            if not texts[name]:
                raise ValueError(f"{file} is empty; write the prompt, or remove the file to use the default")
        lists = {
            name: tuple(line.strip() for line in text.splitlines() if line.strip()) for name, text in texts.items()
        }
        for name in filter(texts.get, ASKING[:2]):
            if "{count}" not in texts[name]:
                raise ValueError(f"{folder}/{name}: expected {{count}} where the number of questions belongs")
        for line in lists["lead_ins.txt"]:
            if line.count("{question}") != 1:
                raise ValueError(f"{folder}/lead_ins.txt: {line!r}; expected {{question}} once in every line")
        if sorted(JUDGED.findall(texts[JUDGE])) != ["answer", "question", "text"]:
            raise ValueError(f"{folder}/{JUDGE}: expected {{text}}, {{question}} and {{answer}}, each once")
        first, again, json = (texts.get(name, "") for name in ASKING)
        return cls(first, lists["lead_ins.txt"], lists["refusals.txt"], again, json, texts[JUDGE])

    def ask(self, count: int, again: bool = False, schema: bool = False) -> str:
        """The request for `count` questions. again: the second one. schema: for an engine that is given `list_schema`."""
        wording = self.again if again else self.questions
        return (f"{wording}\n\n{self.json}" if schema else wording).replace("{count}", str(count))

    def instruct(self, lead_in: int, question: str) -> str:
        """The question as it is put to the model."""
        return self.lead_ins[lead_in].replace("{question}", question)

    def ask_judge(self, text: str, question: str, answer: str) -> str:
        """The request for a rating of an answer; what stands in the three is put in as it is."""
        given = {"text": text, "question": question, "answer": answer}
        return JUDGED.sub(lambda found: given[found[1]], self.judge)

    def digest(self, judged: bool = False) -> str:
        """Equal where the wording is, with that of the judge or without."""
        wording = (
            self.questions,
            self.lead_ins,
            self.refusals,
            *filter(None, (self.again, self.json, self.judge if judged else "")),
        )
        return hashlib.sha256(repr(wording).encode()).hexdigest()[:16]


def list_schema(count: int) -> dict:
    """The JSON schema of a list of `count` questions. An object holds it, as some servers take no other."""
    listed = {"type": "array", "items": {"type": "string"}, "minItems": count, "maxItems": count}
    return {
        "type": "object",
        "properties": {"questions": listed},
        "required": ["questions"],
        "additionalProperties": False,
    }
