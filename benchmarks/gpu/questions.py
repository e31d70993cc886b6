"""What the check asks, in order of worth.

Tests: tests/benchmarks/gpu/test_check.py.
"""

from __future__ import annotations

from . import attention, correctness
from .rows import Question

QUESTIONS = (
    Question("tiles", "Is every kernel right, against float64?", correctness.tiles),
    Question("public", "Is every public function right, against float64?", correctness.public),
    Question("attention", "Is shared-prefix attention right, on every kernel that is here?", attention.rows, True),
)
LONG = ()
BY_NAME = {question.name: question for question in (*QUESTIONS, *LONG)}
