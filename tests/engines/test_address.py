"""Keys and addresses: refused before anything is sent, and never repeated."""

from __future__ import annotations

import asyncio
import logging

import pytest

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.engines import EngineStopped, Request, Sampling
from longpo_ops.engines.address import check_url, read_key, secrets, shown
from longpo_ops.engines.server import ServerEngine
from longpo_ops.engines.settings import EngineSettings

TOKEN = "t0ken-of-somebody"


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("https://host.example/openai/v1beta1", "https://host.example/openai/v1beta1"),
        (f"https://host.example/v1/{TOKEN}/openai", "https://host.example/v1/***/openai"),
        ("https://host.example/onlyletters/v1/a%2Fkey", "https://host.example/***/v1/***"),
        ("https://host.example", "https://host.example"),
    ],
)
def test_of_a_path_the_known_parts_are_shown(url, seen):
    assert shown(check_url(url + "/")) == seen


def test_what_is_hidden_is_known_in_both_spellings():
    assert secrets("http://h/v1/a%2Fkey/x/long-one") == ["long-one", "a%2Fkey", "a/key"]


WRONG = [
    "http://key@host/v1",
    "http://host/v1?key=k",
    "http://host/v1#key=k",
    "ftp://key=k",
    "key=k:80",
    "http://",
    "key=k",
]
WRONG += [
    "http://[::1/key=k",
    "http://host:key=k/v1",
    "http://host:99999/key=k",
    "http://host/key=k v1",
    "http://h/key=k\u00e4",
]


@pytest.mark.parametrize("url", [*WRONG, ""])
def test_urls_that_hold_more_than_an_address_or_are_none_are_refused(url):
    for refuse in (lambda: ServerEngine([url]), lambda: EngineSettings(model="m", engine="server", endpoints=(url,))):
        with pytest.raises(ValueError, match=r"endpoints?: .* such as http://127.0.0.1:8000/v1") as error:
            refuse()
        assert "key@" not in str(error.value) and "key=k" not in str(error.value)


@pytest.mark.parametrize("key", ["sk-s\u00e9cret", "sk-secret\u2019", "sk-sec ret", "sk-sec\nret", "sk-s\x7fecret"])
def test_keys_that_no_header_holds_are_refused_before_anything_is_sent(key, monkeypatch):
    monkeypatch.setenv("MY_KEY", key)
    with OpenAIServer() as server:
        given = dict(model="m", engine="server", endpoints=(server.url,), key_variable="MY_KEY")
        for refuse in (lambda: EngineSettings(**given), lambda: ServerEngine([server.url], key_variable="MY_KEY")):
            with pytest.raises(
                ValueError, match=r"the API key in \$MY_KEY has a character .* number \d+ of \d+"
            ) as error:
                refuse()
            assert "sk-" not in str(error.value) and "ret" not in str(error.value)
    assert read_key("ANOTHER_KEY") == ""


@pytest.mark.parametrize(
    ("engine", "endpoints", "message"),
    [
        ("vllm", (f"http://h/{TOKEN}",), "engine 'vllm' with 1 endpoints"),
        ("server", f"http://h/{TOKEN}", "endpoints: a str came; expected list or tuple"),
        ("server", (f"http://h/{TOKEN}", 7), "endpoints: a tuple came; expected texts"),
    ],
)
def test_settings_with_endpoints_of_a_wrong_kind_do_not_repeat_them(engine, endpoints, message):
    with pytest.raises(ValueError, match=message) as error:
        EngineSettings(model="m", engine=engine, endpoints=endpoints)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("status", [401, 404, 400, 500, 200])
def test_a_key_in_a_path_is_in_no_message_though_the_server_repeats_it(status, caplog):
    caplog.set_level(logging.DEBUG)
    words = {"error": {"message": f"no way to /{TOKEN}/v1/chat/completions"}}

    async def ask(url: str):
        engine = ServerEngine([url], patience=0.3)
        try:
            await engine.start()
            await engine.generate(Request("?", Sampling(4)))
        finally:
            await engine.close()

    with OpenAIServer(lambda number, seen: Reply(status, words)) as server:
        url = server.url.replace("/v1", f"/{TOKEN}/v1")
        with pytest.raises(EngineStopped) as stop:
            asyncio.run(ask(url))
        assert server.seen[0].path == f"/{TOKEN}/v1/chat/completions" and "***" in str(stop.value)
    with pytest.raises(EngineStopped, match=r"no server answers at http://127.0.0.1:\d+/\*\*\*/v1") as down:
        asyncio.run(ask(url))
    assert TOKEN not in str(stop.value) + str(down.value) + caplog.text
