"""The commands, and what they show: summaries, pages, tables. Texts are data wherever they are shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import typer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from benchmarks.loop.openai_server import OpenAIServer
from longpo_ops.data import join_context, read_pairs, write_pairs
from longpo_ops.generate import commands

APP = typer.Typer()
APP.command()(commands.generate)
APP.add_typer(commands.pairs, name="pairs")


def call(*words):
    return CliRunner().invoke(APP, [str(word) for word in words])


def arguments(tokenizer, documents, out, *more) -> list:
    given = ["generate", "--model", tokenizer.name_or_path, "--documents", documents, "--out", out, "--length", 1024]
    given += [
        "--min-document",
        256,
        "--min-chunk",
        48,
        "--max-chunk",
        128,
        "--question-tokens",
        80,
        "--answer-tokens",
        24,
    ]
    return [*given, *more]


def test_one_command_makes_pairs_and_a_summary(tokenizer, documents, tmp_path):
    out = tmp_path / "pairs"
    with OpenAIServer() as one, OpenAIServer() as two:
        more = ("--endpoint", one.url, "--endpoint", two.url, "--engine-option", "top_k=7", "--rope", "null")
        done = call(*arguments(tokenizer, documents, out, *more))
        assert done.exit_code == 0, done.output
        assert "4 pairs in" in done.output and "documents finished" in done.output
        assert one.seen[0].body["top_k"] == 7 and len(one.seen) + len(two.seen) == 48
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["documents"], summary["pairs"], summary["turns"]) == (4, 4, 16)
    sizes = dict.fromkeys(("cut", "parts", "joined", "joins", "lost"), 0)
    sizes["size"] = sum(file.stat().st_size for file in documents.iterdir())
    assert summary["listing"] == {"found": 4, "selected": 4, "left_out": {}, "first_left_out": {}} | sizes
    assert "text lost for want of length" in done.output and "0.0% of 0.0 MB" in (out / "summary.html").read_text()
    assert summary["lengths"]["document"]["number"] == 4 and summary["lengths"]["chunk"]["most"] <= 128
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "summary.html").read_text()
    assert "3 of 4 pairs; longpo pairs show pairs --number 4 shows all" in page
    assert page.count("<h2>") == 3 and "data:image/png;base64," in page
    assert len(list(read_pairs(out))) == 4  # nothing else in the folder is taken for pairs


def test_a_dry_run_lists_and_asks_nobody(tokenizer, documents, tmp_path):
    with OpenAIServer() as server:
        done = call(*arguments(tokenizer, documents, tmp_path / "pairs", "--endpoint", server.url, "--dry-run"))
        assert not server.seen
    assert done.exit_code == 0, done.output
    assert "4 of 4 documents selected" in done.output and re.search(r"chunk tokens, number\s+16", done.output)
    assert not (tmp_path / "pairs").exists()


def test_a_dry_run_says_what_would_keep_more(tokenizer, documents, tmp_path):
    more = ("--length", 2048, "--min-document", 1500, "--endpoint", "http://127.0.0.1:9", "--dry-run")
    done = call(*arguments(tokenizer, documents, tmp_path / "pairs", *more))
    assert done.exit_code == 0, done.output
    told = re.sub(r"\s+", " ", done.output)
    assert (
        '4 of 4 documents were lost to "shorter than wanted": join those of one folder (--join short), or lower' in told
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rope", "{x"], "no valid JSON"),
        (["--rope", "3"], "expected names and values"),
        (["--rope", '{"rope_theta": -1}'], "rope: rope_theta is -1; expected a number above 0"),
        (["--rope", '{"rope_type": "yarnn"}'], "rope: rope_type is 'yarnn'; expected one of default"),
        (["--rope", '{"rope_teta": 1e6}'], "rope: rope_teta is none of its entries; did you mean rope_theta?"),
        (["--engine-option", "x"], "expected name=value"),
        (["--engine", "magic"], "expected one of"),
        (["--dtype", "float8"], "dtype 'float8'; expected one of auto"),
    ],
)
def test_wrong_usage_is_code_2(more, message, tokenizer, documents, tmp_path):
    done = call(*arguments(tokenizer, documents, tmp_path / "pairs", *more))
    assert done.exit_code == 2 and message in re.sub(r"[\s│]+", " ", done.output)


def test_a_server_that_is_down_is_an_error_that_says_what_to_do(tokenizer, documents, tmp_path):
    with OpenAIServer() as server:
        pass
    done = call(*arguments(tokenizer, documents, tmp_path / "pairs", "--endpoint", server.url))
    assert isinstance(done.exception, OSError) and "no server answers" in str(done.exception)


def test_show(pair, tmp_path):
    write_pairs([pair, replace(pair, id="two")], tmp_path / "a.jsonl")
    done = call("pairs", "show", tmp_path, "--id", "two")
    assert done.exit_code == 0 and "two" in done.output and "It rings at noon." in done.output
    assert "one" not in done.output.replace("none", "")
    done = call("pairs", "show", tmp_path, "--html", tmp_path / "page.html")
    assert "holds 2 of 2 pairs" in done.output and "It rings at" in (tmp_path / "page.html").read_text()
    assert "no pair with id 'three'" in str(call("pairs", "show", tmp_path, "--id", "three").exception)


def test_what_is_not_shown_is_counted_on_page_and_terminal(pair, tmp_path):
    write_pairs([replace(pair, id=str(number)) for number in range(4)], tmp_path / "a.jsonl")
    write_pairs([replace(pair, id="2")], tmp_path / "b.parquet")
    told = "3 of 5 pairs; --number 5 shows all"
    assert told in call("pairs", "show", tmp_path, "--html", tmp_path / "page.html").output
    assert told in (tmp_path / "page.html").read_text() and (tmp_path / "page.html").read_text().count("<h2>") == 3
    assert told in call("pairs", "show", tmp_path).output
    assert "1 of 2 pairs; --number 2 shows all" in call("pairs", "show", tmp_path, "--id", 2, "--number", 1).output
    assert "5 of 5 pairs\n" in call("pairs", "show", tmp_path, "--number", 9).output
    write_pairs([replace(pair, id=str(number)) for number in range(400)], tmp_path / "c.jsonl.gz")
    cut = (tmp_path / "c.jsonl.gz").read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(cut[: len(cut) // 2])
    assert "3 pairs; how many there are cannot be said: " in call("pairs", "show", tmp_path).output


def test_stats(pair, tokenizer, tmp_path):
    write_pairs([pair, replace(pair, id="two", document="x" * 100)], tmp_path / "a.jsonl")
    done = call("pairs", "stats", tmp_path)
    assert re.search(r"pairs\s+2\b", done.output) and re.search(r"document characters, most\s+100", done.output)
    done = call("pairs", "stats", tmp_path, "--model", tokenizer.name_or_path)
    assert re.search(r"chosen tokens, median\s+\d", done.output)


def test_validate(pair, tokenizer, tmp_path):
    write_pairs([pair], tmp_path / "good.jsonl")
    done = call("pairs", "validate", tmp_path / "good.jsonl", "--model", tokenizer.name_or_path)
    assert done.exit_code == 0 and "1 of 1 records kept" in done.output
    (tmp_path / "bad.jsonl").write_text("{}\n{broken\n" + json.dumps(pair.to_record()) + "\n")
    done = call("pairs", "validate", tmp_path)
    assert done.exit_code == 1 and "2 of 4 records kept" in done.output and "1 skipped: no valid JSON" in done.output
    assert "\n    bad.jsonl:2, " not in done.output  # such a record is called by file and line alone
    assert re.search(r"record 'bad.jsonl:2', line: .*'{broken' came, expected one object per line", done.output)
    done = call("pairs", "validate", tmp_path / "good.jsonl", "--model", tokenizer.name_or_path, "--max-length", 9)
    assert "longer than max_length" in str(done.exception)  # not one usable record


def test_validate_lays_pairs_out_with_the_variables_of_the_template(pair, tokenizer, tmp_path):
    write_pairs([pair], tmp_path / "pairs.jsonl")
    own = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    own.chat_template = "{% if tone is defined %}{{ tone * 40 }}{% endif %}" + own.chat_template
    own.save_pretrained(tmp_path / "model")
    given = ("pairs", "validate", tmp_path / "pairs.jsonl", "--model", tmp_path / "model")
    tokens = len(own(join_context(pair.document, pair.turns[0].instruction))["input_ids"])
    room = ("--max-length", 8 * tokens)
    assert call(*given, *room).exit_code == 0
    done = call(*given, *room, "--template-kwargs", json.dumps({"tone": "a " * tokens}))
    assert "longer than max_length" in str(done.exception)
    done = call(*given, "--template-kwargs", '{"tine": 1}')
    assert "does not read tine" in str(done.exception)
    done = call("pairs", "validate", tmp_path / "pairs.jsonl", "--template-kwargs", '{"tone": "a"}')
    assert done.exit_code == 2 and "expected with --model" in re.sub(r"[\s│]+", " ", done.output)


def test_validate_names_file_line_field_what_came_and_what_was_expected(pair, tmp_path):
    record = json.loads(json.dumps(pair.to_record()))
    turn = record["turns"][0]
    changes = [
        (
            {"turns": [turn | {"chosen": None}]},
            "turns[0].chosen: missing field; null came; expected text beside chunk, instruction, rejected",
        ),
        ({"turns": [{**turn, "chunk": 3}]}, "turns[0].chunk: wrong type; a number came, 3; expected text"),
        ({"document": ""}, "document: empty field; '' came; expected text"),
        ({"turns": []}, "turns: empty field; [] came; expected a list of at least one turn"),
        ({"provenance": "x"}, "provenance: wrong type; text came, 'x'; expected an object"),
        ({"ref_chosen_logp": 1.0}, "ref_chosen_logp: bad log-probs; a number came, 1.0; expected a number finite"),
    ]
    lines = [json.dumps(record | change) for change, _ in changes] + [json.dumps(record)] * 2
    del turn["chosen"]
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines, *[json.dumps(record)] * 11]))
    done = call("pairs", "validate", tmp_path)
    assert done.exit_code == 1 and "2 of 19 records kept" in done.output
    for line, (_, told) in enumerate(changes, 1):
        assert f"    bad.jsonl:{line}, record 'one', {told}" in done.output
    told = "bad.jsonl:9, record 'one', turns[0].chosen: missing field; nothing came; expected text beside chunk, "
    assert told in done.output
    assert "12 skipped: missing field (10 of them told)" in done.output
    assert "2 bad records are not told; --number 12 tells all" in done.output
    assert "bad.jsonl:19, " in call("pairs", "validate", tmp_path, "--number", 12).output


def test_pairs_commands_name_a_model_that_cannot_be_loaded(pair, tmp_path):
    write_pairs([pair], tmp_path / "pairs.jsonl")
    (tmp_path / "model").mkdir()
    for command in ("stats", "validate"):
        done = call("pairs", command, tmp_path / "pairs.jsonl", "--model", tmp_path / "model")
        assert isinstance(done.exception, ValueError) and "model' cannot be loaded" in str(done.exception)


def test_merge(pair, tmp_path):
    write_pairs([pair, replace(pair, id="two")], tmp_path / "a.jsonl")
    write_pairs([replace(pair, id="two"), replace(pair, id="three")], tmp_path / "b.parquet")
    merged = tmp_path / "all.jsonl.gz"
    done = call("pairs", "merge", tmp_path / "a.jsonl", tmp_path / "b.parquet", "--out", merged)
    assert "3 pairs in" in done.output and [each.id for each in read_pairs(merged)] == ["one", "two", "three"]
    assert "exists; expected a new file" in str(call("pairs", "merge", tmp_path, "--out", merged).exception)
    write_pairs([replace(pair, document="Other.")], tmp_path / "c.jsonl")
    done = call("pairs", "merge", tmp_path / "a.jsonl", tmp_path / "c.jsonl", "--out", tmp_path / "x.jsonl")
    assert "two different pairs have the id 'one'" in str(done.exception) and not (tmp_path / "x.jsonl").exists()
