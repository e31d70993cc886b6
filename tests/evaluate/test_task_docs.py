"""The examples of docs/evaluate.md run as they stand, and its table is the tasks'."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from longpo_ops.evaluate.own import load_tasks
from longpo_ops.evaluate.tasks import LOADED, TASKS
from longpo_ops.evaluate.vocabulary import ADJECTIVES, NOUNS
from tests.evaluate.readers import tokenizer

TEXT = (Path(__file__).parents[2] / "docs/evaluate.md").read_text().partition("\n## Tasks")[2].partition("\n## ")[0]


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    tokenizer().save_pretrained(tmp_path / "my-model")
    (tmp_path / "books").mkdir()
    (tmp_path / "books/one.md").write_text("# One\n\nThe harbour was quiet that day. Nobody came.\n\n" * 50)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(example, "docs/evaluate.md", "exec"), {})
    lines = capsys.readouterr().out.split("\n")[:3]
    assert [line.split()[0] for line in lines] == [f"niah_multikey_1/8192/{i}" for i in range(3)]
    assert all(line.endswith(" 1.0") for line in lines)


def test_the_needles_load(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "codes.yaml").write_text(example)
    (task,) = load_tasks(tmp_path / "codes.yaml").values()
    LOADED.clear()
    assert task.name == yaml.safe_load(example)["name"] and task.keys == ("Alice", "Bob", "Cleo", "Dan")


def test_the_table_is_the_tasks():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", TEXT, re.MULTILINE)
    assert {name: int(limit) for name, limit in rows} == {name: task.max_tokens for name, task in TASKS.items()}
    assert f"{len(ADJECTIVES)} adjectives and {len(NOUNS)} nouns" in TEXT
