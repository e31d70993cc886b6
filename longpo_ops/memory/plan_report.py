"""A plan for the eye: its numbers as a table, and device memory over the step as a picture.

Tests: tests/memory/test_commands.py.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import torch

from longpo_ops.memory.optimizer import OPTIMS
from longpo_ops.memory.plan import DEVICE_RESERVE, GIB, Plan
from longpo_ops.memory.search import lossy_offers

LAST = ("weights", "master", "optimizer states", "gradients", "layer inputs", "layer", "loss")  # drawn first, lowest


def as_json(plan: Plan, allow_lossy: str) -> dict:
    """Everything that was derived, in bytes and seconds."""
    work = plan.work
    return {
        "derived": True,
        "model_type": work.config.model_type,
        "length": work.length,
        "tails": list(work.tails),
        "accumulation": work.accumulation,
        "max_grad_norm": work.max_grad_norm,
        "optim": work.optim,
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
        "phases": [{"name": phase.name} | phase.parts for phase in plan.phases],
    }


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
    step = f"{plan.work.accumulation} of them a step, max_grad_norm {plan.work.max_grad_norm:g}"
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
    total = plan.step_seconds
    rate = plan.work.length * plan.work.accumulation / total
    table.add_row("[bold]seconds of a step[/]", f"[bold]{total:.3g}[/]", f"{rate:,.0f} tokens/s")
    for part, time in plan.seconds.items():
        table.add_row(f"  {part}", f"{time:.3g}", "")
    console.print(table)
    console.print(f"Settings: {describe_settings(plan)}.", soft_wrap=True)
    for offer in lossy_offers(plan, allow_lossy):
        console.print(f"Lossy storage: {offer}.", soft_wrap=True)
    if advice := allocator_advice():
        console.print(f"Allocator: {advice}.", soft_wrap=True)


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
