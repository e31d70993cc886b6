"""Another model, behind a server, rates answers from 1 to 10: what it says is in the journal, as every answer is.

    (name, prompt) --judge, greedy--> text --rating--> 0.1 to 1, or None where it gives no rating

Tests: tests/evaluate/test_published.py, tests/evaluate/test_mt_bench.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..engines import Request, Sampling
from ..engines.fields import changed
from ..engines.judging import JUDGE_TOKENS, judge_engine, rating
from ..runs.journal import Shard
from .answers import Answers


async def ratings(run, journal: Shard, prompts: Sequence[tuple[str, str] | None]) -> tuple[list[float | None], int]:
    """The ratings that the judge of an EvaluateRun gives, in the order of its (name, prompt); None for no prompt, no judge,
    no answer or no rating; and how many of its answers were cut off inside its reasoning. Raises EngineStopped for a judge that
    is gone.
    """
    if run.judge is None:
        return [None] * len(prompts), 0
    engine = judge_engine(run)
    try:
        await engine.start()
        fields = changed(run.judge_options or {})  # another rating comes of them
        who = f"judge {engine.model}" + (f" {json.dumps(fields)}" if fields else "")
        judge = Answers(engine, journal, who=who, more=run.reasoning_tokens)

        async def rate(asked: tuple[str, str] | None) -> float | None:
            if asked is None:
                return None
            name, prompt = asked
            found = await judge.generate(name, Request(prompt, Sampling(JUDGE_TOKENS)))
            return None if found is None else rating(found["text"])

        return await judge.each(prompts, rate), len(judge.cut)
    finally:
        await engine.close()
