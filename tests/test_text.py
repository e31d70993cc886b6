"""Text on its way in and out: encodings by their marks, and what may be shown."""

from __future__ import annotations

import json
import os

import pytest
import yaml

from longpo_ops.cli import _settings
from longpo_ops.evaluate.mt_bench import read_mt_bench
from longpo_ops.evaluate.own import load_tasks
from longpo_ops.evaluate.pools import read_pools
from longpo_ops.evaluate.shots import HarnessTask
from longpo_ops.evolve import Evolution
from longpo_ops.generate.prompts import Prompts
from longpo_ops.text import marked_encoding, one_line, printable, read_text

TURNING = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_names_its_encoding(encoding):
    data = "Wind \U0001f32c".encode(encoding)
    assert marked_encoding(data[:4]) == encoding and data.decode(marked_encoding(data)) == "Wind \U0001f32c"


@pytest.mark.parametrize("codec", ["utf-16-be", "utf-32-be"])
def test_the_other_order_of_bytes_is_known(codec):
    data = "\ufeffWind".encode(codec)
    assert data.decode(marked_encoding(data)) == "Wind"


TEXT = "na\u00efve \u5c71\r\nWind"
NEEDLE = {
    "name": "marked",
    "needle": "{key}: {value}.",
    "question": "{key}?",
    "keys": ["\u5c71"],
    "value": {"digits": 4},
}
ROUND = {"name": "one", "length": 64, "documents": "d\u00f3cs"}
EVOLUTION = {"model": "m", "out": "o", "evaluate": {"lengths": [64]}, "rounds": [ROUND]}
SQUAD = {"data": [{"paragraphs": [{"context": "\u5c71", "qas": [{"question": "?", "answers": [{"text": "\u5c71"}]}]}]}]}
MT = {"question_id": 1, "category": "\u5c71", "turns": ["a\u2028b", "c"]}
RATED = [{"question": "\u5c71", "document": "d", "reference": "r"}]
FILES = {  # what a user hands over: its name, its text, and what reads it
    "train.yaml": (yaml.safe_dump({"model": "\u5c71"}, allow_unicode=True), lambda file: _settings(file, [])),
    "evolve.yaml": (yaml.safe_dump(EVOLUTION, allow_unicode=True), Evolution.from_file),
    "needles.yaml": (yaml.safe_dump(NEEDLE, allow_unicode=True), load_tasks),
    "task.yaml": ("task: mine\n# \u5c71\n", lambda file: HarnessTask.parse(str(file)).named()),
    "squad.json": (json.dumps(SQUAD, ensure_ascii=False), read_pools),
    "question.jsonl": (json.dumps(MT, ensure_ascii=False) + "\n", read_mt_bench),
    "questions.txt": ("{count} of \u5c71\n", lambda file: Prompts.load(file.parent)),
}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", FILES)
def test_whatever_a_user_hands_over_may_have_a_mark(name, encoding, tmp_path):
    text, read = FILES[name]
    (tmp_path / name).write_bytes(text.encode("utf-8"))
    plain = read(tmp_path / name)
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read(tmp_path / name) == plain


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_whole_file_is_read_with_plain_newlines(encoding, tmp_path):
    (tmp_path / "a").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "a") == TEXT.replace("\r", "")
    (tmp_path / "a").write_bytes(b"")
    assert read_text(tmp_path / "a") == ""
    (tmp_path / "a").write_bytes(b"\xffa")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "a")


def test_no_mark_names_nothing():
    assert [marked_encoding(data) for data in (b"", b"\xff", b"Wind", b"\xfe\xfe\x00\x00")] == [None] * 4


def test_what_turns_or_hides_is_seen_and_the_rest_is_as_it_was():
    for code in TURNING:
        assert printable(f"a{chr(code)}b") == f"a[U+{code:04X}]b"
    assert printable("a\x1b[2Jb\x9bc\rd\x00") == "a\ufffd[2Jb\ufffdc\ufffdd\ufffd"
    assert printable("\udcff") == "[U+DCFF]" and printable(3) == "3"
    kept = "na\u00efve\n\t\u05e9\u05dc\u05d5\u05dd \u4f60\u597d \U0001f468\u200d\U0001f469 \u00a0"
    assert printable(kept) == kept


def test_a_name_is_one_line_that_utf_8_holds():
    assert one_line(os.fsdecode(b"a\xff\xfe.txt")) == r"a\xff\xfe.txt"
    assert one_line("a\nb\tc\x1b\x85\u2028\u202e\ud800") == r"a\nb\tc\x1b\x85\u2028\u202e\ud800"
    assert one_line("na\u00efve \u05e9.txt") == "na\u00efve \u05e9.txt"
