"""YAML: what is a flag, a word or a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from longpo_ops.runs.settings_file import Word, parse_yaml, read_yaml, settle


@dataclass
class Settings:
    strategy: str
    flag: bool
    either: bool | str | None
    free: dict[str, Any] | None
    names: tuple[str, ...]
    steps: int
    rate: float | None


@pytest.mark.parametrize("written, flag", [("no", False), ("Off", False), ("YES", True), ("on", True)])
def test_a_word_is_a_flag_only_where_one_is_wanted(written, flag):
    fields = "strategy: {0}\nflag: {0}\neither: {0}\nfree: {{a: {0}, b: [{0}, {{c: {0}}}]}}\nnames: [{0}]\nother: {0}"
    found = settle(parse_yaml(fields.format(written), "here"), Settings)
    assert found == {
        "strategy": written, "flag": flag, "either": flag, "free": {"a": flag, "b": [flag, {"c": flag}]},
        "names": [written], "other": written,
    }  # fmt: skip
    assert type(found["strategy"]) is str and isinstance(found["names"][0], Word)


def test_what_is_written_plainly_or_in_quotes_stays():
    given = settle(
        parse_yaml("strategy: 'no'\nflag: true\neither: \"on\"\nfree: {a: False, b: 'off'}", "here"), Settings
    )
    assert given == {"strategy": "no", "flag": True, "either": "on", "free": {"a": False, "b": "off"}}
    assert type(given["either"]) is str


def test_numbers_need_no_dot_and_quotes_make_text():
    found = parse_yaml("[5e-7, 1.5E+3, -2e3, '5e-7', 7, nothing, noon, .5]", "here")
    assert found == [5e-7, 1500.0, -2000.0, "5e-7", 7, "nothing", "noon", 0.5]
    assert settle({"rate": "1e-5", "strategy": "1e-5"}, Settings) == {"rate": 1e-5, "strategy": "1e-5"}
    assert settle({"steps": parse_yaml("no", "here")}, Settings) == {"steps": "no"}  # a message will name the word


@pytest.mark.parametrize(
    "text", ["a: [", "\x00", "[" * 5000, "a: 2026-99-99", "a: &b {c: *b}", "!!python/object:os.system {}"]
)
def test_no_yaml_is_named(text):
    with pytest.raises(ValueError, match=r"^here: no valid YAML: "):
        parse_yaml(text, "here")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_is_in_the_encoding_of_its_mark(encoding, tmp_path):
    (tmp_path / "a.yaml").write_bytes("strategy: na\u00efve\n".encode(encoding))
    assert read_yaml(tmp_path / "a.yaml") == {"strategy": "na\u00efve"}
    (tmp_path / "b.yaml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"b.yaml: no valid YAML: 'utf-8' codec"):
        read_yaml(tmp_path / "b.yaml")
