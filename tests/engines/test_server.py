"""The server engine against a real HTTP server in this process: what passes, what does not, and who is asked."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.engines import Completion, EngineStopped, Request, RequestFailed, Sampling
from longpo_ops.engines import server as engine_module
from longpo_ops.engines.server import ServerEngine
from longpo_ops.engines.settings import EngineSettings

ASK = Request("Where is the harbour?", Sampling(16, 0.7, 0.9, seed=3), group="g")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(engine_module, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(engine_module, "LONGEST_PAUSE", 0.1)


def ask(engine: ServerEngine, *requests: Request) -> list[Completion]:
    """Start an engine, send requests side by side, close it."""

    async def work():
        try:
            await engine.start()
            return await engine.batch(requests)
        finally:
            await engine.close()

    return asyncio.run(work())


def first(count: int, reply: Reply):
    """A behaviour: the first `count` requests get this reply."""
    return lambda number, seen: reply if number <= count else None


def test_a_request_says_what_it_wants_and_gets_it():
    with OpenAIServer() as server:
        options = {"top_k": 5, "chat_template_kwargs": {"a": 2, "b": 3}}
        (answer,) = ask(ServerEngine([server.url + "/"], template_kwargs={"a": 1}, options=options), ASK)
        assert answer.text.startswith("The ") and answer.finish == "stop" and answer.prompt_tokens > 0
        assert server.seen[0].body == {
            "model": "little", "messages": [{"role": "user", "content": "Where is the harbour?"}], "max_tokens": 16,
            "temperature": 0.7, "top_p": 0.9, "seed": 3, "top_k": 5, "chat_template_kwargs": {"a": 1, "b": 3},
        }  # fmt: skip
        assert "authorization" not in server.seen[0].headers


def test_a_begun_answer_is_the_last_message_and_said_to_go_on():
    with OpenAIServer() as server:
        ask(ServerEngine([server.url]), replace(ASK, prefill="At the"), ASK)
        bodies = {len(seen.body["messages"]): seen.body for seen in server.seen}
        assert bodies[2]["messages"] == [*bodies[1]["messages"], {"role": "assistant", "content": "At the"}]
        assert bodies[2]["continue_final_message"] is True and bodies[2]["add_generation_prompt"] is False
        assert not {"continue_final_message", "add_generation_prompt"} & bodies[1].keys()


def test_earlier_messages_go_first_and_weigh_too():
    earlier = (("user", "Who rings the bell?"), ("assistant", "Eve."))
    with OpenAIServer() as server:
        ask(ServerEngine([server.url]), replace(ASK, earlier=earlier, prefill="At"))
        assert [tuple(message.values()) for message in server.seen[0].body["messages"]] == [
            *earlier, ("user", "Where is the harbour?"), ("assistant", "At")
        ]  # fmt: skip
    with pytest.raises(ValueError, match="earlier messages beside prompt_ids"):
        replace(ASK, earlier=earlier, prompt_ids=(1,))


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_cannot_go_on_with_an_answer_is_told_of(status):
    def behave(number, seen):
        return Reply(status, {"error": "unknown field"}) if "continue_final_message" in seen.body else None

    with OpenAIServer(behave) as server:
        with pytest.raises(EngineStopped, match=r"unknown field.*where a server cannot go on, do not prefill"):
            ask(ServerEngine([server.url]), replace(ASK, prefill="At the"))
        assert ask(ServerEngine([server.url]), ASK)[0].text


def test_token_ids_go_to_the_completions_endpoint():
    choice = {"text": " it is", "finish_reason": "length", "logprobs": {"token_logprobs": [-0.5, -0.25]}}
    with OpenAIServer(first(1, Reply(200, {"choices": [choice]}))) as server:
        (answer,) = ask(ServerEngine([server.url]), Request("", Sampling(2), logprobs=True, prompt_ids=(5, 6)))
        assert answer == Completion(" it is", "length", 0, 0, logprobs=(-0.5, -0.25))
        seen = server.seen[0]
        assert seen.path.endswith("/v1/completions") and seen.body == {
            "model": "little", "prompt": [5, 6], "max_tokens": 2, "temperature": 0.0, "top_p": 1.0, "logprobs": 1,
        }  # fmt: skip


def test_scores_are_those_of_all_tokens_but_the_first():
    async def work(engine):
        await engine.start()
        try:
            return await engine.score([4, 5, 6, 7])
        finally:
            await engine.close()

    with OpenAIServer() as server:
        scores = asyncio.run(work(ServerEngine([server.url])))
        assert np.array_equal(scores, [-0.5 - 5 / 8, -0.5 - 6 / 8, -0.5]) and scores.dtype == np.float64


def test_the_key_goes_into_one_header_and_nowhere_else(monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    caplog.set_level(logging.DEBUG)
    echo = Reply(500, {"error": "bad key sk-secret"})
    with OpenAIServer(first(1, echo)) as server:
        ask(ServerEngine([server.url], key_variable="MY_KEY"), ASK)
        assert server.seen[0].headers["authorization"] == "Bearer sk-secret"
    with (
        OpenAIServer(first(99, Reply(401, {"error": "bad key sk-secret"}))) as server,
        pytest.raises(EngineStopped) as stop,
    ):
        ask(ServerEngine([server.url], key_variable="MY_KEY"), ASK)
    assert "the API key was refused" in str(stop.value) and "***" in str(stop.value)
    assert "sk-secret" not in caplog.text + str(stop.value)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(429, {}, {"Retry-After": "0.05"}),
        Reply(429, {}),
        Reply(500, b"oops"),
        Reply(503, {}, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Reply(None),
        Reply(200, b"no json"),
        Reply(200, {"choices": []}),
        Reply(200, {"error": {"code": 429, "message": "the limit of free models is reached"}}),
        Reply(200, {"error": {"code": 502}, "choices": [{"message": {"content": "The"}}]}),
        Reply(200, {"object": "error", "message": "the model is loading", "code": 50301}),
        Reply(200, {"choices": [{"message": {"content": ""}, "error": {"type": "overloaded_error"}}]}),
        Reply(200, [{"error": "too many at once"}]),
        Reply(200, [1]),
        Reply(200, {"choices": [{"message": None}]}),
    ],
    ids=lambda reply: f"{reply.status}-{reply.body}",
)
def test_what_passes_is_tried_again(reply):
    with OpenAIServer(first(2, reply)) as server:
        (answer,) = ask(ServerEngine([server.url]), ASK)
        assert answer.text.startswith("The ") and len(server.seen) == 3 and server.answered == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ({"code": 401, "message": "no such user"}, "the API key was refused .401: .*401: no such user"),
        ({"code": "invalid_api_key", "message": "wrong key"}, "the API key was refused .*invalid_api_key: wrong key"),
        ({"type": "not_found_error", "message": "no model m"}, "no such model or path .*no model m"),
        ({"code": "context_length_exceeded", "message": "too long"}, "refuses the first request .400: .*too long"),
        ("out of order", "no server has answered for .*500: an error under status 200: out of order"),
        ({"detail": ["a", 1]}, r'no server has answered .*\["a", 1\]'),
    ],
)
def test_an_error_under_status_200_says_what_it_says(error, message):
    with (
        OpenAIServer(lambda number, seen: Reply(200, {"error": error, "choices": []})) as server,
        pytest.raises(EngineStopped, match=message),
    ):
        ask(ServerEngine([server.url], patience=0.3), ASK)


def test_a_timeout_is_tried_again():
    with OpenAIServer(first(1, Reply(wait=30.0))) as server:
        (answer,) = ask(ServerEngine([server.url], timeout=0.5), ASK)
        assert answer.text and len(server.seen) == 2


def test_an_answer_without_content_is_an_empty_text():
    nothing = {"choices": [{"message": {"role": "assistant", "content": None}, "finish_reason": "stop"}]}
    with OpenAIServer(first(1, Reply(200, nothing))) as server:
        (answer,) = ask(ServerEngine([server.url]), ASK)
        assert answer == Completion("", "stop", 0, 0)


def test_log_probs_come_where_asked_for():
    content = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.25}]
    choice = {"message": {"content": "a b"}, "finish_reason": "length", "logprobs": {"content": content}}
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    with OpenAIServer(first(1, Reply(200, {"choices": [choice | {"token_ids": [1, 2]}], "usage": usage}))) as server:
        (answer,) = ask(ServerEngine([server.url]), Request("x", Sampling(2), logprobs=True))
        assert server.seen[0].body["logprobs"] is True
        assert answer == Completion("a b", "length", 5, 2, 4, (1, 2), (-0.5, -0.25))


def test_a_request_that_always_fails_is_given_up_while_others_go_on():
    def behave(number, seen):
        return Reply(500, b"poison") if "poison" in seen.body["messages"][0]["content"] else None

    async def work(engine):
        await engine.start()
        bad = asyncio.create_task(engine.generate(Request("poison", Sampling(1))))
        while not bad.done():
            await engine.generate(ASK)
        await engine.close()
        return await bad

    with OpenAIServer(behave, latency=0.01) as server, pytest.raises(RequestFailed, match="500: poison"):
        asyncio.run(work(ServerEngine([server.url], attempts=3)))


def test_a_refusal_skips_one_request_but_the_first_refusal_stops_the_run():
    def behave(number, seen):
        return Reply(400, {"error": "too long"}) if seen.body["messages"][0]["content"] == "long" else None

    async def work(engine, *contents):
        try:
            await engine.start()
            for content in contents:
                await engine.generate(Request(content, Sampling(1)))
        finally:
            await engine.close()

    with OpenAIServer(behave) as server:
        with pytest.raises(RequestFailed, match=r"the engine refused: 400: .*too long"):
            asyncio.run(work(ServerEngine([server.url]), "short", "long"))
        with pytest.raises(EngineStopped, match="refuses the first request"):
            asyncio.run(work(ServerEngine([server.url]), "long"))


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (
            "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
            "--engine-option max_tokens=max_completion_tokens",
        ),
        ("'temperature' does not support 0.7 with this model.", "--engine-option temperature=null"),
        ("Extra inputs: top_p, seed", "--engine-option top_p=null --engine-option seed=null"),
    ],
)
def test_a_refused_field_comes_with_the_option_that_cures_it(words, option):
    with OpenAIServer(first(9, Reply(400, {"error": {"message": words}}))) as server:
        with pytest.raises(EngineStopped, match="refuses the first request") as stop:
            ask(ServerEngine([server.url]), ASK)
        assert str(stop.value).count("--engine-option") == option.count("--engine-option") and option in str(stop.value)
        with pytest.raises(EngineStopped, match=option.replace("engine", "judge")):
            ask(ServerEngine([server.url], flag="--judge-option"), ASK)


def test_fields_are_renamed_left_out_and_replaced():
    options = {"max_tokens": "max_completion_tokens", "temperature": None, "top_p": 1, "echo": None, "top_k": None}
    options |= {"stream": False, "n": 1, "logprobs": True}
    with OpenAIServer() as server:
        (answer,) = ask(ServerEngine([server.url], options=options), ASK)
        assert answer.text and server.seen[0].body == {
            "model": "little", "messages": [{"role": "user", "content": "Where is the harbour?"}],
            "max_completion_tokens": 16, "top_p": 1, "seed": 3, "top_k": None, "stream": False, "n": 1, "logprobs": True,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": None}, "--engine-option messages: every request has its own"),
        (
            {"stream": True},
            "--engine-option stream=true: one whole answer is read per request; expected false, or none",
        ),
        ({"n": 2}, "--engine-option n=2: one whole"),
        ({"n": True}, "--engine-option n=true: one whole"),
        ({"seed": True}, "expected null"),
        ({"temperature": "seed"}, "temperature='seed': expected null, which leaves it out, another name"),
        ({"max_tokens": [1]}, "expected null"),
        (
            {"chat_template_kwargs": "thinking"},
            "chat_template_kwargs='thinking': expected variables of the chat template",
        ),
        ({"temperature": float("nan")}, r"temperature\W+nan.*: expected (what JSON has|finite)"),
        ({"stop": [float("inf")]}, r"stop\W+inf.*: expected (what JSON has|finite)"),
    ],
)
def test_options_that_no_request_can_have_are_refused(options, message):
    for make in (ServerEngine, lambda urls, options: EngineSettings(
        model="m", engine="server", endpoints=tuple(urls), engine_options=options
    )):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make(["http://h/v1"], options=options)


def test_an_answer_of_no_use_is_an_answer():
    ended = Reply(200, {"choices": [{"message": {"content": "The"}, "finish_reason": "content_filter"}]})
    behave = {1: ended, 2: Reply(400, {"error": "too long"})}.get

    async def work(engine):
        await engine.start()
        for reason in ("the answer ended with content_filter", "the engine refused"):
            with pytest.raises(RequestFailed) as failure:
                await engine.generate(ASK)
            assert failure.value.reason == reason
        assert (await engine.generate(ASK)).text
        await engine.close()

    with OpenAIServer(lambda number, seen: behave(number)) as server:
        asyncio.run(work(ServerEngine([server.url])))


def test_a_server_that_is_down_from_the_start_stops_at_once():
    with OpenAIServer() as server:
        pass
    with pytest.raises(EngineStopped, match=rf"no server answers at http://127.0.0.1:{server.port}/v1 .*vllm serve"):
        ask(ServerEngine([server.url]), ASK)


def test_a_server_that_dies_for_good_stops_the_run_after_some_patience():
    server = OpenAIServer(lambda number, seen: Reply(None))
    with server, pytest.raises(EngineStopped, match="no server has answered for"):
        ask(ServerEngine([server.url], patience=0.5), ASK)


def test_a_server_that_comes_back_goes_on():
    server = OpenAIServer(lambda number, seen: threading.Thread(target=server.stop).start() or Reply(wait=9))
    with server:
        back = threading.Timer(1.0, lambda: (setattr(server, "behave", None), server.start()))
        back.start()
        (answer,) = ask(ServerEngine([server.url], patience=20), ASK)
        back.join()
        assert answer.text and len(server.seen) == 2


def test_requests_are_spread_groups_stay_and_a_dead_endpoint_is_left_alone():
    requests = [Request(f"{g} {i}", Sampling(8), group=f"document {g}") for i in range(4) for g in range(6)]
    with OpenAIServer(latency=0.05) as one, OpenAIServer(latency=0.05) as two:
        ask(ServerEngine([one.url, two.url]), *requests)
        groups = [{seen.body["messages"][0]["content"].split()[0] for seen in server.seen} for server in (one, two)]
        assert not groups[0] & groups[1] and len(groups[0]) == len(groups[1]) == 3
        two.stop()
        engine = ServerEngine([one.url, two.url])
        assert len(ask(engine, *requests)) == 24 and len(one.seen) == 12 + 24
    with OpenAIServer() as one, OpenAIServer(lambda number, seen: Reply(None)) as two:
        answers = ask(ServerEngine([one.url, two.url]), *requests)
        assert len({answer.text for answer in answers}) == 24 and one.answered == 24 and len(two.seen) <= 24


def test_documents_are_spread_by_what_there_is_to_read():
    short, long = Sampling(8), "many words " * 50
    requests = [Request(f"first {long}", short, group="first"), *(Request(f"chunk {i}", short) for i in range(3))]
    requests.append(Request(f"second {long}", short, group="second"))
    with OpenAIServer(latency=0.2) as one, OpenAIServer(latency=0.2) as two:
        ask(ServerEngine([one.url, two.url]), *requests)
        assert [len(server.seen) for server in (one, two)] == [1, 4]  # by number, both documents would be at one


def test_the_model_must_be_clear():
    with OpenAIServer() as server:
        server_models = {"data": [{"id": "a"}, {"id": "b"}]}
        server._reply = _models(server_models)
        with pytest.raises(ValueError, match=r"the servers offer \['a', 'b'\]; name the model"):
            ask(ServerEngine([server.url]), ASK)


def _models(body):
    async def reply(request):
        return Reply(body=body)

    return reply
