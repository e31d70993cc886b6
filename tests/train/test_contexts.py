"""Pairs whose context is a prompt, converted from TRL's columns, through `longpo train`'s own run."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from longpo_ops.cli import app
from longpo_ops.data import read_pairs

from .tiny import run_tiny, write_home


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TEXTS = [{"prompt": f"boat {i} ", "chosen": "has a captain", "rejected": "has none"} for i in range(4)]
TALKS = [
    {"prompt": [said("user", f"boat {i}?")], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "no")]}
    for i in range(4)
]


@pytest.mark.parametrize("rows", [TEXTS, TALKS], ids=["texts", "messages"])
def test_converted_rows_are_trained_on_without_short_inputs(rows, tmp_path):
    home = write_home(tmp_path / "home")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["pairs", "convert", tmp_path / "rows.jsonl", "--from", "trl", "--out", tmp_path / "pairs.jsonl"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0 and "4 pairs in" in done.output, done.output
    assert len(list(read_pairs(tmp_path / "pairs.jsonl"))) == 4
    if rows is TEXTS:  # which need no template
        tokenizer = AutoTokenizer.from_pretrained(home / "model")
        tokenizer.chat_template = None
        (home / "model" / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(home / "model")
        assert AutoTokenizer.from_pretrained(home / "model").chat_template is None
    given = dict(data=str(tmp_path / "pairs.jsonl"), max_steps=1)
    trainer = run_tiny(home, tmp_path / "out", objective="dpo", **given)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    with pytest.raises(ValueError, match=r"no short inputs .* an objective that needs none"):
        run_tiny(home, tmp_path / "longpo", objective="longpo", **given)
    with pytest.raises(ValueError, match="`longpo pairs convert FILE --from trl"):
        run_tiny(home, tmp_path / "rows", objective="dpo", **given | {"data": str(tmp_path / "rows.jsonl")})


@pytest.mark.parametrize(
    "more, code, told",
    [
        (["--from", "other", "--out", "new.jsonl"], 2, "expected one of trl, ultrafeedback, messages"),
        (["--from", "trl", "--out", "rows.jsonl"], 1, "rows.jsonl exists; expected a new file"),
        (["--from", "trl", "--out", "new.parquet"], 1, "expected a name ending in .jsonl or .jsonl.gz"),
        (["--from", "trl", "--out", "new.jsonl"], 1, "record 'rows.jsonl:2', chosen: empty field"),
        (["--from", "trl", "--out", "new.jsonl", "--on-bad-record", "skip"], 0, "1 of 2 records kept"),
    ],
)
def test_the_command_says_what_is_wrong(more, code, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(TEXTS[0]) + "\n" + json.dumps(TEXTS[0] | {"chosen": " "}))
    done = CliRunner().invoke(app, ["pairs", "convert", "rows.jsonl", *more])
    assert done.exit_code == code and told in done.output + str(done.exception)
    assert (tmp_path / "new.jsonl").exists() == (code == 0)


@pytest.mark.parametrize("rows", [TEXTS, TALKS], ids=["texts", "messages"])
def test_converted_pairs_are_shown_counted_and_joined(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def told(*words: str) -> str:
        done = CliRunner().invoke(app, ["pairs", *words])
        assert done.exit_code == 0, done.output
        return done.output

    told("convert", "rows.jsonl", "--from", "trl", "--out", "p.jsonl")
    shown = told("show", "p.jsonl")
    assert "boat 0" in shown and "chunk" not in shown and "turn 1" not in shown
    assert "instruction" not in (counted := told("stats", "p.jsonl")) and "chosen characters, most" in counted
    assert "4 of 4 records kept" in told("validate", "p.jsonl")
    assert "4 pairs in" in told("merge", "p.jsonl", "p.jsonl", "--out", "all.jsonl")
    told("show", "p.jsonl", "--html", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "boat 0" in page and "Turn 1" not in page and "<summary>chunk" not in page
