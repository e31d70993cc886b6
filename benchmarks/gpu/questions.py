"""What the check asks, in order of worth. Knows nothing of torch: the process that keeps the report starts at once.

Tests: tests/benchmarks/gpu/test_check.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import NamedTuple


class Question(NamedTuple):
    """What is asked, in a sentence, and where its rows are, in order of worth: "module:function", a dot for this folder."""

    name: str
    asks: str
    place: str
    own_process: bool = False  # where a crash must hide nothing else

    def rows(self, setting) -> Iterable:
        """The Rows (rows.py) for a Setting (setting.py)."""
        module, function = self.place.split(":")
        return getattr(import_module(module, __package__), function)(setting)

    def seconds(self, setting) -> float:
        """What they should take, those aside that its memory does not hold."""
        return sum(row.seconds for row in self.rows(setting) if row.shortage(setting) is None)


QUESTIONS = (
    Question("tiles", "Is every kernel right, against float64?", ".correctness:tiles"),
    Question("public", "Is every public function right, against float64?", ".correctness:public"),
    Question("attention", "Is shared-prefix attention right, on every kernel that is here?", ".attention:rows", True),
    Question("loss", "How fast is the loss beside the ceiling, plain PyTorch and other libraries?", ".speed:rows"),
    Question("kernels", "How fast are the parts of the loss beside copies and torch.mm?", ".kernels:rows"),
    Question("step", "What does a step of a Llama-3-8B take at 65,536 tokens?", ".steps:step"),
    Question("longest", "And at 131,072?", ".steps:longest"),
    Question("pairs", "What does a pair take as one sequence, what as two?", ".steps:pairs"),
    Question("offload", "What do offload, its copies and the optimizer on the host cost?", ".steps:offload"),
)
LONG = (Question("long", "Is a step of 262,144 tokens as planned, on an H200 one of 524,288 in parts?", ".steps:long"),)
BY_NAME = {question.name: question for question in (*QUESTIONS, *LONG)}
