"""Pages, the spill file, and block-scaled 8-bit storage."""

import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longpo_ops.memory import tiers
from longpo_ops.memory.quantise import BLOCK, CHUNK, Exact, Int8
from longpo_ops.memory.tiers import (
    HostPages,
    Lane,
    SpillPages,
    lane_of,
)

PAGE = 4096


def test_host_pages_are_taken_again_before_new_ones_are_made():
    pages = HostPages(PAGE, 10 * PAGE + 5, Lane())
    first = pages.take(4)
    pages.give(first[:3])
    assert set(pages.take(5)) > set(first[:3]) and pages.made == 6 == pages.used
    assert pages.room() == 4
    pages.reserve(4)
    assert pages.made == 10 and pages.used == 6


def test_pages_of_a_slab_are_apart_and_stay_within_the_budget():
    """A budget of 150 pages is made of slabs of two. The one that is in use beyond closing goes with its last page."""
    pages = HostPages(PAGE, 151 * PAGE + 5, Lane())
    numbers = pages.take(5)
    assert (pages.slab_pages, pages.made, pages.used, pages.nbytes) == (2, 6, 5, 6 * PAGE)
    numbers += pages.take(pages.room())
    assert pages.made == pages.used == 151 and pages.nbytes == 151 * PAGE and pages.room() == 0
    for fill, number in enumerate(numbers):
        pages.view(number, PAGE).fill_(fill)
    assert [pages.view(number, PAGE).unique().tolist() for number in numbers] == [[fill] for fill in range(151)]
    pages.give(numbers[1:])
    pages.close()
    assert (pages.made, pages.used, pages.nbytes) == (1, 1, 2 * PAGE) and not pages.view(numbers[0], PAGE).any()
    pages.give(numbers[:1])
    assert (pages.made, pages.nbytes) == (0, 0)


def test_more_than_the_budget_is_made_where_it_is_asked_for():
    """A layer's input may be larger than the first one's, by which places were found."""
    pages = HostPages(PAGE, 2 * PAGE, Lane())
    assert len(set(pages.take(5))) == 5 and pages.nbytes == 5 * PAGE and pages.room() == -3


def test_pages_that_come_back_in_threads_are_freed_once():
    pages = HostPages(PAGE, 128 * PAGE, Lane())
    numbers = pages.take(128)
    pages.close()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: pages.give([number]), numbers))
    pages.close()  # what a thread found another had already taken
    assert (pages.made, pages.nbytes) == (0, 0)


def test_host_pages_in_use_outlive_closing():
    pages = HostPages(PAGE, 3 * PAGE, Lane())
    one, two = pages.take(2)
    pages.view(one, PAGE).fill_(7)
    pages.give([two])
    pages.close()
    assert pages.made == 1 and pages.view(one, PAGE).unique().tolist() == [7]
    pages.give([one])
    assert pages.made == 0


def test_spill_file_has_no_name_and_keeps_pages_apart(tmp_path):
    pages = SpillPages(PAGE, tmp_path / "new folder")
    assert os.listdir(tmp_path / "new folder") == []
    numbers = pages.take(3)
    data = [torch.randint(256, (size,), dtype=torch.uint8) for size in (PAGE, 10, PAGE)]
    for number, page in zip(numbers, data, strict=True):
        pages.write(number, page)
    for number, page in reversed(list(zip(numbers, data, strict=True))):
        back = torch.empty_like(page)
        pages.read(number, back)
        assert torch.equal(back, page)
    file = pages._file
    pages.close()
    assert not file.closed
    pages.give(numbers)
    assert file.closed


def test_processes_share_what_is_free_on_the_disk(tmp_path, monkeypatch):
    """A share is of what was free at first: what the others take since is theirs."""
    free = [100 * PAGE]
    monkeypatch.setattr(tiers.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[0]))
    pages = SpillPages(PAGE, tmp_path, sharers=4)
    assert pages.room() == 25
    numbers, free[0] = pages.take(5), 60 * PAGE
    assert pages.room() == 20
    pages.give(numbers[:2])
    assert pages.room() == 22
    free[0] = 3 * PAGE  # others took more than theirs
    assert pages.room() == 3 + 2


def test_refuses_a_folder_that_takes_no_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="spill_dir"):
        SpillPages(PAGE, tmp_path / "file")


def test_refuses_other_devices():
    with pytest.raises(ValueError, match="xpu"):
        lane_of(torch.device("xpu"))


@given(
    n=st.integers(1, 5 * BLOCK),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    power=st.floats(-4, 4),
    seed=st.integers(0, 99),
)
def test_int8_error_is_within_its_bound(n, dtype, power, seed):
    """|x - x'| <= max|x| of the block / 254, and the rounding to the dtype."""
    x = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 10**power).to(dtype)
    payload = Int8.encode(x)
    assert payload.numel() == Int8.nbytes(x) == -(-n // BLOCK) * (BLOCK + 4)
    back = Int8.decode(payload, dtype, n)
    assert back.dtype == dtype and back.shape == x.shape
    for block, other in zip(x.double().split(BLOCK), back.double().split(BLOCK), strict=True):
        top = block.abs().max()
        ulp = max(torch.finfo(dtype).eps * top, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
        assert (block - other).abs().max() <= top / 254 * (1 + 1e-6) + ulp / 2


def test_int8_keeps_zeros_and_marks_what_is_not_finite():
    x = torch.zeros(4 * BLOCK)
    x[BLOCK] = float("nan")
    x[2 * BLOCK] = float("inf")
    x[3 * BLOCK] = 5
    back = Int8.decode(Int8.encode(x), x.dtype, x.numel()).split(BLOCK)
    assert torch.equal(back[0], x[:BLOCK]) and torch.equal(back[3], x[3 * BLOCK :])
    assert back[1].isnan().all() and back[2].isnan().all()


def test_int8_goes_by_chunks():
    x = torch.linspace(-1, 1, CHUNK + BLOCK + 1)
    assert (Int8.decode(Int8.encode(x), x.dtype, x.numel()) - x).abs().max() <= 1 / 254 + 1e-6


def test_int8_refuses_float64():
    with pytest.raises(ValueError, match="float64"):
        Int8.encode(torch.zeros(3, dtype=torch.float64))


def test_exact_is_the_same_memory():
    x = torch.randn(6, dtype=torch.bfloat16)
    assert Exact.encode(x).data_ptr() == x.data_ptr()
    assert torch.equal(Exact.decode(Exact.encode(x).clone(), x.dtype, 6), x)
