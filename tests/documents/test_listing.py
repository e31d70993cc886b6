"""Which files there are, and what happens when one cannot be read."""

from __future__ import annotations

import os

import pytest

from longpo_ops.documents import Listing, find_files, read_documents


def test_an_unreadable_file_is_counted(tmp_path):
    (tmp_path / "gone.txt").write_text("x")
    files, listing = find_files([tmp_path]), Listing()
    (tmp_path / "gone.txt").unlink()
    assert list(read_documents(files, listing)) == []
    assert listing.skipped == {"unreadable (FileNotFoundError)": 1}
    assert "1 left out: unreadable (FileNotFoundError) (first: gone.txt)" in str(listing)


def test_files_come_from_folders_and_globs_each_once(tmp_path):
    for name in ("b/2.txt", "b/.hidden/x.txt", ".git/y.txt", "a/1.md", "a/1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [name for _, name in find_files([tmp_path])] == ["a/1.md", "a/1.txt", "b/2.txt"]
    assert [name for _, name in find_files([tmp_path / "*/*.txt", tmp_path])] == ["1.txt", "2.txt", "a/1.md"]
    with pytest.raises(ValueError, match=r"no documents at .*nowhere"):
        find_files([tmp_path / "nowhere"])


NAMES = {
    b"\xff\xfe.txt": r"\xff\xfe.txt",
    b"a\nb\tc\r.txt": r"a\nb\tc\r.txt",
    b"e\x1b[2J\xc2\x85.txt": r"e\x1b[2J\x85.txt",
    "g\u202egpj.txt".encode(): r"g\u202egpj.txt",
    "na\u00efve \u05e9.txt".encode(): "na\u00efve \u05e9.txt",
    b"x" * 251 + b".txt": "x" * 251 + ".txt",
}


def test_a_document_of_any_name_is_read_under_one_that_every_file_holds(tmp_path):
    for name in NAMES:
        (tmp_path / os.fsdecode(name)).write_bytes(name.hex().encode())
    listing = Listing()
    found = {document.text: document.source for document in read_documents(find_files([tmp_path]), listing)}
    assert found == {name.hex(): source for name, source in NAMES.items()} and not listing.skipped
    assert all(source.encode() and "\n" not in source for source in found.values())


def test_a_path_that_is_too_long_is_passed_over_and_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    listing = Listing()
    found = list(read_documents(find_files([tmp_path]), listing))
    assert [document.source for document in found] == ["a.txt"]
    assert listing.skipped == {"unreadable (OSError)": 1} and "(first: dddd" in str(listing)
