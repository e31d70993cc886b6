"""Rows of other libraries' preference data, in every kind of file, and what a pair cannot express."""

from __future__ import annotations

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from longpo_ops.data import BadRecord, DataReport, read_pairs
from longpo_ops.data.convert import convert, read_converted


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TEXTS = {"prompt": "Who?", "chosen": "Ann é\u2028.", "rejected": 'Nobody,\nor "two".'}
TALKS = {"prompt": [user("Who?")], "chosen": [assistant("Ann.")], "rejected": [assistant("No.")]}
BINARIZED = {
    "prompt": "Who?", "prompt_id": "e1", "chosen": [user("Who?"), assistant("Ann.")], "score_chosen": 8.5,
    "rejected": [user("Who?"), assistant("No.")], "score_rejected": 2.0, "messages": [user("Who?"), assistant("Ann.")],
}  # fmt: skip
SCORED = {
    "instruction": "Who?", "source": "x", "models": ["a", "b", "c"],
    "completions": [
        {"response": "Perhaps Ann.", "overall_score": 6.0, "annotations": {}},
        {"response": "Ann.", "overall_score": 9, "model": "b"},
        {"response": "No.", "overall_score": 1.5},
    ],
}  # fmt: skip
OPENAI = {
    "input": {"messages": [user("Who?")], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [assistant("Ann.")], "non_preferred_output": [assistant("No.")],
}  # fmt: skip
FROM_VALUE = {
    "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Who?"}],
    "chosen": {"from": "gpt", "value": "Ann."}, "rejected": {"from": "gpt", "value": "No."},
}  # fmt: skip
SWIFT = {"messages": [user("Who?"), assistant("Ann.")], "rejected_response": "No."}
ANSWERED = {"messages": [user("Who?")], "chosen": "Ann.", "rejected": "No."}
PARTS = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}], "name": None}],
    "chosen": assistant("Ann."), "rejected": assistant("No."),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, row",
    [
        ("trl", TALKS),
        ("trl", {"chosen": BINARIZED["chosen"], "rejected": BINARIZED["rejected"]}),
        ("ultrafeedback", BINARIZED),
        ("ultrafeedback", SCORED),
        *(("messages", row) for row in (OPENAI, SWIFT, ANSWERED, PARTS)),
    ],
)
def test_a_question_and_two_answers_in_every_form(kind, row):
    before = json.dumps(row)
    pair = convert(row, "f:1", kind)
    assert json.dumps(row) == before
    assert pair.context == (user("Who?"),) and pair.chosen == (assistant("Ann."),)
    assert pair.rejected == ((assistant("No."),),) and pair.id == "f:1"


def test_roles_of_from_and_value_are_those_of_templates():
    pair = convert(FROM_VALUE, "f:1", "messages")
    assert pair.context == ({"role": "system", "content": "Be brief."}, user("Who?"))
    assert pair.chosen == (assistant("Ann."),)


def test_other_columns_are_kept_and_an_id_stays():
    pair = convert(BINARIZED | {"id": 7}, "f:1", "ultrafeedback")
    assert pair.id == "7" and pair.provenance == {"prompt_id": "e1", "score_chosen": 8.5, "score_rejected": 2.0}
    assert convert(SCORED, "f:1", "ultrafeedback").provenance == {"source": "x", "models": ["a", "b", "c"]}


def test_prompts_are_found_as_trl_finds_them():
    trl = pytest.importorskip("trl")
    longer = [user("Who?"), assistant("Ann."), user("Why?"), assistant("So.")]
    for chosen, rejected in (
        ("The fox jumps.", "The fox runs."),
        ("The fox jumps.", "The fog runs."),
        ("ab cd", "ab ce"),
        ("abc", "abcdef"),
        (longer, [*longer[:3], assistant("No.")]),
        (longer, longer[:2]),
    ):
        truth = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
        pair = convert({"chosen": chosen, "rejected": rejected}, "f:1", "trl")
        as_list = (lambda x: x) if isinstance(chosen, str) else list
        assert [as_list(said) for said in (pair.context, pair.chosen, pair.rejected[0])] == list(truth.values())


def write(rows: list[dict], file) -> None:
    name, lines = file.name, "\n".join(map(json.dumps, rows))
    if name.endswith((".jsonl", ".json")):
        file.write_text(json.dumps(rows, indent=1) if "array" in name else lines)
    elif name.endswith(".jsonl.gz"):
        file.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif name.endswith(".csv"):
        with open(file, "w", newline="", encoding="utf-8") as out:
            table = csv.writer(out)
            table.writerow(rows[0])
            cells = [[v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows]
            table.writerows(cells)
    else:
        Dataset.from_list(rows).save_to_disk(file)


@pytest.mark.parametrize("row", [TEXTS, TALKS], ids=["texts", "messages"])
@pytest.mark.parametrize(
    "name", ["r.jsonl", "r.json", "array.json", "array.jsonl", "r.jsonl.gz", "r.parquet", "r.csv", "saved"]
)
def test_every_kind_of_file_gives_the_same(name, row, tmp_path):
    write([row | {"id": ""}, row | {"id": "second"}], tmp_path / name)
    first, second = read_converted(tmp_path / name, "trl")
    truth = convert(row, f"{name}:1", "trl")
    assert first == truth and second.chosen == truth.chosen and second.id == "second"


def test_a_folder_is_read_in_order_of_names(tmp_path):
    for name in ("b.csv", "a.json", "c.parquet"):
        write([TEXTS], tmp_path / name)
    assert [pair.id for pair in read_converted(tmp_path, "trl")] == ["a.json:1", "b.csv:1", "c.parquet:1"]


def test_a_huge_cell_is_read(tmp_path):
    write([TEXTS | {"prompt": "fox " * 100_000}], tmp_path / "r.csv")
    (pair,) = read_converted(tmp_path / "r.csv", "trl")
    assert len(pair.context) == 400_000


def test_several_splits_are_named(tmp_path):
    DatasetDict({"train": Dataset.from_list([TEXTS]), "test": Dataset.from_list([TEXTS])}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=r"d holds several splits; give one: .*d/train, .*d/test"):
        list(read_converted(tmp_path / "d", "trl"))
    assert len(list(read_converted(tmp_path / "d/train", "trl"))) == 1


@pytest.mark.parametrize(
    "kind, row, message",
    [
        ("trl", TEXTS | {"chosen": ""}, "chosen: empty field"),
        ("trl", TEXTS | {"chosen": None}, "chosen: missing field"),
        ("trl", TEXTS | {"rejected": TEXTS["chosen"]}, "chosen equal to rejected"),
        ("trl", TEXTS | {"images": ["x"]}, "images: more than text"),
        ("trl", TALKS | {"tools": [{"name": "f"}]}, "tools: more than text"),
        ("trl", BINARIZED, "prompt: texts and messages; prompt: text came, 'Who\\?'.*--from ultrafeedback`"),
        ("trl", TALKS | {"chosen": "Ann.", "rejected": "No."}, "texts and messages; .*--from messages`"),
        ("trl", {"chosen": "Ann.", "rejected": "No."}, "prompt: no prompt"),
        ("trl", {"chosen": [user("a")], "rejected": [user("b"), assistant("c")]}, "prompt: no prompt"),
        ("trl", TALKS | {"chosen": []}, "chosen: empty field"),
        (
            "trl",
            TALKS | {"chosen": [assistant("x") | {"tool_calls": [{"id": 1}]}]},
            r"chosen\[0\]: unknown field; tool_calls",
        ),
        (
            "trl",
            TALKS | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            r"prompt\[0\].content: more than text",
        ),
        ("ultrafeedback", BINARIZED | {"prompt": "How?"}, "prompt: another prompt"),
        ("ultrafeedback", TEXTS, "chosen: wrong type; text came.* see --from trl"),
        ("ultrafeedback", SCORED | {"completions": SCORED["completions"][:1]}, "completions: no preference; 1 answers"),
        ("ultrafeedback", SCORED | {"completions": [{"response": "a"}]}, r"completions\[0\].overall_score: no score"),
        ("messages", TEXTS, "prompt: texts|context: texts"),
        ("messages", {"chosen": "a", "rejected": "b"}, "messages: missing field"),
        ("messages", OPENAI | {"input": OPENAI["input"] | {"tools": [1]}}, "input.tools: more than text"),
        ("messages", SWIFT | {"messages": [assistant("Ann.")]}, "messages: wrong type"),
        ("trl", [1], "line: no JSON object"),
    ],
)
def test_what_a_pair_cannot_express_is_refused_with_its_line(kind, row, message, tmp_path):
    good = {"trl": TALKS, "ultrafeedback": BINARIZED, "messages": OPENAI}[kind]
    (tmp_path / "r.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n" + json.dumps(good))
    if kind == "messages" and row is TEXTS:
        assert len(list(read_converted(tmp_path / "r.jsonl", kind))) == 3  # a prompt that is a text is one
        return
    with pytest.raises(BadRecord, match=f"^record 'r.jsonl:2', .*{message}"):
        list(read_converted(tmp_path / "r.jsonl", kind))
    report = DataReport()
    assert [pair.id for pair in read_converted(tmp_path / "r.jsonl", kind, "skip", report)] == [
        "r.jsonl:1",
        "r.jsonl:3",
    ]
    assert report.skipped.total() == 1


def test_odd_csv_is_refused_with_its_row(tmp_path):
    file = tmp_path / "r.csv"
    file.write_text("prompt,chosen,rejected\nWho?,Ann,No\nWho?,Ann\n")
    with pytest.raises(
        BadRecord, match=r"^record 'r.csv:2', .*another number of cells; 2 cells came, the first row names 3"
    ):
        list(read_converted(file, "trl"))
    file.write_text("prompt,chosen,rejected\nWho?,\"[{'role': 'assistant', 'content': 'Ann'}]\",No\n")
    with pytest.raises(BadRecord, match=r"^record 'r.csv:1', .*chosen: messages that are no JSON"):
        list(read_converted(file, "trl"))
    file.write_text("prompt,chosen,rejected\n[1] Who?,[Ann],{No}\n")
    (pair,) = read_converted(file, "trl")
    assert (pair.context, pair.chosen, pair.rejected) == ("[1] Who?", "[Ann]", ("{No}",))


@pytest.mark.parametrize(
    "name, content",
    [("r.csv", "prompt,chosen,rejected\n"), ("r.json", "[]"), ("r.jsonl", ""), ("r.csv", "")],
)
def test_no_rows_are_told(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="no usable record was found"):
        list(read_converted(tmp_path / name, "trl"))


@pytest.mark.parametrize("name, content", [("r.json", "[{"), ("r.csv", 'a,b\n"x'), ("r.parquet", "no")])
def test_damaged_files_are_named(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        list(read_converted(tmp_path / name, "trl"))


def test_other_paths_are_refused(tmp_path):
    for path, message in ((tmp_path / "no", "does not exist"), (tmp_path, "holds no such file")):
        with pytest.raises(ValueError, match=f"{message}; expected a file ending in .jsonl"):
            list(read_converted(path, "trl"))
    with pytest.raises(ValueError, match="kind='other': expected one of trl, ultrafeedback, messages"):
        list(read_converted(tmp_path, "other"))


COMMAND = "`longpo pairs convert FILE --from {} --out pairs.jsonl`"


@pytest.mark.parametrize(
    "row, kind",
    [
        (TEXTS, "trl"),
        (TALKS, "trl"),
        ({"chosen": "a b", "rejected": "a c", "score": 1}, "trl"),
        *((row, "ultrafeedback") for row in (SCORED, {k: v for k, v in BINARIZED.items() if k != "messages"})),
        *((row, "messages") for row in (OPENAI, SWIFT, FROM_VALUE)),
    ],
)
def test_every_refusal_of_such_rows_names_the_command(row, kind, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadRecord) as refused:
        list(read_pairs(tmp_path))
    assert COMMAND.format(kind) in str(refused.value)


@pytest.mark.parametrize("name", ["r.csv", "r.json", "saved"])
def test_every_refusal_of_such_files_names_the_command(name, tmp_path):
    write([TEXTS], tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        if (name, path) == ("saved", tmp_path):
            continue
        with pytest.raises(ValueError, match=r"`longpo pairs convert .* --from trl --out pairs.jsonl` reads"):
            list(read_pairs(path))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_in_lines_names_the_command(indent, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps([TEXTS], indent=indent))
    with pytest.raises(ValueError, match="of a file that is one JSON array `longpo pairs convert` makes pairs"):
        list(read_pairs(tmp_path))
