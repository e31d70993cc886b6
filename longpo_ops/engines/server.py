"""Any OpenAI-compatible server, one endpoint or many, asynchronous.

A request goes to the endpoint that serves its group already, else to the one with the least to read: requests weigh
what their prompts do, as one whole document takes an engine longer than many chunks. What may pass
(no connection, 429, 5xx, a timeout, an answer that is none) is tried again after a pause of base * 2^failures with
jitter, or as long as Retry-After says; meanwhile the endpoint gets nothing and the others take over. An error under
status 200 is what its code says (replies.py). Two rules end that:

    a request is given up  after `attempts` failures of its own (5xx, timeout, no answer) if others succeeded meanwhile
    the run stops          if for `patience` seconds nothing at all has succeeded

What cannot pass (401, 403, 404, or a refusal before anything was ever answered) stops the run at once. The API key
comes from the environment, goes into one header and into nothing else; of URLs, messages hold what address.py shows.

A schema goes with a request until the server, which has held no answer to one so far, refuses it (400, 422, or whatever else
to the end of `attempts`) or writes something else: that request raises NoSchema, no later one has any, and a warning says so.
Where an answer was held to one, a refusal is that request's alone.

Not covered: starting and stopping servers; streamed answers.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import httpx

from . import Completion, Engine, EngineStopped, NoSchema, Request, RequestFailed
from .address import KEY, check_url, read_key, secrets, shown
from .fields import OWN, change_fields, check_fields
from .reasoning import part_completion
from .replies import NoAnswer, as_completion, echoed_logps, find_error

log = logging.getLogger("longpo_ops.generate")

HOPELESS = {401: "the API key was refused", 403: "access was denied", 404: "no such model or path"}
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

    def __str__(self) -> str:
        return shown(self.url)

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
    template_kwargs: variables of the chat template, for servers that take `chat_template_kwargs`, beside those of the options.
    options: fields of every request's body that are added, renamed or left out (fields.py); flag: how the command line names
    them.

    Raises ValueError for a URL that holds a key or is none, a key that no header can hold, and options that no request has.
    """

    whole, structured, prefills = False, True, False

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
        options: dict | None = None,
        flag: str = "--engine-option",
    ):
        if not endpoints:
            raise ValueError("no endpoint came; expected at least one URL such as http://127.0.0.1:8000/v1")
        self.endpoints = [Endpoint(check_url(url)) for url in endpoints]
        self.model, self.timeout, self.patience, self.attempts = model, timeout, patience, attempts
        self.concurrency = concurrency * len(self.endpoints)
        self._key = read_key(key_variable)
        check_fields(options or {}, flag)
        variables = dict((options or {}).get("chat_template_kwargs") or {}) | (template_kwargs or {})
        self._fields = dict(options or {}) | ({"chat_template_kwargs": variables} if template_kwargs else {})
        self._flag = flag
        self._homes: dict[str, Endpoint] = {}
        self._answered, self._held, self._last_success = 0, False, 0.0

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
            if isinstance(answer, BaseException) and not isinstance(answer, (_Passing, RequestFailed)):
                raise answer
            if isinstance(answer, BaseException):
                log.warning("%s does not answer yet (%s)", endpoint, answer)
                endpoint.failed()
            else:
                served.update(answer)
        if all(isinstance(answer, BaseException) for answer in found):
            urls = ", ".join(map(str, self.endpoints))
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

    async def _answer(self, request: Request) -> Completion:
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
        if request.schema is not None:
            held = {"name": "answer", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": held}
        path = "/completions" if raw else "/chat/completions"
        answer = await self._ask(path, body, request.group, lambda answer: as_completion(answer, sampling.max_tokens))
        if request.schema is not None:
            said = part_completion(answer, "", self.whole).answer
            if not self._held and said is not None and not said.lstrip().startswith("{"):
                raise self._no_schema(f"it wrote {said[:40]!r}")
            self._held = self._held or said is not None
        return answer

    def _no_schema(self, why: str) -> NoSchema:
        """What tells that a request has to do without its schema, and so all later ones where none was ever held to."""
        if self.structured and not self._held:
            log.warning(
                "the server does not hold answers to a JSON schema (%s): they are asked for in words alone", why
            )
            self.structured = False
        return NoSchema(why)

    async def _logps(self, token_ids: Sequence[int]) -> list[float | None]:
        ids = list(map(int, token_ids))
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
        return await self._ask("/completions", body, "", lambda answer: echoed_logps(answer, len(ids)))

    # -- one request, until it is answered or given up -----------------------------------------------------------------

    async def _ask(self, path: str, body: dict, group: str, read):
        began, failures, weight, body = time.monotonic(), 0, _weight(body), change_fields(body, self._fields)
        while True:
            endpoint = self._pick(group)
            endpoint.under_way += weight
            try:
                if (pause := endpoint.retry_at - time.monotonic()) > 0:
                    await asyncio.sleep(pause)
                answer = await self._send("POST", endpoint, path, body)
                try:
                    result = read(answer)
                except NoAnswer as error:
                    raise _Passing(str(error), own=True) from None
                except RequestFailed as failed:  # the server is well all the same
                    result = failed
            except _Passing as failure:
                endpoint.failed(failure.after)
                failures += failure.own
                self._give_up(failure, failures, began, "response_format" in body)
                log.debug("%s: %s; trying again", endpoint, failure)
            else:
                endpoint.failures, endpoint.retry_at = 0, 0.0
                self._last_success = time.monotonic()
                self._answered += 1
                if isinstance(result, RequestFailed):
                    raise result
                return result
            finally:
                endpoint.under_way -= weight

    def _give_up(self, failure: _Passing, failures: int, began: float, schema: bool) -> None:
        """Raise if trying again makes no sense."""
        if failures >= self.attempts and schema:
            raise self._no_schema(str(failure))
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
        status, words = response.status_code, response.text
        if status == 200:
            try:
                answer = response.json()
            except ValueError:
                raise _Passing("an answer that is no JSON", own=True) from None
            if (found := find_error(answer)) is None:
                return answer
            status, words = found[0] or 500, f"an error under status 200: {found[1]}"
        self._refuse(status, words, response.headers.get("retry-after"), endpoint, body)

    def _refuse(self, status: int, words: str, after: str | None, endpoint: Endpoint, body: dict | None) -> NoReturn:
        """Raise what a status that is not 200 stands for. body: None where it was no question."""
        detail = f"{status}: {self._quote(words, endpoint)}"
        if status in (400, 422) and "response_format" in (body or {}):
            raise self._no_schema(detail)
        if status in (400, 422) and body is not None:
            detail += self._advice(words, body)
        if status == 429:
            raise _Passing(detail, own=False, after=_seconds(after))
        if status >= 500 or status == 408:
            raise _Passing(detail, own=status != 503, after=_seconds(after))
        if status in HOPELESS:
            raise EngineStopped(f"{endpoint}: {HOPELESS[status]} ({detail})")
        if not self._answered and body is not None:
            raise EngineStopped(f"{endpoint} refuses the first request ({detail}); nothing was generated yet")
        raise RequestFailed("the engine refused", detail)

    def _advice(self, words: str, body: dict) -> str:
        """What to do about a refusal that names fields of ours."""
        advice = ""
        if "continue_final_message" in body:
            advice += (
                "; the answer was begun for it (continue_final_message): where a server cannot go on, do not prefill"
            )
        named = [name for name in OWN if name in body and re.search(rf"\b{name}\b", words)]
        if "max_tokens" in named and "max_completion_tokens" in words:
            advice += f"; where a server has another name for max_tokens: {self._flag} max_tokens=max_completion_tokens"
            named.remove("max_tokens")
        if named:
            flags = " ".join(f"{self._flag} {name}=null" for name in named)
            advice += f"; where a server does not take {' and '.join(named)}: {flags}"
        return advice

    async def _models(self, endpoint: Endpoint) -> list[str]:
        answer = await self._send("GET", endpoint, "/models", None)
        try:
            return [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError):
            raise _Passing("an answer that is no list of models", own=True) from None

    def _quote(self, text: str, endpoint: Endpoint) -> str:
        """What a server says, short, and without the key and what is hidden of its URL should it repeat them."""
        text = " ".join(text.split())
        for secret in (self._key, *secrets(endpoint.url)):
            text = text.replace(secret, "***") if secret else text
        return text[:300]


def _weight(body: dict) -> int:
    """Characters of a request's messages, or its tokens."""
    if "prompt" in body:
        return len(body["prompt"])
    return sum(len(message["content"]) for message in body["messages"])


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value is not None else None
    except ValueError:  # a date: the usual pause will do
        return None
