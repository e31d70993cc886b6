"""Keys and addresses: refused before anything is sent, and never repeated."""

from __future__ import annotations

import asyncio
import logging
import random
import string

import pytest

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.engines import EngineStopped, Request, Sampling
from longpo_ops.engines.address import check_url, read_key, secrets, shown
from longpo_ops.engines.server import ServerEngine
from longpo_ops.engines.settings import EngineSettings

TOKEN = "t0k3n-Xb9Qw2LmZ7Rk"


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("https://host.example/openai/v1beta1", "https://host.example/openai/v1beta1"),
        (f"https://host.example/v1/{TOKEN}/openai", "https://host.example/v1/***d7ed30/openai"),
        ("https://host.example/sk%2Da/v1", "https://host.example/***fa83a8/v1"),
        ("https://host.example", "https://host.example"),
        ("http://b\u00fccher.example:80/v1", "http://b\u00fccher.example:80/v1"),
    ],
)
def test_of_a_path_all_is_shown_but_what_looks_like_a_key(url, seen):
    assert shown(check_url(url + "/")) == seen == shown(seen)


NAMES = """qwen-a qwen-b vv1 v1 v1beta1 model my_model openai compatible-mode deployments serving-endpoints generativelanguage
qwen2.5-72b-instruct Qwen2.5-Coder-32B-Instruct-AWQ Qwen3-30B-A3B-Instruct-2507-FP8 meta-llama-3.1-70b meta-llama
Llama-3.2-11B-Vision-Instruct Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf Mistral-7B-Instruct-v0.3 Mixtral-8x22B-Instruct-v0.1
mixtral8x7b starcoder2-15b gpt-4o-mini-2024-07-18 gpt-oss-120b text-embedding-ada-002 DeepSeek-R1-0528-Qwen3-8B deepseek-ai
gemma-3-27b-it-qat-q4_0 Phi-3.5-MoE-instruct glm-4-9b-chat-1m NousResearch OLMo-2-1124-13B-Instruct llama-3-70b-262k
gemini-1.5-pro-002 command-r-plus-08-2024 c4ai-command-r-v01 Yi-34B-200K internlm2_5-7b-chat-1m token-classification
hf-inference judge-a my-team-gateway eu-west-1 2024-10-21 SmolLM2-135M-Instruct LongCat-Flash-Chat 123456789012"""
KEYS = """sk-abc sk-proj-abc-def sk_live_4eC3 gsk_a hf_abcdef nvapi-x glpat-a-b ghp_x t0k3nXb9Qw2L abcdefghijklmnopqrstuvwxyz
3f2b8c1e-9d4a-4c7b-8e21-0a1b2c3d4e5f 9f86d081884c7d659a2feaa0c55ad015 AKIAIOSFODNN7EXAMPLE AIzaSyD-9tSrke72PouQMnMX-a7eZSW0j
eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N qX7-mP2kL9vRtB4w_Zc8-Yd1sH6nJ aB3xK9pQ2Z
key=9f86d081884c a%2F9f86d081884c7d65 GhTyUiOpLkJhGf team-9f86d081884c7d659a2f bce345fgh678"""


@pytest.mark.parametrize("name", NAMES.split())
def test_names_are_shown_and_not_taken_from_what_servers_say(name):
    url = f"http://gw/{name}/v1"
    assert shown(url) == url and secrets(url) == []


@pytest.mark.parametrize("key", KEYS.split())
def test_what_looks_like_a_key_is_hidden_and_told_from_others(key):
    url = f"http://gw/{key}/v1"
    assert key not in shown(url) and key in secrets(url)
    assert shown(url) != shown(f"http://gw/{key}a/v1")


def test_random_keys_of_many_shapes_are_hidden():
    draw = random.Random(0)
    for letters, length in ((string.hexdigits[:16], 32), (string.ascii_letters + string.digits + "-_", 43)):
        keys = ["".join(draw.choices(letters, k=length)) for _ in range(2000)]
        assert [key for key in keys if key in shown(f"http://gw/{key}/v1")] == []


def test_what_is_hidden_is_known_in_both_spellings():
    assert secrets(f"http://h/v1/a%2F{TOKEN}/x/sk-long") == [f"a%2F{TOKEN}", f"a/{TOKEN}", "sk-long"]


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
    "http://b\u00fc..h/key=k",
    "http://\u2603\u00fc_.h/key=k",
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
    with pytest.raises(EngineStopped, match=r"no server answers at http://127.0.0.1:\d+/\*\*\*d7ed30/v1") as down:
        asyncio.run(ask(url))
    assert TOKEN not in str(stop.value) + str(down.value) + caplog.text
