"""Where texts come from: one small interface, three engines.

    Request (chat message, sampling)  --Engine.generate--> Completion (text, token ids, log-probs)
    token ids                         --Engine.score-----> log-prob of every token but the first, given those before it

Engines are asynchronous, so that a server or vLLM batches whatever is under way by itself; `batch` takes a list. Chat
messages are rendered with the model's own template, by the server or, for the other two, here; token ids go in as they are.

    server        any OpenAI-compatible server, one or many endpoints
    vllm          vLLM in this process
    transformers  for small models and machines without a server

Not covered: pictures, tools.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..pretrained import render_chat

NAMES = ("server", "vllm", "transformers")


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
    are, instead of a message in the chat template. earlier: the messages before this one, (role, content).
    """

    content: str
    sampling: Sampling
    group: str = ""
    logprobs: bool = False
    prefill: str = ""
    prompt_ids: tuple[int, ...] | None = None
    earlier: tuple[tuple[str, str], ...] = ()

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
    """finish is "stop" where the model ended the text itself, "length" where it was cut off."""

    text: str
    finish: str
    prompt_tokens: int
    tokens: int
    cached_tokens: int = 0  # of the prompt, where the engine tells: read from its prefix cache
    token_ids: tuple[int, ...] | None = None  # None where a server keeps them to itself
    logprobs: tuple[float, ...] | None = None  # one per token, where asked for


class EngineStopped(ConnectionError):
    """The engine is gone, or refuses everything: nothing can be generated, what there is has been kept."""


class RequestFailed(Exception):
    """One request got no answer while the engine goes on answering others. `reason` is what is counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class Engine:
    """What all engines offer. `concurrency` is how many requests are worth having under way at once."""

    concurrency = 1

    async def start(self) -> None:
        """Load or reach the model. Raises EngineStopped (a ConnectionError) or ValueError where that cannot be."""

    async def generate(self, request: Request) -> Completion:
        """Raises RequestFailed for this request alone, EngineStopped if no other would fare better."""
        raise NotImplementedError

    async def score(self, token_ids: Sequence[int]) -> np.ndarray:
        """(T - 1,) float64 log-probs of tokens 1 .. T - 1. Raises as `generate`."""
        raise NotImplementedError

    async def batch(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in their order."""
        return list(await asyncio.gather(*(self.generate(request) for request in requests)))

    async def close(self) -> None:
        """Stop what is under way and let go of the model."""


def render(tokenizer, request: Request, template_kwargs: dict) -> list[int]:
    """The token ids of a request in the model's chat template, up to where its answer begins or goes on."""
    if request.prompt_ids is not None:
        return list(request.prompt_ids)
    text = render_chat(tokenizer, request.messages, True, **template_kwargs)
    return tokenizer(text + request.prefill, add_special_tokens=False, verbose=False)["input_ids"]
