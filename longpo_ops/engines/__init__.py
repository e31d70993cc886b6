"""Where texts come from: one small interface, three engines.

    Request (chat message, sampling)  --Engine.generate--> Completion (text, token ids, log-probs)
    token ids                         --Engine.score-----> log-prob of every token but the first, given those before it

Engines are asynchronous, so that a server or vLLM batches whatever is under way by itself; `batch` takes a list. Chat
messages are rendered with the model's own template, by the server or, for the other two, here; token ids go in as they are.

A log-prob is a finite number of at most 0, and a finish is "stop" or "length", whoever gives them: what comes otherwise is a
failed request (`as_logps`, `as_finish`), never a number.

    server        any OpenAI-compatible server, one or many endpoints
    vllm          vLLM in this process
    transformers  for small models and machines without a server

Not covered: pictures, tools.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..pretrained import render_chat

NAMES = ("server", "vllm", "transformers")
NO_LOGPS = "no log-probs"  # the reason that is counted
ROUNDING = 1e-3  # how far above 0 a log-prob in few bits may come out
UNKNOWN = -9999.0  # what servers write for minus infinity, as JSON has none
STOP = {
    "stop",
    "eos",
    "eos_token",
    "eos_token_id",
    "end",
    "end_turn",
    "end_of_turn",
    "end_of_text",
    "endoftext",
    "stopped",
    "stop_sequence",
    "stop_string",
    "stop_token",
    "complete",
    "completed",
}
LENGTH = {"length", "length_capped", "max_length", "max_tokens", "max_new_tokens", "max_output_tokens", "model_length"}
LENGTH |= {"max_completion_tokens", "token_limit", "model_context_window_exceeded"}
LENGTH |= {"repetition"}  # vLLM cuts off a text that goes round in circles
UNTOLD = {"", "none", "null"}


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. The seed makes a drawn text repeatable where the engine can."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """A user message to be answered. Requests of one group read the same document and share its key-value cache.

    prefill: how the answer begins; the completion is what follows it. prompt_ids: token ids to go on from as they
    are, instead of a message in the chat template. earlier: the messages before this one, (role, content). schema: the JSON
    schema of the answer, for an engine that is `structured`.
    """

    content: str
    sampling: Sampling
    group: str = ""
    logprobs: bool = False
    prefill: str = ""
    prompt_ids: tuple[int, ...] | None = None
    earlier: tuple[tuple[str, str], ...] = ()
    schema: dict | None = None

    def __post_init__(self):
        if self.earlier and self.prompt_ids is not None:
            raise ValueError("earlier messages beside prompt_ids; put their tokens before the others")
        if self.prefill and self.prompt_ids is not None:
            raise ValueError("prefill beside prompt_ids; put the tokens of the begun answer behind the others")

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in (*self.earlier, ("user", self.content))]


@dataclass(frozen=True)
class Completion:
    """finish is "stop" where the model ended the text itself, "length" where it was cut off. reasoning: what a thinking
    model wrote before its text, where the engine tells the two apart."""

    text: str
    finish: str
    prompt_tokens: int
    tokens: int
    cached_tokens: int = 0  # of the prompt, where the engine tells: read from its prefix cache
    token_ids: tuple[int, ...] | None = None  # None where a server keeps them to itself
    logprobs: tuple[float, ...] | None = None  # one per token, where asked for
    reasoning: str = ""


class EngineStopped(ConnectionError):
    """The engine is gone, or refuses everything: nothing can be generated, what there is has been kept."""


class RequestFailed(Exception):
    """One request got no answer while the engine goes on answering others. `reason` is what is counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class NoSchema(RequestFailed):
    """The engine does not hold an answer to a schema: ask without one."""

    def __init__(self, detail: str):
        super().__init__("the engine takes no schema", detail)


class Engine:
    """What all engines offer. `concurrency` is how many requests are worth having under way at once. whole: whether a
    completion holds all that the model wrote; a server may leave its reasoning out. structured: whether it holds an answer to
    the schema of a request, as far as is known. prefills: whether every one of its kind goes on from a `prefill`.

    An engine has `_answer` and `_logps`, both of which raise as `generate`; log-probs are checked here.
    """

    concurrency = 1
    whole = True
    structured = False
    prefills = True

    async def start(self) -> None:
        """Load or reach the model. Raises EngineStopped (a ConnectionError) or ValueError where that cannot be."""

    async def generate(self, request: Request) -> Completion:
        """Raises RequestFailed for this request alone, EngineStopped if no other would fare better, and NoSchema where its
        schema is one too many."""
        if request.schema is not None and not self.structured:
            raise NoSchema("it was not asked")
        answer = await self._answer(request)
        if not request.logprobs:
            return answer
        count = None if answer.token_ids is None else len(answer.token_ids)
        nothing = answer.logprobs is None and not (answer.text or answer.tokens)
        logps = as_logps(() if nothing else answer.logprobs, count)
        return replace(answer, logprobs=tuple(logps.tolist()))

    async def score(self, token_ids: Sequence[int]) -> np.ndarray:
        """(T - 1,) float64 log-probs of tokens 1 .. T - 1, all finite and at most 0. Raises as `generate`."""
        return as_logps(await self._logps(token_ids), len(token_ids) - 1)

    async def _answer(self, request: Request) -> Completion:
        raise NotImplementedError

    async def _logps(self, token_ids: Sequence[int]) -> Sequence[float | None]:
        """(T - 1,), None where there is none."""
        raise NotImplementedError

    async def batch(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in their order."""
        return list(await asyncio.gather(*(self.generate(request) for request in requests)))

    async def close(self) -> None:
        """Stop what is under way and let go of the model."""


def as_logps(values: Sequence[float | None] | None, count: int | None = None) -> np.ndarray:
    """(T,) float64 log-probs out of what an engine gave for `count` tokens; above 0 by rounding alone is 0.

    Raises RequestFailed for another number of them, and for one that is missing, not finite, or positive.
    """
    try:
        logps = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise RequestFailed(NO_LOGPS, "something else came in their place; expected numbers of at most 0") from None
    if logps.ndim != 1 or (count is not None and len(logps) != count):
        came = "none" if logps.ndim != 1 else str(len(logps))
        raise RequestFailed(NO_LOGPS, f"{came} came; expected {count if count is not None else 'one per token'}")
    wrong = np.flatnonzero(~((logps > UNKNOWN) & (logps <= ROUNDING)))
    if len(wrong):
        came = "null" if values[wrong[0]] is None else values[wrong[0]]
        where = f"number {wrong[0] + 1} of {len(logps)} is {came}, {len(wrong)} such in all"
        raise RequestFailed(NO_LOGPS, f"{where}; expected finite numbers of at most 0")
    return np.minimum(logps, 0.0)


def as_finish(reason: str | None, tokens: int = 0, limit: int | None = None) -> str:
    """ "stop" or "length", by whatever name an engine has for it; without any, by the tokens written and their limit.

    Raises RequestFailed for a text that ended otherwise: by a filter of content, in a call of a tool, by an error.
    """
    name = re.sub(r"\W+", "_", str(reason or "").strip().lower())
    name = name.removeprefix("finish_reason_").removeprefix("finishreason_")
    if name in UNTOLD:
        return "length" if limit is not None and tokens >= limit else "stop"
    if name in STOP or name in LENGTH:
        return "stop" if name in STOP else "length"
    raise RequestFailed(f"the answer ended with {name[:40]}", "expected a text that was finished or cut off")


def render(tokenizer, request: Request, template_kwargs: dict) -> list[int]:
    """The token ids of a request in the model's chat template, up to where its answer begins or goes on."""
    if request.prompt_ids is not None:
        return list(request.prompt_ids)
    text = render_chat(tokenizer, request.messages, True, **template_kwargs)
    return tokenizer(text + request.prefill, add_special_tokens=False, verbose=False)["input_ids"]
