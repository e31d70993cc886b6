"""What a generation costs beside its engine, and listing: wall time against a server whose answers take a fixed time.

    busy   = requests * latency / concurrency        what the engine needs if it is never left waiting
    beside = 1 - busy / wall                         reading, tokenising, parting, HTTP, journal, pairs, start and end

The server is a process of its own on 127.0.0.1. The number of requests and the time are bounded by the options.

    python -m benchmarks.loop.generate [--documents 192] [--tokens 8192] [--latency 1.0] [--listed 10000]

Not covered: the engine itself, and what the pairs are worth. Not covered: the engine itself, and what the pairs are
worth.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..stamp import ROOT, stamp

CONCURRENCY = 64
WORDS = ("harbour", "wind", "boat", "log", "bell", "pier", "lamp", "net", "tide", "captain", "rope", "sail", "storm")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--latency", type=float, default=1.0)
    parser.add_argument("--listed", type=int, default=10_000)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        from tests.engines.tiny import make_tokenizer

        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(f"{folder}/model")
        results = {"generation": generation(Path(folder), options), "listing": listing(Path(folder), options.listed)}
    print(json.dumps(stamp(options=vars(options), results=results), indent=1))


def write(folder: Path, count: int, words: int) -> Path:
    """Documents of so many words, in sections and paragraphs."""
    rng = random.Random(0)
    for number in range(count):
        part = folder / f"{number // 1000}"
        part.mkdir(parents=True, exist_ok=True)
        paragraphs = [" ".join(rng.choices(WORDS, k=40)).capitalize() + "." for _ in range(words // 40)]
        sections = [f"# Part {i}\n\n" + "\n\n".join(paragraphs[i : i + 10]) for i in range(0, len(paragraphs), 10)]
        (part / f"{number}.md").write_text("\n\n".join(sections))
    return folder


def generation(folder: Path, options: argparse.Namespace) -> dict:
    """Documents to pairs against the server."""
    from longpo_ops.generate import GenerateRun, generate

    documents = write(folder / "long", options.documents, int(options.tokens * 0.3))
    command = [sys.executable, "-m", "benchmarks.loop.openai_server", "0", str(options.latency)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().strip()
        run = GenerateRun(
            str(folder / "model"),
            (str(documents),),
            2 * options.tokens,
            str(folder / "pairs"),
            engine="server",
            endpoints=(url,),
            concurrency=CONCURRENCY,
            min_document=options.tokens // 4,
            max_chunk=options.tokens // 8,
        )
        run.load_tokenizer()  # imports are not counted
        used, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        result = generate(run)
        wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
        server.stdin.close()
        told = json.loads(server.stdout.readline())
    busy = told["requests"] * options.latency / CONCURRENCY
    lengths = [outcome["lengths"]["document"][0] for outcome in result.outcomes]
    return {
        "requests": told["requests"],
        "pairs": sum(outcome["pairs"] for outcome in result.outcomes),
        "mean_document_tokens": sum(lengths) / len(lengths),
        "most_at_once": told["most"],
        "wall_s": wall,
        "engine_s": busy,
        "beside_share": 1 - busy / wall,
        "cpu_s": after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime,
    }


def listing(folder: Path, count: int) -> dict:
    """Documents listed and parted, nothing asked, in a process of its own, whose memory is measured."""
    documents = write(folder / "many", count, 400)
    script = (
        "import sys, time\n"
        "from transformers import AutoTokenizer\n"
        "from longpo_ops.documents import Listing, find_files\n"
        "from longpo_ops.generate import GenerateRun, select\n"
        "from longpo_ops.runs.usage import peak_bytes\n"
        "bounds = dict(min_document=100, answer_tokens=64, question_tokens=64, max_chunk=128)\n"
        "run = GenerateRun(sys.argv[1], (sys.argv[2],), 4096, 'o', **bounds)\n"
        "tokenizer, found, began = AutoTokenizer.from_pretrained(run.model), Listing(), time.monotonic()\n"
        "tasks = select(run, find_files(run.documents), tokenizer, found)\n"
        "chunks = tokens = 0\n"
        "for task in tasks:\n"
        "    chunks, tokens = chunks + len(task.chunks), tokens + task.tokens\n"
        "print(found.selected, chunks, tokens, time.monotonic() - began, peak_bytes())\n"
    )
    command = [sys.executable, "-c", script, str(folder / "model"), str(documents)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    selected, chunks, tokens, seconds, peak = map(float, done.stdout.split())
    return {"documents": selected, "chunks": chunks, "tokens": tokens, "seconds": seconds, "peak_bytes": peak}


if __name__ == "__main__":
    main()
