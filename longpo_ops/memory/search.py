"""Which settings a step takes: the fastest that fit the machine, by predictions of plan.py; the longest pack that fits.

Numbers stay as they are unless lossy storage is allowed; what it would buy is said.

Tests: tests/memory/test_plan.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from longpo_ops.kinds import check_whole
from longpo_ops.memory.host_memory import gib
from longpo_ops.memory.plan import (
    Machine,
    Plan,
    Settings,
    Work,
    attention_bytes,
    check_planned,
    encoded_bytes,
    input_bytes,
    paged,
    predict,
    traced,
)
from longpo_ops.memory.tiling import ROWS, explain_tiling

LOSSY = {"nothing": "", "states": "8-bit optimizer states", "all": "8-bit optimizer states and layer inputs"}


class NothingFits(ValueError):
    """A step that is planned, and fits under no settings."""


def fit(work: Work, machine: Machine, allow_lossy: str = "nothing") -> Plan:
    """The fastest settings that fit; of those within 3 % of it the first of: float32 states, states on the device, nothing
    offloaded, nothing tiled. Disk is used where nothing fits without.

    allow_lossy: "nothing" keeps every number as it is; "states" allows 8-bit optimizer states; "all" also allows layer
        inputs in 8 bits, which change gradients, where nothing fits without.

    Raises NothingFits, a ValueError, naming the shortfall of the closest settings, and what lossy storage would do.
    """
    check_planned(work, machine)
    plan = _search(work, machine, allow_lossy)
    if plan.shortfalls:
        offers = "".join(f". {offer}" for offer in lossy_offers(plan, allow_lossy))
        raise NothingFits(f"length {work.length}: nothing fits. {explain_shortfall(plan)}{offers}")
    return plan


def _search(work: Work, machine: Machine, allow_lossy: str) -> Plan:
    """The best plan that fits, or the closest of those that do not."""
    closest = None
    for candidates in _candidates(work, allow_lossy):
        plans = [placed(work, settings, machine) for settings in candidates]
        fitting = [plan for plan in plans if not plan.shortfalls]
        if fitting:
            best = min(map(_pace, fitting))
            near = [plan for plan in fitting if _pace(plan) <= 1.03 * best]
            return min(near, key=lambda plan: _rank(plan.settings))
        closest = min([closest, *plans] if closest else plans, key=lambda plan: sum(plan.shortfalls.values()))
    return closest


def lossy_offers(plan: Plan, allow_lossy: str) -> list[str]:
    """What lossy storage that was not allowed would buy: a sentence each, where that is a MiB or a millisecond at least;
    and that the optimizer has no 8-bit states, where they are allowed."""
    check_lossy(allow_lossy)
    levels, settings, offers = list(LOSSY), plan.settings, []
    levels, states = levels[levels.index(allow_lossy) + 1 :], "8bit" in plan.work.step_costs
    alone = {"states": LOSSY["states"], "all": "8-bit layer inputs"}
    if not states:
        levels = [level for level in levels if level != "states"]
        if allow_lossy != "nothing":
            offers.append(f"allow_lossy={allow_lossy!r}: {LOSSY['states']} are not to be had with {plan.work.optim}")
    if plan.shortfalls:
        fitting = (level for level in levels if not _search(plan.work, plan.machine, level).shortfalls)
        stored = LOSSY if states else alone
        return offers + [f"allow_lossy={level!r}, {stored[level]}, would fit" for level in fitting][:1]
    changed = {"states": replace(settings, states="8bit"), "all": replace(settings, store="int8")}
    for level in levels:
        if changed[level] == settings or (level == "all" and not settings.offload):
            continue
        less = _bytes(plan) - _bytes(predict(plan.work, changed[level], plan.machine))
        unplaced = replace(changed[level], kept=0, on_host=0, on_disk=0, attention_layers=0)
        faster = plan.step_seconds - placed(plan.work, unplaced, plan.machine).step_seconds
        if less >= 2**20 or faster >= 1e-3:
            pace = f"{abs(faster):.2g} s {'less' if faster >= 0 else 'more'} a step"
            offers.append(f"allow_lossy={level!r}, {alone[level]}, would take {gib(less)} less and {pace}")
    return offers


def check_lossy(allow_lossy: str) -> None:
    if allow_lossy not in LOSSY:
        raise ValueError(f"allow_lossy={allow_lossy!r}: expected one of {', '.join(LOSSY)}")


def _bytes(plan: Plan) -> int:
    return plan.peak.total + sum(plan.host.values()) + sum(plan.disk.values())


def _pace(plan: Plan) -> float:
    """Seconds of the step; an optimizer step on the device, short for real models, speaks for no kind of states."""
    return plan.step_seconds - (0 if plan.settings.host else plan.seconds["optimizer"])


def _rank(s: Settings) -> tuple:
    return s.states != "float32", s.host, s.step_in_backward, s.offload, s.tile_rows is not None, s.attention_layers


def _candidates(work: Work, allow_lossy: str) -> Iterator[list[Settings]]:
    """Groups of settings, each considered only where none of the groups before it has one that fits."""
    tiles = [None, ROWS] if work.length > ROWS and explain_tiling(work.config) else [None]
    early = work.accumulation == 1 and not work.max_grad_norm and not work.mesh.sharded
    check_lossy(allow_lossy)
    kinds = ("float32",) if allow_lossy == "nothing" else tuple(work.step_costs)
    for store in ("exact", "int8") if allow_lossy == "all" else ("exact",):
        for step_in_backward in (False, True) if early else (False,):
            yield [
                Settings(
                    tile_rows=tile,
                    offload=offload,
                    store=store,
                    states=states,
                    host=host,
                    step_in_backward=step_in_backward,
                )
                for tile in tiles
                for offload in ((False, True) if store == "exact" else (True,))
                for states in kinds
                for host in (False, True)
            ]


def placed(work: Work, settings: Settings, machine: Machine) -> Plan:
    """The prediction with as many layer inputs on the device as fit, then on the host, then on disk, and attention outputs
    where the host has room left."""
    layers = work.weights.layers
    if not settings.offload:
        return predict(work, settings, machine)
    traces = traced(work, settings)
    stored, attention = paged(encoded_bytes(work, settings)), paged(attention_bytes(work, traces))
    used = sum(predict(work, replace(settings, on_disk=layers), machine).host.values())
    room = max(0, machine.host_bytes - used)

    def spread(kept: int) -> Plan:
        on_host = min(layers - kept, room // stored) if machine.disk_bytes else layers - kept
        chosen = replace(settings, kept=kept, on_host=on_host, on_disk=layers - kept - on_host)
        return predict(work, chosen, machine)

    spare = max(0, machine.device_bytes - spread(0).peak.total)
    kept = min(layers, int(spare * (1 - machine.error)) // input_bytes(work))
    while kept < layers and "device" not in spread(kept + 1).shortfalls:
        kept += 1
    plan = spread(kept)
    left = room - plan.settings.on_host * stored
    saved = min(layers, max(0, left) // attention)
    return predict(work, replace(plan.settings, attention_layers=saved), machine) if saved else plan


def explain_shortfall(plan: Plan) -> str:
    """What is missing under a plan's settings, where, and what would do."""
    if not plan.shortfalls:
        return "It fits."
    parts = {"device": plan.peak.parts, "host": plan.host, "disk": plan.disk}
    lines = []
    for where, missing in plan.shortfalls.items():
        most = sorted(parts[where].items(), key=lambda part: -part[1])[:3]
        shown = ", ".join(f"{name} {gib(n)}" for name, n in most)
        lines.append(f"{where} is short of {gib(missing)} ({shown})")
    advice = "a shorter length, or more of what is short"
    if "disk" in plan.shortfalls or "host" in plan.shortfalls:
        advice += " (a host or a disk that takes the layer inputs)"
    late = plan.work.accumulation > 1 or plan.work.max_grad_norm
    if plan.work.mesh.sharded:
        advice += ", a larger sequence_parallel, or more GPUs"
    elif late and "device" in plan.shortfalls:
        advice += (
            f"; gradient_accumulation_steps=1 and max_grad_norm=0 would let weights step in backward and free "
            f"{gib(max(phase.parts['gradients'] for phase in plan.phases))} of gradients"
        )
    return f"{'; '.join(lines)}. What would help: {advice}"


def longest(work: Work, machine: Machine, unit: int = 8192, allow_lossy: str = "nothing") -> Plan:
    """The plan of the longest length that fits, in multiples of `unit`. Raises ValueError where not even one fits."""
    check_planned(work, machine)
    unit = check_whole("unit", unit, 1)
    best, low, high = fit(replace(work, length=unit), machine, allow_lossy), 1, 2

    def attempt(units: int) -> Plan | None:
        plan = _search(replace(work, length=units * unit), machine, allow_lossy)
        return None if plan.shortfalls else plan

    while (plan := attempt(high)) is not None:
        best, low, high = plan, high, 2 * high
    while high - low > max(1, low // 32):  # within 3 %
        middle = (low + high) // 2
        plan = attempt(middle)
        if plan is None:
            high = middle
        else:
            best, low = plan, middle
    return best
