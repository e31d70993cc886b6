"""What the demo prints of its documents and pairs.

Tests: tests/demo/test_commands.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..data import Pair, Turn, read_pairs
from ..evolve import Evolution
from ..runs.page import printable
from ..tiny.text import FACT, QUESTIONS

SHOWN = 420  # characters of a long text


def show_documents(console: Console, evolution: Evolution) -> None:
    """How many there are, and how one begins."""
    for each in evolution.rounds:
        files = sorted(path for folder in each.documents for path in Path(folder).iterdir())
        sizes = [path.stat().st_size for path in files]
        console.print(
            f"[bold]{len(files)} documents[/bold] for {each.length:,} tokens, {min(sizes):,} to {max(sizes):,} bytes: "
            "Python's own documentation with facts planted in it, such as"
        )
        console.print(Panel(_marked(files[0].read_text(encoding="utf-8")[:SHOWN] + " ..."), title=files[0].name))


def show_pair(console: Console, evolution: Evolution) -> None:
    """The first turn whose chosen answer says what the document says and whose rejected one does not, else the first."""
    pairs = list(read_pairs(f"{evolution.out}/{evolution.rounds[0].name}/pairs", allow_equal=True))
    turns = [(pair, turn) for pair in pairs for turn in pair.turns]
    pair, turn = next(
        (each for each in turns if _right(*each, each[1].chosen) and not _right(*each, each[1].rejected[0])), turns[0]
    )
    right = (
        sum(_right(pair, turn, turn.chosen) for pair, turn in turns),
        sum(_right(pair, turn, turn.rejected[0]) for pair, turn in turns),
    )
    agree = sum(turn.chosen == turn.rejected[0] for _, turn in turns)
    console.print(
        f"[bold]{len(pairs)} pairs of {len(turns)} questions[/bold] the model asked itself. Right from the chunk: "
        f"{right[0]}, from the whole document: {right[1]}; both answers are the same in {agree}. One of them:"
    )
    console.print(Panel(Text(printable(turn.instruction)), title="question"))
    chosen = Text.assemble(("chosen: ", "bold green"), printable(turn.chosen), "\n\n", _marked(turn.chunk))
    document = pair.document if len(pair.document) <= 2 * SHOWN else pair.document[: 2 * SHOWN] + " ..."
    rejected = Text.assemble(("rejected: ", "bold red"), printable(turn.rejected[0]), "\n\n", _marked(document))
    sides = Table.grid(expand=True)
    for _ in range(2):
        sides.add_column(ratio=1)
    sides.add_row(
        Panel(chosen, title=f"read a chunk of {len(turn.chunk):,} characters"),
        Panel(rejected, title=f"read all {len(pair.document):,} characters"),
    )
    console.print(sides)


def _right(pair: Pair, turn: Turn, said: str) -> bool:
    """Whether an answer is the fact that the document holds about what was asked."""
    wordings = "|".join(re.escape(wording).replace(re.escape("{key}"), r"(\w+)") for wording in QUESTIONS)
    asked = re.search(wordings, turn.instruction)
    key = asked and next(filter(None, asked.groups()))
    value = key and re.search(
        re.escape(FACT.format(key=key, value="#")).replace(re.escape("#"), r"(\d+)"), pair.document
    )
    return bool(value) and value[1] in said


def _marked(text: str) -> Text:
    """The text with its facts highlighted."""
    marked = Text(printable(text))
    pattern = re.escape(FACT.strip()).replace(re.escape("{key}"), r"\w+").replace(re.escape("{value}"), r"\d+")
    marked.highlight_regex(pattern, "bold yellow")
    return marked
