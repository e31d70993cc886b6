"""Records: both text formats, every kind of bad one, files and folders, streaming."""

from __future__ import annotations

import gzip
import json
import os
import re
import tracemalloc
from dataclasses import replace
from functools import partial

import pyarrow
import pytest

from longpo_ops.data import BadRecord, DataReport, Pair, Turn, read_pairs, records, write_pairs

OFFICIAL = {
    "prompt": "A long document.",
    "short_prompts": ["A long", "document."],
    "questions": ["How long?", "What is it?"],
    "chosens": ["Long.", "A document."],
    "rejecteds": ["Short.", "A dog."],
    "prompt_id": 7,
}


def spoil(pair: Pair, path: str, value) -> dict:
    """The pair's record with the value at a dotted path replaced, or removed where the value is ...."""
    record = json.loads(json.dumps(pair.to_record()))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    target = record
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return record


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_pairs_come_back_from_files(suffix, pair, tmp_path):
    scored = replace(
        pair, id="2", provenance={"model": "m", "n": [1]}, ref_chosen_logp=-2.5, ref_rejected_logps=(-3.0,)
    )
    odd = replace(
        pair, id="3", document="a\u2028b\x85c\r\nd \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")
    )
    path = tmp_path / f"pairs{suffix}"
    assert write_pairs(iter([pair, scored, odd]), path) == 3
    report = DataReport()
    assert list(read_pairs(path, report=report)) == [pair, scored, odd]
    assert (report.read, report.kept) == (3, 3)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_official_unformatted_records_are_read(tmp_path):
    (tmp_path / "official.jsonl").write_text(json.dumps(OFFICIAL) + "\n\n" + json.dumps(OFFICIAL | {"id": 5}))
    first, second = read_pairs(tmp_path)
    assert first.id == "official.jsonl:1" and second.id == "5"
    assert first.turns[1] == Turn("What is it?", "document.", "A document.", ("A dog.",))
    assert first.provenance == {"prompt_id": 7} and first.document == "A long document."


def test_a_folder_is_read_in_order_of_names(pair, tmp_path):
    write_pairs([replace(pair, id="c")], tmp_path / "b" / "1.parquet")
    write_pairs([replace(pair, id="a"), replace(pair, id="b")], tmp_path / "a.jsonl.gz")
    (tmp_path / "notes.txt").write_text("not data")
    assert [each.id for each in read_pairs(str(tmp_path))] == ["a", "b", "c"]


BAD = [
    ("document", ..., "document: missing field"),
    ("document", None, "document: missing field"),
    ("document", " \n", "document: empty field"),
    ("document", 3, "document: wrong type; a number came, 3; expected text"),
    ("document", "\ud800", "document: broken text encoding"),
    ("turns", [], "turns: empty field"),
    ("turns", "x", "turns: wrong type"),
    ("turns", ["x"], r"turns\[0\]: wrong type; text came, 'x'; expected an object"),
    ("turns.1.chunk", ..., r"turns\[1\].chunk: missing field"),
    ("turns.1.chosen", "", r"turns\[1\].chosen: empty field"),
    ("turns.0.instruction", ["x"], r"turns\[0\].instruction: wrong type"),
    ("turns.0.rejected", [], r"turns\[0\].rejected: empty field"),
    ("turns.0.rejected", [""], r"turns\[0\].rejected\[0\]: empty field"),
    ("turns.0.rejected", ["a", "b"], "different numbers of rejected answers"),
    ("turns.0.answer", "x", r"turns\[0\]: unknown field; answer came"),
    ("provenence", {}, "record: unknown field; provenence came"),
    ("provenance", "text", "provenance: wrong type"),
    ("ref_chosen_logp", -1.0, "ref_chosen_logp: bad log-probs; it came alone; expected both"),
    ("ref_chosen_logp", float("nan"), "ref_chosen_logp: bad log-probs"),
    ("ref_rejected_logps", [-1.0, -2.0], "ref_rejected_logps: bad log-probs"),
    ("ref_rejected_logps", [0.5], "at most 0"),
    ("ref_chosen_logp", -float("inf"), "ref_chosen_logp: bad log-probs"),
    ("ref_rejected_logps", [None], "ref_rejected_logps: bad log-probs"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD)
def test_bad_records_are_named(path, value, message, pair):
    with pytest.raises(BadRecord, match=f"^record 'boats', .*{message}"):
        Pair.from_record(spoil(pair, path, value))


@pytest.mark.parametrize("value", [{"n": 1}, [1], 1.5, float("nan"), True, " ", "\ud800"])
def test_an_id_is_text_or_a_whole_number(value, pair):
    with pytest.raises(BadRecord, match=r"^record 'a\.jsonl:3', id: (wrong type|empty field|broken text encoding); "):
        Pair.from_record(pair.to_record() | {"id": value}, "a.jsonl:3")
    for given, called in ((7, "7"), (7.0, "7"), ("x y", "x y"), (None, "a.jsonl:3"), ("", "a.jsonl:3")):
        assert Pair.from_record(pair.to_record() | {"id": given}, "a.jsonl:3").id == called


def test_a_record_that_no_parser_takes_is_one_bad_record(pair, tmp_path):
    deep, long = "[" * 200_000, "9" * 5000
    good = json.dumps(pair.to_record())
    spoilt = (good.replace('"provenance": {}', f'"provenance": {value}') for value in (deep, long, json.dumps(deep)))
    (tmp_path / "a.jsonl").write_text("\n".join([good, *spoilt, deep, good]))
    report = DataReport(tell=9)
    assert list(read_pairs(tmp_path, "skip", report)) == [pair, pair]
    assert report.skipped == {"no valid JSON": 3, "wrong type": 1}
    told = [line for lines in report.told.values() for line in lines]
    assert {re.search(r"a\.jsonl:\d", line)[0] for line in told} == {f"a.jsonl:{n}" for n in (2, 3, 4, 5)}
    assert all(len(line) < 500 for line in told)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_half_a_surrogate_pair_in_provenance_comes_back(suffix, pair, tmp_path):
    odd = replace(pair, provenance={"source": "a\ud800b"})
    write_pairs([odd], tmp_path / f"a{suffix}")
    assert list(read_pairs(tmp_path)) == [odd]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_believed(suffix, encoding, pair, tmp_path):
    odd = replace(pair, document="na\u00efve \u010a\u0a0d \U0001f600")  # bytes of line breaks in two of them
    data = (json.dumps(odd.to_record(), ensure_ascii=False) + "\r\n").encode(encoding)
    pack = {
        ".jsonl": bytes,
        ".jsonl.gz": gzip.compress,
        ".jsonl.zst": partial(pyarrow.compress, codec="zstd", asbytes=True),
    }
    (tmp_path / f"a{suffix}").write_bytes(pack[suffix](data))
    assert list(read_pairs(tmp_path)) == [odd]


def test_a_file_whose_name_is_no_utf_8_gives_names_that_are(pair, tmp_path):
    record = {name: value for name, value in pair.to_record().items() if name != "id"}
    (tmp_path / os.fsdecode(b"p\xff\n[1].jsonl")).write_text(json.dumps(record))
    (found,) = read_pairs(tmp_path)
    assert found.id == r"p\xff\n[1].jsonl:1"
    assert write_pairs([found], tmp_path / "out.parquet") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosens": ["Long."]}, "lists of different lengths"),
        ({"questions": "How?"}, "questions: wrong type"),
        ({"rejecteds": ["Short.", 3]}, r"turns\[1\].rejected: wrong type"),
        ({"short_prompts": None}, "short_prompts: missing field"),
    ],
)
def test_bad_official_records_are_named(change, message):
    with pytest.raises(BadRecord, match=f"^record 'file:9', .*{message}"):
        Pair.from_record(OFFICIAL | change, "file:9")


def test_equal_answers_are_bad_unless_allowed(pair):
    same = tuple(replace(turn, rejected=("Other.", f" {turn.chosen}\n")) for turn in pair.turns)
    record = replace(pair, turns=same).to_record()
    with pytest.raises(BadRecord, match="chosen equal to rejected; rejected answer 1"):
        Pair.from_record(record)
    assert Pair.from_record(record, allow_equal=True).turns[0].rejected[1] == " There are 42 boats.\n"
    half = (same[0], pair.turns[1])  # one turn of a conversation may be equal
    assert Pair.from_record(replace(pair, turns=(replace(half[0], rejected=(half[0].chosen,)), half[1])).to_record())


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_what_json_has_not_is_not_written(name, pair, tmp_path):
    spoilt = replace(pair, provenance={"score": float("nan")})
    with pytest.raises(ValueError, match=r"record 'boats': .*JSON has neither NaN nor infinities"):
        write_pairs([pair, spoilt], tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    for change in ({"ref_chosen_logp": 0.5}, {"ref_rejected_logps": (-1.0, 0.5)}):
        with pytest.raises(ValueError, match=r"Pair: ref_\w+: got 0.5, expected a log-prob, which is at most 0"):
            replace(pair, **change)


def test_skipping_counts_and_raising_names_the_line(pair, tmp_path):
    file = tmp_path / "a.jsonl"
    good = json.dumps(pair.to_record()).encode()
    file.write_bytes(b"\n".join([good, b"{broken", b"[1]", b"{}", b'{"id": "x", "document": "\xff"}', b"", good]))
    report = DataReport()
    kept = list(read_pairs(file, on_bad_record="skip", report=report))
    assert len(kept) == 2 and report.read == 6
    assert report.skipped == {"no valid JSON": 2, "no JSON object": 1, "empty record": 1}
    with pytest.raises(BadRecord, match=r"'a.jsonl:2', line: no valid JSON"):
        list(read_pairs(file))
    file.write_bytes(good.replace(b"42", b"\xff\xfe", 1))
    with pytest.raises(BadRecord, match=r"'a.jsonl:1', line: no valid JSON; Invalid .escape"):
        list(read_pairs(file))


def test_a_line_nested_too_deeply_is_one_bad_record(pair, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(pair.to_record()) + "\n" + "[" * 100_000 + "\n")
    report = DataReport()
    assert [found.id for found in read_pairs(tmp_path, "skip", report)] == [pair.id]
    assert report.skipped == {"no valid JSON": 1}


def test_paths_without_data_are_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        list(read_pairs(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="holds no data file"):
        list(read_pairs(tmp_path))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match="another kind"):
        list(read_pairs(tmp_path / "a.csv"))
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"(?s)no usable record.*1 skipped: empty record"):
        list(read_pairs(tmp_path, on_bad_record="skip"))
    with pytest.raises(ValueError, match="on_bad_record='ignore'"):
        list(read_pairs(tmp_path, on_bad_record="ignore"))
    with pytest.raises(ValueError, match="cannot write"):
        write_pairs([pair], tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_that_is_cut_off_is_named(suffix, pair, tmp_path):
    file = tmp_path / f"a{suffix}"
    if suffix == ".jsonl.zst":
        lines = "".join(json.dumps(replace(pair, id=str(i)).to_record()) + "\n" for i in range(2_000))
        file.write_bytes(pyarrow.compress(lines.encode(), codec="zstd", asbytes=True))
        assert sum(1 for _ in read_pairs(file)) == 2_000
    else:
        write_pairs([pair], file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"a{suffix} cannot be read .*; it is damaged or cut off"):
        list(read_pairs(file))


def test_a_file_that_may_not_be_read_is_not_called_damaged(pair, tmp_path, monkeypatch):
    def refuse(file):
        raise PermissionError(13, "Permission denied", str(file))

    write_pairs([pair], tmp_path / "a.jsonl")
    monkeypatch.setattr(records, "_records", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        list(read_pairs(tmp_path))


def test_a_failed_write_leaves_the_old_file(pair, tmp_path):
    path = tmp_path / "a.jsonl"
    write_pairs([pair], path)

    def failing():
        yield replace(pair, id="new")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_pairs(failing(), path)
    assert [each.id for each in read_pairs(path)] == ["boats"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_reading_and_writing_do_not_hold_the_set(suffix, pair, tmp_path):
    """160 records of 1 MiB pass through far less memory than that."""
    path = tmp_path / f"big{suffix}"
    document = "word " * (2**20 // 5)
    tracemalloc.start()
    try:
        write_pairs((replace(pair, id=str(i), document=document) for i in range(160)), path)
        count = sum(1 for _ in read_pairs(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 160 and peak < 80 * 2**20


def test_compressed_text_is_read_whoever_wrote_it(pair, tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as out:
        out.write(json.dumps(pair.to_record()))
    assert list(read_pairs(tmp_path)) == [pair]
