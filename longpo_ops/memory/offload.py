"""Offload of what gradient checkpointing saves: each layer's input waits for its backward in host memory or on disk.

    forward   layer i computes            | the input of layer i is copied out, then its device memory is free
    backward  layer i recomputes, returns | the input of layer i - 1 is copied in

    with offload_activations(model, device_bytes=40 << 30, host_bytes=96 << 30):
        loss = model(...).loss
        loss.backward()

L layers, inputs x (B, T, H) of b bytes each. Device: the last floor(device_bytes / b) inputs stay, one more leaves or
arrives at any time, with store="int8" a second in its encoded form. Host: ceil(stored bytes / page) pages per input.
Disk: the rest, spread evenly over the layers. Non-reentrant checkpointing saves exactly one tensor per layer outside
its own hooks, so saved_tensors_hooks around it see the layer's input and nothing else. With store="exact" the bytes, and
with them all that is recomputed, are bitwise those of plain checkpointing. Not covered: reentrant checkpointing; weights,
gradients and optimizer states (optimizer.py).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from longpo_ops.kinds import check_choice, check_flag, check_object, check_whole
from longpo_ops.memory.attention_outputs import recall_contexts
from longpo_ops.memory.host_memory import available_host_bytes, gib, processes_here
from longpo_ops.memory.quantise import CODECS, Exact
from longpo_ops.memory.stored import Move, Mover, Stored
from longpo_ops.memory.tiers import DEVICE, DISK, HOST, PAGE, HostPages, SpillPages, lane_of

log = logging.getLogger("longpo_ops.memory")

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")  # what a layer's checkpointing is set by


# --- where each layer's input goes ------------------------------------------------------------------------------------


class Placement(NamedTuple):
    """How many layers' inputs stay on the device, go to the host, and go to disk."""

    device: int
    host: int
    disk: int

    def tiers(self) -> list[str]:
        """One per layer. The last stay on the device, as their backward comes first; those on disk are spread evenly,
        so that the disk has several layers' time for each."""
        rest = self.host + self.disk
        spread = [(i + 1) * self.disk // rest > i * self.disk // rest for i in range(rest)]
        return [DISK if on_disk else HOST for on_disk in spread] + [DEVICE] * self.device


def place(
    layers: int,
    input_bytes: int,
    *,
    stored_bytes: int | None = None,
    device_bytes: int = 0,
    host_bytes: int = 0,
    disk_bytes: int = 0,
    page_bytes: int = PAGE,
    sharers: int = 1,
) -> Placement:
    """Where the inputs of `layers` layers go: to the device first, then the host, then disk.

    input_bytes: of one layer's input; stored_bytes: of the same away from the device (default: as many); the budgets are
    what is left of them. sharers: processes that host_bytes as it is set is shared out to, this one's share is given here.
    Raises ValueError where they do not hold all, naming what is short and settings that would do.
    """
    sizes = {"layers": (layers, 0), "input_bytes": (input_bytes, 1), "page_bytes": (page_bytes, 1)}
    budgets = {"device_bytes": device_bytes, "host_bytes": host_bytes, "disk_bytes": disk_bytes}
    sizes |= {name: (value, 0) for name, value in budgets.items()}
    sizes |= {} if stored_bytes is None else {"stored_bytes": (stored_bytes, 1)}
    for name, (value, least) in sizes.items():
        check_whole(name, value, least)
    stored = input_bytes if stored_bytes is None else stored_bytes
    paged = -(-stored // page_bytes) * page_bytes
    device = min(layers, device_bytes // input_bytes)
    host = min(layers - device, host_bytes // paged)
    disk = min(layers - device - host, disk_bytes // paged)
    missing = layers - device - host - disk
    if missing:
        told = f", shared out to {sharers} processes" if sharers > 1 else ""
        raise ValueError(
            f"offload: {layers} layer inputs of {gib(input_bytes)} ({gib(paged)} away from the device) do not fit: "
            f"device_bytes has room for {device}, host_bytes for {host}, the spill_dir for {disk}, which leaves {missing} "
            f"({gib(missing * paged)}) without a place. Set host_bytes at least {gib(missing * paged * sharers)} higher "
            f"({(host + missing) * paged * sharers} bytes free of other use{told}), or device_bytes "
            f"{gib(missing * input_bytes)} higher"
            + (f", or free {gib(missing * paged)} in the spill_dir" if disk_bytes else ", or give a spill_dir")
            + (", or use store='int8'" if stored == input_bytes else "")
        )
    return Placement(device, host, disk)


# --- one model --------------------------------------------------------------------------------------------------------


class Kept:
    """A tensor that stays on the device."""

    def __init__(self, x: Tensor):
        self.tensor, self.nbytes = x, x.nbytes


class Visit:
    """One layer in one forward pass: its input, the attention outputs saved with it, and the layer before."""

    def __init__(self, before: Visit | None):
        self.input: Stored | Kept | None = None
        self.others: list[Stored] = []
        self.before = before and weakref.ref(before)  # the graph alone keeps visits alive


class Offloader:
    """Decides where each layer's input goes, and brings it back one layer ahead."""

    def __init__(self, mover: Mover, layers: int, codec, device_bytes: int, save_attention: bool):
        self.mover, self.layers, self.codec, self.device_bytes = mover, layers, codec, device_bytes
        self.save_attention = save_attention
        self.tiers: list[str] = []
        self.stored_bytes = 0  # of one layer's input away from the device
        self.last: Callable[[], Visit | None] = lambda: None
        self.last_layer = layers
        self.leaving: Callable[[], Stored | None] = lambda: None
        self.kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    # The compiler would trace hooks and threads: it leaves this frame to Python and compiles what the layer calls.
    @torch.compiler.disable(recursive=False)
    def run(self, layer: int, function: Callable, *args, **kwargs):
        """Calls a layer under checkpointing, its input offloaded. Takes the place of torch's checkpoint."""
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if not args or not isinstance(args[0], Tensor):
            raise ValueError(
                f"offload: layer {layer} got its input by keyword, where checkpointing does not see it; expected hidden "
                "states as the first argument: leave offload off for this model"
            )
        visit = Visit(self.last() if layer == self.last_layer + 1 else None)
        contexts = partial(recall_contexts, partial(self.keep, layer, visit)) if self.save_attention else _no_contexts
        try:
            with saved_tensors_hooks(partial(self._pack, layer, visit, args[0].data_ptr()), self._unpack):
                return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        except BaseException:
            self.last_layer = self.layers  # the next forward pass begins anew, whichever layer it meets first
            raise

    def _pack(self, layer: int, visit: Visit, address: int, x: Tensor):
        if x.data_ptr() != address:  # another argument of a layer that takes several tensors
            return x
        if layer <= self.last_layer:
            self._begin(x)
        self._settle()
        self.last, self.last_layer = weakref.ref(visit), layer
        visit.input = self._put(layer, x)
        return visit

    def _begin(self, x: Tensor) -> None:
        """A forward pass begins: finds a place for every layer's input and makes the pages, before anything is computed."""
        mover, kept = self.mover, sum(k.nbytes for k in self.kept)
        host, disk, page = mover.host, mover.disk, mover.host.page_bytes
        self.stored_bytes = self.codec.nbytes(x)
        placement = place(
            self.layers,
            x.nbytes,
            stored_bytes=self.stored_bytes,
            device_bytes=max(0, self.device_bytes - kept),
            host_bytes=host.room() * page,
            disk_bytes=disk.room() * page if disk else 0,
            page_bytes=page,
            sharers=host.sharers,
        )
        host.reserve(placement.host * host.count(self.stored_bytes))
        if disk:
            disk.reserve(placement.disk * disk.count(self.stored_bytes))
        self.tiers = placement.tiers()

    def _put(self, layer: int, x: Tensor) -> Stored | Kept:
        tier = self.tiers[layer]
        if tier == DEVICE:
            self.mover.note("keep", layer, tier, x.nbytes)
            kept = Kept(x)
            self.kept.add(kept)
            return kept
        return self._store(layer, x, tier, self.codec)

    def _store(self, layer: int, x: Tensor, tier: str, codec) -> Stored:
        stored = Stored(self.mover, layer, x, tier, codec)
        self.leaving = weakref.ref(stored)
        return stored

    def keep(self, layer: int, visit: Visit, x: Tensor) -> Stored | None:
        """Stores an attention output exactly, where there is room beside the inputs that are still to come."""
        for tier, store in ((HOST, self.mover.host), (DISK, self.mover.disk)):
            if store is None:
                continue
            promised = self.tiers[layer + 1 :].count(tier) * store.count(self.stored_bytes)
            if store.room() - promised >= store.count(x.nbytes):
                self._settle()
                stored = self._store(layer, x, tier, Exact)
                visit.others.append(stored)
                return stored
        return None

    def _unpack(self, packed: Tensor | Visit) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        visits = [packed, packed.before and packed.before()]
        for stored in [*packed.others, *(v.input for v in visits if v is not None)]:
            if isinstance(stored, Stored):
                stored.fetch()
        return packed.input.tensor if isinstance(packed.input, Kept) else packed.input.load()

    def _settle(self) -> None:
        leaving = self.leaving()
        if leaving is not None:
            leaving.settle()


def _no_contexts():
    return nullcontext(), nullcontext()


class OffloadHandle:
    """Undoes offload_activations: by remove(), or at the end of a with block.

    moves: what happened to each tensor, the newest last. host_bytes, disk_bytes: allocated now. used_bytes: of them
    holding tensors of graphs that are alive.
    """

    def __init__(self, offloader: Offloader, before: list[tuple[nn.Module, dict]], hook):
        self._offloader, self._before, self._hook = offloader, before, hook

    @property
    def moves(self) -> list[Move]:
        return list(self._offloader.mover.moves)

    @property
    def host_bytes(self) -> int:
        return self._offloader.mover.host.nbytes

    @property
    def disk_bytes(self) -> int:
        disk = self._offloader.mover.disk
        return disk.made * disk.page_bytes if disk else 0

    @property
    def used_bytes(self) -> int:
        mover = self._offloader.mover
        return sum(store.used * store.page_bytes for store in (mover.host, mover.disk) if store)

    def reserve(self) -> None:
        """Allocates, and for a GPU page-locks, all of host_bytes now; otherwise steps do so as they first need it.

        Raises MemoryError if the system refuses.
        """
        host = self._offloader.mover.host
        host.reserve(host.room())

    def remove(self) -> None:
        """Gives the layers their former checkpointing back and frees all memory and the spill file.

        Graphs that are still alive can be freed, but no longer be run backward through where they are on disk.
        """
        if not self._before:
            return
        for layer, attributes in self._before:
            for name in CHECKPOINTING:
                layer.__dict__.pop(name, None)
            layer.__dict__.update(attributes)
        self._before = []
        self._hook.remove()
        self._offloader.mover.close()

    def __enter__(self) -> OffloadHandle:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()


def offload_activations(
    model: nn.Module,
    *,
    device_bytes: int = 0,
    host_bytes: int | None = None,
    spill_dir: str | PathLike | None = None,
    store: str = "exact",
    save_attention: bool = False,
    page_bytes: int = PAGE,
) -> OffloadHandle:
    """Checkpoints every layer of a transformers model (or a PEFT model of one) and offloads what that saves.

    device_bytes: of layer inputs that stay on the device. host_bytes: of the machine's memory to use, page-locked for a GPU, by
    all of the run's processes on it, each of which takes its share (LOCAL_WORLD_SIZE), as it does of the space in spill_dir;
    default four fifths of what is available. More than is available is taken at its word, with a warning, as the memory of
    a guest may grow when it is used. It is taken when a forward pass first needs it, in steps of a 64th, 1 GiB at most.
    spill_dir: folder for what the host does not hold; its disk should be local. store: "exact", or "int8" for half the bytes
    of bfloat16 at an error of 1/254 of the largest of 128 neighbours.
    save_attention: also stores attention outputs and logsumexps, exactly, as far as host and disk have room beside the
    inputs, first layers first; the backward of those layers does not run the attention forward again. For kernels that are
    one PyTorch operator: flash, cuDNN and memory-efficient attention, CPU flash, the flash-attn package.
    page_bytes: granularity of host memory and file.

    Attach after model.gradient_checkpointing_enable(), which it replaces (non-reentrant). Works in training mode, as the
    model's own checkpointing does. A forward pass whose inputs do not fit is refused with a ValueError when it meets the
    first layer. Host memory that the system refuses is a MemoryError, a disk that fails or is full, and a file that was
    cut short, an OSError; weights and optimizer are untouched then.

    Asks nothing of what a layer computes: it need not be one that tile_layers takes, and may have several inputs.

    Raises ValueError for a model without checkpointable layers or on several devices, a folder that takes no file, and an
    unknown store.
    """
    layers = _layers(check_object("model", model, nn.Module, "a transformers model"))
    _check(store, device_bytes, host_bytes, page_bytes)
    save_attention = check_flag("save_attention", save_attention)
    check_object("spill_dir", spill_dir, str | PathLike | None, "a path or None")
    devices = {p.device for layer in layers for p in layer.parameters()}
    if len(devices) > 1:
        raise ValueError(f"model: its layers are on {sorted(map(str, devices))}, offloading wants them on one device")
    lane = lane_of(devices.pop())
    available = available_host_bytes()
    host_bytes = available * 4 // 5 if host_bytes is None else host_bytes
    if host_bytes > available:
        log.warning(
            "host_bytes is %s, of which the host has %s available now: unless its memory grows as it is used, set host_bytes "
            "to %d or less, and give a spill_dir or device_bytes for the rest",
            *(gib(host_bytes), gib(available), available),
        )
    sharers = processes_here()
    disk = None if spill_dir is None else SpillPages(page_bytes, spill_dir, sharers)
    mover = Mover(lane, HostPages(page_bytes, host_bytes // sharers, lane, sharers), disk)
    offloader = Offloader(mover, len(layers), CODECS[store], device_bytes, save_attention)
    before = [(layer, {n: layer.__dict__[n] for n in CHECKPOINTING if n in layer.__dict__}) for layer in layers]
    runs = [partial(offloader.run, number) for number in range(len(layers))]
    for layer, run in zip(layers, runs, strict=True):
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, run

    def still_attached(*_):
        if any(layer._gradient_checkpointing_func is not run for layer, run in zip(layers, runs, strict=True)):
            raise ValueError(
                "gradient_checkpointing_enable() was called after offload_activations and replaced it: enable "
                "checkpointing first (for a Trainer: gradient_checkpointing=False), or remove() and attach again"
            )

    return OffloadHandle(offloader, before, layers[0].register_forward_pre_hook(still_attached))


def _layers(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no layers that transformers can checkpoint")
    taken = [layer for layer in layers if isinstance(getattr(layer, "_gradient_checkpointing_func", None), partial)]
    if any(isinstance(getattr(t._gradient_checkpointing_func.func, "__self__", None), Offloader) for t in taken):
        raise ValueError("model: its activations are offloaded already: remove() the handle first")
    return layers


def _check(store: str, device_bytes: int, host_bytes: int | None, page_bytes: int) -> None:
    check_choice("store", store, tuple(CODECS))
    check_whole("device_bytes", device_bytes, 0)
    check_whole("page_bytes", page_bytes, 4096)
    if host_bytes is not None:
        check_whole("host_bytes", host_bytes, 0)
