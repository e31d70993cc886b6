"""Whole runs: against a real HTTP server, with every fault between documents and pairs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.loop.openai_server import OpenAIServer, Reply, answer, sentence
from longpo_ops.data import ChatFormat, read_pairs
from longpo_ops.engines import EngineStopped
from longpo_ops.generate import GenerateRun, generate, generate_and_summarise
from longpo_ops.generate.report import values_of
from longpo_ops.runs.journal import Shard
from tests.engines import tiny
from tests.processes import SMALL_FILES, Started

pytestmark = pytest.mark.usefixtures("short_pauses")

ROOT = Path(__file__).parents[2]
REQUESTS = 4 * 4 * 3  # documents, chunks, and the pool, chosen and rejected answer of each


@pytest.fixture
def whole(settings, tmp_path) -> Path:
    """The folder of a run that nothing disturbed."""
    with OpenAIServer() as server:
        run = settings(endpoints=(server.url,), out=str(tmp_path / "whole"))
        generate(run)
        assert len(server.seen) == REQUESTS
    return tmp_path / "whole"


def files(folder: Path) -> dict[str, bytes]:
    """What a run leaves for training, and its receipts."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix in (".jsonl", ".json")}


def prompt(seen) -> str:
    return seen.body["messages"][0]["content"]


def begin(run: GenerateRun, before: str = "", **kwargs) -> Started:
    """The run in a process of its own, behind other code."""
    script = before + (
        "import json, sys\n"
        "from longpo_ops.generate import GenerateRun, generate\n"
        "settings = json.loads(sys.argv[1])\n"
        "settings['documents'], settings['endpoints'] = tuple(settings['documents']), tuple(settings['endpoints'])\n"
        "try:\n"
        "    generate(GenerateRun(**settings))\n"
        "except (OSError, ValueError) as error:\n"
        "    sys.exit(f'{type(error).__name__}: {error}')\n"
    )
    return Started(script, json.dumps(vars(run) | kwargs))


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


# -- what a run makes --------------------------------------------------------------------------------------------------


def test_pairs_follow_the_method_and_tokenise(settings, tokenizer, tmp_path, documents):
    with OpenAIServer() as server:
        result = generate(settings(endpoints=(server.url,)))
    pairs, texts = list(read_pairs(tmp_path / "pairs")), [path.read_text() for path in sorted(documents.iterdir())]
    assert [pair.document for pair in pairs] == texts
    chat = ChatFormat(tokenizer, max_length=1024)
    for pair in pairs:
        assert len(pair.turns) == 4 and pair.provenance["source"].startswith("report-")
        spans = [pair.document[begin:end] for begin, end in pair.provenance["chunks"]]
        assert [turn.chunk for turn in pair.turns] == spans
        for turn in pair.turns:
            assert turn.chosen == sentence(f"{turn.chunk}\n\n{turn.instruction}")  # greedy, from the chunk
            assert turn.rejected == (sentence(f"{pair.document}\n\n{turn.instruction}"),)  # each question on its own
            assert sum(question in turn.instruction for question in tiny_questions()) == 1
        assert chat.tokenize(pair).length <= 1024
    instructions = {turn.instruction for pair in pairs for turn in pair.turns}
    assert len(instructions) > 8  # questions and lead-ins vary
    assert result.listing.selected == 4 and result.tally.requests == REQUESTS == len(server.seen)
    asked = [seen.body for seen in server.seen]
    assert {(b["temperature"], b["top_p"], b["max_tokens"]) for b in asked} == {(0.7, 0.9, 80), (0.0, 1.0, 24)}
    assert len({b.get("seed") for b in asked if b["temperature"]}) == 16


def tiny_questions():
    from benchmarks.loop.openai_server import QUESTIONS

    return QUESTIONS


def test_documents_of_names_that_are_no_utf_8_become_pairs(settings, tmp_path, documents):
    names = {"report-00.md": b"r\xff\xfe.md", "report-01.md": b"r\n\x1b[2J.md"}
    (tmp_path / "odd").mkdir()
    for given, name in names.items():
        shutil.copy(documents / given, os.fsencode(tmp_path / "odd") + b"/" + name)
    (tmp_path / os.fsdecode(b"odd/\xe9.bin")).write_bytes(b"\0")
    with OpenAIServer() as server:
        run = settings(
            endpoints=(server.url,), documents=(str(tmp_path / "odd"),), out=str(tmp_path / os.fsdecode(b"o\xff"))
        )
        _, summary = generate_and_summarise(run)
    found = {pair.provenance["source"] for pair in read_pairs(run.out)}
    assert summary["pairs"] == 2 and found == {r"r\xff\xfe.md", r"r\n\x1b[2J.md"}
    kept = json.loads(Path(run.out, "summary.json").read_text(encoding="utf-8"))
    assert kept["listing"]["first_left_out"] == {"binary file": r"\xe9.bin"}
    assert r"binary file (first: \xe9.bin)" in Path(run.out, "summary.html").read_text(encoding="utf-8")


def test_the_first_reader_of_a_document_runs_ahead_of_the_others(settings, documents):
    texts = [path.read_text() for path in sorted(documents.iterdir())]
    under_way: dict[str, int] = {}
    answered: set[str] = set()
    crowded = []

    def behave(number, seen):
        for text in texts:
            if prompt(seen).startswith(text):
                crowded.append(under_way.get(text, 0) > 0 and text not in answered)
                under_way[text] = under_way.get(text, 0) + 1
                threading.Timer(0.04, answered.add, [text]).start()
        return Reply(wait=0.05)

    with OpenAIServer(behave) as server:
        generate(settings(endpoints=(server.url,), concurrency=64))
        assert len(crowded) == 16 and not any(crowded) and server.most_at_once > 8


def test_no_more_requests_than_wanted_are_under_way(settings):
    with OpenAIServer(latency=0.02) as server:
        generate(settings(endpoints=(server.url,), concurrency=3))
        assert server.most_at_once == 3


def test_reference_log_probs_are_those_of_the_answers_alone(settings, tokenizer, tmp_path):
    with OpenAIServer() as server:
        generate(settings(endpoints=(server.url,), reference_logps=True, max_documents=1))
        (pair,) = read_pairs(tmp_path / "pairs")
        tokenized = ChatFormat(tokenizer).tokenize(pair)

        def total(sequences):
            return sum(-0.5 - (token % 7) / 8 for sequence in sequences for token in sequence.answer_ids.tolist())

        assert pair.ref_chosen_logp == pytest.approx(total(tokenized.ref_chosen), abs=1e-9)
        assert pair.ref_rejected_logps == pytest.approx((total(tokenized.ref_rejected[0]),), abs=1e-9)
        asked = len(server.seen)
        generate(settings(endpoints=(server.url,), reference_logps=True, max_documents=1))
        assert len(server.seen) == asked


@pytest.mark.parametrize("bad", [None, float("nan"), -float("inf"), 2.0])
def test_a_pair_whose_log_probs_are_none_has_none_and_is_counted(bad, settings, tmp_path):
    scored = []

    def behave(number, seen):
        if "prompt" not in seen.body:
            return None
        scored.append(seen)
        values = [None, *(-0.5 for _ in seen.body["prompt"][1:]), -0.5]
        values[-3] = bad if len(scored) == 2 else -0.5
        return Reply(200, {"choices": [{"text": "", "logprobs": {"token_logprobs": values}}]})

    with OpenAIServer(behave) as server:
        result, summary = generate_and_summarise(
            settings(endpoints=(server.url,), reference_logps=True, max_documents=2, concurrency=1)
        )
    spoilt, good = sorted(read_pairs(tmp_path / "pairs"), key=lambda pair: pair.ref_chosen_logp is not None)
    assert spoilt.ref_chosen_logp is spoilt.ref_rejected_logps is None and good.ref_chosen_logp < 0
    assert summary["left_out"] == {"no reference log-probs": 1} and summary["pairs"] == 2
    told = dict(values_of(result, summary))
    assert told["pairs with no reference log-probs"] == "1" and "no log-probs: number" in told["last failed request"]
    text = b"".join(path.read_bytes() for path in (tmp_path / "pairs").rglob("*.json*"))
    assert b"NaN" not in text and b"Infinity" not in text


def test_a_number_that_is_none_in_a_journal_is_asked_again(tmp_path):
    shard = Shard(tmp_path / "0.journal", 0)
    shard.record("d", "one", [-1.5, -0.5])
    with pytest.raises(ValueError, match="Out of range"):
        shard.record("d", "two", float("nan"))
    shard.close()
    with open(tmp_path / "0.journal", "a") as file:
        file.write('{"document": "d", "step": "two", "value": [NaN, -Infinity]}\n')
        file.write('{"document": "d", "step": "three", "value": -2.5}\n')
    shard = Shard(tmp_path / "0.journal", 0)
    assert [shard.result("d", step) for step in ("one", "two", "three")] == [[-1.5, -0.5], None, -2.5]
    shard.close()


def test_other_servers_texts_and_ends_make_the_same_pairs(settings, whole, tmp_path):
    def behave(number, seen):
        reply = answer(seen)
        content = reply["choices"][0]["message"].pop("content")
        thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm, [{'type'}]"}]}
        reply["choices"][0]["message"]["content"] = [thought, {"type": "text", "text": content}]
        reply["choices"][0]["finish_reason"] = ("eos_token", "STOP", "end_turn")[number % 3]
        return Reply(200, reply)

    with OpenAIServer(behave) as server:
        generate(settings(endpoints=(server.url,)))
    pairs = [sorted(read_pairs(folder), key=lambda pair: pair.id) for folder in (whole, tmp_path / "pairs")]
    assert pairs[0] == pairs[1]


def test_an_answer_that_a_filter_ended_is_counted_as_that(settings):
    def behave(number, seen):
        reply = answer(seen)
        reply["choices"][0]["finish_reason"] = "content_filter" if len(prompt(seen)) > 1200 else "stop"
        return Reply(200, reply)

    with OpenAIServer(behave) as server:
        result = generate(settings(endpoints=(server.url,), max_documents=1))
    assert result.outcomes[0]["counts"] == {"the answer ended with content_filter": 4} and not result.made


def test_what_is_filtered_is_counted_by_reason(settings, tmp_path):
    def answered(text, finish="stop"):
        return Reply(200, {"choices": [{"message": {"content": text}, "finish_reason": finish}]})

    bad = [
        ("I'm sorry, but I cannot say more about that.", "stop", "chosen: refusal"),
        ("again and again " * 9, "stop", "chosen: repetitive"),
        ("Yes.", "stop", "chosen: near-empty"),
        (None, "stop", "chosen: empty"),
        ("The wind turns and", "length", "chosen: cut off"),
        ("The boats <|end|> return at noon.", "stop", "an answer holds a special token"),
    ]
    counts = {}
    for text, finish, reason in bad:
        chunk_answer = answered(text, finish)

        def behave(number, seen, reply=chunk_answer):
            return reply if len(prompt(seen)) < 800 and "numbered list" not in prompt(seen) else None

        with OpenAIServer(behave) as server:
            result = generate(settings(endpoints=(server.url,), max_documents=1, out=str(tmp_path / reason)))
        counts[reason] = result.outcomes[0]["counts"]
        assert list(tmp_path.glob(f"{reason}/*.jsonl")) == []
    assert counts == {reason: {reason: 4} for *_, reason in bad}


def test_an_unparsable_list_skips_the_chunk(settings, tmp_path):
    no_list = Reply(200, {"choices": [{"message": {"content": "1. Why?\n2. No."}, "finish_reason": "stop"}]})
    with OpenAIServer(lambda number, seen: no_list if number in (2, 5) else None) as server:
        result = generate(settings(endpoints=(server.url,), max_documents=1, concurrency=1))
        assert result.outcomes[0]["counts"] == {"questions: too few": 1} and len(server.seen) == 11
    (pair,) = read_pairs(tmp_path / "pairs")
    assert len(pair.turns) == 3


def test_an_engine_that_fails_for_one_chunk_costs_that_chunk(settings, documents, tmp_path):
    text = sorted(documents.iterdir())[0].read_text()
    chunk = text[: text.index("## Part 2")]

    def behave(number, seen):
        return Reply(500, b"") if prompt(seen).startswith(chunk[:60]) and "numbered list" in prompt(seen) else None

    with OpenAIServer(behave, latency=0.02) as server:
        result = generate(settings(endpoints=(server.url,), concurrency=2, chunks=16, min_chunk=32, answer_tokens=8,
                                   question_tokens=16))  # fmt: skip
    assert sum(outcome["counts"].get("the engine failed", 0) for outcome in result.outcomes) == 1
    assert "500" in result.tally.last_failure
    assert len(list(read_pairs(tmp_path / "pairs"))) == 4


# -- stopped and started -----------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_bytes(settings, whole, tmp_path):
    run = settings(endpoints=("http://127.0.0.1:1",), concurrency=2)
    seen = []
    for kills in (7, 20, None):
        behave = lambda number, seen, last=kills: Reply(wait=300.0) if last and number > last else None  # noqa: E731
        with OpenAIServer(behave) as server:
            process = begin(replace(run, endpoints=(server.url,)))
            if kills is not None:
                wait_for(lambda server=server, last=kills: server.answered >= last)
                process.send_signal(signal.SIGKILL)
            _, error = process.communicate()
            assert process.returncode == (0 if kills is None else -signal.SIGKILL), error
            seen += [prompt(request) for request in server.seen]
    assert files(tmp_path / "pairs") == files(whole)
    assert len(set(seen)) == REQUESTS
    assert len(seen) <= REQUESTS + 2 * 2  # a kill loses at most the requests under way
    assert sorted(path.name for path in (tmp_path / "pairs/work").iterdir()) == ["00000.json", "lock"]


def test_a_torn_journal_and_a_kill_before_the_receipt_lose_nothing(settings, whole, tmp_path):
    with OpenAIServer(lambda number, seen: Reply(None) if number > 30 else None) as server:
        with pytest.raises(EngineStopped):
            generate(settings(endpoints=(server.url,), patience=0.3, concurrency=1))
        done = server.answered
    journal = tmp_path / "pairs/work/00000.journal"
    journal.write_bytes(journal.read_bytes() + b'{"document": "torn off in the mid')
    (tmp_path / "pairs/pairs-00000.jsonl").write_text("written before the receipt, by a run that was killed then")
    (tmp_path / "pairs/.pairs-00000.jsonl.99.partial").write_text("half")
    with OpenAIServer() as server:
        generate(settings(endpoints=(server.url,)))
        assert len(server.seen) == REQUESTS - done
        generate(settings(endpoints=(server.url,)))  # all is done
        assert len(server.seen) == REQUESTS - done
    assert files(tmp_path / "pairs") == files(whole)
    assert not list((tmp_path / "pairs").glob(".*"))


@pytest.mark.parametrize("full", ["journal", "pairs"])
def test_a_full_disk_stops_with_a_message_and_loses_nothing(full, settings, whole, tmp_path):
    limit = 6_000 if full == "journal" else (whole / "pairs-00000.jsonl").stat().st_size - 1  # no file grows beyond
    with OpenAIServer() as server:
        process = begin(settings(endpoints=(server.url,)), SMALL_FILES.format(limit))
        _, error = process.communicate()
        assert process.returncode == 1 and "OSError" in error and "File too large" in error
        kept = (tmp_path / "pairs/work/00000.journal").read_bytes()
        assert kept.endswith(b"}\n") and not (tmp_path / "pairs/pairs-00000.jsonl").exists()
        recorded = sum(b'"step"' in line for line in kept.splitlines())
        assert recorded == REQUESTS if full == "pairs" else 5 < recorded < REQUESTS
        before = len(server.seen)
        generate(settings(endpoints=(server.url,)))
        assert len(server.seen) - before == REQUESTS - recorded
    assert files(tmp_path / "pairs") == files(whole)


def test_ctrl_c_stops_at_once_and_the_run_goes_on_later(settings, whole, tmp_path):
    run = settings(endpoints=("http://127.0.0.1:1",))
    script = "import typer; from longpo_ops.generate import commands; typer.run(commands.generate)"
    command = ["--model", run.model, "--documents", run.documents[0], "--out", run.out]
    for name in ("length", "min_document", "min_chunk", "max_chunk", "question_tokens", "answer_tokens", "concurrency"):
        command += ["--" + name.replace("_", "-"), str(getattr(run, name))]
    with OpenAIServer(lambda number, seen: Reply(wait=300.0) if number > 12 else None) as server:
        process = Started(script, *command, "--endpoint", server.url)
        wait_for(lambda: len(server.seen) == 12 + run.concurrency)  # nothing else is under way: twelve answers are kept
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
        assert process.returncode == 130 and "run the same command again to go on" in " ".join(error.split())
    with OpenAIServer() as server:
        generate(settings(endpoints=(server.url,)))
        assert len(server.seen) <= REQUESTS - 12
    assert files(tmp_path / "pairs") == files(whole)


def test_a_server_that_dies_and_another_that_takes_over(settings, whole, tmp_path):
    with OpenAIServer() as two:
        one = OpenAIServer(lambda number, seen: Reply(None) if number > 5 else None, latency=0.01)
        with one:
            generate(settings(endpoints=(one.url, two.url), concurrency=2))
            assert one.answered + two.answered == REQUESTS and one.answered == 5
    assert files(tmp_path / "pairs") == files(whole)


def test_more_documents_join_a_run_that_was_finished(settings, tmp_path):
    folder = tiny.write_documents(tmp_path / "growing", 2)
    run = dict(documents=(str(folder),))
    with OpenAIServer() as server:
        generate(settings(endpoints=(server.url,), **run))
        before = (tmp_path / "pairs/pairs-00000.jsonl").read_bytes()
        (folder / "another.md").write_text(tiny.document(9))
        generate(settings(endpoints=(server.url,), **run))
        assert len(server.seen) == 3 * 12
    assert (tmp_path / "pairs/pairs-00000.jsonl").read_bytes() == before
    assert [len(list(read_pairs(tmp_path / f"pairs/pairs-0000{i}.jsonl"))) for i in (0, 1)] == [2, 1]


def test_a_document_that_vanished_keeps_its_shard_open(settings, tmp_path):
    folder = tiny.write_documents(tmp_path / "shrinking", 3)
    with OpenAIServer(lambda number, seen: Reply(None) if number > 30 else None) as server:
        with pytest.raises(EngineStopped):
            generate(settings(endpoints=(server.url,), documents=(str(folder),), patience=0.3, concurrency=2))
        done = server.answered
    away = (folder / "report-02.md").rename(tmp_path / "report-02.md")
    with OpenAIServer() as server:
        result = generate(settings(endpoints=(server.url,), documents=(str(folder),)))
        assert result.missing == 1 and len(list(read_pairs(tmp_path / "pairs"))) == 2
        away.rename(folder / "report-02.md")
        result = generate(settings(endpoints=(server.url,), documents=(str(folder),)))
        assert result.missing == 0 and len(list(read_pairs(tmp_path / "pairs"))) == 3
        assert done + len(server.seen) == 3 * 12


# -- refused -----------------------------------------------------------------------------------------------------------


def test_a_run_that_made_nothing_leaves_the_folder_to_other_settings(settings, tmp_path):
    with OpenAIServer() as server:
        pass
    with pytest.raises(ConnectionError, match="no server answers"):
        generate(settings(endpoints=(server.url,), patience=0.5))
    with OpenAIServer() as server:
        assert generate(settings(endpoints=(server.url,), seed=1)).outcomes
        with pytest.raises(ValueError, match=r"begun with other settings .seed was 1, is 0"):
            generate(settings(endpoints=(server.url,)))
        shutil.rmtree(tmp_path / "pairs/work")
        with pytest.raises(ValueError, match="begun with other settings"):
            generate(settings(endpoints=(server.url,)))


def test_a_folder_holds_one_run(settings, whole, tmp_path):
    with OpenAIServer() as server:
        with pytest.raises(ValueError, match=r"begun with other settings .seed was 0, is 1"):
            generate(settings(endpoints=(server.url,), out=str(whole), seed=1))
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/notes.txt").write_text("x")
        with pytest.raises(ValueError, match="neither empty nor the folder of a run"):
            generate(settings(endpoints=(server.url,), out=str(tmp_path / "mine")))
        with pytest.raises(ValueError, match=r"notes.txt is a file; expected a folder"):
            generate(settings(endpoints=(server.url,), out=str(tmp_path / "mine/notes.txt")))
        with OpenAIServer(latency=30.0) as slow:
            process = begin(settings(endpoints=(slow.url,)))
            wait_for(lambda: len(slow.seen) > 0)
            with pytest.raises(ValueError, match="another run is at work"):
                generate(settings(endpoints=(server.url,)))
            process.kill()
            process.communicate()
        assert server.seen == []


def test_no_key_no_address_and_no_path_of_this_machine_is_recorded(settings, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    caplog.set_level(0)
    with OpenAIServer(lambda number, seen: Reply(500, b"sk-secret") if number == 1 else None) as server:
        generate(settings(endpoints=(server.url,), max_documents=1))
    written = b"".join(path.read_bytes() for path in (tmp_path / "pairs").rglob("*") if path.is_file())
    assert b"report-00.md" in written
    for secret in ("sk-secret", str(server.port), str(tmp_path), str(ROOT)):
        assert secret.encode() not in written
    assert "sk-secret" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "magic"}, "engine 'magic'; expected one of"),
        ({"engine": "server"}, "expected endpoints for 'server' only"),
        ({"length": 0}, "length is 0; expected more than 0"),
        ({"max_repeated": 90.0}, "max_repeated is 90.0; expected a share from 0 to 1"),
        ({"temperature": float("nan")}, "temperature=nan: expected a finite number"),
        (
            {"long_endpoints": ("http://u:p@h",), "endpoints": ("http://h",)},
            "long_endpoints: the one at h holds a user",
        ),
        ({"top_p": 0.0}, "top_p 0.0; expected >= 0, and above 0"),
        ({"min_chunk": 200}, "chunks of 200 to 128 tokens; expected 0 < min_chunk"),
        ({"documents": ("nowhere",)}, "no documents at nowhere"),
        ({"rope": {"rope_theta": 1e7}, "endpoints": ("http://h",)}, "vllm serve --hf-overrides"),
        ({"rope": {"rope_theta": 1e7}, "reference_logps": True}, "the reference keeps its own RoPE"),
        ({"max_document": 608, "min_document": 607, "endpoints": ()}, "no document was selected. 0 of 4 documents"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, settings):
    with pytest.raises(ValueError, match=message), OpenAIServer() as server:
        if changes.get("endpoints") == ():
            changes = changes | {"endpoints": (server.url,)}
        generate(settings(**changes))


def test_progress_is_told(settings):
    told = []
    with OpenAIServer() as server:
        generate(settings(endpoints=(server.url,)), lambda *args: told.append(args[:3]))
        assert [documents for _, documents, _ in told] == [1, 2, 3, 4] and told[-1][::2] == (1.0, 4)
        generate(settings(endpoints=(server.url,)), lambda *args: told.append(args[:3]))
        assert told[-1] == (1.0, 4, 0)
