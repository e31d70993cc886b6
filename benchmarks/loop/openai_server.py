"""A small server that speaks the OpenAI protocol over real HTTP, with answers made of the prompt after a fixed latency.

For tests and benchmarks of what stands around an engine: the model here takes no time but the latency asked for. It
listens on 127.0.0.1 alone. `behave` decides request by request what goes wrong.

    python -m benchmarks.loop.openai_server PORT LATENCY

Tests: tests/engines/test_server.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

QUESTIONS = (
    "Who keeps the log?",
    "Why do the boats return?",
    "How are wind and trade linked?",
    "What is the bell for?",
)
POOL = "\n".join(f"{i}. {question}" for i, question in enumerate(QUESTIONS, 1))
WORDS = [
    "harbour",
    "wind",
    "boat",
    "log",
    "bell",
    "pier",
    "lamp",
    "net",
    "tide",
    "captain",
    "rope",
    "sail",
    "storm",
    "trade",
    "gull",
    "anchor",
]


@dataclass
class Reply:
    """What is sent instead of an answer. status None: the connection is cut without a word."""

    status: int | None = 200
    body: object = None
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0


@dataclass
class Seen:
    """One request: its path, its body, its headers in lower case."""

    path: str
    body: dict
    headers: dict[str, str]


class OpenAIServer:
    """Answers in a thread of its own. behave(number, seen) gives a Reply, or None for a good answer."""

    def __init__(self, behave: Callable[[int, Seen], Reply | None] | None = None, latency: float = 0.0, port: int = 0):
        self.behave, self.latency, self.port = behave, latency, port
        self.seen: list[Seen] = []
        self.answered = 0
        self.at_once = self.most_at_once = 0
        self.busy = 0.0  # the integral of at_once over time

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> OpenAIServer:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; on the same port as before if it was stopped."""
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        if not ready.wait(10):
            raise RuntimeError("the server did not start in 10 s")

    def stop(self) -> None:
        """Die at once: what is under way is cut off, and nobody listens any more."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(10)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stopped, self._connections = asyncio.get_running_loop(), asyncio.Event(), set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stopped.wait()
        server.close()
        for writer in self._connections:
            writer.transport.abort()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while request := await self._read(reader):
                reply = await self._reply(request)
                if reply.status is None:
                    writer.transport.abort()
                    return
                body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                headers = {"Content-Type": "application/json", "Content-Length": len(body)} | reply.headers
                lines = [f"HTTP/1.1 {reply.status} X", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
                writer.write("\r\n".join(lines).encode() + body)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Seen | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except asyncio.IncompleteReadError:
            return None
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Seen(head[0].split()[1], json.loads(body) if body else {}, headers)

    async def _reply(self, request: Seen) -> Reply:
        if request.path.endswith("/models"):
            return Reply(body={"data": [{"id": "little", "object": "model"}]})
        self.seen.append(request)
        reply = self.behave(len(self.seen), request) if self.behave else None
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        began = time.monotonic()
        try:
            await asyncio.sleep(self.latency if reply is None else reply.wait)
        finally:
            self.at_once -= 1
            self.busy += time.monotonic() - began
        if reply is None or (reply.status == 200 and reply.body is None):
            reply = Reply(body=answer(request))
            self.answered += 1
        return reply


def answer(request: Seen) -> dict:
    """A good answer: questions if asked for a list, as JSON where a schema came, a sentence that depends on the prompt, or
    scores with echo."""
    body = request.body
    if request.path.endswith("/chat/completions"):
        prompt = body["messages"][-1]["content"]
        text = POOL if "numbered list" in prompt[-400:] else sentence(prompt)
        text = json.dumps({"questions": QUESTIONS}) if "response_format" in body else text
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return {"choices": [choice], "usage": usage}
    scores = [None, *(-0.5 - (token % 7) / 8 for token in body["prompt"][1:]), -0.5]
    return {"choices": [{"index": 0, "text": "", "finish_reason": "length", "logprobs": {"token_logprobs": scores}}]}


def sentence(prompt: str) -> str:
    """Twelve words drawn from the prompt's digest."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "The " + " ".join(WORDS[byte % len(WORDS)] for byte in digest[:12]) + "."


def main() -> None:
    server = OpenAIServer(latency=float(sys.argv[2]), port=int(sys.argv[1]))
    server.start()
    print(server.url, flush=True)
    sys.stdin.read()  # until the parent ends
    print(json.dumps({"requests": len(server.seen), "busy": server.busy, "most": server.most_at_once}), flush=True)
    server.stop()


if __name__ == "__main__":
    main()
