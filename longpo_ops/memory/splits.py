"""Which split of the cards a pack is best trained on: sequence_parallel x data_parallel = cards, every divisor tried.

The most tokens a second win; of those within 3 % the first of: float32 states, states on the devices, layer inputs there, few
ranks to a pack, which exchange less. Where the longest pack is looked for, the longest wins, and of those within 3 % the
fastest.

Tests: tests/memory/test_mesh.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from longpo_ops.memory.plan import Machine, Plan, Work, check_planned
from longpo_ops.memory.search import fit, longest

NEAR = 0.03


class Split(NamedTuple):
    """One way to share out the cards, with its plan, or with the reason why there is none."""

    sequence_parallel: int
    data_parallel: int
    plan: Plan | None
    refused: str


def splits(work: Work, machine: Machine, allow_lossy: str = "nothing", find_longest: bool = False) -> list[Split]:
    """Of every divisor of the work's cards, from one rank to a pack up to all of them. machine: one of the cards."""
    check_planned(work, machine)
    cards = work.mesh.cards
    return [
        _split(work, machine, allow_lossy, find_longest, ranks) for ranks in range(1, cards + 1) if cards % ranks == 0
    ]


def _split(work: Work, machine: Machine, allow_lossy: str, find_longest: bool, ranks: int) -> Split:
    parts = ranks, work.mesh.cards // ranks
    try:
        shared = replace(work, mesh=replace(work.mesh, sequence_parallel=ranks))
        search = longest if find_longest else fit
        return Split(*parts, search(shared, machine, allow_lossy=allow_lossy), "")
    except ValueError as error:
        return Split(*parts, None, str(error))


def best(tried: list[Split], find_longest: bool = False) -> Plan:
    """Raises ValueError where no split has a plan, saying of each why."""
    plans = [split.plan for split in tried if split.plan is not None]
    if not plans:
        reasons = "\n".join(f"{s.sequence_parallel} x {s.data_parallel}: {s.refused}" for s in tried)
        raise ValueError(f"no split of sequence_parallel x data_parallel fits:\n{reasons}")
    if find_longest:
        most = max(plan.work.length for plan in plans)
        plans = [plan for plan in plans if plan.work.length >= (1 - NEAR) * most]
    most = max(plan.tokens_per_second for plan in plans)
    near = [plan for plan in plans if plan.tokens_per_second >= (1 - NEAR) * most]
    return min(near, key=_preference)


def _preference(plan: Plan) -> tuple:
    s = plan.settings
    return s.states != "float32", s.host, s.on_host + s.on_disk > 0, plan.work.mesh.sequence_parallel
