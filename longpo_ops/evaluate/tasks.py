"""RULER's 13 tasks in 4 categories, and the samples of any of them for any tokenizer and length.

    retrieval     niah_single_1..3, niah_multikey_1..3, niah_multivalue, niah_multiquery   `needles`
    tracing       vt                                                                      `tracing`
    aggregation   cwe, fwe                                                                `words`
    answering     qa_1, qa_2                                                              `questions`

Definitions are those of https://github.com/NVIDIA/RULER (arXiv 2404.06654): its prompts, counts and limits. Memory: one
sample's text and tokens at a time beside the samples, which hold their texts (4 bytes or so per token).
"""

from __future__ import annotations

from functools import cache

from .needles import RULER as NEEDLES
from .needles import NeedleTask
from .questions import QuestionAnswering
from .samples import SPARE, Counter, Draft, Sample, Task, fit
from .sources import Texts
from .tracing import VariableTracking
from .words import CommonWords, FrequentWords

QUESTIONS = (QuestionAnswering("qa_1", "squad"), QuestionAnswering("qa_2", "hotpotqa"))
TASKS: dict[str, Task] = {
    task.name: task for task in (*NEEDLES, VariableTracking(), CommonWords(), FrequentWords(), *QUESTIONS)
}
LOADED: dict[str, Task] = {}  # what own.load_tasks has read, by name
CATEGORIES = {
    "retrieval": tuple(task.name for task in NEEDLES),
    "tracing": ("vt",),
    "aggregation": ("cwe", "fwe"),
    "answering": ("qa_1", "qa_2"),
}


@cache
def default_texts() -> Texts:
    """Python's documentation, read once."""
    return Texts()


def find_task(name: str) -> Task:
    """One of RULER's tasks, or of those that own.load_tasks has read. Raises ValueError for another name."""
    if name in TASKS:
        return TASKS[name]
    if name in LOADED:
        return LOADED[name]
    own = f" and your own {', '.join(LOADED)}" if LOADED else "; your own needle task is read from its YAML file first"
    raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}{own}")


def comparable(name: str, texts: Texts | None = None) -> bool:
    """Whether scores can be held against published ones of RULER: not where its essays are replaced by local text, nor
    its question files by local questions, nor for a user's own task. Raises ValueError for an unknown task.
    """
    task = find_task(name)
    if isinstance(task, NeedleTask):
        return name in TASKS and task.haystack != "essay"
    return not isinstance(task, QuestionAnswering) or task.source in (texts or default_texts()).published


def make_samples(
    task: str,
    length: int,
    count: int,
    tokenizer,
    *,
    seed: int = 0,
    texts: Texts | None = None,
    template_kwargs: dict | None = None,
) -> list[Sample]:
    """`count` samples whose prompt, chat template, prefill and answer take at most `length` tokens, and nearly so many.

    Sample i depends on task, length, i, seed, tokenizer and texts, and not on `count`. At another length sample i asks
    the same question and has the same references: what is hidden is the same, where it lies and what is around it are
    not. Raises ValueError for an unknown task, a length too short for its fixed part (naming the least), a tokenizer
    without a chat template and texts that cannot be used.
    """
    found, counter, texts = find_task(task), Counter(tokenizer, template_kwargs or {}), texts or default_texts()
    for name, number in (("length", length), ("count", count)):
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} is {number!r}; expected a whole number of at least 1")
    if isinstance(found, VariableTracking):
        found = found.filled(tokenizer)
    samples, guess = [], None
    for number in range(count):
        units, draft = _fitted(found, length, number, seed, counter, texts, guess)
        guess = guess or units  # sample 0 shows the others where to look first
        samples.append(
            Sample(
                id=f"{task}/{length}/{number}",
                task=task,
                length=length,
                prompt=draft.prompt,
                prefill=draft.prefill,
                references=draft.references,
                max_tokens=found.max_tokens,
                metric=found.metric,
                depth=draft.depth,
            )
        )
    return samples


def _fitted(
    task: Task, length: int, number: int, seed: int, counter: Counter, texts: Texts, guess: int | None
) -> tuple[int, Draft]:
    """How many units a sample takes, and the sample."""
    drafts: dict[int, Draft] = {}

    def count(units: int) -> int:
        drafts[units] = draft = task.draft(f"{seed}|{task.name}|{number}", number, length, units, texts)
        return counter.count(draft.prompt, draft.prefill)

    least, answer = task.least(number, length, texts), task.max_tokens + SPARE
    units = fit(count, least, length - answer, guess)
    if units is None:
        raise ValueError(
            f"{task.name}: {length} tokens are too few; sample {number} takes at least {count(least) + answer} with "
            f"this tokenizer, {task.max_tokens} of them for the answer"
        )
    return units, drafts[units]
