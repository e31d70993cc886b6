"""Whole training steps at the size of a Llama-3-8B, each beside what the planner said of it before.

    step      a pair of 65,536 tokens
    longest   one of 131,072
    pairs     one of 32,768 as one sequence against two
    offload   layer inputs on the host against kept on the device; rates of copies; the optimizer's step on the host
    long      one full step of 262,144 tokens; on an H200 then 524,288 by proofs that add up: four layers for the time, and
              all layers' forward, the loss and the last four layers' backward for the peak

Settings are the planner's for the card: all layer inputs and attention outputs leave or stay as it places them; states in 8
bits where torchao works, else float32 on the device or the host, whichever fits. Weights are random, built on the device. A
row of one step has paid what a first step pays before it is measured (training/step.py). On the CPU all of it is tiny.

Tests: tests/benchmarks/gpu/test_steps.py.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from longpo_ops.memory.optimizer import PIECE, AdamW
from longpo_ops.memory.plan import CARDS, GIB, Machine, Plan, Settings, predict, weights_of
from longpo_ops.memory.search import placed
from longpo_ops.memory.tiers import PAGE

from ..training import offload as offloading
from ..training.step import ALL, TINY, Shape, compiled_on, measure_plan, no_8bit_states, planned
from .rows import Row
from .setting import Setting

MODEL = "llama-3-8b"
FLOAT32 = replace(ALL, states="float32")
ON_HOST = replace(FLOAT32, host=True)
TARGETS = {"peak": 0.03, "seconds": 0.15}  # of a long step's errors
BUILD = 6.0  # seconds to build a model and to give its memory back
COMPILE = 40.0  # of the 8-bit step: five sizes of pieces on the device, by inductor
GRAPHS = 8.0  # of attention, and whatever else is made for a new length
PINNED = 3e9  # bytes a second at which host memory is allocated and page-locked
SHRINK = 256  # of lengths in a rehearsal
COPIED = 1 << 30  # bytes, for their rate
HOST_WEIGHTS = 1 << 30  # of the optimizer's step on the host
NORM = 1e-3  # by which gradients may differ where kernels do not repeat themselves


# -- shapes and plans --------------------------------------------------------------------------------------------------


def shape_of(setting: Setting, length: int, layers: int = 0, backward_layers: int = 0, steps: int = 1) -> Shape:
    parts = {"layers": layers, "backward_layers": backward_layers, "steps": steps}
    if setting.on_gpu:
        return Shape(MODEL, length, **parts)
    tiny = {"layers": min(layers, 2), "backward_layers": min(backward_layers, 1), "steps": min(steps, 1)}
    return replace(TINY, length=length // SHRINK, **tiny)


def machine_of(setting: Setting) -> Machine:
    if setting.on_gpu:
        return Machine(setting.device_bytes, setting.host_bytes, **CARDS.get(setting.card, {}))
    return Machine(1, GIB, device_reserve=0, host_reserve=0)  # all that can leave the device leaves it


def plan_for(setting: Setting, shape: Shape, settings: tuple[Settings, ...]) -> Plan:
    """By the first of the settings that fits; by the first of all where none does."""
    machine, work = machine_of(setting), shape.work()
    tiled = (replace(each, tile_rows=each.tile_rows and shape.tile_rows) for each in settings)
    plans = [placed(work, each, machine) for each in tiled]
    return next((plan for plan in plans if not plan.shortfalls), plans[0])


def possible(setting: Setting, *settings: Settings) -> tuple[Settings, ...]:
    """Those of them that can be had: 8-bit states need torchao, which a card elsewhere has."""
    if setting.elsewhere or no_8bit_states(str(setting.device)) is None:
        return settings
    return tuple(each for each in settings if each.states != "8bit")


def host_bytes(plan: Plan) -> int:
    """That the step itself takes of the host."""
    return sum(plan.host.values()) - plan.machine.host_reserve


def seconds_of(plan: Plan, shape: Shape, compiles: bool = False) -> float:
    """That a row of such steps should take, the model and a warm-up included."""
    layers = weights_of(plan.work.config).layers
    undone = (1 - shape.backward_layers / layers) * plan.seconds["backward"] if shape.backward_layers else 0.0
    warm = GRAPHS + host_bytes(plan) / PINNED + plan.step_seconds / layers
    return BUILD + warm + shape.steps * (plan.step_seconds - undone) + COMPILE * compiles


# -- rows of one step --------------------------------------------------------------------------------------------------


def step_row(setting: Setting, what: str, shape: Shape, settings: tuple[Settings, ...], compiles: bool = False) -> Row:
    plan = plan_for(setting, shape, settings)
    return Row(
        what,
        case_of(shape),
        lambda seed: measured(setting, shape, plan),
        seconds=seconds_of(plan, shape, compiles and plan.settings.states == "8bit") if setting.on_gpu else 1.0,
        device_bytes=plan.peak.total,
        host_bytes=sum(plan.host.values()),
    )


def case_of(shape: Shape) -> str:
    parts = [shape.model, f"{shape.length} tokens"]
    parts += [f"{shape.layers} layers"] * bool(shape.layers)
    parts += [f"backward of the last {shape.backward_layers} layers"] * bool(shape.backward_layers)
    return ", ".join(parts)


def measured(setting: Setting, shape: Shape, plan: Plan, shared: bool = True) -> dict:
    """A step under a plan; layers are told on stderr as they are launched. Out of memory is told beside what was planned."""
    start = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - start:7.1f} s  {text}", file=sys.stderr, flush=True)

    forget(setting)
    quiet = shape.steps > 1 or not setting.on_gpu
    try:
        row = measure_plan(shape, plan, (lambda text: None) if quiet else tell, shared)
    except (torch.OutOfMemoryError, MemoryError) as error:
        row = {"status": f"failed: out of memory: {str(error).splitlines()[0]}"[:300]} | planned(plan)
    without = None if plan.settings.states == "8bit" else no_8bit_states(str(setting.device))
    return row | ({"no_8bit_states": without} if without else {})


def forget(setting: Setting) -> None:
    """Gives back what earlier rows left: a model with features refers to itself."""
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()


def step(setting: Setting) -> Iterator[Row]:
    shape = shape_of(setting, 65_536, steps=2)
    yield step_row(setting, "step", shape, possible(setting, ALL, FLOAT32, ON_HOST), compiles=True)


def longest(setting: Setting) -> Iterator[Row]:
    """The same length on every card: float32 states where they fit on the device, else 8-bit ones, else the host's."""
    yield step_row(setting, "longest", shape_of(setting, 131_072), possible(setting, FLOAT32, ALL, ON_HOST))


def long(setting: Setting) -> Iterator[Row]:
    """What `--piece long` asks. A shorter step follows a long one that did not work; the H200's proofs come last."""
    done: list[int] = []
    settings = possible(setting, ALL, FLOAT32, ON_HOST)
    for length in (262_144, 196_608):
        row = step_row(setting, "long", shape_of(setting, length), settings, compiles=True)
        yield row._replace(compute=partial(_unless_longer, row, done))
    if setting.card == "H200":
        for part in ({"layers": 4}, {"backward_layers": 4}):
            yield step_row(setting, "long, in parts", shape_of(setting, 524_288, **part), settings)


def _unless_longer(row: Row, done: list[int], seed: int) -> dict:
    if done:
        return {"status": "skipped: a longer one was measured"}
    result = row.compute(seed)
    if result["status"] == "measured":
        done.append(1)
        errors = {name: result.get(f"planner_error_{name}") for name in TARGETS}
        result |= {"targets": TARGETS}
        result |= {"within_targets": all(e is not None and abs(e) <= TARGETS[name] for name, e in errors.items())}
    return result


# -- a pair as one sequence or two -------------------------------------------------------------------------------------


def pairs(setting: Setting) -> Iterator[Row]:
    """Both by the same settings, plain ones and float32 states, so that the shared prefix alone differs."""
    shape = shape_of(setting, 32_768, layers=8, steps=2)
    settings = Settings(step_in_backward=True)
    one = plan_for(setting, shape, (settings,))
    twice = replace(shape.work(), length=2 * (shape.length - shape.tail) - 1, tails=())
    two = predict(twice, one.settings, one.machine)
    yield Row(
        "one sequence against two",
        case_of(shape),
        lambda seed: _both(setting, shape, one, two),
        seconds=sum(seconds_of(plan, shape) for plan in (one, two)) if setting.on_gpu else 1.0,
        device_bytes=max(one.peak.total, two.peak.total),
        host_bytes=max(sum(plan.host.values()) for plan in (one, two)),
    )


def _both(setting: Setting, shape: Shape, one: Plan, two: Plan) -> dict:
    rows = {"one": measured(setting, shape, one), "two": measured(setting, shape, two, shared=False)}
    for name, row in rows.items():
        if row["status"] != "measured":
            return row | {"status": f"{row['status']} ({name})"}
    keys = ("seconds", "peak_device_bytes", "peak_host_bytes")
    numbers = {name: {key: row[key] for key in keys} for name, row in rows.items()}
    peak = "peak_device_bytes" if setting.on_gpu else "peak_host_bytes"
    faster = rows["two"]["seconds"] / rows["one"]["seconds"]
    return rows["one"] | numbers | {"faster": faster, "memory": rows["one"][peak] / rows["two"][peak]}


# -- offload -----------------------------------------------------------------------------------------------------------


def offload(setting: Setting) -> Iterator[Row]:
    """At 65,536 tokens, where copies hide behind attention, and at 32,768."""
    for length, names in ((65_536, offloading.COMPARED), (32_768, offloading.COMPARED[:2])):
        shape, kept = _offload_shape(setting, length), {}
        for name in names:
            if name in offloading.settings_for(shape):
                case = f"{shape.tokens} tokens, {shape.layers} layers: {name}"
                cost = _cost(setting, 12.0 * (length / 65_536) ** 2 + 2.0, 24)
                yield Row("offload", case, partial(_offloaded, setting, shape, name, kept), **cost)
    yield Row("copy rates", "pages against one copy", partial(_rates, setting), **_cost(setting, 3.0, 3))
    for states in ("float32", "8bit"):
        compiles = COMPILE / 2 if states == "8bit" else 0.0  # one size, by the host's compiler
        cost = _cost(setting, 8.0 + compiles, 6, 16)
        yield Row("optimizer step on the host", f"{states} states", partial(_host_step, setting, states), **cost)


def _offload_shape(setting: Setting, length: int) -> offloading.Shape:
    threads = torch.get_num_threads()
    if setting.on_gpu:
        large = {"layers": 4, "width": 4096, "window": 0, "rows": 8192, "device": "cuda", "dtype": "bfloat16"}
        return offloading.Shape(length, threads=threads, **large)
    tiny = {"layers": 2, "width": 32, "window": 64, "rows": 64, "steps": 1, "page_bytes": 1 << 14}
    return offloading.Shape(length // SHRINK, threads=threads, **tiny)


def _cost(setting: Setting, seconds: float, device_gib: int, host_gib: int = 8) -> dict:
    if not setting.on_gpu:
        return {"seconds": 0.5}
    return {"seconds": seconds, "device_bytes": device_gib * GIB, "host_bytes": host_gib * GIB}


def _offloaded(setting: Setting, shape: offloading.Shape, name: str, kept: dict, seed: int) -> dict:
    """One of offloading.COMPARED, the first of which keeps all on the device. The others' gradients must be its own, bitwise
    where the kernels repeat themselves, else in norm."""

    def perform(name: str) -> dict:
        forget(setting)
        return offloading.perform(shape, name)

    if not kept:
        kept |= perform(offloading.COMPARED[0])
    if name == offloading.COMPARED[0]:
        return {"status": "measured"} | kept
    result = {"status": "measured"} | perform(name)
    result["bitwise"] = result["gradients"] == kept["gradients"]
    if not result["bitwise"]:
        repeats = perform(offloading.COMPARED[0])["gradients"] == kept["gradients"]
        if repeats or abs(result["norm"] / kept["norm"] - 1) > NORM:
            return result | {"status": f"failed: offload changed the gradients, whose norm was {kept['norm']}"}
    if result["used_bytes_after"]:
        return result | {"status": f"failed: {result['used_bytes_after']} bytes are still held after the step"}
    return result | {"times_kept": result["seconds"] / kept["seconds"], "target": offloading.SLOWDOWN}


def _rates(setting: Setting, seed: int) -> dict:
    nbytes, page = (COPIED, PAGE) if setting.on_gpu else (1 << 20, 1 << 14)
    rates = offloading.copy_rates(str(setting.device), nbytes, page)
    shares = {way: rates[way] / rates[f"{way}, one copy"] for way in ("out", "in")}
    return {"status": "measured", "bytes_per_second": rates, "share_of_one_copy": shares, "target": offloading.RATE}


def _host_step(setting: Setting, states: str, seed: int) -> dict:
    """The second step of so many bfloat16 weights, states and master on the host."""
    device = str(setting.device)
    if states == "8bit" and (reason := no_8bit_states(device)):
        return {"status": f"skipped: {reason}"}
    forget(setting)
    count, size = (HOST_WEIGHTS // PIECE // 4, 4 * PIECE) if setting.on_gpu else (2, 1 << 14)
    weights = [nn.Parameter(torch.randn(size, device=device, dtype=torch.bfloat16)) for _ in range(count)]
    with compiled_on(device):
        optimizer, seconds = AdamW(weights, states=states, host=True), []
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.full_like(weight, 1e-3)
            _wait(setting)
            start = time.perf_counter()
            optimizer.step()
            _wait(setting)
            seconds.append(time.perf_counter() - start)
    billion = 1e9 / (count * size)
    shape = shape_of(setting, 65_536)
    plan = predict(shape.work(), Settings(tile_rows=shape.tile_rows, states=states, host=True), machine_of(setting))
    expected = plan.seconds["optimizer"] * 1e9 / weights_of(plan.work.config).total
    return {
        "status": "measured",
        "seconds": seconds[1],
        "seconds_per_billion": seconds[1] * billion,
        "predicted_seconds_per_billion": expected,
        "planner_error_seconds": seconds[1] * billion / expected - 1,
    }


def _wait(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize()
