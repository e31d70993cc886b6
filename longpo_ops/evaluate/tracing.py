"""Variable tracking: five assignments, each from the one before, among lines of noise; which variables hold the value?

    VAR A = 12345 .. VAR B = VAR A .. VAR C = VAR B .. VAR D = VAR C .. VAR E = VAR D   ->   A B C D E

As in RULER's current code: one chain of four hops, names of five capital letters, no assignment behind the last line;
before it a solved example with names of three, of as many lines as 500 tokens hold, and an empty line.

Tests: tests/evaluate/test_tasks.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from .samples import Draft, fit
from .sources import Texts
from .text import NOISE, fill, scatter

HOPS = 4
EXAMPLE_TOKENS, EXAMPLE_LINES = 500, 5  # at most, with the beginning of the answer; at least, whatever they take
TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
PREFILL = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {value}, they are: "
)


@dataclass(frozen=True)
class VariableTracking:
    """RULER's vt. Its units are lines of noise. example_lines: those of the solved example."""

    name: str = "vt"
    max_tokens: int = 30
    metric: str = "all"
    example_lines: int = EXAMPLE_LINES

    def filled(self, tokenizer) -> VariableTracking:
        """The same with an example that fills its tokens: 14 to 16 lines with usual tokenizers."""

        def count(lines: int) -> int:
            prompt, prefill, _ = _puzzle(Random("example"), lines, 3)
            return len(tokenizer(prompt + prefill, add_special_tokens=False, verbose=False)["input_ids"])

        return replace(self, example_lines=fit(count, EXAMPLE_LINES, EXAMPLE_TOKENS) or EXAMPLE_LINES)

    def least(self, number: int, length: int, texts: Texts) -> int:
        return HOPS + 2

    def draft(self, seed: str, number: int, length: int, units: int, texts: Texts) -> Draft:
        example, told, names = _puzzle(Random(f"{seed}|example"), self.example_lines, 3)
        prompt, prefill, references = _puzzle(Random(seed), units, 5)
        return Draft(f"{example}{told} {' '.join(names)}\n\n{prompt}", prefill, references)


def _puzzle(random: Random, lines: int, letters: int) -> tuple[str, str, tuple[str, ...]]:
    """-> prompt, beginning of the answer, the names in the order of the chain."""
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(random.choices(ascii_uppercase, k=letters))] = None
    chain, value = tuple(names), str(random.randrange(10000, 99999))
    told = [f"\nVAR {chain[0]} = {value}", *(f"\nVAR {b} = VAR {a} " for a, b in pairwise(chain))]
    context, _ = scatter(random, [f"\n{NOISE}"] * lines, told, range(lines))
    prefill = fill(PREFILL, count=str(len(chain)), value=value)
    return fill(TEMPLATE, context=context, value=value), prefill, chain
