"""What a training step will take, before anything is allocated: memory by component over the step, its time, what fits.

    device(phase) = weights + master + states + gradients so far + layer inputs kept or passing + what the phase itself needs
    phases: forward of layer 0..L-1, last norm, loss, backward of layer L-1..0, embedding, optimizer

What a layer needs comes from trace.py, which runs one on the meta device; the rest is arithmetic. Everything here is
derived, not measured: times are operations over the rates of Machine, copies that are longer than a layer's time are added,
and nothing else (norms, launches, data) is in them. Full fine-tuning in one dtype on one device; adapters and sharding are
not modelled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from longpo_ops.kinds import FLOATS, check_choice, check_each, check_number, check_object, check_whole, refusal
from longpo_ops.memory import optimizer, pieces
from longpo_ops.memory.host_step import room_bytes
from longpo_ops.memory.offload import Placement
from longpo_ops.memory.quantise import CODECS
from longpo_ops.memory.tiers import PAGE
from longpo_ops.memory.trace import Trace, build, trace
from longpo_ops.ops.sweep import DEFAULT_WORKSPACE, workspace_of

GIB = 1 << 30
ERROR = 0.1  # of a predicted peak, at most, in tests/memory/test_plan.py: real <= predicted / (1 - ERROR)
DEVICE_RESERVE = 2 * GIB  # context, libraries, gaps between blocks of the allocator
HOST_RESERVE = 8 * GIB  # system, Python, data, and room to write a checkpoint
MASTER_BYTES = {"residue": 2, "float32": 4}
STEP_BYTES = 16  # scratch of an optimizer step, for each number of the piece it works on
# What the way to a float32 master and back reads and writes on a device, bytes a weight.
CONVERSIONS = {"residue": 66, "float32": 12}


class StepCost(NamedTuple):
    """Bytes a weight. states: held. passes: what the step's operators read and write on a device. host: what a host copies,
    read and written, while it steps a weight."""

    states: float
    passes: int
    host: int


# AdamW is one fused kernel; RMSprop is five, each over all numbers. `host` was measured on 2026-11-27 on one core of a Zen 3:
# where it copied 11.3 GB/s, AdamW took 7.7 ns, in which 26 bytes come from memory or go there, and 71 ns, in which torchao's
# quantisation computes; where it copied 13.4 GB/s, RMSprop took 8.0 ns and AdamW 6.4.
STEP_COSTS = {
    optimizer.AdamW: {"float32": StepCost(8, 28, 87), "8bit": StepCost(2 * (1 + 4 / 256), 16, 800)},
    optimizer.RMSprop: {"float32": StepCost(4, 52, 107)},
}
# The H200's are those of whole steps (docs/log.md, 2026-11-27): bf16 products at 65,536 rows and cuDNN's causal attention.
CARDS = {
    "H100": {"device_memory": 3.0e12, "matmul": 798e12},
    "H200": {"device_memory": 4.15e12, "matmul": 687e12, "attention": 475e12, "attention_backward": 525e12},
}


@dataclass(frozen=True)
class Machine:
    """Memory in bytes, and rates: operations or bytes a second, read and written ones together for device_memory and
    host_memory. The defaults are those of an H200 on PCIe 5."""

    device_bytes: int
    host_bytes: int = 0
    disk_bytes: int = 0
    matmul: float = 788e12
    attention: float = 600e12
    attention_backward: float = 510e12
    device_memory: float = 4.3e12
    copy: float = 50e9
    disk: float = 3e9
    host_memory: float = 100e9
    device_reserve: int = DEVICE_RESERVE
    host_reserve: int = HOST_RESERVE
    error: float = ERROR  # of the device's peak, for which room is left

    def __post_init__(self):
        for field in fields(self):
            name, value = f"Machine: {field.name}", getattr(self, field.name)
            if field.type == "int":
                check_whole(name, value, 0)
            elif field.name == "error":
                if not 0 <= check_number(name, value) < 1:
                    raise refusal(name, value, "a share of at least 0, below 1")
            else:
                check_number(name, value, above=0)


@dataclass(frozen=True)
class Work:
    """A step: packs of `length` tokens, of which `tails` are rejected answers, through the model of a transformers config.
    reference_bytes: weights of a reference that stays on the device beside the policy. optim: a name of optimizer.OPTIMS."""

    config: object
    length: int
    tails: tuple[int, ...] = ()
    accumulation: int = 1
    max_grad_norm: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    workspace_bytes: int = DEFAULT_WORKSPACE["cuda"]
    reference_bytes: int = 0
    optim: str = "adamw_torch"

    def __post_init__(self):
        if not hasattr(self.config, "to_json_string") or isinstance(self.config, type):
            raise refusal("config", self.config, "a transformers config")
        check_whole("length", self.length, 1)
        check_whole("accumulation", self.accumulation, 1, "at least one pack")
        check_whole("workspace_bytes", self.workspace_bytes, 1)
        check_whole("reference_bytes", self.reference_bytes, 0)
        optimizer.check_optim(self.optim)
        for tail in check_each("tails", self.tails, int, "a number of rows", (tuple, list)):
            check_whole("tails", tail, 1)
        if self.max_grad_norm is not None and check_number("max_grad_norm", self.max_grad_norm) < 0:
            raise refusal("max_grad_norm", self.max_grad_norm, "a number >= 0")
        if not isinstance(self.dtype, torch.dtype) or self.dtype not in FLOATS:
            raise refusal("dtype", self.dtype, "a floating-point torch dtype")
        if sum(self.tails) >= self.length:
            raise ValueError(
                f"length={self.length!r}, tails={self.tails}: expected a pack longer than its rejected tails"
            )

    @property
    def step_costs(self) -> dict[str, StepCost]:
        """By the states that its optimizer may have."""
        return STEP_COSTS[optimizer.OPTIMS[self.optim]]


@dataclass(frozen=True)
class Settings:
    """What can be chosen. tile_rows: of tile_layers, None for none. offload: inputs beyond `kept` leave the device, to the
    host first, then to disk. The rest as in offload_activations and optimizer.MasterOptimizer."""

    tile_rows: int | None = None
    offload: bool = False
    kept: int = 0
    on_host: int = 0
    on_disk: int = 0
    store: str = "exact"
    attention_layers: int = 0
    states: str = "float32"
    master: str = "residue"
    host: bool = False
    step_in_backward: bool = False


class Weights(NamedTuple):
    """Numbers of weights. tied: whether the head is the embedding."""

    total: int
    layer: int
    embedding: int
    largest: int
    layers: int
    tied: bool


class Phase(NamedTuple):
    name: str
    parts: dict[str, int]  # bytes by component

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Plan(NamedTuple):
    """A prediction: device memory over the step, host and disk memory and seconds by component."""

    work: Work
    machine: Machine
    settings: Settings
    phases: tuple[Phase, ...]
    host: dict[str, int]
    disk: dict[str, int]
    seconds: dict[str, float]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def shortfalls(self) -> dict[str, int]:
        """Bytes that are missing, by where."""
        machine = self.machine
        over = {
            "device": self.peak.total - machine.device_bytes,
            "host": sum(self.host.values()) - machine.host_bytes,
            "disk": sum(self.disk.values()) - machine.disk_bytes,
        }
        return {where: missing for where, missing in over.items() if missing > 0}

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


# -- prediction --------------------------------------------------------------------------------------------------------


def weights_of(config) -> Weights:
    return _weights(config.to_json_string(use_diff=False), _Hidden(config))


class _Hidden(NamedTuple):
    """A config that a cache does not look at."""

    config: object

    def __hash__(self):
        return 0

    def __eq__(self, other):
        return True


@functools.lru_cache(maxsize=64)
def _weights(key: str, hidden: _Hidden) -> Weights:
    model = build(hidden.config)
    body = getattr(model, model.base_model_prefix)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return Weights(
        total=sum(p.numel() for p in model.parameters()),
        layer=sum(p.numel() for p in body.layers[0].parameters()),
        embedding=embedding.numel(),
        largest=max(p.numel() for p in model.parameters()),
        layers=len(body.layers),
        tied=embedding is head,
    )


def traced(work: Work, settings: Settings) -> Trace:
    mode = "freed" if settings.step_in_backward else "held" if work.accumulation > 1 else "new"
    return trace(work.config, work.length, settings.tile_rows, work.dtype, mode, _float32_gradients(work))


def _float32_gradients(work: Work) -> bool:
    return work.accumulation > 1 and work.dtype.itemsize < 4


def predict(work: Work, settings: Settings, machine: Machine) -> Plan:
    """The step under these settings, whether it fits or not.

    Raises ValueError for settings that exclude each other, and for a model that cannot be traced.
    """
    check_planned(work, machine)
    check_object("settings", settings, Settings, "a Settings")
    check_choice(f"optim={work.optim!r}, states", settings.states, tuple(work.step_costs))
    if settings.step_in_backward:
        optimizer.refuse_step_in_backward(work.accumulation, work.max_grad_norm)
    t, w = traced(work, settings), weights_of(work.config)
    layers = w.layers
    inputs = (
        Placement(settings.kept, settings.on_host, settings.on_disk) if settings.offload else Placement(layers, 0, 0)
    )
    if sum(inputs) != layers:
        raise ValueError(f"kept, on_host and on_disk are {tuple(inputs)}: expected {layers} layers in all")
    stored = paged(encoded_bytes(t, work, settings))
    attention = settings.attention_layers * paged(t.attention)
    optimizer_bytes = _optimizer_bytes(work, settings, w)
    host = {
        "reserve": machine.host_reserve,
        "layer inputs": inputs.host * stored,
        "attention outputs": attention,
    } | (optimizer_bytes | {"optimizer scratch": _host_scratch(work, settings, w)} if settings.host else {})
    return Plan(
        work,
        machine,
        settings,
        tuple(_phases(work, settings, machine, t, w, inputs)),
        {name: n for name, n in host.items() if n},
        {"layer inputs": inputs.disk * stored} if inputs.disk else {},
        _seconds(work, settings, machine, t, w, inputs),
    )


def check_planned(work: Work, machine: Machine) -> None:
    check_object("work", work, Work, "a Work")
    check_object("machine", machine, Machine, "a Machine")


def paged(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def encoded_bytes(t: Trace, work: Work, settings: Settings) -> int:
    count = t.input // work.dtype.itemsize
    return CODECS[settings.store].nbytes(torch.empty(count, dtype=work.dtype, device="meta"))


def _optimizer_bytes(work: Work, settings: Settings, w: Weights) -> dict[str, int]:
    master = MASTER_BYTES[settings.master] if work.dtype.itemsize < 4 else 0
    return {"master": master * w.total, "optimizer states": int(work.step_costs[settings.states].states * w.total)}


def _host_scratch(work: Work, settings: Settings, w: Weights) -> int:
    """The two rooms that pieces cross through, and what the host's step of one takes."""
    numbers, size = min(optimizer.PIECE, w.largest), work.dtype.itemsize
    at_once = numbers if settings.states == "8bit" else min(pieces.BLOCK, numbers)
    return 2 * room_bytes(numbers, size, max(4, size)) + STEP_BYTES * at_once


def _phases(
    work: Work, settings: Settings, machine: Machine, t: Trace, w: Weights, inputs: Placement
) -> Iterator[Phase]:
    size, layers, tiers = work.dtype.itemsize, w.layers, inputs.tiers()
    g = 4 if _float32_gradients(work) else size
    base = {"reserve": machine.device_reserve, "weights": w.total * size, "ids and positions": t.positions}
    base |= {"reference": work.reference_bytes} if work.reference_bytes else {}
    if not settings.host:
        base |= _optimizer_bytes(work, settings, w)
    held, freed = work.accumulation > 1, settings.step_in_backward
    step_scratch = 0 if settings.host else STEP_BYTES * min(optimizer.PIECE, w.largest)
    scratch = step_scratch if freed else 0
    encoded = encoded_bytes(t, work, settings) if settings.store != "exact" else 0

    def away(layer: int) -> bool:
        return layer >= 0 and tiers[layer] != "device"

    def phase(name: str, gradients: int, kept: int, passing: int, **needs: int) -> Phase:
        parts = base | {"gradients": w.total * g if held else gradients, "layer inputs": kept * t.input + passing}
        parts |= {n.replace("_", " "): v for n, v in needs.items()}
        predicted = sum(parts.values()) - machine.device_reserve
        return Phase(name, parts | {"error": int(predicted * (1 / (1 - machine.error) - 1))})

    last = layers - 1
    for layer in range(layers):
        kept = layer + 1 - sum(map(away, range(layer + 1)))
        yield phase(f"forward {layer}", 0, kept, (t.input + encoded) * away(layer), layer=max(t.forward, 0))
    passing = (t.input + encoded) * away(last)
    kept = tiers.count("device")
    yield phase("last norm", 0, kept, passing, layer=t.norm)
    head, dw = w.embedding * g, w.embedding * (4 + (size if size < 4 else 0))
    yield phase("loss", 0, kept, passing, layer=t.held, loss=_workspace(work) + dw)
    own = 0 if freed else head
    yield phase("backward last norm", own, kept, passing, layer=t.norm_backward + (head if freed else 0))
    for layer in reversed(range(layers)):
        gradients = 0 if freed else head + (last - layer) * w.layer * g
        kept = layer + 1 - sum(map(away, range(layer + 1)))
        passing = (t.input + encoded) * away(layer) + (encoded or t.input) * away(layer - 1)
        yield phase(f"backward {layer}", gradients, kept, passing, layer=t.backward, optimizer_scratch=scratch)
    gradients = 0 if freed else head + layers * w.layer * g
    yield phase("embedding", gradients, 1, 0, layer=t.embedding_backward, optimizer_scratch=scratch)
    if not freed:
        yield phase("optimizer", w.total * g, 0, 0, optimizer_scratch=step_scratch)


def _workspace(work: Work) -> int:
    """Scratch of the loss: what it may use, or all it can use."""
    weight = torch.empty(work.config.vocab_size, work.config.hidden_size, dtype=work.dtype, device="meta")
    return min(work.workspace_bytes, workspace_of(work.length, weight, work.dtype))


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


def _seconds(
    work: Work, settings: Settings, machine: Machine, t: Trace, w: Weights, inputs: Placement
) -> dict[str, float]:
    config, layers = work.config, w.layers
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = attention_pairs(work.length, work.tails, getattr(config, "sliding_window", None))
    attention = 4 * config.num_attention_heads * size * pairs
    layer = {
        "forward": t.forward_flops / machine.matmul + attention / machine.attention,
        "backward": t.backward_flops / machine.matmul
        + 2.5 * attention / machine.attention_backward
        + (1 - settings.attention_layers / layers) * attention / machine.attention,
    }
    seconds = {name: layers * time for name, time in layer.items()}
    seconds["loss"] = 6 * work.length * w.embedding / machine.matmul
    stored, rest = encoded_bytes(t, work, settings), inputs.host + inputs.disk
    saved = settings.attention_layers * t.attention / layers
    copied = (rest * stored / layers + saved) / machine.copy
    spilled = inputs.disk * stored / max(rest, 1) / machine.disk
    seconds["waiting for copies"] = sum(layers * max(0.0, copied - time, spilled - time) for time in layer.values())
    seconds = {name: work.accumulation * time for name, time in seconds.items()}
    return seconds | {"optimizer": _step_seconds(work, settings, machine, w)}


def _step_seconds(work: Work, settings: Settings, machine: Machine, w: Weights) -> float:
    """A step on the host takes as long as the slower of two: the copies of weights and gradients, and the host's own work."""
    size, cost = work.dtype.itemsize, work.step_costs[settings.states]
    if not settings.host:
        conversions = CONVERSIONS[settings.master] if size < 4 else 0
        return (cost.passes + conversions) * w.total / machine.device_memory
    crossing = 2 * size + (4 if _float32_gradients(work) else size)
    return w.total * max(crossing / machine.copy, cost.host / machine.host_memory)
