"""What the model is asked, and the phrase lists: files under prompts/RECIPE/ that a user can replace one by one.

questions.txt  the request for a pool of questions; {count} stands for their number
lead_ins.txt   one way of putting a question per line; {question} stands for it
refusals.txt   one phrase of a refusal per line, compared without case
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from ..recipes import DEFAULT, check_recipe
from ..text import read_text

FOLDER = Path(__file__).with_name("prompts")
NAMES = ("questions.txt", "lead_ins.txt", "refusals.txt")
NUMBERED = re.compile(r"\s*(\d+)[.)]\s+(\S.*?)\s*")
MARK = re.compile(r"\b\d+\s*[:.!?-]+\s*")
EDGES = re.compile(r"\A[\s*#.!]+|[\s*#.!]+\Z")


@dataclass(frozen=True)
class Prompts:
    """The three files. `load` takes each from a folder of the user's, or the recipe's own where it is not there."""

    questions: str
    lead_ins: tuple[str, ...]
    refusals: tuple[str, ...]

    @classmethod
    def load(cls, folder: str | Path | None = None, recipe: str = DEFAULT) -> Prompts:
        """Raises ValueError for a recipe that is none, a folder with none of the files, and a file that is empty or
        lacks its placeholder.
        """
        own = FOLDER / check_recipe(recipe)
        folder = own if folder is None else Path(folder)
        if not any((folder / name).is_file() for name in NAMES):
            raise ValueError(f"no prompt files in {folder}; expected any of {', '.join(NAMES)}")
        texts = {}
        for name in NAMES:
            file = folder / name if (folder / name).is_file() else own / name
            texts[name] = read_text(file).strip()
            if not texts[name]:
                raise ValueError(f"{file} is empty; write the prompt, or remove the file to use the default")
        lists = {
            name: tuple(line.strip() for line in text.splitlines() if line.strip()) for name, text in texts.items()
        }
        if "{count}" not in texts["questions.txt"]:
            raise ValueError(f"{folder}/questions.txt: expected {{count}} where the number of questions belongs")
        for line in lists["lead_ins.txt"]:
            if line.count("{question}") != 1:
                raise ValueError(f"{folder}/lead_ins.txt: {line!r}; expected {{question}} once in every line")
        return cls(texts["questions.txt"], lists["lead_ins.txt"], lists["refusals.txt"])

    def ask(self, count: int) -> str:
        """The request for `count` questions."""
        return self.questions.replace("{count}", str(count))

    def instruct(self, lead_in: int, question: str) -> str:
        """The question as it is put to the model."""
        return self.lead_ins[lead_in].replace("{question}", question)

    def digest(self) -> str:
        """Equal where the wording is."""
        return hashlib.sha256(repr((self.questions, self.lead_ins, self.refusals)).encode()).hexdigest()[:16]


def parse_questions(text: str, count: int) -> list[str] | None:
    """The questions of a list numbered 1 to `count`, one per line and nothing else, all different; None for any
    other.
    """
    matches = [NUMBERED.fullmatch(line) for line in text.splitlines() if line.strip()]
    if len(matches) != count or None in matches or [int(match[1]) for match in matches] != list(range(1, count + 1)):
        return None
    questions = [match[2] for match in matches]
    return questions if len(set(questions)) == count else None


def parse_marked(text: str, count: int) -> list[str] | None:
    """The questions of a list as the published recipe reads it; None where they are not `count`.

    Each begins behind a mark, a number with one of : . ! ? - behind it, takes at least one character, and ends before
    the next mark or with the text. Numbers are not looked at, questions may be equal and have several lines, and what
    stands before the first mark is left out. A year that ends a sentence is a mark, too.
    """
    questions, mark = [], MARK.search(text)
    while mark is not None and mark.end() < len(text):
        following = MARK.search(text, mark.end() + 1)
        question = text[mark.end() : following.start() if following else len(text)].strip()
        if question:
            questions.append(EDGES.sub("", question) or question[-1])
        mark = following
    return questions if len(questions) == count else None
