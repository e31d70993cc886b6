"""Which documents and chunks a run of the generator takes (generate/run.py: select)."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from longpo_ops.documents import Listing, find_files
from longpo_ops.generate import GenerateRun, select, selection
from tests.engines import tiny

ROOT = Path(__file__).parents[2]


def selected(run: GenerateRun, tokenizer, **kwargs) -> tuple[list, Listing]:
    listing = Listing()
    return list(select(run, find_files(run.documents), tokenizer, listing, **kwargs)), listing


def test_documents_are_selected_by_tokens(settings, tokenizer, tmp_path):
    folder = tmp_path / "some"
    tiny.write_documents(folder, 2)
    (folder / "short.txt").write_text("Too short.")
    (folder / "short-too.txt").write_text(tiny.document(7)[:900])
    (folder / "blob.txt").write_text("QUJD" * 120)
    (folder / "twin.md").write_text(tiny.document(0))
    tasks, listing = selected(settings(documents=(str(folder),)), tokenizer)
    assert [task.document.source for task in tasks] == ["report-00.md", "report-01.md"]
    assert listing.skipped == {
        "shorter than wanted": 2, "shorter than one chunk": 1, "duplicate": 1
    }  # fmt: skip
    for task in tasks:
        assert len(task.chunks) == 4 and 256 < task.tokens <= 1024 - 4 * (80 + 24)
    assert listing.selected == 2 and "2 of 6 documents selected" in str(listing)


def test_draws_depend_on_the_text_alone(settings, tokenizer, tmp_path):
    tiny.write_documents(tmp_path / "x", 4)
    first, _ = selected(settings(documents=(str(tmp_path / "x"),)), tokenizer)
    (tmp_path / "x/report-00.md").rename(tmp_path / "x/zzz.txt")
    second, _ = selected(settings(documents=(str(tmp_path / "x"),)), tokenizer)
    assert {t.document.id: t.chunks for t in first} == {t.document.id: t.chunks for t in second}
    other, _ = selected(settings(documents=(str(tmp_path / "x"),), seed=1, chunks=2), tokenizer)
    assert [task.chunks for task in other] != [task.chunks for task in second]
    few, listing = selected(settings(documents=(str(tmp_path / "x"),), max_documents=2), tokenizer)
    assert len(few) == listing.selected == 2 and few[-1].position == 1.0


def test_default_bounds_leave_room_for_questions_and_answers():
    run = GenerateRun("m", ("d",), 131072, "o")
    assert run.document_bounds() == (62464, 131072 - 4 * (1024 + 512)) and run.chunk_bounds() == (15000, 30000)
    with pytest.raises(ValueError, match="documents of 0 to -4096 tokens: 4 questions and answers"):
        GenerateRun("m", ("d",), 2048, "o")


def test_a_long_text_is_cut_and_each_part_knows_its_place(settings, tokenizer, tmp_path):
    text = tiny.document(8, sections=40)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/long.md").write_text(text)
    (tmp_path / "x/rows.jsonl").write_text(json.dumps({"text": tiny.document(9, sections=40)}) + "\n")
    tasks, listing = selected(settings(documents=(str(tmp_path / "x"),)), tokenizer)
    own = [task for task in tasks if task.document.source.startswith("long.md#")]
    assert [task.document.source for task in own] == [f"long.md#{i}/{len(own)}" for i in range(1, len(own) + 1)]
    assert {task.document.source.partition("#")[0] for task in tasks} == {"long.md", "rows.jsonl:1"}
    for number, task in enumerate(own, 1):
        place = task.document.place["part"]
        assert place["part"] == [number, len(own)] and text[slice(*place["characters"])] == task.document.text
        assert text.rfind(place["heading"], 0, place["characters"][0] + 200) >= 0
        assert task.tokens == len(tokenizer(task.document.text, add_special_tokens=False)["input_ids"])
        assert task.document.id == hashlib.sha256(task.document.text.encode()).hexdigest()[:32]
    assert (listing.cut, listing.parts, listing.lost) == (2, len(tasks), 0)
    again, _ = selected(settings(documents=(str(tmp_path / "x/rows.jsonl"), str(tmp_path / "x"))), tokenizer)
    assert {t.document.id: t.chunks for t in again} == {t.document.id: t.chunks for t in tasks}
    done = {task.document.id for task in tasks[:3]}
    rest, _ = selected(settings(documents=(str(tmp_path / "x"),)), tokenizer, done=done.__contains__)
    assert [isinstance(task, float) for task in rest] == [True] * 3 + [False] * (len(tasks) - 3)
    assert rest[3].document.source == tasks[3].document.source


def test_equal_parts_are_duplicates(settings, tokenizer, tmp_path):
    (tmp_path / "x").mkdir()
    half = tiny.document(3)
    for name in "ab":
        (tmp_path / f"x/{name}.txt").write_text(f"{half}\n\n\f{half}\n\n\f{name}{half}")
    tasks, listing = selected(settings(documents=(str(tmp_path / "x"),), min_document=300, max_document=620), tokenizer)
    assert listing.skipped["duplicate"] >= 1 and len({task.document.id for task in tasks}) == len(tasks)
    assert len(tasks) + listing.skipped["duplicate"] == listing.parts


def test_short_texts_of_a_folder_are_joined_in_their_order(settings, tokenizer, tmp_path):
    for folder, count in (("a", 9), ("a/b", 5), ("c", 1)):
        (tmp_path / "x" / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (tmp_path / "x" / folder / f"{i}.txt").write_text(f"\n{folder} {i}\n" + "The boats return at noon.\n" * 12)
    run = settings(documents=(str(tmp_path / "x"),), join="short")
    tasks, listing = selected(run, tokenizer)
    assert listing.joined == 14 and listing.joins == len(tasks) and listing.skipped == {"shorter than wanted": 1}
    assert 0 < listing.lost < 400 and "documents joined: 14 to" in str(listing)
    pieces = [piece for task in tasks for piece in task.document.place["joined"]]
    assert list(dict.fromkeys(piece["source"] for piece in pieces)) == [
        *(f"a/{i}.txt" for i in range(9)),
        *(f"a/b/{i}.txt" for i in range(5)),
    ]
    for task in tasks:
        place = task.document.place["joined"]
        texts = [(tmp_path / "x" / piece["source"]).read_text()[slice(*piece["characters"])] for piece in place]
        assert task.document.text == "\n\n".join(texts) and 256 < task.tokens <= 608
        assert task.document.source.startswith(place[0]["source"]) and task.document.source.endswith(
            place[-1]["source"]
        )
    alone, listing = selected(settings(documents=(str(tmp_path / "x"),)), tokenizer)
    assert alone == [] and listing.skipped == {"shorter than wanted": 15} and listing.lost == listing.size
    with pytest.raises(ValueError, match="join is 'long'; expected 'short'"):
        settings(join="long")
    with pytest.raises(ValueError, match="join is 'short', and recipe 'official' leaves short documents out"):
        GenerateRun("m", ("d",), 131072, "o", recipe="official", join="short")


def test_what_is_too_large_to_be_read_is_named_with_its_share(settings, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "LARGEST", 64 * 700)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/dump.txt").write_text("The boats return at noon. " * 4000)
    tiny.write_documents(tmp_path / "x", 1)
    tasks, listing = selected(settings(documents=(str(tmp_path / "x"),)), tokenizer)
    assert len(tasks) == 1 and listing.skipped == {"longer than the target": 1}
    assert listing.lost == 104_000 and listing.first == {"longer than the target": "dump.txt"}


SCRIPT = """
import sys
from transformers import AutoTokenizer
from longpo_ops.documents import Listing, find_files
from longpo_ops.generate import GenerateRun, select
from longpo_ops.runs.usage import peak_bytes
bounds = dict(min_document=32, max_chunk=48, answer_tokens=16, question_tokens=16)
run, listing = GenerateRun(sys.argv[1], (sys.argv[2],), 1024, "o", **bounds), Listing()
tokenizer = AutoTokenizer.from_pretrained(run.model)
before = peak_bytes()
chunks = sum(len(task.chunks) for task in select(run, find_files(run.documents), tokenizer, listing))
print(listing.selected, chunks, before, peak_bytes())
"""


def test_ten_thousand_documents_are_listed_and_parted_in_a_gibibyte(tokenizer, tmp_path):
    """Of two thousand: what each of them adds to the peak, the first ones' buffers included, five times over."""
    line = "The wind turns and the boats return. The bell rings at noon.\n\n" * 5
    for i in range(2_000):
        folder = tmp_path / f"{i // 1000}"
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.txt").write_text(f"# Report {i}\n\n{line}")
    command = [sys.executable, "-c", SCRIPT, tokenizer.name_or_path, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    documents, chunks, before, peak = map(int, done.stdout.split())
    assert documents == 2_000 and chunks >= 4_000
    assert before + 5 * (peak - before) < 2**30, (before, peak)
