"""Any OpenAI-compatible server, one endpoint or many, asynchronous.

A request goes to the endpoint that serves its group already, else to the one with the least to read: requests weigh
what their prompts do, as one whole document takes an engine longer than many chunks. What may pass
(no connection, 429, 5xx, a timeout, an answer that is none) is tried again after a pause of base * 2^failures with
jitter, or as long as Retry-After says; meanwhile the endpoint gets nothing and the others take over. Two rules end
that:

    a request is given up  after `attempts` failures of its own (5xx, timeout, no answer) if others succeeded meanwhile
    the run stops          if for `patience` seconds nothing at all has succeeded

What cannot pass (401, 403, 404, or a refusal before anything was ever answered) stops the run at once. The API key
comes from the environment, goes into one header and into nothing else. Not covered: starting and stopping servers;
streamed answers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import numpy as np

from . import Completion, Engine, EngineStopped, Request, RequestFailed

log = logging.getLogger("longpo_ops.generate")

HOPELESS = {401: "the API key was refused", 403: "access was denied", 404: "no such model or path"}
KEY = "OPENAI_API_KEY"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


@dataclass(eq=False)
class Endpoint:
    """One server: the weight of what is under way there, until when it is left alone, and idle connections to it.

    A client per connection, as a shared pool of httpx looks through all its connections at every request and answer.
    """

    url: str
    under_way: int = 0
    failures: int = 0
    retry_at: float = 0.0
    clients: list[httpx.AsyncClient] = field(default_factory=list)

    def failed(self, after: float | None = None) -> None:
        """Leave it alone for longer and longer; failures of requests sent before the pause count once."""
        now = time.monotonic()
        if now < self.retry_at:
            return
        self.failures += 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self.failures - 1)) * random.uniform(0.75, 1.25)
        self.retry_at = now + (pause if after is None else min(after, 10 * LONGEST_PAUSE))


class _Passing(Exception):
    """A failure that may pass. `own`: the request may be to blame."""

    def __init__(self, detail: str, own: bool, after: float | None = None):
        super().__init__(detail)
        self.own, self.after = own, after


class ServerEngine(Engine):
    """Chat completions for texts, completions with echo for scores.

    endpoints: base URLs such as http://127.0.0.1:8000/v1. model: the name it is served under; None takes the only one
    there is. concurrency: requests under way per endpoint. timeout: seconds until a request counts as failed.
    patience: seconds without any success until the run stops. key_variable: environment variable of the API key.
    template_kwargs: variables of the chat template, for servers that take `chat_template_kwargs`. extra: further
    fields of every request's body.

    Raises ValueError for a URL that holds a key or is none.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        model: str | None = None,
        concurrency: int = 64,
        timeout: float = 1800.0,
        patience: float = 300.0,
        attempts: int = 5,
        key_variable: str = KEY,
        template_kwargs: dict | None = None,
        extra: dict | None = None,
    ):
        if not endpoints:
            raise ValueError("no endpoint came; expected at least one URL such as http://127.0.0.1:8000/v1")
        self.endpoints = [Endpoint(_checked_url(url)) for url in endpoints]
        self.model, self.timeout, self.patience, self.attempts = model, timeout, patience, attempts
        self.concurrency = concurrency * len(self.endpoints)
        self._key = os.environ.get(key_variable, "").strip()
        self._extra = dict(extra or {}) | ({"chat_template_kwargs": template_kwargs} if template_kwargs else {})
        self._homes: dict[str, Endpoint] = {}
        self._answered, self._last_success = 0, 0.0

    async def start(self) -> None:
        """Reach the endpoints. Raises EngineStopped if none answers, and ValueError if the model's name is not
        clear.
        """
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = httpx.Timeout(self.timeout, connect=min(10.0, self.timeout))
        self._options = dict(headers=headers, timeout=timeout, trust_env=False, verify=httpx.create_ssl_context())
        found = await asyncio.gather(*(self._models(endpoint) for endpoint in self.endpoints), return_exceptions=True)
        served: set[str] = set()
        for endpoint, answer in zip(self.endpoints, found):
            if isinstance(answer, EngineStopped):
                raise answer
            if isinstance(answer, BaseException):
                log.warning("%s does not answer yet (%s)", endpoint.url, answer)
                endpoint.failed()
            else:
                served.update(answer)
        if all(isinstance(answer, BaseException) for answer in found):
            urls = ", ".join(endpoint.url for endpoint in self.endpoints)
            raise EngineStopped(
                f"no server answers at {urls} ({found[0]}); start one, say: vllm serve MODEL, and run again"
            )
        if self.model is None:
            if len(served) != 1:
                raise ValueError(f"the servers offer {sorted(served)}; name the model with --served-model")
            (self.model,) = served
        self._last_success = time.monotonic()

    async def close(self) -> None:
        for endpoint in self.endpoints:
            while endpoint.clients:
                await endpoint.clients.pop().aclose()

    async def generate(self, request: Request) -> Completion:
        sampling, raw = request.sampling, request.prompt_ids is not None
        body = {
            "model": self.model,
            **({"prompt": list(request.prompt_ids)} if raw else {"messages": request.messages}),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if request.logprobs:
            body["logprobs"] = 1 if raw else True
        if request.prefill:  # the names that vLLM's server and those like it have for this
            body["messages"].append({"role": "assistant", "content": request.prefill})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return await self._ask("/completions" if raw else "/chat/completions", body, request.group, _completion)

    async def score(self, token_ids: Sequence[int]) -> np.ndarray:
        ids = list(map(int, token_ids))
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
        return await self._ask("/completions", body, "", lambda answer: _scores(answer, len(ids)))

    # -- one request, until it is answered or given up -----------------------------------------------------------------

    async def _ask(self, path: str, body: dict, group: str, read):
        began, failures, weight, body = time.monotonic(), 0, _weight(body), body | self._extra
        while True:
            endpoint = self._pick(group)
            endpoint.under_way += weight
            try:
                if (pause := endpoint.retry_at - time.monotonic()) > 0:
                    await asyncio.sleep(pause)
                result = read(await self._send("POST", endpoint, path, body))
            except _Passing as failure:
                endpoint.failed(failure.after)
                failures += failure.own
                self._give_up(failure, failures, began)
                log.debug("%s: %s; trying again", endpoint.url, failure)
            else:
                endpoint.failures, endpoint.retry_at = 0, 0.0
                self._last_success = time.monotonic()
                self._answered += 1
                return result
            finally:
                endpoint.under_way -= weight

    def _give_up(self, failure: _Passing, failures: int, began: float) -> None:
        """Raise if trying again makes no sense."""
        if failures >= self.attempts and self._last_success > began:
            raise RequestFailed("the engine failed", str(failure))
        silent = time.monotonic() - self._last_success
        if silent > self.patience:
            raise EngineStopped(
                f"no server has answered for {silent:.0f} s, last: {failure}; what was generated is kept: start the "
                "server and run the same command again"
            )

    def _pick(self, group: str) -> Endpoint:
        """The group's endpoint, as its cache holds the document; else, and while that one fails, the least busy one."""
        now = time.monotonic()
        home = self._homes.get(group)
        if home is None or home.retry_at > now:
            home = min(self.endpoints, key=lambda each: (max(0.0, each.retry_at - now), each.under_way))
            if group:
                self._homes[group] = home
        return home

    async def _send(self, method: str, endpoint: Endpoint, path: str, body: dict | None) -> dict:
        client = endpoint.clients.pop() if endpoint.clients else httpx.AsyncClient(**self._options)
        try:
            response = await client.request(method, endpoint.url + path, json=body)
        except httpx.TimeoutException as error:
            connected = not isinstance(error, httpx.ConnectTimeout)
            raise _Passing(f"timeout ({type(error).__name__})", own=connected) from None
        except httpx.TransportError as error:
            raise _Passing(f"no connection ({type(error).__name__})", own=False) from None
        finally:
            endpoint.clients.append(client)
        if response.status_code == 200:
            try:
                return response.json()
            except ValueError:
                raise _Passing("an answer that is no JSON", own=True) from None
        detail = f"{response.status_code}: {self._quote(response.text)}"
        if response.status_code in (400, 422) and body is not None and "continue_final_message" in body:
            detail += (
                "; the answer was begun for it (continue_final_message): where a server cannot go on, do not prefill"
            )
        if response.status_code == 429:
            raise _Passing(detail, own=False, after=_seconds(response.headers.get("retry-after")))
        if response.status_code >= 500 or response.status_code == 408:
            raise _Passing(detail, own=response.status_code != 503, after=_seconds(response.headers.get("retry-after")))
        if response.status_code in HOPELESS:
            raise EngineStopped(f"{endpoint.url}: {HOPELESS[response.status_code]} ({detail})")
        if not self._answered and body is not None:
            raise EngineStopped(f"{endpoint.url} refuses the first request ({detail}); nothing was generated yet")
        raise RequestFailed("the engine refused", detail)

    async def _models(self, endpoint: Endpoint) -> list[str]:
        answer = await self._send("GET", endpoint, "/models", None)
        try:
            return [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError):
            raise _Passing("an answer that is no list of models", own=True) from None

    def _quote(self, text: str) -> str:
        """What a server says, short, and without the key should it repeat that."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:300]


def _weight(body: dict) -> int:
    """Characters of a request's messages, or its tokens."""
    if "prompt" in body:
        return len(body["prompt"])
    return sum(len(message["content"]) for message in body["messages"])


def _completion(answer: dict) -> Completion:
    try:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        raw = "message" not in choice and "text" in choice  # of the completions endpoint
        text = (choice["text"] if raw else choice["message"].get("content")) or ""
        logprobs = choice.get("logprobs") or {}
        values = logprobs.get("token_logprobs") if raw else [each["logprob"] for each in logprobs.get("content") or ()]
        ids = choice.get("token_ids")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Completion(
            text=str(text),
            finish=str(choice.get("finish_reason") or "stop"),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            tokens=int(usage.get("completion_tokens") or 0),
            cached_tokens=int(cached),
            token_ids=None if ids is None else tuple(ids),
            logprobs=tuple(map(float, values)) if values else None,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise _Passing("an answer without a text", own=True) from None


def _scores(answer: dict, count: int) -> np.ndarray:
    try:
        values = answer["choices"][0]["logprobs"]["token_logprobs"][1:count]
        scores = np.array(values, dtype=np.float64)
    except (KeyError, IndexError, TypeError, ValueError):
        raise _Passing("an answer without log-probs of the prompt", own=True) from None
    if scores.shape != (count - 1,):
        raise _Passing(f"{len(scores)} log-probs of {count - 1} tokens", own=True)
    return scores


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"endpoint {url!r}; expected a URL such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"the endpoint at {parts.hostname} holds more than an address; give the key in ${KEY} instead")
    return url.rstrip("/")


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value is not None else None
    except ValueError:  # a date: the usual pause will do
        return None
