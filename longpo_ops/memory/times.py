"""How long a step of a plan takes, and what its cards send: operations over rates, bytes over rates.

    layer = products / matmul + attention's pairs / attention;    copies and FSDP2's traffic count where they outlast it

Tests: tests/memory/test_plan.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longpo_ops.memory.mesh import PASSES, head_dim, heads_of
from longpo_ops.memory.structure import window_of

if TYPE_CHECKING:
    from longpo_ops.memory.cost import WeightBytes
    from longpo_ops.memory.offload import Placement
    from longpo_ops.memory.plan import Machine, Settings, Work
    from longpo_ops.memory.structure import Weights
    from longpo_ops.memory.trace import Trace

# What the way to a float32 master and back reads and writes on a device, bytes a weight.
CONVERSIONS = {"residue": 66, "float32": 12}


def attention_pairs(length: int, tails: tuple[int, ...], window: int | None = None) -> float:
    """Pairs of a query and a key it sees, in a pack of one pair: prefix and chosen tail causal, rejected tails see the prefix.

    How long the chosen tail is makes no difference but in what rejected ones see: taken as long as they are on average.
    """
    rows = length - sum(tails)
    prefix = rows - (sum(tails) // len(tails) if tails else 0)
    seen = [(rows, 0), *((tail, prefix) for tail in tails)]
    if window is None:
        return sum(n * n / 2 + n * before for n, before in seen)
    return sum(min(n, window) ** 2 / 2 + max(0, n - window) * window + n * min(before, window) for n, before in seen)


def sent_bytes(work: Work, w: Weights) -> dict[str, int]:
    """By a card for a pack, at most."""
    heads, size = heads_of(work.config, work.mesh.sequence_parallel), work.dtype.itemsize
    exchanged = PASSES * w.layers * heads.sent(work.rows, head_dim(work.config), size)
    sent = {"Ulysses": exchanged, "FSDP2": work.mesh.fsdp_sent(w.total, work.dtype)}
    return {name: nbytes for name, nbytes in sent.items() if nbytes}


def step_seconds(
    work: Work,
    settings: Settings,
    machine: Machine,
    traces: dict[int, Trace],
    w: Weights,
    inputs: Placement,
    stored: int,
    kept: WeightBytes,
) -> dict[str, float]:
    """By component. stored: bytes of a layer input away from the device, not rounded to pages."""
    layers = {kind: _layer_seconds(work, settings, machine, traces[kind], w, kind) for kind in w.counts}
    seconds = {name: sum(n * layers[kind][name] for kind, n in w.counts.items()) for name in ("forward", "backward")}
    seconds["loss"] = (4 if work.adapters else 6) * work.rows * w.embedding / machine.matmul
    rest = inputs.host + inputs.disk
    saved = (
        settings.attention_layers * max(t.attention for t in traces.values()) * work.rows / work.rows_at_once / w.layers
    )
    copied = (rest * stored / w.layers + saved) / machine.copy
    spilled = inputs.disk * stored / max(rest, 1) / machine.disk
    seconds["waiting for copies"] = sum(
        n * max(0.0, copied - time, spilled - time) for kind, n in w.counts.items() for time in layers[kind].values()
    )
    seconds |= _sending_seconds(work, machine, w, layers)
    seconds = {name: work.accumulation * time for name, time in seconds.items()}
    return seconds | {"optimizer": _optimizer_seconds(work, settings, machine, w, kept)}


def _layer_seconds(
    work: Work, settings: Settings, machine: Machine, t: Trace, w: Weights, layer: int
) -> dict[str, float]:
    length, calls = work.length, 1.0
    if work.separate is not None:  # as many forwards of the longest sequence as make up all rows
        length, calls = work.rows_at_once, work.length / work.rows_at_once
    attention = calls * t.pair_flops * attention_pairs(length, work.tails, window_of(work.config, layer))
    return {
        "forward": calls * t.forward_flops / machine.matmul + attention / machine.attention,
        "backward": calls * t.backward_flops / machine.matmul
        + 2.5 * attention / machine.attention_backward
        + (1 - settings.attention_layers / w.layers) * attention / machine.attention,
    }


def _sending_seconds(work: Work, machine: Machine, w: Weights, layers: dict[int, dict[str, float]]) -> dict[str, float]:
    """Attention waits for the exchanges of heads. FSDP2's traffic goes on beside the layers, which hide what they take as long
    as; weights outside of them (the head, the embedding) are waited for."""
    mesh, rates = work.mesh, (machine.inside_node, machine.between_nodes)
    if not mesh.sharded:
        return {}

    def fsdp(weights: int, gathers: int, reduced: bool) -> float:
        return mesh.ring_seconds(mesh.fsdp_sent(weights, work.dtype, gathers, reduced), *rates)

    shown = 0.0
    for kind, n in w.counts.items():
        for reduced, time in zip((False, True), layers[kind].values(), strict=True):
            shown += n * max(0.0, fsdp(w.each[kind], 1, reduced) - time)
    exchanged = sent_bytes(work, w).get("Ulysses", 0)
    return {
        "exchanging heads": mesh.exchange_seconds(exchanged, *rates),
        "waiting for weights": shown + fsdp(w.total - sum(w.each), 2, True),
    }


def _optimizer_seconds(work: Work, settings: Settings, machine: Machine, w: Weights, kept: WeightBytes) -> float:
    """A step on the host takes as long as the slower of two: the copies of weights and gradients, and the host's own work."""
    cost, weights = work.step_costs[settings.states], work.mesh.share(w.trained)
    if not settings.host:
        conversions = CONVERSIONS[settings.master] if kept.master else 0
        return (cost.passes + conversions) * weights / machine.device_memory
    return weights * max((2 * kept.weight + kept.gradient) / machine.copy, cost.host / machine.host_memory)
