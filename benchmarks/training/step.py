"""A whole training step of one LongPO pair at random weights: time, tokens/s, TFLOP/s, peak device and host memory.

    python -m benchmarks.training.step --model qwen2.5-1.5b --length 65536                 all variants, a process each
    python -m benchmarks.training.step --model mistral-7b --length 524288 --layers 8 --variant "all features"
    python -m benchmarks.training.step --model mistral-7b --length 524288 --backward-layers 4 --variant "all features"
    python -m benchmarks.training.step --model mistral-7b --length 524288 --variant "all features" --detach
    python -m benchmarks.training.step --rehearse                                              tiny, on the CPU

Variants switch features off one by one; then (a) transformers with gradient checkpointing and full logits of both
sequences, (b) its own checkpoint offload, (c) our step on two separate sequences. TFLOP/s counts what the pair needs, 6
operations a weight and row and 3.5 attention forwards, in every variant alike: recomputation and a prefix read twice are
not achievements.
--layers keeps the first layers only; --backward-layers stops after that many layers' backward (a proof of the peak).
--steps 1 pays what a first step pays (compiles, states, pages, graphs) before the one that is measured.
--detach returns at once: a step of ten minutes tells its layers as they pass in step_*.progress. Each row holds the
planner's prediction beside the measurement, where the planner models the variant. Results: dated JSON in
benchmarks/results. Not covered: reading data and the reference's pass, which a run pays once. make gpu-check measures
chosen ones of these steps (benchmarks/gpu/steps.py).
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from longpo_ops.attention import use_shared_prefix
from longpo_ops.data.layout import PairSpans, SharedPrefixLayout
from longpo_ops.memory.host_memory import available_host_bytes
from longpo_ops.memory.optimizer import PIECE, AdamW
from longpo_ops.memory.plan import GIB, Machine, Plan, Settings, Work, predict
from longpo_ops.memory.search import placed
from longpo_ops.memory.settings import Memory, machine_here
from longpo_ops.memory.structure import first_layers, weights_of
from longpo_ops.memory.times import attention_pairs
from longpo_ops.memory.trace import read_config, trace
from longpo_ops.ops.head import attach
from longpo_ops.ops.preference import packed_preference_loss

from ..measure import Peak, fresh
from ..stamp import RESULTS, ROOT, host_class, stamp

ALL = Settings(tile_rows=8192, offload=True, states="8bit", step_in_backward=True)
VARIANTS: dict[str, Settings | str] = {
    "all features": ALL,
    "without tiling": replace(ALL, tile_rows=None),
    "without offload": replace(ALL, offload=False),
    "8-bit layer inputs": replace(ALL, store="int8"),
    "float32 states": replace(ALL, states="float32"),
    "without stepping in backward": replace(ALL, step_in_backward=False),
    "transformers, full logits": "logits",
    "transformers' offload, full logits": "logits+offload",
    "two separate sequences": "two",
}


@dataclass(frozen=True)
class Shape:
    """A pair of `length` rows in all, `tail` of them the rejected answer, as many the chosen one."""

    model: str
    length: int
    tail: int = 1024
    layers: int = 0  # 0: all
    backward_layers: int = 0  # 0: all
    steps: int = 2  # the last is measured
    device: str = "cuda"
    dtype: str = "bfloat16"
    tile_rows: int = 8192
    workspace_bytes: int = 2 << 30

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def config(self):
        if self.model == "tiny":
            from transformers import AutoConfig

            sizes = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, vocab_size=256, head_dim=16)
            config = AutoConfig.for_model("llama", **sizes, num_attention_heads=4, num_key_value_heads=2)
        else:
            config = read_config(self.model)
        return first_layers(config, self.layers) if self.layers else config

    def work(self) -> Work:
        return Work(
            self.config(), self.length, (self.tail,), dtype=self.torch_dtype, workspace_bytes=self.workspace_bytes
        )


TINY = Shape("tiny", 256, tail=16, device="cpu", dtype="float32", tile_rows=64, workspace_bytes=8 << 20)


class Enough(Exception):
    """The backward has come as far as it was to."""


# -- rows of a pair ----------------------------------------------------------------------------------------------------


def pair_rows(shape: Shape, shared: bool):
    """-> token ids (N,), positions (N,), layout, labels (N,) and sequences (N,) of a pair with a shared prefix, or of the
    same two sequences one after the other."""
    random = torch.Generator().manual_seed(0)
    prefix, tail = shape.length - 2 * shape.tail, shape.tail
    ids = torch.randint(shape.config().vocab_size, (shape.length,), generator=random)
    whole = prefix + tail
    ids[whole] = ids[prefix - 1]  # a rejected tail begins with the last prefix token
    if shared:
        layout = SharedPrefixLayout((PairSpans(0, prefix, ((prefix, whole), (whole, whole + tail))),), shape.length)
        positions = torch.cat([torch.arange(whole), torch.arange(prefix - 1, whole - 1)])
        tails = {0: slice(prefix - 1, whole - 1), 1: slice(whole, whole + tail - 1)}
    else:
        end = 2 * whole - 1
        spans = PairSpans(0, prefix, ((prefix, whole),)), PairSpans(whole, whole + prefix, ((whole + prefix, end),))
        layout = SharedPrefixLayout(spans, end)
        positions = torch.cat([torch.arange(whole), torch.arange(whole - 1)])
        ids = torch.cat([ids[:whole], ids[:prefix], ids[whole + 1 :]])
        tails = {0: slice(prefix - 1, whole - 1), 1: slice(whole + prefix - 1, end - 1)}
    labels = ids.roll(-1)
    sequences = torch.full_like(ids, -1)
    for number, rows in tails.items():
        sequences[rows] = number
    return ids, positions, layout, labels, sequences


def our_loss(model, shape: Shape, shared: bool) -> torch.Tensor:
    ids, positions, layout, labels, sequences = pair_rows(shape, shared)
    weights = torch.full(ids.shape, 1.0 / len(ids))
    references = {f"ref_{side}_logps": torch.tensor([-10.0 * shape.tail]) for side in ("chosen", "rejected")}

    def compute(hidden, head):
        return head(
            hidden[0],
            (labels, sequences),
            loss=packed_preference_loss,
            num_chosen=1,
            rejected_pair=torch.tensor([0]),
            nll_weights=weights,
            workspace_bytes=shape.workspace_bytes,
            **{name: value.to(hidden.device) for name, value in references.items()},
        ).loss

    ids, positions = (x[None].to(shape.device) for x in (ids, positions))
    call = dict(position_ids=positions, shared_prefix_layout=layout, use_cache=False)
    return model(input_ids=ids, compute=compute, **call)


def logits_loss(model, shape: Shape) -> torch.Tensor:
    """Both sequences as a padded batch of two, all logits, as trainers without fused losses have it."""
    whole = shape.length - shape.tail
    ids = F.pad(pair_rows(shape, shared=False)[0], (0, 1)).view(2, whole).to(shape.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    logps = -F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    answers = logps[:, -shape.tail :].sum(1)
    return -F.logsigmoid(0.1 * (answers[0] - answers[1])) * 0.01 - logps[0].mean()


# -- one variant, in this process --------------------------------------------------------------------------------------


def perform(shape: Shape, name: str, tell=lambda text: None) -> dict:
    """Measures a variant. Never raises for what does not fit or does not run: that is its result."""
    variant = VARIANTS[name]
    settings = variant if isinstance(variant, Settings) else ALL
    if settings.states == "8bit" and (reason := no_8bit_states(shape.device)):
        return {"status": f"skipped: {reason}"}
    settings = replace(settings, tile_rows=settings.tile_rows and shape.tile_rows)
    try:
        if str(variant).startswith("logits"):
            return _measure_logits(shape, offload=variant == "logits+offload", tell=tell)
        shared = variant != "two"
        plan = _planned(shape, settings, torch.device(shape.device), doubled=not shared)
        return measure_plan(shape, plan, tell, shared)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"status": f"out of memory: {str(error).splitlines()[0]}"}
    except Exception as error:  # whatever it is belongs in the report
        return {"status": f"failed: {type(error).__name__}: {error}"[:500]}


@functools.cache
def no_8bit_states(device: str) -> str | None:
    """Why the optimizer's states cannot have 8 bits here, found by a step of one weight; None if they can."""
    weight = nn.Parameter(torch.zeros(PIECE if device != "cpu" else 4096, device=device, dtype=torch.bfloat16))
    weight.grad = torch.zeros_like(weight)
    try:
        with compiled_on(device):
            AdamW([weight], states="8bit").step()
    except Exception as error:  # torchao's and inductor's
        return f"no 8-bit states: {error}"[:300]


def compiled_on(device: str):
    """A rehearsal on the CPU is of the script: compiling the 8-bit step takes longer than all of it."""
    return torch.compiler.set_stance("force_eager" if device == "cpu" else "default")


def measure_plan(shape: Shape, plan: Plan, tell=lambda text: None, shared: bool = True) -> dict:
    """The last of shape.steps whole steps under a plan, beside what was planned; of a pair as two sequences (shared=False),
    which the planner does not model, alone.

    Raises what a step raises, torch.OutOfMemoryError among it.
    """
    device = torch.device(shape.device)
    before, start = _allocated(device), time.perf_counter()
    model, memory = make_model(shape), Memory.from_plan(plan)
    use_shared_prefix(model)
    attach(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with compiled_on(shape.device), memory.attached(model) as offloaded:
        optimizer = memory.make_optimizer(model.parameters(), lr=5e-7)
        loss = partial(our_loss, model, shape, shared)
        times = {"build_seconds": time.perf_counter() - start}
        if shape.steps == 1:
            tell("warm-up")
            times["warm_up_seconds"] = _warm_up(model, optimizer, loss, offloaded, device)
        measured = _steps(shape, model, optimizer, loss, tell)
    if device.type == "cuda":
        measured["peak_device_bytes"] -= before
    row = _rated(shape, measured) | times
    return row | compare_with_plan(plan, measured, part=bool(shape.backward_layers)) if shared else row


def _measure_logits(shape: Shape, offload: bool, tell) -> dict:
    model = make_model(shape)
    model.gradient_checkpointing_enable({"use_reentrant": False} | ({"offload": True} if offload else {}))
    with compiled_on(shape.device):
        optimizer = AdamW(model.parameters(), lr=5e-7, states="8bit")
        return _rated(shape, _steps(shape, model, optimizer, partial(logits_loss, model, shape), tell))


def make_model(shape: Shape) -> nn.Module:
    """At random weights, straight on the device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(shape.device):
        return AutoModelForCausalLM.from_config(shape.config(), dtype=shape.torch_dtype).train()


def _rated(shape: Shape, measured: dict) -> dict:
    row = {"status": "measured"} | measured
    if not shape.backward_layers:  # a part of a step has no rate
        row["tokens_per_s"] = shape.length / row["seconds"]
        row["tflops"] = useful_operations(shape) / row["seconds"] / 1e12
    return row


def planned(plan: Plan) -> dict:
    """What a plan says. predicted_*: what it expects; planned_*: that with room for its error and the reserves."""
    peak = plan.peak.parts
    return {
        "predicted_seconds": plan.step_seconds,
        "predicted_peak_bytes": plan.peak.total - peak.get("reserve", 0) - peak.get("error", 0),
        "planned_device_bytes": plan.peak.total,
        "planned_host_bytes": sum(plan.host.values()),
        "settings": asdict(plan.settings),
    }


def compare_with_plan(plan: Plan, measured: dict, part: bool = False) -> dict:
    """planned(plan) and its errors, as shares: 0.1 is a tenth more than predicted. part: of a step, whose time says nothing."""
    told = planned(plan)
    if measured["peak_device_bytes"]:
        told["planner_error_peak"] = measured["peak_device_bytes"] / told["predicted_peak_bytes"] - 1
    if not part:
        told["planner_error_seconds"] = measured["seconds"] / told["predicted_seconds"] - 1
    return told


def _planned(shape: Shape, settings: Settings, device: torch.device, doubled: bool) -> Plan:
    work = shape.work()
    if doubled:
        work = replace(work, length=2 * (shape.length - shape.tail) - 1, tails=())
    here = machine_here(device)
    if device.type == "cpu":  # a rehearsal: something must leave, and something stay
        here = Machine(GIB, min(available_host_bytes(), GIB), device_reserve=0, host_reserve=0)
        if settings.offload:
            here = replace(here, device_bytes=1)
    plan = placed(work, settings, here)
    if device.type == "cuda" and plan.shortfalls and settings.offload:
        raise MemoryError(f"planned: short of {plan.shortfalls}")
    return plan if settings.offload else predict(work, settings, here)


def _steps(shape: Shape, model: nn.Module, optimizer, loss, tell) -> dict:
    """All steps of a shape; the last one's seconds and peaks."""
    _watch(model, shape, tell)
    for number in range(shape.steps):
        tell(f"step {number}")
        measured = _measured(partial(_step, loss, optimizer), torch.device(shape.device))
    return measured


def _step(loss, optimizer) -> None:
    with suppress(Enough):
        loss().backward()
        return _finish(optimizer)
    gc.collect()  # the rest of the graph refers to itself, and holds its pages
    _finish(optimizer)


def _finish(optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _warm_up(model: nn.Module, optimizer, loss, offloaded, device: torch.device) -> float:
    """Seconds of what only a first step pays: states and their code, pages of the host, and by a step through the first layer
    alone, at full length, every kernel's code and graph. Weights stay close to where they were."""
    start = time.perf_counter()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None
    if offloaded is not None:
        offloaded.reserve()
    with only_first_layer(model):
        _step(loss, optimizer)
    _synchronize(device)
    return time.perf_counter() - start


@contextmanager
def only_first_layer(model: nn.Module) -> Iterator[None]:
    """Within it the model's body is its first layer."""
    body = model.get_decoder()
    layers, body.layers = body.layers, nn.ModuleList([body.layers[0]])
    try:
        yield
    finally:
        body.layers = layers


def _measured(step, device: torch.device) -> dict:
    """Seconds and peaks; device memory with weights and states."""
    cuda = device.type == "cuda"
    _synchronize(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with Peak() as host:
        start = time.perf_counter()
        step()
        _synchronize(device)
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {"seconds": seconds, "peak_device_bytes": peak, "peak_host_bytes": host.start + host.bytes}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _watch(model, shape: Shape, tell) -> None:
    """Tells layers of a step as they are launched, once each way, and ends the backward where it is to end."""
    layers = model.get_decoder().layers
    first = len(layers) - shape.backward_layers
    waiting: set[int] = set()  # for their backward, in which they run again

    def before(number, _, args):
        if number not in waiting and torch.is_grad_enabled() and args and args[0].requires_grad:
            waiting.add(number)
            args[0].register_hook(partial(after, number))
            tell(f"forward of layer {number} of {len(layers)}")

    def after(number, grad):
        waiting.discard(number)
        tell(f"backward of layer {number} done")
        if shape.backward_layers and number == first:
            waiting.clear()
            raise Enough

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(before, number))


def useful_operations(shape: Shape) -> float:
    """What one pair with a shared prefix needs, without recomputation."""
    work = shape.work()
    config, w = work.config, weights_of(work.config)
    t = trace(config, min(shape.length, 1024), None, work.dtype)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_attention_heads * size * attention_pairs(work.length, work.tails)
    products = t.forward_flops / min(shape.length, 1024) * shape.length
    return w.layers * (3 * products + 3.5 * attention) + 6 * shape.length * w.embedding


# -- files, command ------------------------------------------------------------------------------------------------------


def file_of(shape: Shape, out: Path) -> Path:
    date = stamp()["date"][:10]
    kind = torch.cuda.get_device_name().replace(" ", "-") if shape.device == "cuda" else host_class()
    part = f"-{shape.layers}layers" * bool(shape.layers) + f"-{shape.backward_layers}backward" * bool(
        shape.backward_layers
    )
    return out / f"step_{date}_{kind}_{shape.model}_{shape.length}{part}.json"


def run_variant(shape: Shape, name: str, progress: Path, limit: float) -> dict:
    """One variant in a process of its own."""
    order = json.dumps({"shape": asdict(shape), "variant": name, "progress": str(progress)})
    try:
        return fresh("benchmarks.training.step", "--perform", order, seconds=limit)
    except subprocess.TimeoutExpired:
        return {"status": f"stopped after {limit:.0f} s"}
    except RuntimeError as error:
        return {"status": f"failed: {error}"}


def perform_order(order: str) -> None:
    """What a variant's own process does: measure, print one line of JSON."""
    given = json.loads(order)
    start, progress = time.monotonic(), Path(given["progress"])

    def tell(text: str) -> None:
        with progress.open("a") as file:
            file.write(f"{time.monotonic() - start:9.1f} s  {given['variant']}: {text}\n")

    print(json.dumps(perform(Shape(**given["shape"]), given["variant"], tell)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-1.5b", help="a name of memory/models, a folder or a hub name")
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--tail", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--backward-layers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only this one (repeatable)")
    parser.add_argument("--limit", type=float, default=530, help="seconds a variant may take")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--detach", action="store_true", help="run on in the background, without a limit")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--perform", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.perform:
        perform_order(options.perform)
        return 0
    shape = TINY
    if not options.rehearse:
        if not torch.cuda.is_available():
            print("this benchmark needs a CUDA device, and torch sees none; --rehearse runs it on the CPU")
            return 1
        given = (options.model, options.length, options.tail, options.layers, options.backward_layers, options.steps)
        shape = Shape(*given)
    options.out.mkdir(parents=True, exist_ok=True)
    path = file_of(shape, options.out)
    progress = path.with_suffix(".progress")
    if options.detach:
        words = [word for word in (sys.argv[1:] if arguments is None else arguments) if word != "--detach"]
        command = [sys.executable, "-m", "benchmarks.training.step", *words, "--limit", "86400"]
        with progress.open("a") as log:
            subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        print(f"progress: {progress}\nresult:   {path}")
        return 0
    report = stamp(rehearsal=options.rehearse, shape=asdict(shape), state="running", rows=[])
    for name in options.variant or VARIANTS:
        run = partial(perform, shape, name) if options.rehearse else partial(
            run_variant, shape, name, progress, options.limit
        )  # fmt: skip
        report["rows"].append({"variant": name} | run())
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(_line(report["rows"][-1]), flush=True)
    report["state"] = "finished"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row["status"].startswith("failed") for row in report["rows"]))


def _line(row: dict) -> str:
    if row["status"] != "measured":
        return f"{row['variant']}: {row['status']}"
    peak = row["peak_device_bytes"] or row["peak_host_bytes"]
    rate = f", {row['tokens_per_s']:.0f} tokens/s, {row['tflops']:.3g} TFLOP/s" if "tflops" in row else ""
    return f"{row['variant']}: {row['seconds']:.3g} s{rate}, {peak / 2**30:.3g} GiB"


if __name__ == "__main__":
    raise SystemExit(main())
