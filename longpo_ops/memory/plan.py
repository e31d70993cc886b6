"""What a training step will take, before anything is allocated: memory by component over the step, its time, what fits.

    device(phase) = weights + master + states + gradients so far + layer inputs kept or passing + what the phase itself needs
    phases: forward of layer 0..L-1, last norm, loss, backward of layer L-1..0, embedding, optimizer

    one of C cards (mesh.py): weights, master, states and gradients a C-th; rows and layer inputs those of its rank
    + gathered   the weights of a layer and as many more: those on their way, or the buffer that they came in; the head
                 likewise, from the last norm to the loss, and its weights until their backward; before the embedding's
                 backward its weights, though nothing there reads them
    + reduced    gradients on their way to be summed, of a layer or the head, whose gathered weights have gone by then

What a layer needs comes from trace.py, which runs one on the meta device; the rest is arithmetic. Everything here is
derived, not measured: times are operations over the rates of Machine, copies and FSDP2's traffic where they are longer than a
layer's time are added, the exchanges of heads in full, and nothing else (norms, launches, data) is in them. Full fine-tuning;
of several cards FSDP2 as accelerate sets it up, with Ulysses. Or adapters on a frozen base, on one card:

    device(phase) = frozen weights + adapters, their states and gradients so far + layer inputs + what the phase itself needs

Sequences that are separate have a forward each, and wait for one backward (sequences.py).

Layers of one kind are traced once (structure.py). Of a mixture memory holds all experts, their gradients and states; operations
are those of the experts that a row goes to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from longpo_ops.kinds import FLOATS, check_choice, check_each, check_number, check_object, check_whole, refusal
from longpo_ops.memory import optimizer, pieces
from longpo_ops.memory.adapters import Adapters
from longpo_ops.memory.cost import WeightBytes, weight_bytes
from longpo_ops.memory.host_step import room_bytes
from longpo_ops.memory.mesh import ONE_CARD, Mesh, heads_of
from longpo_ops.memory.offload import Placement
from longpo_ops.memory.quantise import CODECS
from longpo_ops.memory.sequences import Sequences, check_sequences, parts_bytes
from longpo_ops.memory.structure import Weights, weights_of
from longpo_ops.memory.tiers import PAGE
from longpo_ops.memory.times import sent_bytes, step_seconds
from longpo_ops.memory.trace import Trace, trace
from longpo_ops.ops.sweep import DEFAULT_WORKSPACE, workspace_of

GIB = 1 << 30
ERROR = 0.1  # of a predicted peak, at most, in tests/memory/test_plan.py: real <= predicted / (1 - ERROR)
DEVICE_RESERVE = 2 * GIB  # context, libraries, gaps between blocks of the allocator
HOST_RESERVE = 8 * GIB  # system, Python, data, and room to write a checkpoint
STEP_BYTES = 16  # scratch of an optimizer step, for each number of the piece it works on


class StepCost(NamedTuple):
    """Bytes a weight. passes: what the step's operators read and write on a device. host: what a host copies, read and
    written, while it steps a weight."""

    passes: int
    host: int


# AdamW is one fused kernel; RMSprop is five, each over all numbers. `host` was measured on 2026-11-27 on one core of a Zen 3:
# where it copied 11.3 GB/s, AdamW took 7.7 ns, in which 26 bytes come from memory or go there, and 71 ns, in which torchao's
# quantisation computes; where it copied 13.4 GB/s, RMSprop took 8.0 ns and AdamW 6.4.
STEP_COSTS = {
    optimizer.AdamW: {"float32": StepCost(28, 87), "8bit": StepCost(16, 800)},
    optimizer.RMSprop: {"float32": StepCost(52, 107)},
}
# The H200's are those of whole steps (docs/log.md, 2026-11-27): bf16 products at 65,536 rows and cuDNN's causal attention.
CARDS = {
    "H100": {"device_memory": 3.0e12, "matmul": 798e12},
    "H200": {"device_memory": 4.15e12, "matmul": 687e12, "attention": 475e12, "attention_backward": 525e12},
}


@dataclass(frozen=True)
class Machine:
    """Memory in bytes, and rates: operations or bytes a second, read and written ones together for device_memory and
    host_memory. The defaults are those of an H200 on PCIe 5. With several cards: one of them, its share of the host, and what
    it sends a second to cards of its node (NVLink) and of others (400 Gbit/s a card, nine tenths of it)."""

    device_bytes: int
    host_bytes: int = 0
    disk_bytes: int = 0
    matmul: float = CARDS["H200"]["matmul"]
    attention: float = CARDS["H200"]["attention"]
    attention_backward: float = CARDS["H200"]["attention_backward"]
    device_memory: float = CARDS["H200"]["device_memory"]
    copy: float = 50e9
    disk: float = 3e9
    host_memory: float = 100e9
    inside_node: float = 300e9
    between_nodes: float = 45e9
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

    def shared_by(self, processes: int) -> Machine:
        """What a process has that shares the host and its disk evenly with the others; the card is its own."""
        shared = ("host_bytes", "disk_bytes", "host_reserve")
        parts = {name: getattr(self, name) // processes for name in shared}
        rates = {"host_memory": self.host_memory / processes, "disk": self.disk / processes}
        return replace(self, **parts, **rates)


@dataclass(frozen=True)
class Work:
    """A step: packs of `length` tokens, of which `tails` are rejected answers, through the model of a transformers config.
    reference_bytes: weights of a reference that stays on the device beside the policy. optim: a name of optimizer.OPTIMS.
    dtype: what is computed in, and on one card what weights are kept in. mesh: the cards; accumulation is of one data-parallel
    group. adapters: what is trained, in float32 on a base that is frozen; None for all weights. separate: the sequences of a
    pack, where they share no prefix; length is then that of all."""

    config: object
    length: int
    tails: tuple[int, ...] = ()
    accumulation: int = 1
    max_grad_norm: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    workspace_bytes: int = DEFAULT_WORKSPACE["cuda"]
    reference_bytes: int = 0
    optim: str = "adamw_torch"
    mesh: Mesh = ONE_CARD
    adapters: Adapters | None = None
    separate: Sequences | None = None

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
        check_object("mesh", self.mesh, Mesh, "a Mesh")
        if self.adapters is not None:
            check_object("adapters", self.adapters, Adapters, "an Adapters")
            if self.mesh.sharded:
                raise refusal("mesh", f"{self.mesh.cards} cards", "one card, as adapters are planned for no more")
        elif getattr(self.config, "quantization_config", None) is not None:
            raise ValueError(
                f"model {self.config.name_or_path!r}: its weights are quantised, which steps of full fine-tuning cannot move; "
                "give lora_rank to plan adapters on them"
            )
        if self.length < self.mesh.sequence_parallel:
            raise refusal(
                "length", self.length, f"a token for each of the {self.mesh.sequence_parallel} ranks at least"
            )
        heads_of(self.config, self.mesh.sequence_parallel)
        if self.separate is not None:
            check_object("separate", self.separate, Sequences, "a Sequences")
            check_sequences(self)

    @property
    def rows(self) -> int:
        """Of a pack, on one card."""
        return -(-self.length // self.mesh.sequence_parallel)

    @property
    def rows_at_once(self) -> int:
        """Of a forward: those of the longest sequence, where they are separate."""
        return self.rows if self.separate is None else min(self.rows, self.separate.longest)

    @property
    def rows_before(self) -> int:
        """Of forwards that wait for their backward while the last one of a pack computes."""
        return 0 if self.separate is None else min(self.rows - 1, self.separate.before)

    @property
    def row_bytes(self) -> int:
        """Of a row of a layer's input."""
        return self.config.hidden_size * self.dtype.itemsize

    @property
    def trained_dtype(self) -> torch.dtype:
        """Adapters beside 16-bit weights are float32."""
        return self.dtype if self.adapters is None or self.dtype.itemsize > 4 else torch.float32

    @property
    def weights(self) -> Weights:
        return weights_of(self.config, self.adapters)

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


class Phase(NamedTuple):
    name: str
    parts: dict[str, int]  # bytes by component

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Plan(NamedTuple):
    """A prediction: device memory over the step, host and disk memory and seconds by component; bytes that a card sends for
    a pack."""

    work: Work
    machine: Machine
    settings: Settings
    phases: tuple[Phase, ...]
    host: dict[str, int]
    disk: dict[str, int]
    seconds: dict[str, float]
    sent: dict[str, int]
    active: int  # weights that a row is multiplied by, or looked up in

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

    @property
    def tokens_per_second(self) -> float:
        """Of all data-parallel groups together."""
        return self.work.mesh.data_parallel * self.work.accumulation * self.work.length / self.step_seconds

    @property
    def bytes_per_weight(self) -> WeightBytes:
        """Of all cards together."""
        return kept_bytes(self.work, self.settings)


# -- prediction --------------------------------------------------------------------------------------------------------


def traced(work: Work, settings: Settings, earlier: bool = False) -> dict[int, Trace]:
    """A layer of each kind, by the first one, on a card. Where weights are sharded, the whole gradients of a layer are new in
    every backward, in the dtype that is computed in; shards of them are summed over packs. Of separate sequences those of the
    last forward are new, and earlier ones add to them."""
    held = earlier if work.rows_before else work.accumulation > 1 and not work.mesh.sharded
    mode = "held" if held else "freed" if settings.step_in_backward and not work.rows_before else "new"
    ranks = work.mesh.sequence_parallel
    wide = _float32_gradients(work) and not work.mesh.sharded
    given = (work.config, work.rows_at_once, settings.tile_rows, work.dtype, mode, wide, ranks)
    return {layer: trace(*given, layer, work.adapters) for layer in work.weights.counts}


def input_bytes(work: Work) -> int:
    """Of a layer, all rows of a pack."""
    return work.rows * work.row_bytes


def attention_bytes(work: Work, traces: dict[int, Trace]) -> int:
    """Of a layer's attention output and logsumexp, at most."""
    return -(-max(t.attention for t in traces.values()) * work.rows // work.rows_at_once)


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
        optimizer.refuse_step_in_backward(work.accumulation, work.max_grad_norm, work.mesh.cards)
    traces, w = traced(work, settings), work.weights
    layers = w.layers
    inputs = (
        Placement(settings.kept, settings.on_host, settings.on_disk) if settings.offload else Placement(layers, 0, 0)
    )
    if sum(inputs) != layers:
        raise ValueError(f"kept, on_host and on_disk are {tuple(inputs)}: expected {layers} layers in all")
    encoded = encoded_bytes(work, settings)
    stored = paged(encoded)
    attention = settings.attention_layers * paged(attention_bytes(work, traces))
    optimizer_bytes = _optimizer_bytes(work, settings, w)
    host = {
        "reserve": machine.host_reserve,
        "layer inputs": inputs.host * stored + parts_bytes(work, layers) * (inputs.host > 0),
        "attention outputs": attention,
    } | (optimizer_bytes | {"optimizer scratch": _host_scratch(work, settings, w)} if settings.host else {})
    return Plan(
        work,
        machine,
        settings,
        tuple(_phases(work, settings, machine, traces, w, inputs)),
        {name: n for name, n in host.items() if n},
        {"layer inputs": inputs.disk * stored + parts_bytes(work, layers)} if inputs.disk else {},
        step_seconds(work, settings, machine, traces, w, inputs, encoded, kept_bytes(work, settings)),
        sent_bytes(work, w),
        _active(work, traces, w),
    )


def _active(work: Work, traces: dict[int, Trace], w: Weights) -> int:
    layers = sum(n * traces[kind].forward_flops for kind, n in w.counts.items()) // (2 * work.rows_at_once)
    return layers + (1 if w.tied else 2) * w.embedding


def check_planned(work: Work, machine: Machine) -> None:
    check_object("work", work, Work, "a Work")
    check_object("machine", machine, Machine, "a Machine")


def paged(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def encoded_bytes(work: Work, settings: Settings) -> int:
    count = input_bytes(work) // work.dtype.itemsize
    return CODECS[settings.store].nbytes(torch.empty(count, dtype=work.dtype, device="meta"))


def kept_bytes(work: Work, settings: Settings) -> WeightBytes:
    """Of each weight that is trained."""
    return weight_bytes(
        work.trained_dtype,
        settings.states,
        settings.master,
        optim=work.optim,
        mixed_precision=work.mesh.mixed_precision,
        accumulation=work.accumulation,
        fsdp=work.mesh.sharded,
    )


def _optimizer_bytes(work: Work, settings: Settings, w: Weights) -> dict[str, int]:
    share, kept = work.mesh.share(w.trained), kept_bytes(work, settings)
    return {"master": kept.master * share, "optimizer states": int(kept.states * share)}


def _host_scratch(work: Work, settings: Settings, w: Weights) -> int:
    """The two rooms that pieces cross through, and what the host's step of one takes."""
    numbers, size = min(optimizer.PIECE, work.mesh.share(w.largest)), kept_bytes(work, settings).weight
    at_once = numbers if settings.states == "8bit" else min(pieces.BLOCK, numbers)
    return 2 * room_bytes(numbers, size, max(4, size)) + STEP_BYTES * at_once


def _phases(
    work: Work, settings: Settings, machine: Machine, traces: dict[int, Trace], w: Weights, inputs: Placement
) -> Iterator[Phase]:
    size, layers, tiers, mesh = work.dtype.itemsize, w.layers, inputs.tiers(), work.mesh
    of_layer = [traces[kind] for kind in w.kinds]
    t, before, row = traces[0], work.rows_before, work.row_bytes
    kept_of_each = kept_bytes(work, settings)
    g = kept_of_each.gradient
    base = {"reserve": machine.device_reserve, "weights": _weights_bytes(work, w, kept_of_each)}
    base["ids and positions"] = t.positions * work.rows // work.rows_at_once
    base |= {"reference": work.reference_bytes} if work.reference_bytes else {}
    if not settings.host:
        base |= _optimizer_bytes(work, settings, w)
    held, freed = work.accumulation > 1, settings.step_in_backward
    early = freed and not before  # else a weight steps when the first forward's backward completes its gradient
    step_scratch = 0 if settings.host else STEP_BYTES * min(optimizer.PIECE, mesh.share(w.largest))
    scratch = step_scratch if freed else 0
    encoded = encoded_bytes(work, settings) * work.rows_at_once // work.rows if settings.store != "exact" else 0
    own = (work.rows - before) * row  # inputs of the last forward
    earlier = tiers.count("device") * before * row  # and of the others
    saved = -(-(t.held - t.input) // work.rows_at_once)  # of a row, by the last norm

    def away(layer: int) -> bool:
        return layer >= 0 and tiers[layer] != "device"

    def phase(name: str, gradients: int, kept: int, passing: int, earlier: int = earlier, **needs: int) -> Phase:
        """gradients: numbers of those that are complete, or begun; the head's, of one forward alone, is complete at once."""
        begun = max(0, gradients - complete * (not w.tied)) if before else 0
        numbers = w.trained + begun if held else gradients
        parts = base | {"gradients": mesh.share(numbers) * g, "layer inputs": kept * own + earlier + passing}
        parts |= {n.replace("_", " "): v for n, v in needs.items()}
        predicted = sum(parts.values()) - machine.device_reserve
        return Phase(name, parts | {"error": int(predicted * (1 / (1 - machine.error) - 1))})

    def waiting(norms: int, hidden: int) -> dict[str, int]:
        """What there is of so many rows of separate sequences: saved by the last norm, and hidden states or gradients."""
        return {"hidden_states": norms * saved + hidden * row} if before else {}

    def sharding(gathered: int, reduced: int = 0, whole: int = 0) -> dict[str, int]:
        """What there is beside a card's share, of so many gathered weights and gradients: of those summed up just now, and of
        those still whole."""
        if not mesh.sharded:
            return {}
        return {
            "gathered": size * gathered,
            "reduced": mesh.reduced_bytes(work.dtype) * reduced,
            "whole_gradients": size * whole,
        }

    last, head, each, trained = layers - 1, w.embedding, w.each, w.trained_each
    of_head = 0 if work.adapters else head  # gradients
    # A head that is the embedding is gathered from the first layer to the last, and its gradient waits for the embedding's.
    throughout, whole, summed = (head, head, 0) if w.tied else (0, 0, head)
    complete = summed if mesh.sharded else of_head
    for layer in range(layers):
        kept = layer + 1 - sum(map(away, range(layer + 1)))
        passing = (t.input + encoded) * away(layer)
        needs = sharding(throughout + each[layer] + each[min(layer + 1, last)]) | waiting(before, before)
        yield phase(f"forward {layer}", 0, kept, passing, layer=max(of_layer[layer].forward, 0), **needs)
    passing = (t.input + encoded) * away(last)
    kept, at_loss = tiers.count("device"), sharding(head + each[last] if w.tied else 2 * head)
    yield phase("last norm", 0, kept, passing, layer=t.norm, **at_loss, **waiting(before, before))
    dw = of_head * (4 + (size if size < 4 else 0))
    at_loss |= waiting(before, 2 * before + work.rows)
    yield phase("loss", 0, kept, passing, layer=t.held, loss=_workspace(work) + dw, **at_loss)
    at_head = 0 if early or mesh.sharded else of_head
    held_back = t.norm_backward + (of_head * g if early else 0)
    sides = sharding(head + each[last], 0, head), sharding(throughout + each[last], summed, head)
    needs = max(sides, key=lambda parts: sum(parts.values()))
    yield phase("backward last norm", at_head, kept, passing, layer=held_back, **needs, **waiting(before, before))
    wait = waiting(before, work.rows) | {"optimizer_scratch": scratch}
    for layer in reversed(range(layers)):
        gradients = 0 if early else complete + sum(trained[layer + 1 :])
        kept = layer + 1 - sum(map(away, range(layer + 1)))
        passing = (t.input + encoded) * away(layer) + (encoded or t.input) * away(layer - 1)
        following = each[layer - 1] if layer else summed  # an embedding of its own comes where the next layer did
        needs = sharding(throughout + each[layer] + following, summed if layer == last else each[layer + 1], whole)
        yield phase(f"backward {layer}", gradients, kept, passing, layer=of_layer[layer].backward, **needs, **wait)
    gradients = 0 if early else complete + sum(trained)
    needs = sharding(head, each[0], whole) | wait
    yield phase("embedding", gradients, 1, 0, layer=t.embedding_backward, **needs)
    if before:
        again, passing = traced(work, settings, earlier=True), 2 * (t.input + encoded) * (tiers[0] != "device")
        left = earlier * (work.separate.most > 2)
        for kind in w.counts:
            needs = wait | {"layer": again[kind].backward}
            yield phase(f"backward {kind}, earlier sequences", w.trained, 0, passing, **needs)
        needs = wait | {"layer": again[0].embedding_backward}
        yield phase("embedding, earlier sequences", w.trained, 0, 0, left, **needs)
    if not freed:
        yield phase("optimizer", 0 if held else w.trained, 0, 0, 0, optimizer_scratch=step_scratch)


def _weights_bytes(work: Work, w: Weights, kept: WeightBytes) -> int:
    """Of a card."""
    if work.adapters is None:
        return work.mesh.share(w.total) * kept.weight
    frozen = (w.total - w.quantised) * work.dtype.itemsize + work.adapters.quantised_bytes(w.quantised)
    return frozen + w.trained * kept.weight


def _workspace(work: Work) -> int:
    """Scratch of the loss: what it may use, or all it can use."""
    weight = torch.empty(work.config.vocab_size, work.config.hidden_size, dtype=work.dtype, device="meta")
    return min(work.workspace_bytes, workspace_of(work.rows, weight, work.dtype))
