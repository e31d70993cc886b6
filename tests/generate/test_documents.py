"""Reading every format, what is left out, and where documents are parted."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longpo_ops.generate import Chunker, GenerateRun, Listing, find_files, read_documents, select
from longpo_ops.generate.documents import find_breaks
from tests.generate import tiny

ROOT = Path(__file__).parents[2]
TEXT = "# Wind\n\nThe wind turns.\n\nIt is cold.\n"


def read(*sources, column="text", max_tokens=None) -> tuple[list, Listing]:
    listing = Listing()
    return list(read_documents(find_files(sources), listing, column, max_tokens)), listing


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def pdf(text: str) -> bytes:
    """The smallest PDF of one page with a line of text."""
    stream = f"BT /F1 12 Tf 50 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + trailer


def in_short(value) -> str | None:
    """How a parameter is named: a compressed file holds the time."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else None


def parquet(path: Path, **columns) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


HTML = """<html><head><title>t</title><style>x</style></head><body><nav>menu</nav><h2>Wind &amp; rain</h2>
<p>The <b>wind</b> turns <a href="x">here</a>.</p><script>alert(1)</script><pre>a = 1\n\nb = 2</pre></body></html>"""


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", TEXT.encode(), TEXT),
        ("a.md", TEXT.replace("\n", "\r\n").encode("utf-8-sig"), TEXT),
        ("a.tex", TEXT.encode("utf-16"), TEXT),
        ("notes", TEXT.encode(), TEXT),
        ("a.txt.gz", gzip.compress(TEXT.encode()), TEXT),
        ("a.md.zst", zstd(TEXT.encode()), TEXT),
        ("a.HTML", HTML.encode(), "## Wind & rain\n\nThe **wind** turns here.\n\n```\na = 1\n\nb = 2\n```"),
        ("a.pdf", pdf("The wind turns."), "The wind turns."),
        ("a.pdf.gz", gzip.compress(pdf("The wind turns.")), "The wind turns."),
    ],
    ids=in_short,
)
def test_a_file_is_one_document(name, data, expected, tmp_path):
    (tmp_path / name).write_bytes(data)
    (document,), listing = read(tmp_path)
    assert (document.text, document.source, listing.skipped) == (expected, name, {})


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_rows_are_documents(suffix, tmp_path):
    texts = [f"text {i}\u2028\nwith lines" for i in range(40)]
    path = tmp_path / f"rows{suffix}"
    lines = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(texts)).encode()
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}
    if suffix == ".parquet":
        parquet(path, id=range(40), body=texts)
    else:
        path.write_bytes(pack[suffix](lines))
    found, listing = read(path, column="body")
    assert [document.text for document in found] == texts and listing.found == 40
    assert found[6].source == f"rows{suffix}:7"
    assert 0 <= found[0].position <= found[-1].position <= 1


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"", "empty"),
        ("a.md", b" \n\t\n", "empty"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary file"),
        ("a.html", b"\0\1\2<p>", "binary file"),
        ("a.txt", "Dünen".encode("latin-1"), "not UTF-8"),
        ("a.gz", b"no gzip at all", "unreadable (BadGzipFile)"),
        ("a.txt.gz", gzip.compress(TEXT.encode())[:-12], "unreadable (EOFError)"),
        ("a.txt.zst", b"no zstd at all", "unreadable (OSError)"),
        ("a.txt.zst", zstd(TEXT.encode() * 9)[:-9], "unreadable (OSError)"),
        ("a.pdf", b"%PDF-1.4 broken", "unreadable (PdfStreamError)"),
        ("a.pdf", pdf(""), "PDF without text"),
        ("a.parquet", b"PAR1 broken", "unreadable (ArrowInvalid)"),
        ("a.jsonl", b"{broken\n", "no valid JSON"),
        ("a.jsonl", b"[1]\n", "no JSON object"),
        ("a.jsonl", b'{"txt": "x"}\n', "no text in column 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "no text in column 'text'"),
        ("a.jsonl", b'{"text": " "}\n', "empty"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "broken text encoding"),
        ("a.txt.gz", gzip.compress(b"a b " * 1_000_000), "longer than the target"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "' + b"a b " * 1_000_000 + b'"}\n'), "longer than the target"),
    ],
    ids=in_short,
)
def test_what_cannot_be_read_is_counted_and_the_rest_goes_on(name, data, reason, tmp_path):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "z.txt").write_text(TEXT)
    found, listing = read(tmp_path, max_tokens=1000)
    assert [document.text for document in found] == [TEXT]
    assert listing.skipped == {reason: 1}


def test_good_rows_beside_bad_ones_are_kept(tmp_path):
    rows = [b'{"text": "one"}', b"{", b"", b'{"text": "' + b"x" * 9000 + b'"}', b'{"text": "two"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    parquet(tmp_path / "b.parquet", text=["three", None, "one"])
    found, listing = read(tmp_path, max_tokens=10)
    assert [(d.text, d.source) for d in found] == [("one", "a.jsonl:1"), ("two", "a.jsonl:5"), ("three", "b.parquet:1")]
    assert listing.skipped == {
        "no valid JSON": 1, "longer than the target": 1, "no text in column 'text'": 1, "duplicate": 1
    }  # fmt: skip


def test_an_unreadable_file_is_counted(tmp_path):
    (tmp_path / "gone.txt").write_text("x")
    files, listing = find_files([tmp_path]), Listing()
    (tmp_path / "gone.txt").unlink()
    assert list(read_documents(files, listing)) == []
    assert listing.skipped == {"unreadable (FileNotFoundError)": 1}


def test_files_come_from_folders_and_globs_each_once(tmp_path):
    for name in ("b/2.txt", "b/.hidden/x.txt", ".git/y.txt", "a/1.md", "a/1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [name for _, name in find_files([tmp_path])] == ["a/1.md", "a/1.txt", "b/2.txt"]
    assert [name for _, name in find_files([tmp_path / "*/*.txt", tmp_path])] == ["1.txt", "2.txt", "a/1.md"]
    with pytest.raises(ValueError, match=r"no documents at .*nowhere"):
        find_files([tmp_path / "nowhere"])


# -- chunks ------------------------------------------------------------------------------------------------------------


def part(tokenizer, text: str, minimum: int, maximum: int) -> list[str]:
    chunker = Chunker(tokenizer, minimum, maximum)
    return [text[begin:end] for begin, end, _ in chunker.chunks(text, chunker.starts(text))]


WORDS = st.text("abc", min_size=1, max_size=8)
SEPARATORS = st.sampled_from([" ", " ", ". ", "\n", "\n\n", "\n\n# ", "\n\\section{", "\n```\n", "\t", "! "])


@given(st.lists(st.tuples(WORDS, SEPARATORS), min_size=1, max_size=120), st.integers(1, 30), st.integers(0, 30))
def test_chunks_are_disjoint_in_bounds_and_never_end_inside_a_word(tokenizer, pieces, minimum, more):
    text = "".join(word + separator for word, separator in pieces)
    chunker = Chunker(tokenizer, minimum, minimum + more)
    starts, before = chunker.starts(text), 0
    for begin, end, tokens in chunker.chunks(text, starts):
        assert before <= begin < end <= len(text)
        assert minimum <= tokens <= minimum + more
        assert begin == 0 or text[begin - 1].isspace()
        assert end == len(text) or text[end].isspace()
        assert text[begin:end] == text[begin:end].strip()
        before = end


def test_the_highest_structure_in_reach_ends_a_chunk(tokenizer):
    paragraph = "The wind turns and the boats return. The bell rings at noon.\n\n"
    text = ("# One\n\n" + 3 * paragraph + "## Two\n\n" + 3 * paragraph) * 3
    for chunk in part(tokenizer, text, 40, 100):
        assert chunk.startswith(("# One", "## Two")) and chunk.endswith("noon.")
    setext = ("Title\n=====\n\n" + 4 * paragraph) * 3
    assert all(chunk.startswith("Title\n=====") for chunk in part(tokenizer, setext, 40, 110))
    latex = ("\\section{One}\n" + 3 * paragraph) * 4
    assert all(chunk.startswith("\\section{One}") for chunk in part(tokenizer, latex, 40, 90))
    plain = 12 * paragraph
    assert all(chunk.endswith("noon.") for chunk in part(tokenizer, plain, 30, 60))
    sentences = "The wind turns and the boats return. " * 30
    assert all(chunk.endswith("return.") for chunk in part(tokenizer, sentences, 30, 60))


def test_code_is_one_block_as_long_as_it_fits(tokenizer):
    code = "```python\n# no heading\n\ndef f():\n\n    return 1\n\n# none either\n\nx = f()\n```"
    prose = "The boats return at noon with the wind.\n\n"
    text = (4 * prose + code + "\n\n") * 3
    chunks = part(tokenizer, text, 20, 140)
    assert "".join(chunks).count(code) == 3
    assert not any(chunk.startswith("# no") for chunk in chunks)
    assert len(part(tokenizer, "~~~\n" + "x = f(1)\n\n" * 60 + "~~~", 20, 60)) > 3  # too long: lines part it


def test_a_stretch_without_breaks_is_left_out_and_scripts_without_spaces_are_parted(tokenizer):
    blob = "data:" + "QUJD" * 400
    text = "The wind turns. " * 12 + blob + " " + "The bell rings. " * 12
    chunks = part(tokenizer, text, 20, 60)
    assert chunks and not any("QUJD" in chunk for chunk in chunks)
    assert any("bell" in chunk for chunk in chunks)
    chinese = "风转了方向。船只归来。" * 40
    assert all(chunk.endswith("。") for chunk in part(tokenizer, chinese, 100, 300))
    assert len(part(tokenizer, "风" * 400, 100, 300)) > 2


def test_bounds_that_make_no_sense_are_refused(tokenizer):
    with pytest.raises(ValueError, match="chunks of 9 to 3 tokens; expected 0 < minimum <= maximum"):
        Chunker(tokenizer, 9, 3)
    with pytest.raises(ValueError, match="object gives no character offsets"):
        Chunker(object(), 1, 2)


# -- selection ---------------------------------------------------------------------------------------------------------


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
    assert run.document_bounds() == (65536, 131072 - 4 * (1024 + 512)) and run.chunk_bounds() == (16384, 32768)
    with pytest.raises(ValueError, match="documents of 1024 to -4096 tokens: 4 questions and answers"):
        GenerateRun("m", ("d",), 2048, "o")


SCRIPT = """
import resource, sys
from transformers import AutoTokenizer
from longpo_ops.generate import GenerateRun, Listing, find_files, select
bounds = dict(min_document=32, max_chunk=48, answer_tokens=16, question_tokens=16)
run, listing = GenerateRun(sys.argv[1], (sys.argv[2],), 1024, "o", **bounds), Listing()
tasks = select(run, find_files(run.documents), AutoTokenizer.from_pretrained(run.model), listing)
chunks = sum(len(task.chunks) for task in tasks)
print(listing.selected, chunks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_ten_thousand_documents_are_listed_and_parted_in_a_gibibyte(tokenizer, tmp_path):
    line = "The wind turns and the boats return. The bell rings at noon.\n\n" * 5
    for i in range(10_000):
        folder = tmp_path / f"{i // 1000}"
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.txt").write_text(f"# Report {i}\n\n{line}")
    command = [sys.executable, "-c", SCRIPT, tokenizer.name_or_path, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    documents, chunks, peak = map(int, done.stdout.split())
    assert documents == 10_000 and chunks >= 20_000
    assert peak < 2**30


def test_one_line_of_millions_of_characters_is_parted():
    """A rule that looked through the whole line again at each of its places would not come to an end."""
    places, _ = find_breaks("word " * 600_000 + "\n")
    assert len(places) >= 600_000
