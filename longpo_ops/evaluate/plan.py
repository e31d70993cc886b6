"""What an evaluation will ask, read and checked before any engine is started.

Tests: tests/evaluate/test_run.py, tests/evaluate/test_commands.py.
"""

from __future__ import annotations

import importlib.util
from functools import cached_property
from typing import TYPE_CHECKING

from ..engines.reasoning import opens_reasoning
from ..pretrained import read_config
from .mt_bench import MTBench
from .own import load_tasks
from .perplexity import Windows, read_windows
from .published import Published, read_published
from .samples import Counter, Sample
from .sources import Texts
from .tasks import find_task, make_samples

if TYPE_CHECKING:
    from .run import EvaluateRun


class Plan:
    """What a run will ask, read and checked before any engine is started."""

    def __init__(self, run: EvaluateRun):
        self.run = run
        self.tasks = tuple(dict.fromkeys(run.tasks))
        self.lengths = sorted(set(run.lengths))
        self.texts = Texts(tuple(run.texts), run.questions)
        self.tokenizer = run.load_tokenizer()

    @cached_property
    def windows(self) -> dict[int, Windows]:
        """By length."""
        run = self.run
        if not run.perplexity:
            return {}
        lengths = run.perplexity_lengths or run.lengths
        return {each.length: each for each in read_windows(run.perplexity, lengths, run.samples, self.tokenizer)}

    @cached_property
    def published(self) -> list[Published | MTBench]:
        found = read_published(self.run.published)
        if not self.lengths and (cut := [each.name for each in found if not isinstance(each, MTBench)]):
            raise ValueError(f"no lengths for {', '.join(cut)}; expected numbers of tokens, such as --length 4096")
        return found

    @cached_property
    def counter(self) -> Counter:
        return Counter(self.tokenizer, self.run.template_kwargs or {})

    @cached_property
    def opens_reasoning(self) -> str:
        return opens_reasoning(self.tokenizer, self.run.template_kwargs or {})

    @cached_property
    def room(self) -> int:
        """Tokens of the harness's longest prompts and of conversations: those of the run, or what the model reads."""
        return self.run.reads or _positions(self.run)

    @cached_property
    def harness(self):
        """Our module harness, and the harness's tasks. Raises ValueError without the package."""
        try:
            from . import harness
        except ImportError as error:
            raise ValueError(
                f"tasks of lm-evaluation-harness need the package lm_eval ({error}): pip install 'longpo_ops[evaluate]'"
            ) from None
        return harness, harness.check_tasks(self.run.harness_tasks)

    def check(self) -> None:
        """Raises ValueError for whatever cannot be asked."""
        run = self.run
        if run.needles is not None:
            own = load_tasks(run.needles)
            if not set(own) & set(self.tasks):
                raise ValueError(
                    f"needles: none of {', '.join(own)} of {run.needles} is among the tasks; name them, too"
                )
        for task in self.tasks:
            find_task(task)
        if self.tasks and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the heat map needs matplotlib: pip install 'longpo_ops[generate]'")
        if self.tasks or run.published:
            _ = self.counter
        for task in self.tasks:  # the shortest is the one that may not fit
            self.samples(task, self.lengths[0], 1)
        if run.harness_tasks:
            _ = self.harness, self.room
        for each in self.published:
            if isinstance(each, MTBench):
                each.check(self.room, self.counter, run.reasoning_tokens)
            else:
                each.sample(0, run.longest, self.counter)
        _ = self.windows

    def samples(self, task: str, length: int, count: int) -> list[Sample]:
        run = self.run
        kwargs = dict(seed=run.seed, texts=self.texts, template_kwargs=run.template_kwargs)
        return make_samples(task, length, count, self.tokenizer, **kwargs)

    def tokens(self) -> int:
        """That will be read, about; without the harness's, which are known once it has made its requests."""
        asked = sum(self.lengths) * len(self.tasks) * self.run.samples
        scored = sum(length * len(each.ids) for length, each in self.windows.items())
        return asked + scored + self.run.longest * sum(len(each.records) for each in self.published)


def _positions(run: EvaluateRun) -> int:
    """How many tokens the model's config says it reads. Raises ValueError where it does not say."""
    try:
        return int(read_config(run.model, run.trust_remote_code).max_position_embeddings)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{run.model} does not say how many tokens it reads ({str(error).splitlines()[0]}); give a --length"
        ) from error
