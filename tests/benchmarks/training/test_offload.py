"""The offload benchmark at a size for tests: what it requires of the peak at 32K tokens holds at 4K as well."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.stamp import ROOT
from benchmarks.training import offload
from benchmarks.training.offload import Shape, copy_rates, measure, measure_peer, perform, told, verdict
from benchmarks.training.offload_peers import PEERS, Peer

SHAPE = Shape(tokens=4096, layers=6, width=128, window=64, rows=128, steps=1, page_bytes=1 << 18)


def test_peak_is_at_most_half_of_plain_checkpointing():
    settings = ("checkpointing", "offload to disk + tiles")
    results = {setting: measure(SHAPE, setting) for setting in settings}
    assert verdict(results, {}, SHAPE) == "passed", results
    tiled = results["offload to disk + tiles"]
    assert tiled["offloaded_bytes"] == tiled["disk_bytes"] == SHAPE.layers * SHAPE.tokens * SHAPE.width * 4
    assert tiled["host_bytes"] == 0


def test_verdict_names_what_is_wrong():
    result = {"peak_bytes": 100, "seconds": 1.0, "gradients": "a", "norm": 1.0, "used_bytes_after": 0}
    names = (
        "checkpointing",
        "checkpointing + tiles",
        "offload to disk",
        "offload to disk + tiles",
        "offload to host + tiles",
    )
    sound = {name: dict(result) for name in names}
    sound["offload to disk + tiles"]["peak_bytes"] = 50
    assert verdict(sound, {}, SHAPE) == "passed"
    for change, word in (({"peak_bytes": 51}, "peak"), ({"norm": 1.1}, "norm"), ({"used_bytes_after": 8}, "held")):
        broken = sound | {"offload to disk + tiles": sound["offload to disk + tiles"] | change}
        assert word in verdict(broken, {}, SHAPE)
    assert "changed" in verdict(sound | {"offload to disk": result | {"gradients": "b"}}, {}, SHAPE)
    gpu, rates = Shape(tokens=65536, device="cuda"), {"out": 9, "in": 9, "out, one copy": 10, "in, one copy": 10}
    assert verdict(sound, rates, gpu) == "passed"
    assert "copies ['in']" in verdict(sound, rates | {"in": 8.9}, gpu)
    slow = sound | {"offload to host + tiles": result | {"seconds": 1.021}}
    for tokens in (32768, 65536):
        assert "1.021 times as long as keeping all, at most 1.02" in verdict(slow, rates, replace(gpu, tokens=tokens))
    assert verdict(slow, rates, replace(gpu, tokens=16384)) == "passed"  # too short to hide copies behind


def test_copy_rates_go_both_ways():
    rates = copy_rates("cpu", nbytes=1 << 22, page_bytes=1 << 20)
    assert set(rates) == {"out", "in", "out, one copy", "in, one copy"} and min(rates.values()) > 0


def test_a_setting_is_stopped_at_its_limit():
    with pytest.raises(RuntimeError, match="checkpointing: no result within 0 s"):
        measure(SHAPE, "checkpointing", 0.01)


def test_repeatable_kernels_for_one_step_only():
    with offload.repeatable():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


TINY = Shape(tokens=256, layers=3, width=64, window=32, steps=1)


def test_a_peer_is_around_every_step_and_counts_what_it_moved(monkeypatch):
    class Counts(torch.autograd.graph.saved_tensors_hooks):
        entered, packed = 0, 0

        def __init__(self, factor: float):
            super().__init__(self.pack, lambda x: x * factor if x.is_floating_point() else x)

        def __enter__(self):
            self.entered += 1
            super().__enter__()

        def pack(self, tensor):
            self.packed += tensor.is_floating_point()
            return tensor

    for name, factor in (("right", 1.0), ("wrong", 1.01)):
        hooks = Counts(factor)
        monkeypatch.setitem(PEERS, name, Peer(lambda model, hooks=hooks: (hooks, lambda: hooks.packed), False))
        monkeypatch.setattr(offload, "measure", lambda shape, name, python: perform(shape, name))
        plain = perform(TINY, "checkpointing")
        row = measure_peer(TINY, name, plain, Path("unused"))
        assert (
            "status" not in row and hooks.entered == 2 and row["moved"] >= 2 * TINY.layers
        )  # a short step and the timed one
        assert row["same_bits"] == (name == "right") and ("same bits" in told(name, row)) == (name == "right")
        assert row["norm_error"] < 1e-6 if name == "right" else row["norm_error"] > 1e-4


def test_a_peer_that_cannot_be_had_or_moves_nothing_says_so(monkeypatch):
    missing = measure_peer(TINY, "DeepSpeed's offload to the host", {}, Path("no/such/python"))
    assert missing["status"].startswith("not installed") and (ROOT / "requirements/offload.txt").exists()
    result = {"seconds": 1.0, "peak_bytes": 1, "status": "runs, but moves nothing off this device"}
    monkeypatch.setattr(offload, "measure", lambda *given, **more: result)
    assert measure_peer(TINY, "transformers' offload to the host", {}, Path("unused")) == {"status": result["status"]}
    assert offload.counted(lambda: 0) == {"moved": 0, "status": result["status"]}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="it runs where memory can be pinned")
def test_transformers_pins_and_so_fails_without_an_accelerator():
    row = measure_peer(TINY, "transformers' offload to the host", {}, Path("unused"))
    assert row["status"].startswith("failed: ") and "pin_memory" in row["status"]
