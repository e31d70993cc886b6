"""benchmarks/losses/tiles_cpu.py on a tile of no account: every function is timed beside the copy."""

from benchmarks.losses.tiles_cpu import measure
from longpo_ops.ops.tiles import TorchTiles


def test_every_function_is_timed_in_copies():
    found = measure(TorchTiles(), rows=3, vocab=40, repeats=1)
    assert found["copy"][1] == 1.0
    assert {"logps", "gradient_", "logps_gradient_", "divergence_, jsd"} < set(found)
    assert all(milliseconds > 0 and copies > 0 for milliseconds, copies in found.values())
