"""Whole evaluations: with a real model in the transformers engine, and with every fault against a real HTTP server."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.engines import EngineStopped, Request, Sampling
from longpo_ops.engines import server as server_engine
from longpo_ops.engines.transformers import TransformersEngine
from longpo_ops.evaluate import EvaluateRun, Scores, Texts, evaluate, load_tasks, make_samples
from longpo_ops.evaluate.report import KILLED
from longpo_ops.evaluate.samples import score
from longpo_ops.runs.locks import Lock, holder
from tests.processes import killed_once
from tests.processes import run as run_process

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(server_engine, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(server_engine, "LONGEST_PAUSE", 0.1)


def measured(scores: Scores) -> Scores:
    """All but the time it took."""
    return replace(scores, seconds=0.0)


def answers(out: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "answers.jsonl").read_text().splitlines()]


def asked(run: EvaluateRun) -> int:
    """Answers in the journal of a run."""
    journal = Path(run.out) / "work/00000.journal"
    return journal.read_bytes().count(b'"step"') if journal.exists() else 0


def run_killed(run: EvaluateRun, answers: int, before: str = "") -> int:
    """The run in a process of its own, killed once so many answers are kept; its exit code. before: code that goes first."""
    script = (
        "import json, sys\n"
        "from longpo_ops.evaluate import EvaluateRun, evaluate\n"
        "given = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()}\n"
        "evaluate(EvaluateRun(**given))\n"
    )
    kill = killed_once(Path(run.out) / "work/00000.journal", '"step"', answers)
    return run_process(kill + before + script, json.dumps(vars(run))).returncode


# -- what is measured --------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_models_own_answers(settings, world, model, tokenizer):
    told = []
    run = settings(tasks=("names", "begun"), lengths=(160, 96))
    scores = evaluate(run, lambda *args: told.append(args))
    load_tasks(world / "needles")
    texts = Texts((str(world / "text"),))
    made = {(t, n): make_samples(t, n, 6, tokenizer, texts=texts) for t in run.tasks for n in run.lengths}

    async def ask(samples) -> list[str]:
        requests = [Request(sample.prompt, Sampling(sample.max_tokens), prefill=sample.prefill) for sample in samples]
        return [answer.text for answer in await engine.batch(requests)]

    async def ask_all() -> dict:
        await engine.start()
        return {key: await ask(samples) for key, samples in made.items()}

    engine = TransformersEngine(str(model), length=160)
    for (task, length), replies in asyncio.run(ask_all()).items():
        samples = made[task, length]
        expected = [score(sample, text) for sample, text in zip(samples, replies)]
        assert scores.tasks[task][length].score == pytest.approx(sum(expected) / 6)
        kept = [row for row in answers(run.out) if (row["task"], row["length"]) == (task, length)]
        found = [tuple(row[name] for name in ("id", "depth", "answer", "score")) for row in kept]
        assert found == [(s.id, s.depth, text, value) for s, text, value in zip(samples, replies, expected)]
    values = [cell.score for cells in scores.tasks.values() for cell in cells.values()]
    assert 0 < sum(values) < len(values)  # it knows some and not all: the comparison says something
    assert not any(cell.comparable for cells in scores.tasks.values() for cell in cells.values())
    assert list(scores.tasks["names"]) == scores.lengths() == [96, 160]  # from the shortest on
    for length, tenths in scores.depths.items():
        assert sum(cell.samples for cell in tenths.values()) == 2 * 6
        total = sum(cell.score * cell.samples for cell in tenths.values())
        assert total == pytest.approx(12 * scores.accuracy(length))
    assert Scores.load(run.out) == scores and scores.complete and scores.notes == ()
    done = [tokens for tokens, _, _ in told]
    assert done == sorted(done) and told[-1][0] == told[-1][1] == 2 * 6 * (96 + 160)
    assert told[-1][2] == "begun, 160 tokens"


def test_a_killed_evaluation_goes_on_to_the_same_results(settings, world, tmp_path):
    given = dict(perplexity=(str(world / "held"),), perplexity_lengths=(64,), samples=12)
    whole = evaluate(settings(out=str(tmp_path / "whole"), **given))
    run = settings(**given)
    assert run_killed(run, 12 + 4) == -signal.SIGKILL  # the windows are the shortest
    kept, total = asked(run), 2 * 12 + 12
    assert 12 + 4 <= kept < total
    lock = Path(run.out) / "work/lock"  # results.json says that it runs, as the killed could not say anything else
    assert json.loads((Path(run.out) / "results.json").read_text())["state"] == "running"
    assert (Scores.load(run.out).state, Scores.load(run.out).why, holder(lock)) == ("stopped", KILLED, None)
    with Lock(lock):
        assert holder(lock).startswith("process ") and Scores.load(run.out).state == "running"
    calls, answer = [], TransformersEngine._answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "_answer", lambda *args: calls.append(1) or answer(*args))
        again = evaluate(run)
    assert len(calls) == total - kept
    assert measured(again) == measured(whole) and asked(run) == total
    assert answers(run.out) == answers(tmp_path / "whole")
    for name in ("results.json", "results.md"):
        first, second = ((folder / name).read_text() for folder in (Path(run.out), tmp_path / "whole"))
        assert [a for a, b in zip(first.splitlines(), second.splitlines(), strict=True) if a != b and "sec" not in a
                and "time" not in a] == []  # fmt: skip
    assert (Path(run.out) / "heatmap.png").read_bytes() == (tmp_path / "whole/heatmap.png").read_bytes()


def test_results_do_not_depend_on_the_order_of_answers(settings, tmp_path):
    found = []
    for name, concurrency in (("one", 1), ("many", 16)):
        with OpenAIServer(lambda number, seen: Reply(wait=(0.0, 0.06, 0.01, 0.04)[number % 4])) as server:
            given = dict(out=str(tmp_path / name), concurrency=concurrency, tasks=("niah_single_1", "names"))
            run = settings(endpoints=(server.url,), lengths=(700, 900), **given)
            found.append((measured(evaluate(run)), answers(run.out)))
            assert server.most_at_once > 1 or concurrency == 1
    assert found[0] == found[1]


def test_more_tasks_lengths_and_samples_ask_only_what_is_new(settings, tmp_path):
    with OpenAIServer() as server:
        evaluate(settings(endpoints=(server.url,)))
        assert len(server.seen) == 12
        evaluate(settings(endpoints=(server.url,)))
        assert len(server.seen) == 12
        more = evaluate(settings(endpoints=(server.url,), lengths=(96, 160, 300), samples=8, tasks=("names", "begun")))
        assert len(server.seen) == 12 + (3 * 8 * 2 - 12)
        fewer = evaluate(settings(endpoints=(server.url,), lengths=(300,)))
        assert len(server.seen) == 48 and fewer.lengths() == [300] and more.lengths() == [96, 160, 300]
        evaluate(settings(endpoints=(server.url,), seed=1))
        assert len(server.seen) == 60


def test_the_beginning_of_an_answer_can_end_the_message_instead(settings, tmp_path):
    bodies = []
    for prefill in (True, False):
        with OpenAIServer() as server:
            run = settings(endpoints=(server.url,), tasks=("begun",), prefill=prefill, out=str(tmp_path / str(prefill)))
            evaluate(run)
            bodies.append(sorted((seen.body["messages"] for seen in server.seen), key=str))
    for begun, (message,) in zip(*bodies):
        assert begun[1]["role"] == "assistant" and begun[1]["content"].startswith("By ")
        assert message["content"] == f"{begun[0]['content']}\n{begun[1]['content']}"


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_requests_that_fail_score_nothing_are_counted_and_asked_again(settings):
    def behave(number, seen):
        return Reply(400, {"error": "\x1b[31mtoo long"}) if number in (2, 5, 9) else None

    with OpenAIServer(behave) as server:
        some = evaluate(settings(endpoints=(server.url,), concurrency=1))
    cells = some.tasks["names"]
    assert (cells[96].failed, cells[160].failed, cells[96].samples) == (2, 1, 6)
    assert any("names at 96 tokens: 2 of 6 requests failed and score 0, last: " in note for note in some.notes)
    assert "\x1b" not in str(some.notes) and ", n=6, 2 failed" in (Path(settings().out) / "results.md").read_text()
    with OpenAIServer() as server:
        whole = evaluate(settings(endpoints=(server.url,)))
        assert len(server.seen) == 3 and whole.notes == () and whole.tasks["names"][96].failed == 0


def test_an_engine_that_is_gone_leaves_finished_lengths_readable(settings):
    with OpenAIServer(lambda number, seen: Reply(None) if number > 8 else None) as server:
        run = settings(endpoints=(server.url,), concurrency=1, patience=0.3)
        with pytest.raises(EngineStopped, match=r"no server has answered .* texts of 160 tokens were read"):
            evaluate(run)
    partial = Scores.load(run.out)
    assert not partial.complete and partial.lengths() == [96] and asked(run) == 8
    assert partial.state == "stopped" and "no server has answered" in partial.why
    assert "**Stopped: no server has answered" in (Path(run.out) / "results.md").read_text()
    with OpenAIServer() as server:
        assert evaluate(settings(endpoints=(server.url,))).complete and len(server.seen) == 4


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_a_length_that_does_not_fit_into_memory_is_named(error, settings, monkeypatch):
    generate = TransformersEngine._generate

    def short_of_memory(self, request):
        if len(request.content) > 400:
            raise error
        return generate(self, request)

    run = settings(samples=2, lengths=(96, 300))
    monkeypatch.setattr(TransformersEngine, "_generate", short_of_memory)
    with pytest.raises(ValueError, match=r"not enough memory to read 300 tokens .* leave out --length 300"):
        evaluate(run)
    assert Scores.load(run.out).lengths() == [96] and not Scores.load(run.out).complete
    assert evaluate(replace(run, lengths=(96,))).complete


def test_a_model_that_does_not_fit_is_named(settings, monkeypatch):
    def load(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TransformersEngine, "_load", load)
    with pytest.raises(ValueError, match="the model does not fit into memory for texts of 160 tokens"):
        evaluate(settings())
    bug = RuntimeError("some bug")
    monkeypatch.setattr(TransformersEngine, "_load", lambda self: None)
    monkeypatch.setattr(TransformersEngine, "_generate", lambda *args: (_ for _ in ()).throw(bug))
    with pytest.raises(RuntimeError, match="some bug"):  # no bug is taken for a lack of memory
        evaluate(settings())


def test_a_length_beyond_the_model_says_how_to_give_rope(settings):
    run = settings(lengths=(160, 4096), samples=1)
    with pytest.raises(ValueError, match=r"reads 1024 tokens, 4096 are wanted; .*--rope"):
        evaluate(run)
    assert evaluate(replace(run, rope={"rope_theta": 5e4}, lengths=(160, 1100), out=run.out + "-rope")).lengths() == [
        160,
        1100,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("names", "vtt")}, "no task 'vtt'; there are niah_single_1, .*your own"),
        ({"tasks": ("vt",)}, "needles: none of begun, names of .* is among the tasks"),
        ({"lengths": (16,)}, "names: 16 tokens are too few"),
        ({"needles": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({"perplexity": ("{world}/held",), "perplexity_lengths": (9999,)}, "no text is long enough"),
        ({"published": ("{world}/held/b.txt",)}, "b.txt"),
        ({"engine_options": {"a": 1}}, "the transformers engine has none"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(changes, message, settings, world, monkeypatch):
    monkeypatch.setattr(TransformersEngine, "_load", lambda self: pytest.fail("loaded"))
    filled = {k: tuple(str(v).format(world=world) for v in value) if k in ("perplexity", "published") else value
              for k, value in changes.items()}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        evaluate(settings(**filled))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples is 0; expected more than 0"),
        ({"lengths": ()}, "no lengths for tasks; expected"),
        ({"lengths": (64, -1)}, "lengths has -1; expected whole numbers"),
        ({"lengths": (64.0,)}, "lengths has 64.0; expected whole numbers"),
        ({"tasks": ()}, "nothing to evaluate; name tasks"),
        ({"tasks": (), "lengths": (), "perplexity": ("x",)}, "no lengths for perplexity"),
        ({"engine": "magic"}, "engine 'magic'; expected one of"),
        ({"short": "offical"}, "short is 'offical'; expected official, or none"),
        ({"harness": ("",)}, "harness has ''; expected TASK, TASK:SHOTS or TASK:SHOTS:METRIC"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluateRun(**{"model": "m", "out": "o", "lengths": (64,)} | changes)


def test_a_tokenizer_without_a_chat_template_is_refused(settings, model, world, tmp_path):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(model)
    bare.chat_template = None
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / name).symlink_to(model / name)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no chat template; use an instruction-tuned"):
        evaluate(settings(model=str(tmp_path / "bare")))
    held = dict(tasks=(), needles=None, perplexity=(str(world / "held"),), perplexity_lengths=(32,), samples=1)
    assert evaluate(settings(model=str(tmp_path / "bare"), **held)).perplexity  # it needs none


def test_a_folder_that_cannot_be_written_or_is_anothers(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(TransformersEngine, "_load", lambda self: pytest.fail("loaded"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file; expected a folder"):
        evaluate(settings(out=str(tmp_path / "file")))
    with pytest.raises(ValueError, match=r"file/below cannot be written to \(.*\); give another folder with --out"):
        evaluate(settings(out=str(tmp_path / "file/below")))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(ValueError, match="neither empty nor the folder of a run"):
        evaluate(settings(out=str(tmp_path / "mine")))


def test_a_folder_holds_one_models_answers(settings, model, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    run = settings(model=str(copy), samples=1, lengths=(96,))
    evaluate(run)
    with pytest.raises(ValueError, match=r"begun with other settings .rope was None"):
        evaluate(replace(run, rope={"rope_theta": 5e4}))
    weights = load_file(copy / "model.safetensors")
    save_file({name: value * 1.001 for name, value in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"begun with other settings .weights was"):  # trained on meanwhile
        evaluate(run)


def test_no_key_no_address_and_no_path_is_recorded(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with OpenAIServer(lambda number, seen: Reply(400, b"sk-secret") if number == 3 else None) as server:
        run = settings(endpoints=(server.url,), concurrency=1)
        evaluate(run)
    written = b"".join(path.read_bytes() for path in Path(run.out).rglob("*") if path.is_file())
    for secret in ("sk-secret", str(server.port), str(tmp_path), str(ROOT)):
        assert secret.encode() not in written
