"""vLLM's OpenAI server: two at once, one that stands still for a while, one killed in mid-run and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from longpo_ops.data import read_pairs
from longpo_ops.generate import generate

READY = 300.0  # seconds; most of it is spent on imports


class Served:
    """A vLLM server in processes of its own."""

    def __init__(self, model: Path):
        self._kept = (
            socket.socket()
        )  # nobody else is given its port, while a server that reuses addresses may listen there
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._kept.bind(("127.0.0.1", 0))
        self.port = self._kept.getsockname()[1]
        self.model, self.url = model, f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            self.model,
            "--port",
            self.port,
        ]
        command += ["--host", "127.0.0.1", "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "1024", "--enable-prompt-tokens-details"]
        self.process = subprocess.Popen([str(word) for word in command], start_new_session=True)

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + READY
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/models", timeout=5):
                return
            assert self.process.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(0.5)

    def signal(self, number: int) -> None:
        """To the server and the engine processes behind it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def servers(model):
    """Two that serve the same model."""
    found = [Served(model), Served(model)]
    for server in found:
        server.start()
    try:
        for server in found:
            server.wait()
        yield found
    finally:
        for server in found:
            server.kill()


@pytest.fixture(scope="module")
def truth(model, documents, tmp_path_factory):
    """(document, turns) of every pair that transformers makes: the questions are greedy too, so all engines agree."""
    from longpo_ops.generate import GenerateRun

    given = dict(min_document=256, min_chunk=48, max_chunk=128, question_tokens=80, answer_tokens=24, length=1024)
    given |= dict(model=str(model), documents=(str(documents),), out=str(tmp_path_factory.mktemp("truth") / "pairs"))
    given |= dict(prompts=str(model / "prompts"))
    generate(GenerateRun(**given, dtype="float32", temperature=0.0))
    return turns(given["out"])


def turns(folder) -> list:
    return [(pair.document, pair.turns) for pair in read_pairs(folder)]


def requests(folder: Path) -> int:
    """Finished requests in the journal of an unfinished run."""
    journal = folder / "work/00000.journal"
    return journal.read_bytes().count(b'"step"') if journal.exists() else 0


def test_two_servers_at_once(servers, truth, model, settings, tmp_path):
    urls = tuple(server.url for server in servers)
    result = generate(settings(model=str(model), endpoints=urls, temperature=0.0, timeout=120.0, reference_logps=True))
    assert turns(tmp_path / "pairs") == truth
    assert all(pair.ref_chosen_logp < 0 for pair in read_pairs(tmp_path / "pairs"))
    assert result.tally.cached_tokens > 0
    queries, hits = (sum_of(servers, f"vllm:prefix_cache_{counter}_total") for counter in ("queries", "hits"))
    assert all(queries) and sum(hits) > 0  # both worked, and prefills were shared


def sum_of(servers: list[Served], metric: str) -> list[float]:
    """A counter of each server."""
    found = []
    for server in servers:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        found.append(sum(float(line.split()[-1]) for line in lines if line.startswith(metric)))
    print(metric, found)
    return found


def test_a_server_that_stands_still_is_waited_for(servers, truth, model, settings, tmp_path):
    out = tmp_path / "pairs"

    def stop_for_a_while():
        while requests(out) < 5:
            time.sleep(0.02)
        servers[0].signal(signal.SIGSTOP)
        time.sleep(6)
        servers[0].signal(signal.SIGCONT)

    pause = threading.Thread(target=stop_for_a_while)
    pause.start()
    urls = tuple(server.url for server in servers)
    generate(settings(model=str(model), endpoints=urls, temperature=0.0, timeout=3.0, patience=120.0, concurrency=2))
    pause.join()
    assert turns(out) == truth


def test_a_server_killed_in_mid_run_and_started_again(servers, truth, model, settings, tmp_path):
    out, server, seen = tmp_path / "pairs", servers[1], []

    def kill_and_start():
        while requests(out) < 8:
            time.sleep(0.02)
        server.kill()
        seen.append(requests(out))
        server.start()
        server.wait()

    killer = threading.Thread(target=kill_and_start)
    killer.start()
    result = generate(
        settings(
            model=str(model), endpoints=(server.url,), temperature=0.0, timeout=60.0, patience=READY, concurrency=1
        )
    )
    killer.join()
    # 16 chunks: a list as JSON, which this model was never taught, the list in words, and two answers. Nothing twice.
    assert seen and 8 <= seen[0] < 64 == result.tally.requests
    assert turns(out) == truth
