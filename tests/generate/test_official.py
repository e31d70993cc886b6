"""The official recipe, whole: its records are those of a plain script (published.py) over 200 documents, field by field.

The model is made: what it says is a function of the message, in fixed proportions good and bad.
"""

from __future__ import annotations

import asyncio
import gzip
import random
from collections import Counter
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from benchmarks.loop.openai_server import WORDS
from longpo_ops.data import read_pairs
from longpo_ops.engines import Completion, Engine, Request
from longpo_ops.generate import GenerateRun, generate_and_summarise
from longpo_ops.generate import prompts as wording
from longpo_ops.train.run import TrainRun
from tests.generate.published import official_records

PROMPTS = Path(wording.__file__).with_name("prompts") / "official"
REFUSALS = (PROMPTS / "refusals.txt").read_text().splitlines()
SIZES = {"document": 150, "target": 900, "chunk": 80, "longest": 150}
DOCUMENTS, SEED = 200, 5


# -- the documents -----------------------------------------------------------------------------------------------------


def words(draw: random.Random, count: int) -> str:
    """A sentence of words that hardly ever come in the same order again."""
    return " ".join(draw.choice(WORDS) for _ in range(count)).capitalize() + "."


def prose(draw: random.Random, i: int) -> str:
    """Paragraphs, few or many; some too long for a chunk, some that end what was gathered too early."""
    lengths = {0: (40, 60), 1: (3, 8)}.get(i % 12, (3, 24))  # all too long, all short, mixed
    parts = [words(draw, draw.randint(*lengths)) for _ in range(draw.choice((6, 9, 12, 15, 18)))]
    return "".join(part + draw.choice(("\n\n", "\n\n\n", "\n\n \t\n\n", "\n", "\n \n")) for part in parts)


def latex(draw: random.Random, i: int) -> str:
    """Sections of several paragraphs behind a preamble; one in eight documents has none."""
    text = f"\\documentclass{{article}}\n\n{words(draw, 12)}\n\n"
    for _ in range(draw.choice((4, 8, 12))):
        title = draw.choice(("\\section{", "\\SubSection{", "\\subsubsection{", "\\section*{"))
        title = "\\paragraph{" if i % 40 == 3 else title
        text += f"{title}{words(draw, 2)}}}\n" + "\n\n".join(words(draw, draw.randint(3, 9)) for _ in "ab") + "\n"
    return text


def write_documents(folder: Path) -> Path:
    folder.mkdir()
    for i in range(DOCUMENTS):
        draw = random.Random(i)
        if i % 5 == 3:
            text, suffix = latex(draw, i), (".tex", ".tex.gz")[i % 2]
        else:
            text, suffix = prose(draw, i), (".txt", ".md")[i % 2]
        data = text.encode()
        (folder / f"{i:03}{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    return folder


# -- the model ---------------------------------------------------------------------------------------------------------


def say(content: str) -> tuple[str, str, str]:
    """What the model answers to a message: its kind, the text, and how it ends."""
    draw, question = random.Random(content), content.rpartition("\n\n")[2]
    if content.endswith('up to "4:".'):
        kinds = lists(draw)
    elif random.Random(question).random() < 0.1:  # the same from the chunk and from the whole
        return "equal", words(random.Random(question), 12), "stop"
    else:
        kinds = answers(draw)
    kind = draw.choice([name for name in kinds for _ in range(6 if name.startswith("good") else 1)])
    return kind, *kinds[kind]


def lists(draw: random.Random) -> dict[str, tuple[str, str]]:
    questions = [words(draw, 5)[:-1] + "?" for _ in range(6)]
    good = "\n".join(f"{i}: {question}" for i, question in enumerate(questions[:4], 1))
    kinds = {
        "good": good,
        "good, dressed": "Here they are.\n\n" + good.replace("\n", "\n\n**").replace(": ", ".** ## ") + " **\n",
        "good, several lines": good.replace(" ", "\n") + "\n",
        "good, other numbers": good.replace("4: ", "7 - ").replace("1: ", "1) No.\n0! "),
        "good, cut off": good[:-9],
        "blank line in two questions": good.replace("?\n2", "\n\nWhy?\n2").replace("?\n3", "\n\nWho?\n3"),
        "three": good[: good.index("\n4")],
        "five": good + f"\n5: {questions[4]}",
        "cut off in the third": good[: good.index("3:") + 9],
        "a year": good.replace("?\n2", " in 1984. Or not?\n2"),
        "a year at the end": good.replace("?\n2", " in 1984?\n2"),
        "a year in the place of the fourth": good.replace("?\n2", " in 1914-18 or so?\n2")[: -len(questions[3]) - 4],
        "no numbers": "\n".join(questions),
        "nothing": "",
    }
    return {kind: (text, "length" if "cut off" in kind else "stop") for kind, text in kinds.items()}


def answers(draw: random.Random) -> dict[str, tuple[str, str]]:
    once = [f"{word}{i}" for i, word in enumerate(WORDS)]
    return {
        "good": (words(draw, 12), "stop"),
        "good, with spaces around": (f" \n{words(draw, 12)}\n\n", "stop"),
        "cut off": (words(draw, 14)[:-3], "length"),
        "stopped by a filter": (words(draw, 14), "content_filter"),
        "refusal": (f"{words(draw, 5)} {draw.choice(REFUSALS).capitalize()}: {words(draw, 4)}", "stop"),
        "repeated, 36 of 40": (" ".join(once[:9] * 4 + once[9:13]), "stop"),
        "repeated, 37 of 40": (" ".join([*once[:9] * 4, once[0], *once[9:12]]), "length"),
        "repeated, 38 of 40": (" ".join([*once[:9] * 4, *once[:2], *once[9:11]]), "stop"),
        "repeated, 39 of 40": (" ".join([*once[:9] * 4, *once[:3], once[9]]), "length"),
        "one long word": ("It is so, as he is in on Harbour_1.", "stop"),
        "two long words": ("It's so, as he is in on 128.", "stop"),
        "signs": (" ... !?", "stop"),
        "empty": ("", "length"),
    }


class Made(Engine):
    """The made model as an engine; it keeps the requests."""

    concurrency = 8

    def __init__(self):
        self.requests: list[Request] = []

    async def _answer(self, request: Request) -> Completion:
        self.requests.append(request)
        await asyncio.sleep(0)
        _, text, finish = say(request.content)
        return Completion(text, finish, 1, 1)


def asked(request: Request) -> tuple[float, float, int]:
    return request.sampling.temperature, request.sampling.top_p, request.sampling.max_tokens


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> str:
    """The tokenizer with a token that begins every text: it counts once per paragraph."""
    folder = tmp_path_factory.mktemp("begins")
    begins = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", begins.convert_tokens_to_ids("<|user|>"))]
    )
    begins.save_pretrained(folder)
    return str(folder)


def test_the_records_are_those_of_a_plain_script(model, tmp_path, monkeypatch):
    folder, out, told = write_documents(tmp_path / "documents"), str(tmp_path / "pairs"), Counter()
    tokenizer, short, long = AutoTokenizer.from_pretrained(model), Made(), Made()

    def count(text: str, special: bool) -> int:
        return len(tokenizer(text, add_special_tokens=special)["input_ids"])

    def ask(content: str) -> str:
        kind, text, _ = say(content)
        told[kind] += 1
        return text

    expected = official_records(folder, count, ask, PROMPTS, SEED, SIZES)
    monkeypatch.setattr(
        GenerateRun, "make_engine", lambda run, length: {"http://short": short, "http://long": long}[run.endpoints[0]]
    )
    settings = dict(engine="server", endpoints=("http://short",), long_endpoints=("http://long",), seed=SEED)
    settings |= dict(min_document=SIZES["document"], min_chunk=SIZES["chunk"], max_chunk=SIZES["longest"])
    result, _ = generate_and_summarise(GenerateRun(model, (str(folder),), SIZES["target"], out, "official", **settings))
    records = [
        {
            "prompt": pair.document,
            "short_prompts": [turn.chunk for turn in pair.turns],
            "questions": [turn.instruction for turn in pair.turns],
            "chosens": [turn.chosen for turn in pair.turns],
            "rejecteds": [rejected for turn in pair.turns for rejected in turn.rejected],
        }
        for pair in read_pairs(out, allow_equal=True)
    ]
    assert records == expected
    requests = short.requests + long.requests
    assert len(requests) == told.total()  # nothing was asked that the script does not ask
    assert not any("\n\n\n" in request.content for request in short.requests)  # chunks alone, at the model's own RoPE
    assert {asked(request) for request in long.requests} == {(1.0, 1.0, 1024)}
    assert {asked(request) for request in short.requests} == {(0.7, 0.9, 1024), (1.0, 1.0, 1024)}
    assert len({request.sampling.seed for request in requests}) == len(requests)
    # What the comparison went through:
    assert set(told) == {*lists(random.Random()), *answers(random.Random()), "equal"}
    assert {1, 2, 3, 5} <= {record["prompt"].count("\n\n\n") + 1 for record in records}
    assert set(result.listing.skipped) == {"shorter than wanted", "longer than the target", "shorter than one chunk"}
    wrong = [
        f"{which}: {why}"
        for why in ("empty", "near-empty", "refusal", "repetitive")
        for which in ("chosen", "rejected")
    ]
    counted = {reason for outcome in result.outcomes for reason in outcome["counts"]}
    assert counted == {"unparsable question list", "blank line in the question", *wrong}
    assert {len(record["questions"]) for record in records} == {1, 2}
    assert any(record["chosens"] == record["rejecteds"] for record in records)
    run = TrainRun(model, out, str(tmp_path / "run"), recipe="official")  # which takes these, too
    assert len(run.load_pairs(out, tokenizer, len(tokenizer))) == len(records)
