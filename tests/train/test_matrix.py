"""All causal LMs of the installed transformers: each is packed, separate or refused by name, and none is wrong."""

import pytest
import transformers

from .matrix import TOLERANCE, kinds, outcome, written

VERSION, WAYS = written()


@pytest.mark.parametrize("kind", kinds())
def test_what_training_makes_of_a_model(kind):
    row = outcome(kind)
    assert row.off is None or row.off <= TOLERANCE, row
    if transformers.__version__ == VERSION:
        assert row.way == WAYS.get(kind), f"{row}: run python -m tests.train.matrix"


def test_the_page_knows_each():
    assert transformers.__version__ != VERSION or sorted(WAYS) == kinds()
