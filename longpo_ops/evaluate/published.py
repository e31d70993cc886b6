"""InfiniteBench and LongBench-Chat, from the files a user has, in the format they are published in.

    TASK.jsonl       InfiniteBench: id, context, input, answer, options; TASK is one of its 12 names
    test_cases.json  LongBench-Chat: a list of idx, prompt, query, answer; few_shots.json beside it: rated answers
    question.jsonl   MT-Bench: mt_bench.py

    record --sample--> Sample (cut in the middle where it is too long, counted) --engine--> text --score / judge--> 0 to 1

InfiniteBench (arXiv 2402.13718): its prompts for models that complete them, the last words of which begin the answer;
its limits; its scores, as its code has had them since August 2024. LongBench-Chat (arXiv 2401.18058): another model
rates each answer from 1 to 10 against the reference, a tenth of which is the score; without a judge the answers are
written and stay unjudged. Memory: one file.
"""

from __future__ import annotations

import re
import string
from collections import Counter as Multiset
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import mt_bench
from .mt_bench import MTBench, read_mt_bench
from .records import check_record, loads, read_lines, read_text
from .samples import JUDGED, METRICS, Counter, Sample
from .text import fill

CHAT, CHAT_TOKENS, CHAT_TRIES = "longbench_chat", 1024, 5
LETTERS = "ABCD"
MARKS = (
    re.compile(  # as published: of the marks around these some stay, such as an opening \u300a, whose closing one goes
        r"[\s\u2013\u2014\u2018\u2019\u201b-\u201f\u2026\u2027\u3001-\u3003\u300b-\u3011\u3014-\u301f\u3030\u303e\u303f"
        r"\uff01-\uff0d\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff64\ufe4f]"
    )
)

# -- InfiniteBench's prompts: the user's message, how the answer begins, its tokens ------------------------------------

OPTIONS = "\n".join(f"{letter}. {{{letter}}}" for letter in LETTERS)
HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it"
PROMPTS: dict[str, tuple[str, str, int]] = {
    "passkey": (
        f"{HIDDEN} and memorize it. I will quiz you about the important information.\n\n{{context}}\n\n{{input}}",
        "The pass key is",
        6,
    ),
    "number_string": (
        f"{HIDDEN}. I will quiz you about the important information there.\n\n{{context}}\n\n{{input}}",
        "The sequence of digits is",
        12,
    ),
    "kv_retrieval": (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}",
        "",
        50,
    ),
    "longbook_sum_eng": ("Summarize the book below.\n\n{context}", "Summary:", 1200),
    "longbook_choice_eng": (
        f"Read the book and answer the question.\n\n{{context}}\n\nQuestion: {{input}}\n{OPTIONS}",
        "The letter of the correct answer is",
        40,
    ),
    "longbook_qa_eng": (
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\nQuestion: {input}",
        "Answer:",
        40,
    ),
    "longbook_qa_chn": ("阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}", "答案：", 40),
    "longdialogue_qa_eng": (
        'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", and you '
        "should try to guess who that character is.\n\n{context}",
        "The name that has been replaced with $$MASK$$ is likely",
        40,
    ),
    "math_find": ("What is {target} in the following list?\n\n{context}\n\n{input}", "", 3),
    "math_calc": (
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}",
        "Values:",
        30000,
    ),
    "code_run": (
        "There is a function called {function} in the following Python code.\n\n{context}\n\nPlease compute the exact "
        "value of {call}.",
        "The value of {call} is",
        5,
    ),
    "code_debug": (
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        f"crash.\n\n{{context}}\n\nOptions:\n{OPTIONS}",
        "The correct option is:",
        5,
    ),
}
CHOICES = ("longbook_choice_eng", "code_debug")  # references: the option's text and its letter


@dataclass(frozen=True)
class Published:
    """A file: its task and records. few_shots: of LongBench-Chat, by record, (answer, rating)."""

    name: str
    records: tuple[dict, ...]
    few_shots: tuple[tuple[tuple[str, str], ...], ...] = ()

    @property
    def judged(self) -> bool:
        """Whether answers are rated by a judge."""
        return self.name == CHAT

    @property
    def tries(self) -> int:
        """How often a judge is asked for a rating that can be read."""
        return CHAT_TRIES

    def judge_prompts(self, texts: Sequence[str | None]) -> list[tuple[str, str] | None]:
        """What the judge is asked about each record's answer, and its name in the journal."""
        return [
            None if text is None else (f"{self.name}/{number}/judge", judge_prompt(self, number, text))
            for number, text in enumerate(texts)
        ]

    def parts(self, values: list) -> dict[str, list]:
        """What is averaged."""
        return {self.name: values}

    def units(self, name: str, values: list) -> list[float]:
        """Of a part: the values that do not hang together, of which its interval is made."""
        return [value for value in values if value is not None]

    def sample(self, number: int, length: int, counter: Counter, prefill: bool = True) -> tuple[Sample, bool]:
        """-> a record's sample of at most `length` tokens, and whether its middle was cut out. prefill: whether the engine
        begins the answer, which `counter` then counts with it.

        Raises ValueError where the answer alone would fill the length.
        """
        record = self.records[number]
        prompt, begin, most = _prompt(self.name, record)
        room = length - most
        if room < 64:
            raise ValueError(f"{self.name} writes up to {most} tokens; expected --length of at least {most + 64}")
        fitted = cut_middle(prompt, begin, room, counter)
        return Sample(
            f"{self.name}/{length}/{record.get('id', record.get('idx', number))}",
            self.name,
            0,
            fitted,
            begin,
            references(self.name, record),
            most,
            JUDGED if self.name == CHAT else f"infinitebench/{self.name}",
        ), fitted != prompt


def read_published(sources: Sequence[str]) -> list[Published | MTBench]:
    """The files, each with all its records; of a folder those that have a published name.

    Raises ValueError for files in no known format, naming what is missing, and for a task that comes twice.
    """
    readers = dict.fromkeys((f"{name}.jsonl" for name in PROMPTS), _infinite_bench)
    readers |= {"test_cases.json": _longbench_chat, mt_bench.FILE: read_mt_bench}
    found: dict[str, Published | MTBench] = {}
    for source in sources:
        path = Path(source)
        files = [path / name for name in readers if (path / name).is_file()] if path.is_dir() else [path]
        if not files:
            raise ValueError(
                f"{path} has none of InfiniteBench's files ({', '.join(f'{name}.jsonl' for name in PROMPTS)}), nor "
                f"test_cases.json, nor {mt_bench.FILE}"
            )
        for file in files:
            other = _infinite_bench if file.suffix == ".jsonl" else _longbench_chat
            read = readers.get(file.name, other)(file)
            if read.name in found:
                raise ValueError(f"{file}: {read.name} comes twice; name one of its files")
            found[read.name] = read
    return list(found.values())


def _infinite_bench(file: Path) -> Published:
    if file.stem not in PROMPTS:
        raise ValueError(
            f"{file}: expected one of InfiniteBench's names: {', '.join(PROMPTS)}, or MT-Bench's {mt_bench.FILE}"
        )
    records = []
    for record, where in read_lines(file):
        check_record(record, {"context": str, "input": str, "answer": (str, list, int, float)}, where)
        try:
            _prompt(file.stem, record)
            references(file.stem, record)
        except (ValueError, IndexError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
        records.append(record)
    return Published(file.stem, tuple(records))


def _longbench_chat(file: Path) -> Published:
    records = loads(read_text(file), str(file))
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file}: expected LongBench-Chat's list of idx, prompt, query and answer, or a .jsonl file")
    for number, record in enumerate(records):
        check_record(record, {"prompt": str, "query": str, "answer": str}, f"{file}, entry {number}")
    beside, shots = file.with_name("few_shots.json"), ()
    if beside.is_file():
        rated = loads(read_text(beside), str(beside))
        try:
            numbers = [int(record.get("idx", i)) - 1 for i, record in enumerate(records, 1)]
            shots = tuple(tuple((str(shot["answer"]), str(shot["score"])) for shot in rated[i]) for i in numbers)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{beside}: expected a list of answer and score for every idx of {file.name}") from error
    return Published(CHAT, tuple(records), shots)


# -- prompts -----------------------------------------------------------------------------------------------------------


def _prompt(name: str, record: dict) -> tuple[str, str, int]:
    """The user's message, how the answer begins, and its tokens."""
    if name == CHAT:
        return record["prompt"], "", CHAT_TOKENS
    prompt, begin, most = PROMPTS[name]
    values = {"context": record["context"], "input": record["input"]}
    if name in CHOICES:
        values |= dict(zip(LETTERS, map(str, _options(record))))
    if name == "math_find":
        asked = re.search(r"The (.+?) of", record["input"]) or re.search(r"The (\w+ number)", record["input"])
        if asked is None:
            raise ValueError(f"input {record['input']!r}; expected one that asks for 'The ... of' the list")
        values["target"] = f"the {asked[1].lower()}"
    if name == "code_run":
        call = re.search(r"(func_\d+)\(-?\d+\)", record["input"])
        if call is None:
            raise ValueError(f"input {record['input']!r}; expected a call such as func_1(2)")
        values |= {"function": call[1], "call": call[0]}
    return fill(prompt, **values), fill(begin, **values), most


def _options(record: dict) -> list:
    if len(record.get("options") or ()) != len(LETTERS):
        raise ValueError(f"{len(record.get('options') or ())} options; expected {len(LETTERS)}")
    return record["options"]


def references(name: str, record: dict) -> tuple[str, ...]:
    """What answers are scored against. Raises ValueError for an answer that is none of the options."""
    answer = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    answer = tuple(map(str, answer[0] if answer and isinstance(answer[0], list) else answer))  # math_calc has both
    if name in CHOICES and not (len(answer) == 2 and answer[1] in LETTERS):
        options = [str(option) for option in _options(record)]
        if not answer or answer[0] not in options:
            raise ValueError(f"the answer {answer!r} is none of the options {options}")
        return answer[0], LETTERS[options.index(answer[0])]
    if not answer:
        raise ValueError("an empty list of answers")
    return answer


def cut_middle(prompt: str, begin: str, room: int, counter: Counter) -> str:
    """The prompt if it takes at most `room` tokens with its template and the answer's beginning, else its first and last
    parts, alike in tokens. Raises ValueError where the template alone takes more.
    """
    if (over := counter.count(prompt, begin) - room) <= 0:
        return prompt
    encoded = counter.tokenizer(
        prompt, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    spans = encoded["offset_mapping"]
    keep = len(spans) - over
    while keep > 1:
        first, last = keep // 2, keep - keep // 2
        cut = prompt[: spans[first - 1][1]] + prompt[spans[-last][0] :]
        if (over := counter.count(cut, begin) - room) <= 0:  # the seam may join or part tokens
            return cut
        keep -= over
    raise ValueError(f"the chat template and the answer leave no room for the text in {room} tokens; raise --length")


# -- InfiniteBench's scores --------------------------------------------------------------------------------------------


def _words(text: str, marks: str) -> list[str]:
    return text.translate(str.maketrans(dict.fromkeys(marks, " "))).split()


def _first_number(references: tuple[str, ...], text: str) -> float:
    found = re.search(r"[0-9]+", text)
    return float(found is not None and found[0] == references[0])


def _word(references: tuple[str, ...], text: str) -> float:
    return float(references[0] in _words(text, "\n:\"'.,?!{}"))


def _name(references: tuple[str, ...], text: str) -> float:
    text = text.strip().upper()
    return float(any(reference.upper() in text for reference in references))


def _last_integer(references: tuple[str, ...], text: str) -> float:
    words = _words(text, "\n.`'\":")
    try:
        return float(bool(words) and int(words[-1]) == int(references[0]))
    except ValueError:
        return 0.0


def _found_number(references: tuple[str, ...], text: str) -> float:
    found = re.search(r"\d+\.\d+|\d+", text)
    kind = int if re.fullmatch(r"-?\d+", references[0]) else float
    try:
        return float(found is not None and kind(found[0]) == kind(references[0]))
    except ValueError:  # a fraction where an integer is asked for, or thousands of digits
        return 0.0


def _first_values(references: tuple[str, ...], text: str) -> float:
    """The share of the values that are right before the first wrong one."""
    came, right = re.findall(r"[0-9]+", text), 0
    for expected, value in zip(references, came):
        if value.lstrip("0") != expected.lstrip("0"):  # as texts: a model that repeats itself writes very long numbers
            break
        right += 1
    return right / len(references)


def _lone_letter(text: str, letters: str) -> str | None:
    """The last of the letters that stand alone in the first line that has one; None without any."""
    found = (re.findall(rf"\b[{letters}]\b", line) for line in text.split("\n"))
    return next((line[-1] for line in found if line), None)


def _after(text: str, beginnings: tuple[str, ...]) -> str | None:
    """What follows the first of these words that the text has, less one character; None without any."""
    for begin in beginnings:
        if begin in text:
            return text.partition(begin)[2][1:]
    return None


def _debug_option(references: tuple[str, ...], text: str) -> float:
    function, letter = references
    text = text.strip()
    if _lone_letter(text, "A-J") == letter:
        return 1.0
    text = re.sub(" +", " ", re.sub(r"[\n`'\"*-]|[Oo]ption", " ", text))
    told = _after(text, ("answer is:", "is:", "answer:"))
    return float(text.startswith((letter, function)) or (told or "").startswith((letter, function)))


def _book_option(references: tuple[str, ...], text: str) -> float:
    text = text.strip()
    if _lone_letter(text, LETTERS) in references:
        return 1.0
    if text[:1] and text[0] in LETTERS:  # an option's own first letter counts as one too
        return float(text[0] in references)
    if text in references:
        return 1.0
    text = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", text))
    told = _after(text, ("answer is:", "answer:", "answer is", "option is"))
    if told is not None:
        return float(told.startswith(references))
    first = next((word for word in text.split() if word in LETTERS), None)
    return float(first in references)


def _f1(came: Sequence[str], expected: Sequence[str]) -> float:
    same = sum((Multiset(came) & Multiset(expected)).values())
    return 2 * same / (len(came) + len(expected)) if same else 0.0


def _english(text: str) -> list[str]:
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _chinese(text: str) -> str:
    """The characters that are neither space nor punctuation."""
    return "".join(char for char in MARKS.sub("", text.lower()) if char not in string.punctuation)


def _english_f1(references: tuple[str, ...], text: str) -> float:
    return max(_f1(_english(text), _english(reference)) for reference in references)


def _chinese_f1(references: tuple[str, ...], text: str) -> float:
    return max(_f1(_chinese(text), _chinese(reference)) for reference in references)


def rouge_l_sum(reference: str, text: str) -> float:
    """ROUGE-Lsum's F: for every sentence (line) of the reference the words it has in a common subsequence with any
    sentence of the text, each word counted as often as both texts have it (Lin 2004, union of subsequences).
    """
    expected, came = (
        [words for line in part.split("\n") if (words := re.findall(r"[a-z0-9]+", line.lower()))]
        for part in (reference, text)
    )
    left = [Multiset(word for line in part for word in line) for part in (expected, came)]
    total = [left[0].total(), left[1].total()]
    hits = 0
    for line in expected:
        common = sorted({i for other in came for i in _common(line, other)})
        for word in (line[i] for i in common):
            if left[0][word] > 0 and left[1][word] > 0:
                hits += 1
                left[0][word] -= 1
                left[1][word] -= 1
    return 2 * hits / sum(total) if hits else 0.0


def _common(first: list[str], second: list[str]) -> list[int]:
    """Places in `first` of a longest common subsequence."""
    rows = [[0] * (len(second) + 1)]
    for word in first:
        above, row = rows[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
    places, i, j = [], len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            places.append(i - 1)
            i, j = i - 1, j - 1
        elif rows[i][j - 1] > rows[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places[::-1]


METRICS |= {
    "infinitebench/passkey": _first_number,
    "infinitebench/number_string": _first_number,
    "infinitebench/kv_retrieval": _word,
    "infinitebench/longbook_sum_eng": lambda references, text: max(rouge_l_sum(each, text) for each in references),
    "infinitebench/longbook_choice_eng": _book_option,
    "infinitebench/longbook_qa_eng": _english_f1,
    "infinitebench/longbook_qa_chn": _chinese_f1,
    "infinitebench/longdialogue_qa_eng": _name,
    "infinitebench/math_find": _found_number,
    "infinitebench/math_calc": _first_values,
    "infinitebench/code_run": _last_integer,
    "infinitebench/code_debug": _debug_option,
}

# -- LongBench-Chat's judge --------------------------------------------------------------------------------------------

JUDGE = """[Instructions]
You are asked to evaluate the quality of an AI assistant's answer to a user's question, as an impartial judge. Weigh \
correctness most, then helpfulness, accuracy and relevance:
1. Read the assistant's answer and compare it with the reference answer.
2. Find all errors in the assistant's answer and consider how much each affects the answer to the question.
3. Consider how well the answer gives the user what was asked for.
4. Check that whatever else the answer says is right and belongs to the question; deduct points where it does not.

Give one whole rating from 1 to 10 by these principles, strictly in this form: "[[rating]]", for example "[[5]]".

[Question]
{question}

[Reference answer begins]
{reference}
[Reference answer ends]

{rated}Rate the following answer by the principles above:

[Assistant's answer begins]
{answer}
[Assistant's answer ends]

Rating: """
RATED = "[Assistant's answer begins]\n{answer}\n[Assistant's answer ends]\n\nRating: [[{rating}]]\n\n"


def judge_prompt(published: Published, number: int, answer: str) -> str:
    """What the judge is asked about the answer to a record of LongBench-Chat."""
    shots = published.few_shots[number] if published.few_shots else ()
    rated = "".join(fill(RATED, answer=text, rating=rating) for text, rating in shots)
    if rated:
        rated = f"Below are several assistants' answers and their ratings:\n\n{rated}"
    record = published.records[number]
    return fill(JUDGE, question=record["query"], reference=record["answer"], rated=rated, answer=answer)
