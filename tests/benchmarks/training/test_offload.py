"""The offload benchmark at a size for tests: what it requires of the peak at 32K tokens holds at 4K as well."""

from dataclasses import replace

import pytest
import torch

from benchmarks.training import offload
from benchmarks.training.offload import Shape, copy_rates, measure, verdict

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
