"""Another model, behind a server, rates answers from 1 to 10: what it says is in the journal, as every answer is.

    (name, prompt) --judge, greedy--> text --rating--> 0.1 to 1, or None where it gives no rating
                   as often as `tries`, until a rating can be read

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


async def ratings(
    run, journal: Shard, prompts: Sequence[tuple[str, str] | None], tries: int = 1
) -> tuple[list[float | None], int, int]:
    """-> the ratings that the judge of an EvaluateRun gives, in the order of its (name, prompt), None for no prompt, no judge,
    no answer or no rating; how many of them were cut off inside its reasoning; and how many prompts were asked again.

    tries: how often a prompt is asked at most, until a rating can be read; a request that fails is not asked again, as the
    engine has done so (its patience). Raises EngineStopped for a judge that is gone.
    """
    if run.judge is None:
        return [None] * len(prompts), 0, 0
    engine = judge_engine(run)
    try:
        await engine.start()
        fields = changed(run.judge_options or {})  # another rating comes of them
        who = f"judge {engine.model}" + (f" {json.dumps(fields)}" if fields else "")
        judge = Answers(engine, journal, who=who, more=run.reasoning_tokens)

        unheard, again = set(), set()

        async def rate(asked: tuple[str, str] | None) -> float | None:
            name, prompt = asked or ("", "")
            for number in range(tries if asked else 0):
                told = f"{name}/{number + 1}" if number else name
                found = await judge.generate(told, Request(prompt, Sampling(JUDGE_TOKENS)))
                again.update({name} if number else ())
                if found is None and told not in judge.cut:  # the request failed
                    return None
                if found is not None and (value := rating(found["text"])) is not None:
                    return value
                unheard.update({name} if number + 1 == tries and found is None else ())
            return None

        return await judge.each(prompts, rate), len(unheard), len(again)
    finally:
        await engine.close()
