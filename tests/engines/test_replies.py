"""What servers of all kinds answer, over real HTTP: contents, ends and log-probs."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.engines import Completion, Request, RequestFailed, Sampling, as_finish, as_logps
from longpo_ops.engines.replies import find_error
from longpo_ops.engines.server import ServerEngine

ASK = Request("Who rings the bell?", Sampling(8))
IDS = [3, 4, 5, 6]


@pytest.fixture(scope="module")
def ask():
    """ask(choice, request or token ids, usage): what a started engine makes of a server's choice."""
    reply = {}
    with OpenAIServer(lambda number, seen: Reply(200, reply)) as server, asyncio.Runner() as runner:
        engine = ServerEngine([server.url])
        runner.run(engine.start())

        def work(choice: dict, what: Request | list[int] = ASK, usage: dict | None = None) -> Completion | np.ndarray:
            reply.update(choices=[choice], usage=usage)
            return runner.run(engine.generate(what) if isinstance(what, Request) else engine.score(what))

        yield work
        runner.run(engine.close())


def said(content, **message) -> dict:
    return {"message": {"role": "assistant", "content": content, **message}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("choice", "text", "reasoning"),
    [
        (said([{"type": "text", "text": "Eve "}, {"type": "output_text", "text": "does."}]), "Eve does.", ""),
        (
            said(
                [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "Eve."}]
            ),
            "Eve.",
            "hm",
        ),
        (
            said([{"type": "thinking", "thinking": "hm"}, {"type": "redacted_thinking", "data": "x"}, "Eve."]),
            "Eve.",
            "hm",
        ),
        (said([{"type": "reasoning", "text": "hm"}, {"text": "Eve."}]), "Eve.", "hm"),
        (said("Eve.", reasoning_content="hm"), "Eve.", "hm"),
        (said("Eve.", reasoning="hm"), "Eve.", "hm"),
        (said(None, reasoning="hm"), "", "hm"),
        (said(None, refusal="I will not say."), "I will not say.", ""),
        (said([]), "", ""),
        (said("Eve.", reasoning=True), "Eve.", ""),
        (said("Eve.", thinking={"type": "enabled"}, reasoning="hm"), "Eve.", "hm"),
        (said("Eve.", reasoning=[{"type": "encrypted", "data": "x"}, "hm", 3]), "Eve.", "hm"),
        (said([{"type": "text", "text": None}, {"type": "text", "text": "Eve."}]), "Eve.", ""),
        (said([{"type": "thinking", "thinking": None}, {"type": "text", "text": "Eve."}]), "Eve.", ""),
    ],
)
def test_texts_are_joined_and_reasoning_is_apart(ask, choice, text, reasoning):
    assert ask(choice) == Completion(text, "stop", 0, 0, reasoning=reasoning)


@pytest.mark.parametrize("error", [{"message": "", "code": None}, {}, "", None, False])
def test_an_error_that_says_nothing_is_none(ask, error):
    assert ask(said("Eve.") | {"error": error}).text == "Eve."
    assert find_error({"choices": [said("Eve.")], "error": error}) is None
    assert find_error({"choices": [{"error": {"code": 503}}], "error": error})[0] == 503


def test_a_part_that_is_no_text_is_a_failed_request(ask):
    with pytest.raises(RequestFailed, match="the answer is no text: a part of type image_url came"):
        ask(said([{"type": "image_url", "image_url": {"url": "http://h"}}]))


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        (name, "stop")
        for name in (
            "stop",
            "STOP",
            "eos_token",
            "end_turn",
            "stop_sequence",
            "FINISH_REASON_STOP",
            "COMPLETE",
            "end_of_text",
            "eos_token_id",
            "stopped",
            "FinishReason.STOP",
        )
    ]
    + [
        (name, "length")
        for name in (
            "length",
            "MAX_TOKENS",
            "max_tokens",
            "length_capped",
            "model_length",
            "max-length",
            "repetition",
            "FinishReason.MAX_TOKENS",
        )
    ],
)
def test_ends_have_one_name(ask, reason, finish):
    assert ask(said("Eve.") | {"finish_reason": reason}).finish == finish == as_finish(reason)


@pytest.mark.parametrize("reason", [None, "", " ", "null", "None"])
def test_an_end_without_a_name_is_told_by_the_limit(ask, reason):
    choice = said("Eve.") | {"finish_reason": reason}
    assert ask(choice, usage={"completion_tokens": 8}).finish == "length"
    assert ask(choice, usage={"completion_tokens": 7}).finish == ask(choice).finish == "stop"


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "SAFETY", "abort"])
def test_another_end_is_said_and_not_taken_for_finished(ask, reason):
    with pytest.raises(RequestFailed) as failure:
        ask(said("Eve.") | {"finish_reason": reason})
    assert failure.value.reason == f"the answer ended with {reason.lower()}"


BAD = (None, float("nan"), float("inf"), -float("inf"), 0.5, -9999.0, "x")


@pytest.mark.parametrize("bad", BAD)
def test_a_log_prob_that_is_none_fails_the_request(ask, bad):
    echo = {"text": "", "finish_reason": "length", "logprobs": {"token_logprobs": [None, -0.5, bad, -0.25, -1.0]}}
    chat = said("a b") | {"logprobs": {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": bad}]}}
    for choice, what in ((echo, IDS), (chat, replace(ASK, logprobs=True))):
        with pytest.raises(RequestFailed, match="no log-probs: ") as failure:
            ask(choice, what)
        assert failure.value.reason == "no log-probs"
    assert ask(chat).text == "a b"  # where nobody asked for them


@pytest.mark.parametrize("logprobs", [None, {}, {"token_logprobs": [None, -0.5]}, {"token_logprobs": "-0.5"}])
def test_too_few_log_probs_fail_the_request(ask, logprobs):
    with pytest.raises(RequestFailed, match="no log-probs: "):
        ask({"text": "", "finish_reason": "length", "logprobs": logprobs}, IDS)
    with pytest.raises(RequestFailed, match="no log-probs: none came"):
        ask(said("Eve."), replace(ASK, logprobs=True))


def test_rounding_alone_is_taken_off():
    assert as_logps([1e-6, -0.5, -300.0], 3).tolist() == [0.0, -0.5, -300.0]
    with pytest.raises(RequestFailed, match=r"number 2 of 2 is 0\.002, 1 such in all"):
        as_logps([0.0, 0.002])
