"""Tasks of lm-evaluation-harness, with one of our engines as its model. Imported only where `lm_eval` is installed.

    loglikelihood          (context, continuation)  -> sum of log p(continuation), and whether greedy decoding gives it
    loglikelihood_rolling  (text,)                  -> sum of log p over windows that do not overlap
    generate_until         (context, until, ..)     -> the text up to the first of `until`

Prompts are the harness's own: token ids that go to the engine as they are, without the chat template, as its numbers
are usually given. Contexts that are too long lose their beginning, as with the harness's own models, and are counted.
The harness works in a thread of its own and asks the event loop that the engine lives in. Every answer is in the
journal, so a killed run goes on. Cost: one scored sequence per continuation, and one short text per context of which a
continuation may be the greedy one.

A task is asked with the shots it comes with or with those that are given for it (shots.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Coroutine, Sequence
from functools import cache
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..engines import Request, Sampling
from .answers import Answers
from .shots import HarnessTask

MAIN = ("acc", "exact_match", "f1", "em")  # which of a task's metrics is its one number, else its first
TEXT = 256  # tokens of a text where the task sets no limit, as the harness has it


class EngineLM(TemplateLM):
    """The harness's model. length: tokens that fit, prompt and answer. tell(tokens) follows every request.

    Raises ValueError for a tokenizer with neither a beginning nor an end of text.
    """

    def __init__(self, answers: Answers, tokenizer, length: int, tell: Callable[[int], None]):
        super().__init__()
        self.answers, self.tokenizer, self.max_length, self.tell = answers, tokenizer, length, tell
        self.loop = asyncio.get_running_loop()
        self.failed = self.cut = 0
        if self.prefix_token_id is None:
            raise ValueError(
                "the tokenizer has neither a bos_token nor an eos_token, which the harness begins texts with"
            )

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if add_special_tokens is None:  # as the model was trained, but never a second beginning of text
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[tuple], **kwargs) -> list[tuple[float, bool]]:
        pairs = [(self._fitting(context, len(told)), told) for _, context, told in requests]
        longest: dict[tuple[int, ...], int] = {}
        for context, told in pairs:
            longest[tuple(context)] = max(len(told), longest.get(tuple(context), 0))

        async def score(pair: tuple[list[int], list[int]]) -> tuple[float, bool]:
            context, told = pair
            found = await self._score(context, told)
            self.tell(len(context) + len(told))
            if found is None:
                return -math.inf, False
            total, least = found
            if least > math.log(0.5):  # every token has more than half
                return total, True
            if least < -math.log(len(self.tokenizer)):  # less than an equal share: another one has more
                return total, False
            return total, await self._is_greedy(context, told, longest[tuple(context)])

        return self._ask(self.answers.each(pairs, score))

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        async def score(request) -> float:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            sums = [await self._score(*make_disjoint_window(window)) for window in windows]
            self.tell(len(ids))
            return -math.inf if None in sums else math.fsum(total for total, _ in sums)

        return self._ask(self.answers.each(requests, score))

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        async def generate(request) -> str:
            context, wanted = request.args
            limits = ("max_gen_toks", "max_new_tokens", "max_tokens")
            most = next((int(wanted[name]) for name in limits if wanted.get(name)), TEXT)
            drawn = float(wanted.get("temperature") or 0.0) if wanted.get("do_sample") else 0.0
            ids = self._fitting(self.tok_encode(context), most)
            sampling = Sampling(most, drawn, float(wanted.get("top_p") or 1.0), seed=0 if drawn else None)
            answer = await self._generate(ids, sampling)
            self.tell(len(ids))
            until = wanted.get("until") or []
            text = "" if answer is None else answer["text"]
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            return text

        return self._ask(self.answers.each(requests, generate))

    # -- one request ---------------------------------------------------------------------------------------------------

    def _ask(self, work: Coroutine) -> list:
        """What a coroutine gives on the engine's event loop; called from the harness's thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def _fitting(self, context: Sequence[int], answer: int) -> list[int]:
        """The end of a context that leaves room for so many tokens."""
        room = max(1, self.max_length - answer)
        self.cut += len(context) > room
        return list(context[-room:])

    async def _score(self, context: Sequence[int], told: Sequence[int]) -> tuple[float, float] | None:
        if not told:
            return 0.0, 0.0
        ids = [*context, *told]
        found = await self.answers.score(f"harness/{_digest(ids)}", ids, first=len(context))
        self.failed += found is None
        return found

    async def _generate(self, ids: Sequence[int], sampling: Sampling) -> dict | None:
        request = Request("", sampling, prompt_ids=tuple(ids))
        found = await self.answers.generate(f"harness/{_digest(ids)}/text", request)
        self.failed += found is None
        return found

    async def _is_greedy(self, context: list[int], told: list[int], most: int) -> bool:
        answer = await self._generate(context, Sampling(most))
        if answer is None:
            return False
        if "ids" in answer:
            return answer["ids"][: len(told)] == told
        return answer["text"].startswith(self.tokenizer.decode(told))


known_tasks = cache(TaskManager)  # it reads thousands of files, which takes seconds


def check_tasks(tasks: Sequence[HarnessTask]) -> TaskManager:
    """Raises ValueError for a name that is neither one of the harness's tasks or groups nor a YAML file of one."""
    manager = known_tasks()
    for each in tasks:
        if each.is_file:
            each.named()
    if unknown := [each.task for each in tasks if each.task not in manager.task_index and not each.is_file]:
        raise ValueError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}; see `lm-eval ls tasks`, or name a YAML file; shots "
            "and a metric are put behind it: mmlu:5:acc"
        )
    return manager


async def run_tasks(
    tasks: Sequence[HarnessTask], manager: TaskManager, model: EngineLM
) -> tuple[dict[str, float], dict[str, dict], dict[str, dict], list[dict[str, Any]]]:
    """By the name of a task or group with what was asked of it -> its one number; all that the harness found (its
    `results`), None for what is not finite, as after a failed request; of the one number its shots, metric, standard error
    (None without), questions, and whether more is better (None where the task does not say); and a line of values.jsonl per
    question of a number that is the mean over its questions.

    Raises ValueError for data that cannot be loaded and for shots and metrics that a task does not have, before anything
    is asked.
    """

    def work() -> list[dict[str, Any]]:
        loaded = [_load(each, manager) for each in tasks]  # all of them, before the first is asked
        given = dict(task_manager=manager, bootstrap_iters=1000)
        return [simple_evaluate(model, tasks=each, **given) for each in loaded]

    numbers, details, settings, kept = {}, {}, {}, []
    for each, found in zip(tasks, await asyncio.to_thread(work)):
        for name, values in found["results"].items():
            label, (metric, filtered, number) = each.label(name), _main(values, each.metric)
            details[label] = {key: _finite(value) for key, value in values.items() if _is_number(value)}
            if number is not None:
                numbers[label] = number
                lines = _lines(name, found, metric, filtered)
                error = values.get(f"{metric}_stderr,{filtered}")
                error = float(error) if _is_number(error) and math.isfinite(error) else None
                settings[label] = {
                    "shots": _shots(name, found),
                    "metric": metric,
                    "stderr": error,
                    "questions": len(lines),
                    "more_is_better": found.get("higher_is_better", {}).get(name, {}).get(metric),
                }
                mean = math.fsum(line["value"] for line in lines) / max(1, len(lines))
                if lines and math.isclose(mean, number, rel_tol=1e-9, abs_tol=1e-12):
                    kept += [{"of": f"harness/{label}"} | line for line in lines]
    return numbers, details, settings, kept


def _lines(name: str, found: dict, metric: str, filtered: str) -> list[dict[str, Any]]:
    """id, asked and value of every question of a task, or of all tasks of a group; value 0 where it is no number."""
    parts = found.get("group_subtasks", {}).get(name)
    if parts:
        return [line for part in parts for line in _lines(part, found, metric, filtered)]
    samples = [each for each in found.get("samples", {}).get(name, ()) if each.get("filter", filtered) == filtered]
    return [
        {"id": f"{name}/{each['doc_id']}", "asked": str(each.get("doc_hash", ""))[:16]}
        | {"value": float(each[metric]) if _is_number(each.get(metric)) else 0.0}
        for each in samples
    ]


def _load(asked: HarnessTask, manager: TaskManager) -> list:
    """The harness's tasks and groups, with their shots."""
    try:
        loaded = manager.load([asked.task])
    except (FileNotFoundError, ConnectionError, KeyError) as error:
        raise ValueError(
            f"lm-evaluation-harness cannot load {asked.task} ({error}); its data sets come from the network or from local "
            "files that the task's YAML names"
        ) from error
    tasks, groups = loaded["tasks"], loaded.get("groups", {})
    inner = {name for names in loaded.get("group_map", {}).values() for name in names}
    wanted = [each for name, each in {**tasks, **groups}.items() if name not in inner]
    for name, task in tasks.items():
        if asked.shots is not None:
            _check_shots(name, task, asked.shots)
            task.set_config(key="num_fewshot", value=asked.shots)
        _check_metric(name, asked.metric, list(task.aggregation()))
    for each in wanted:
        if isinstance(each, Group):
            _check_metric(each.name, asked.metric, [one.metric for one in each.aggregate_metric_list or ()])
    return wanted


def _check_shots(name: str, task, shots: int) -> None:
    """Raises ValueError for a task that cannot show so many examples besides the one that is asked."""
    if shots and task.get_config("num_fewshot") == 0:
        raise ValueError(f"{name}: {shots} shots; the task itself sets 0, which the harness keeps to: leave them out")
    source = getattr(task, "fewshot_cfg", None)
    if not shots or source is None:
        return
    if not (source.split or source.samples or task.has_training_docs() or task.has_validation_docs()):
        raise ValueError(
            f"{name}: {shots} shots; it has no examples but those that are asked: give it a fewshot_split, or no shots"
        )
    available = len(task.fewshot_docs()) - (source.split == task.get_config("test_split"))
    if shots > available:
        raise ValueError(f"{name}: {shots} shots; it has {available} examples to show")


def _check_metric(name: str, metric: str | None, known: list[str]) -> None:
    if metric is not None and metric not in known:
        raise ValueError(f"{name} has no metric {metric}; expected one of {', '.join(map(str, known))}")


def _shots(name: str, found: dict) -> int | None:
    """Of a task, or of all tasks of a group; None where they differ."""
    shots, parts = found["n-shot"], found.get("group_subtasks", {})
    if not parts.get(name):
        return shots.get(name)
    inside = {_shots(part, found) for part in parts[name]}
    return inside.pop() if len(inside) == 1 else None


def _main(found: dict, wanted: str | None) -> tuple[str, str, float | None]:
    """Which metric and filter the one number of a task's results is, and it; results are named "metric,filter"."""
    metrics = {name: value for name, value in found.items() if "," in name and "_stderr," not in name}
    metrics = {name: float(value) for name, value in metrics.items() if _is_number(value) and math.isfinite(value)}
    for metric in MAIN if wanted is None else (wanted,):
        for name, value in metrics.items():
            if name.split(",")[0] == metric:
                return *name.split(",", 1), value
    if wanted is not None or not metrics:
        return "", "", None
    name, value = next(iter(metrics.items()))
    return *name.split(",", 1), value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]
