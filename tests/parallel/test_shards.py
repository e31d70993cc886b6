"""Rows over ranks: a partition, even to one row, refused where a rank would have none."""

from types import SimpleNamespace

import pytest

from longpo_ops.parallel import Shards


def shards(length, size, rank=0):
    return Shards(length, SimpleNamespace(size=lambda: size, rank=lambda: rank))


@pytest.mark.parametrize("length, size", [(2, 2), (7, 2), (7, 4), (1000, 8), (13, 13)])
def test_the_shards_are_a_partition_even_to_one_row(length, size):
    made = [shards(length, size, rank) for rank in range(size)]
    assert [row for each in made for row in range(length)[each.rows]] == list(range(length))
    assert made[0].counts() == [each.rows.stop - each.rows.start for each in made]
    assert max(made[0].counts()) - min(made[0].counts()) <= 1


def test_fewer_rows_than_ranks_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"3 tokens over 4 ranks.*sequence_parallel"):
        shards(3, 4)
