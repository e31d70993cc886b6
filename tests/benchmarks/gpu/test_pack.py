"""gpu-pack without a GPU: what is packed under one folder is found under another, and what cannot be is told.

Triton is real but for the launch itself (benchmarks/gpu/pretended.py). Each run of its JIT is a process of its own, forked:
a kernel that was launched before is not looked up again.
"""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
import torch._dynamo  # torch would import it in every forked process anew

from benchmarks.gpu import carried, pack
from benchmarks.gpu.pretended import DEVICE, pretended_gpu
from benchmarks.gpu.rows import Row
from benchmarks.stamp import revision
from longpo_ops.ops.dispatch import choose_backend
from longpo_ops.ops.tiles import empty_tile

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="needs Triton's compiler")


KERNELS = 4  # segment sums; a row of one logit: scored, its gradient, both


def apart(function, *arguments):
    """The result of a function called in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def few_rows(cases=("n=1 K=1", "n=1000 K=3", "V=1 pitch=1 bfloat16")):
    """Three rows that launch KERNELS kernels, of the cheapest."""
    return ((question, row) for question, row in pack.launching_rows() if row.case in cases)


def pack_few(carry: Path) -> None:
    pack.describe(carry, pack.pack_kernels(carry, 2, few_rows()))


def prove_few(folder: str, *cases) -> dict:
    triton.knobs.cache.dir = folder
    return pack.prove(few_rows(*cases))


@pytest.fixture(scope="module")
def carry(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    for name in ("native", "wheels"):
        (folder / name).mkdir()
    (folder / "native/cuda-0.so").write_bytes(b"library")
    with ZipFile(folder / "wheels/peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", "answer = 42\n")
    apart(pack_few, folder)
    return folder


def test_every_launch_finds_its_kernel_in_another_folder(carry, tmp_path, monkeypatch):
    for name in carried.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    environment, facts = carried.prepare(
        carry, tmp_path, compile=lambda environment: {"compiled": "though nothing lacks"}
    )
    assert "failures" not in facts and "compiled" not in facts
    assert facts["triton_key"] == "the same" and facts["wheels"] == ["peer-1.0"] and facts["seconds"] > 0
    assert environment["LONGPO_COMMIT"] == facts["commit"] == revision()["commit"]
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert (tmp_path / "native/cuda-0.so").read_bytes() == b"library"
    assert Path(environment["PYTHONPATH"].split(os.pathsep)[0], "peer/__init__.py").exists()
    found = apart(prove_few, environment["TRITON_CACHE_DIR"])
    assert found["hits"] == found["kernels"] == facts["kernels"] == KERNELS
    assert found["compiled"] == [] and found["modules_compiled"] == 0 and found["rows"] == 3


def test_another_triton_compiles_and_is_told(carry, tmp_path, monkeypatch):
    key = triton.runtime.cache.triton_key()
    monkeypatch.setattr(triton.runtime.cache, "triton_key", lambda: key[:-1] + ("0" if key[-1] != "0" else "1"))
    asked = []
    environment, facts = carried.prepare(
        carry, tmp_path, compile=lambda environment: {"asked": asked.append(environment)}
    )
    assert facts["triton_key"] == "differs" and asked == [environment]
    found = apart(prove_few, environment["TRITON_CACHE_DIR"], ["n=1 K=1"])
    assert found["hits"] == 0 and found["compiled"] == ["segment_kernel"]


def test_changed_kernels_are_compiled_there(carry, tmp_path, monkeypatch):
    monkeypatch.setattr(carried, "kernel_sources", lambda: "others")
    _, facts = carried.prepare(carry, tmp_path, compile=lambda environment: {"compiled_here": {"kernels": 3}})
    assert facts["kernels_folder"] == "changed since it was packed" and facts["compiled_here"] == {"kernels": 3}


def test_compiling_there_ends_in_time(tmp_path):
    facts = carried.compile_missing({"TRITON_CACHE_DIR": str(tmp_path)}, processes=1, limit=0.1)
    assert facts == {"compiled_here": {"failed": "not done after 0 s"}}


def test_what_does_not_unpack_is_told_and_the_rest_is_used(carry, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "pack.json").write_bytes((carry / "pack.json").read_bytes())
    (broken / "triton.tar.xz").write_bytes((carry / "triton.tar.xz").read_bytes()[:-100])
    environment, facts = carried.unpack(broken, tmp_path / "there")
    assert set(facts["failures"]) == {"kernels", "native"} and carried.need_compiling(facts)
    assert environment["LONGPO_COMMIT"] == facts["commit"] and "LONGPO_OPS_CACHE" not in environment
    environment, facts = carried.unpack(tmp_path / "nowhere", tmp_path / "there")
    assert {"pack", "kernels", "native"} <= set(facts["failures"]) and carried.need_compiling(facts)


def test_a_users_allocator_stays(carry, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert not set(carried.unpack(carry, tmp_path)[0]) & set(carried.ALLOCATOR)


def test_a_tree_without_git_takes_the_packed_commit(monkeypatch):
    monkeypatch.setattr("benchmarks.stamp.git", lambda *_: "")
    monkeypatch.delenv("LONGPO_COMMIT", raising=False)
    monkeypatch.delenv("LONGPO_CHANGED_FILES", raising=False)
    assert revision() == {"commit": None, "changed_files": None}
    monkeypatch.setenv("LONGPO_COMMIT", "abc")
    monkeypatch.setenv("LONGPO_CHANGED_FILES", "2")
    assert revision() == {"commit": "abc", "changed_files": 2}


def test_a_row_that_raises_stops_the_packing_by_its_name():
    def compute(seed: int) -> dict:
        raise KeyError("no such tile")

    rows = [("tiles", Row("rows", "V=1", lambda seed: {"status": "failed: error 1.0, allowed 0.1"}, "triton"))]
    assert pack.run(rows) == 1  # numbers are nobody's here
    with pytest.raises(RuntimeError, match=r"tiles \| rows \| triton \| V=2: KeyError: 'no such tile'"):
        pack.run([*rows, ("tiles", Row("rows", "V=2", compute, "triton"))])


def test_what_does_not_travel_is_refused(tmp_path):
    (tmp_path / "triton.tar.xz").write_bytes(b"0" * 1000)
    pack.check_sizes(tmp_path, tree=pack.MOST_WITH_TREE - 1000)
    with pytest.raises(RuntimeError, match=r"1000 \+ 67107865 bytes: expected at most 67108864"):
        pack.check_sizes(tmp_path, tree=pack.MOST_WITH_TREE - 999)
    with open(tmp_path / "large.whl", "wb") as file:
        file.truncate(pack.MOST_CARRIED)
    with pytest.raises(RuntimeError, match="expected at most 40000000"):
        pack.check_sizes(tmp_path, tree=0)


def test_the_pretended_gpu_takes_the_way_of_cuda():
    """Devices, layouts and addresses as on the device; labels steer, floats are 1 on the host."""
    with pretended_gpu():
        tile = empty_tile(3, 250, DEVICE, torch.float32)
        assert tile.device == DEVICE and tile.is_cuda and tile.stride() == (256, 1)
        assert tile[1:, 4:].data_ptr() - tile.data_ptr() == 4 * 260 and tile.data_ptr() % 512 == 0
        assert tile.view(torch.bfloat16)[:, :250].stride() == (512, 1)
        assert choose_backend(DEVICE, torch.bfloat16).name == "triton"
        labels = torch.arange(6, device=DEVICE).view(2, 3) * 2
        assert torch.where(labels > 4, labels, -1).cpu().tolist() == [[-1, -1, -1], [6, 8, 10]]
        pinned = torch.arange(3).pin_memory(), torch.zeros(3, pin_memory=True)
        assert all(host.is_pinned() and host.to(DEVICE, non_blocking=True).is_cuda for host in pinned)
        leaf = torch.zeros(2, 3, device=DEVICE, requires_grad=True)
        (leaf * labels).sum().backward()
        assert leaf.grad.device == DEVICE and leaf.grad.shape == (2, 3) and float(leaf.detach().sum()) == 1.0
        assert json.dumps((leaf.detach().cpu() + labels.cpu()).tolist()) == "[[1.0, 3.0, 5.0], [7.0, 9.0, 11.0]]"
