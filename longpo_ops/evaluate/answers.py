"""An engine that is asked everything once: what it said is in a journal, under the digest of what it was asked.

    (name, request)   --Answers.generate--> {"text", "finish"}, or None where the request failed, or the model did not come
                                            out of its reasoning
    (name, token ids) --Answers.score-----> sum and least of the log-probs of ids[first:], or None

A run that is killed loses the requests under way and no others; one with more lengths, tasks or samples goes on from
there. What failed is not in the journal: the next run asks again. Memory: the answers. Retries and pauses are the
engine's.

Tests: tests/evaluate/test_run.py, tests/evaluate/test_answers.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..engines import Engine, EngineStopped, Request, RequestFailed
from ..engines.concurrency import side_by_side
from ..engines.reasoning import part
from ..pretrained import is_out_of_memory
from ..runs.journal import Shard


class Answers:
    """engine: started. who: told apart in the journal, where several engines answer. `reading` is how many tokens are
    read at present, which failures tell. `last_failure` is what the last failed request said. opens: the mark of reasoning
    with which what a request renders to ends, or "". more: tokens that a model may write beside those of an answer, as
    reasoning. tokenizer: then cuts the answers themselves to their limits; None leaves them. `reasoning` is what models wrote
    before their answers, by name; `cut` are the names of those that came to no answer.

    All methods raise EngineStopped where the engine is gone and ValueError where memory does not suffice.
    """

    def __init__(
        self,
        engine: Engine,
        journal: Shard,
        who: str = "",
        opens: Callable[[Request], str] = lambda request: "",
        more: int = 0,
        tokenizer=None,
    ):
        self.engine, self.journal, self.who, self.opens = engine, journal, who, opens
        self.more, self.tokenizer = more, tokenizer
        self.reading, self.last_failure = 0, ""
        self.reasoning: dict[str, str] = {}
        self.cut: set[str] = set()

    async def generate(self, name: str, request: Request) -> dict[str, Any] | None:
        """{"text", "finish"}, the text without reasoning; for prompts of token ids as it came, and also "ids", where the engine
        tells them."""
        raw, limit = request.prompt_ids is not None, request.sampling.max_tokens
        sampling = request.sampling if raw else replace(request.sampling, max_tokens=limit + self.more)
        request = replace(request, sampling=sampling)
        asked = [request.content, request.prefill, request.prompt_ids]
        asked += [sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed]
        asked += [request.earlier] if request.earlier else []

        async def ask() -> dict:
            answer = await self.engine.generate(request)
            texts = {"text": answer.text} | ({"reasoning": answer.reasoning} if answer.reasoning else {})
            value = {name: each.encode("utf-8", "replace").decode() for name, each in texts.items()}
            value |= {"finish": answer.finish}
            return value | ({"ids": list(answer.token_ids)} if raw and answer.token_ids is not None else {})

        found = await self._once(name, asked, ask)
        if found is None or raw:
            return found
        opened, apart = self.opens(request), found.get("reasoning", "")
        parts = part(found["text"], opened, apart, found["finish"], self.engine.whole)
        self.reasoning |= {name: parts.reasoning} if parts.reasoning else {}
        self.cut |= {name} if parts.answer is None else set()
        return None if parts.answer is None else found | self._within(limit, parts.answer, found["finish"])

    def _within(self, limit: int, text: str, finish: str) -> dict[str, str]:
        """An answer as if it had had no more than its own `limit` of tokens."""
        if self.more and self.tokenizer is not None:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) > limit:
                text, finish = self.tokenizer.decode(ids[:limit], clean_up_tokenization_spaces=False), "length"
        return {"text": text, "finish": finish}

    async def score(self, name: str, ids: Sequence[int], first: int = 1) -> tuple[float, float] | None:
        """(sum, least) of the log-probs of ids[first:], which must not be empty; first is at least 1."""

        async def ask() -> list[float]:
            scores = (await self.engine.score(ids))[first - 1 :]
            return [math.fsum(scores), float(scores.min())]

        value = await self._once(name, [np.asarray(ids).tolist(), first], ask)
        return None if value is None else tuple(value)

    async def each(self, items: Iterable, work: Callable[[Any], Awaitable]) -> list:
        """What `work` makes of every item, in their order; as many side by side as the engine is worth."""
        found, numbered = {}, enumerate(items)

        async def worker() -> None:
            for number, item in numbered:
                found[number] = await work(item)

        await side_by_side(*(worker() for _ in range(self.engine.concurrency)))
        return [found[number] for number in sorted(found)]

    async def _once(self, name: str, asked: list, ask: Callable[[], Awaitable]) -> Any:
        key = hashlib.sha256(json.dumps([self.who, *asked]).encode()).hexdigest()[:32]
        value = self.journal.result(name, key)
        if value is None:
            try:
                value = await ask()
            except RequestFailed as failure:
                self.last_failure = str(failure)
                return None
            except EngineStopped as error:
                where = f"; texts of {self.reading} tokens were read: if memory ran out, leave that length out"
                raise EngineStopped(f"{error}{where if self.reading else ''}") from None
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                what = f"to read {self.reading} tokens " if self.reading else ""
                rest = f"the lengths finished before are kept: leave out --length {self.reading}, or " if what else ""
                raise ValueError(
                    f"not enough memory {what}({_first_line(error)}); {rest}use a smaller --dtype, another --engine or a "
                    "larger machine"
                ) from error
            self.journal.record(name, key, value)
        return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
