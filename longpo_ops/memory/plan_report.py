"""A plan for the eye: its numbers as a table, and device memory over the step as a picture.

Tests: tests/memory/test_commands.py.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from longpo_ops.memory.mesh import Mesh
from longpo_ops.memory.optimizer import OPTIMS
from longpo_ops.memory.plan import DEVICE_RESERVE, GIB, Plan
from longpo_ops.memory.search import lossy_offers
from longpo_ops.memory.splits import Split

LAST = (
    "weights",
    "master",
    "optimizer states",
    "gathered",
    "gradients",
    "layer inputs",
    "layer",
    "loss",
)  # drawn first, lowest


def as_json(plan: Plan, allow_lossy: str, tried: Sequence[Split] = ()) -> dict:
    """Everything that was derived, in bytes and seconds; of several cards, of one of them."""
    work = plan.work
    return {
        "derived": True,
        "model_type": work.config.model_type,
        "length": work.length,
        "tails": list(work.tails),
        "accumulation": work.accumulation,
        "max_grad_norm": work.max_grad_norm,
        "optim": work.optim,
        "mesh": dataclasses.asdict(work.mesh),
        "adapters": None if work.adapters is None else dataclasses.asdict(work.adapters),
        "separate": None if work.separate is None else dataclasses.asdict(work.separate),
        "weights": work.weights.total,
        "active_weights": plan.active,
        "trained": work.weights.trained,
        "settings": dataclasses.asdict(plan.settings),
        "lossy_offers": lossy_offers(plan, allow_lossy),
        "fits": not plan.shortfalls,
        "shortfalls": plan.shortfalls,
        "peak_phase": plan.peak.name,
        "peak_bytes": plan.peak.total,
        "peak": plan.peak.parts,
        "host": plan.host,
        "disk": plan.disk,
        "seconds": plan.seconds,
        "tokens_per_second": plan.tokens_per_second,
        "sent_per_pack": plan.sent,
        "bytes_per_weight": plan.bytes_per_weight._asdict(),
        "splits": [_split_as_json(split) for split in tried],
        "phases": [{"name": phase.name} | phase.parts for phase in plan.phases],
    }


def _split_as_json(split: Split) -> dict:
    told = {"sequence_parallel": split.sequence_parallel, "data_parallel": split.data_parallel}
    if (plan := split.plan) is None:
        return told | {"fits": False, "refused": split.refused}
    numbers = {"length": plan.work.length, "peak_bytes": plan.peak.total, "tokens_per_second": plan.tokens_per_second}
    return told | {"fits": True} | numbers


def allocator_advice() -> str | None:
    """What to set so that the reserve of a plan does for the gaps between blocks of CUDA memory; None where it is set, and
    without CUDA. Of two names torch reads the older one alone where both are set."""
    older, newer = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    name = older if older in os.environ else newer
    given = os.environ.get(name, "")
    if not torch.cuda.is_available() or re.search(r"expandable_segments\s*:\s*True", given):
        return None
    value = ",".join(filter(None, [given, "expandable_segments:True"]))
    return (
        f"the plan leaves {DEVICE_RESERVE / GIB:g} GiB for gaps between blocks of device memory: set {name}={value} in the "
        "environment before Python starts, as they may grow larger without"
    )


def describe_settings(plan: Plan) -> str:
    s, layers = plan.settings, plan.settings.kept + plan.settings.on_host + plan.settings.on_disk
    words = [f"tiles of {s.tile_rows} rows" if s.tile_rows else "no tiling"]
    if s.offload:
        places = [
            f"{n} {where}"
            for n, where in ((s.kept, "on the device"), (s.on_host, "on the host"), (s.on_disk, "on disk"))
            if n
        ]
        words.append(
            f"of {layers} layer inputs {', '.join(places)}" + (", in 8 bits away from it" * (s.store == "int8"))
        )
    else:
        words.append("layer inputs on the device")
    if s.attention_layers:
        words.append(f"attention outputs of {s.attention_layers} layers kept")
    name, where = OPTIMS[plan.work.optim].__name__, "host" if s.host else "device"
    words.append(f"{name} with {s.states} states and {s.master} master on the {where}")
    if s.step_in_backward:
        words.append("weights step in backward")
    return "; ".join(words)


def print_plan(plan: Plan, title: str, allow_lossy: str) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100)
    work, mesh = plan.work, plan.work.mesh
    packs = work.accumulation * mesh.data_parallel
    step = f"{packs} of them a step, max_grad_norm {work.max_grad_norm:g}"
    if mesh.sharded:
        title += f", {mesh.cards} GPUs, {split_words(mesh)}, numbers of one GPU"
    console.print(f"{title}, {step} (derived, not measured)", soft_wrap=True)
    table = Table()
    for column in ("", "at the peak", ""):
        table.add_column(column, justify="right" if column else "left")
    peak = plan.peak
    sections = {
        f"device, GiB ({peak.name})": (peak.parts, plan.machine.device_bytes),
        "host, GiB": (plan.host, plan.machine.host_bytes),
        "disk, GiB": (plan.disk, plan.machine.disk_bytes),
    }
    for name, (parts, limit) in sections.items():
        if not parts:
            continue
        total = sum(parts.values())
        verdict = "fits" if total <= limit else "does not fit"
        table.add_row(f"[bold]{name}[/]", f"[bold]{total / GIB:.1f}[/]", f"of {limit / GIB:.1f}: {verdict}")
        for part, nbytes in parts.items():
            if nbytes:
                table.add_row(f"  {part}", f"{nbytes / GIB:.2f}", "")
        table.add_section()
    if plan.sent:
        table.add_row("[bold]sent for a pack, GiB[/]", f"[bold]{sum(plan.sent.values()) / GIB:.1f}[/]", "")
        for part, nbytes in plan.sent.items():
            table.add_row(f"  {part}", f"{nbytes / GIB:.1f}", "")
        table.add_section()
    total = plan.step_seconds
    rate = f"{plan.tokens_per_second:,.0f} tokens/s" + " of all GPUs" * mesh.sharded
    table.add_row("[bold]seconds of a step[/]", f"[bold]{total:.3g}[/]", rate)
    for part, time in plan.seconds.items():
        table.add_row(f"  {part}", f"{time:.3g}", "")
    console.print(table)
    console.print(f"Settings: {describe_settings(plan)}.", soft_wrap=True)
    for line in (*weights_words(plan), *assumptions(plan)):
        console.print(line, soft_wrap=True)
    for offer in lossy_offers(plan, allow_lossy):
        console.print(f"Lossy storage: {offer}.", soft_wrap=True)
    if advice := allocator_advice():
        console.print(f"Allocator: {advice}.", soft_wrap=True)


def split_words(mesh: Mesh) -> str:
    return f"sequence parallel {mesh.sequence_parallel} x data parallel {mesh.data_parallel}"


def weights_words(plan: Plan) -> list[str]:
    """Of mixtures and adapters: how many weights are held, met by a token, and trained."""
    w, work = plan.work.weights, plan.work
    if work.adapters is not None:
        kept = "16 bits" if work.adapters.quantization == "none" else f"{work.adapters.quantization} but for the head"
        return [f"Trained: {w.trained:,} numbers of adapters on {w.total:,} frozen weights ({kept})."]
    if plan.active > 0.9 * w.total:
        return []
    return [f"Mixture: {w.total:,} weights, all held and stepped; a token meets {plan.active:,} of them."]


def assumptions(plan: Plan) -> list[str]:
    """What a plan for several cards rests on, beside what is counted."""
    mesh, machine, parts = plan.work.mesh, plan.machine, plan.bytes_per_weight
    if not mesh.sharded:
        return []
    wide = plan.work.accumulation > 1
    why = "accelerate keeps weights in float32 then, and gradients"
    if mesh.mixed_precision == "no":
        why = "several packs' gradients are summed in float32" if wide else "one pack a step"
    where = ", master and states on the hosts" * plan.settings.host
    return [
        f"Kept: {parts}, sharded over {mesh.cards} GPUs{where} (mixed_precision {mesh.mixed_precision}: {why}).",
        f"Assumed: a GPU sends {machine.inside_node / 1e9:g} GB/s to the {mesh.on_node - 1} others of its machine and "
        f"{machine.between_nodes / 1e9:g} GB/s to other machines; attention waits for its exchanges; FSDP2's traffic is hidden "
        "behind the layers as far as they take as long.",
    ]


def print_splits(tried: Sequence[Split], chosen: Plan) -> None:
    """A line for every split of the cards, and why it was refused."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100)
    table = Table(title=f"{chosen.work.mesh.cards} GPUs, every split (derived, not measured)")
    for column in ("sequence x data", "tokens of a pack", "packs a step", "GiB a GPU", "tokens/s", ""):
        table.add_column(column, justify="right")
    for split in tried:
        name = f"{split.sequence_parallel} x {split.data_parallel}"
        if (plan := split.plan) is None:
            table.add_row(name, "", "", "", "", "refused")
            continue
        packs, verdict = plan.work.accumulation * split.data_parallel, "chosen" if plan is chosen else ""
        numbers = f"{plan.work.length:,}", str(packs), f"{plan.peak.total / GIB:.1f}", f"{plan.tokens_per_second:,.0f}"
        table.add_row(name, *numbers, verdict)
    console.print(table)
    for split in tried:
        if split.refused:
            console.print(f"{split.sequence_parallel} x {split.data_parallel}: {split.refused}", soft_wrap=True)


def draw_plan(plan: Plan, title: str, path: Path) -> None:
    """Device memory by component over the phases of the step, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {name for phase in plan.phases for name, n in phase.parts.items() if n}
    names = [n for n in LAST if n in found] + sorted(found - set(LAST))
    figure, axis = plt.subplots(figsize=(9, 4.5))
    steps = range(len(plan.phases))
    axis.stackplot(
        steps, [[p.parts.get(n, 0) / GIB for p in plan.phases] for n in names], labels=names, step="mid", alpha=0.85
    )
    axis.axhline(plan.machine.device_bytes / GIB, color="black", linestyle="--", linewidth=1, label="device")
    shown = [i for i, p in enumerate(plan.phases) if p.name in ("forward 0", "loss", "backward 0")]
    axis.set_xticks(shown, [plan.phases[i].name for i in shown], fontsize=8)
    axis.set_ylabel("GiB on the device")
    axis.set_title(f"{title} (derived, not measured)", fontsize=10)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.margins(x=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
