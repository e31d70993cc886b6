"""Which documents and chunks a run of the generator takes (generate/run.py: select)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from longpo_ops.documents import Listing, find_files
from longpo_ops.generate import GenerateRun, select
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
    (folder / "long.txt").write_text(tiny.document(8, sections=60))
    (folder / "blob.txt").write_text("QUJD" * 120)
    (folder / "twin.md").write_text(tiny.document(0))
    tasks, listing = selected(settings(documents=(str(folder),)), tokenizer)
    assert [task.document.source for task in tasks] == ["report-00.md", "report-01.md"]
    assert listing.skipped == {
        "shorter than wanted": 2, "longer than the target": 1, "shorter than one chunk": 1, "duplicate": 1
    }  # fmt: skip
    for task in tasks:
        assert len(task.chunks) == 4 and 256 < task.tokens <= 1024 - 4 * (80 + 24)
    assert listing.selected == 2 and "2 of 7 documents selected" in str(listing)


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
    assert run.document_bounds() == (65536, 131072 - 4 * (1024 + 512)) and run.chunk_bounds() == (15000, 30000)
    with pytest.raises(ValueError, match="documents of 1024 to -4096 tokens: 4 questions and answers"):
        GenerateRun("m", ("d",), 2048, "o")


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
