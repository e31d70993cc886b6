"""Which files there are, and what happens when one cannot be read."""

from __future__ import annotations

import pytest

from longpo_ops.documents import Listing, find_files, read_documents


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
