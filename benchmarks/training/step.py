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
--detach returns at once: a step of ten minutes tells its layers as they pass in step_*.progress. Each row holds the
planner's prediction beside the measurement, where the planner models the variant. Results: dated JSON in
benchmarks/results. Not covered: reading data and the reference's pass, which a run pays once.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from longpo_ops.attention import use_shared_prefix
from longpo_ops.data.layout import PairSpans, SharedPrefixLayout
from longpo_ops.memory.optimizer import AdamW
from longpo_ops.memory.plan import GIB, Machine, Plan, Settings, Work, attention_pairs, predict, weights_of
from longpo_ops.memory.search import placed
from longpo_ops.memory.settings import Memory, machine_here
from longpo_ops.memory.tiers import available_host_bytes
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
        if self.layers:
            config.num_hidden_layers = self.layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[: self.layers]
        return config

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
    try:
        # A rehearsal on the CPU is of this script: compiling the 8-bit step takes longer than all of it.
        with torch.compiler.set_stance("force_eager" if shape.device == "cpu" else "default"):
            return _perform(shape, name, tell)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"status": f"out of memory: {str(error).splitlines()[0]}"}
    except Exception as error:  # whatever it is belongs in the report
        return {"status": f"failed: {type(error).__name__}: {error}"[:500]}


def _perform(shape: Shape, name: str, tell) -> dict:
    from transformers import AutoModelForCausalLM

    variant, device = VARIANTS[name], torch.device(shape.device)
    settings = variant if isinstance(variant, Settings) else ALL
    settings = replace(settings, tile_rows=settings.tile_rows and shape.tile_rows)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=shape.torch_dtype).train()
    ours = not str(variant).startswith("logits")
    planned: Plan | None = None
    with ExitStack() as stack:
        if ours:
            planned = _planned(shape, settings, device, doubled=variant == "two")
            memory = Memory.from_plan(planned)
            use_shared_prefix(model)
            attach(model)
            model.gradient_checkpointing_enable({"use_reentrant": False})
            stack.enter_context(memory.attached(model))
            optimizer = memory.make_optimizer(model.parameters(), lr=5e-7)
            loss = partial(our_loss, model, shape, variant != "two")
        else:
            options = {"use_reentrant": False} | ({"offload": True} if variant == "logits+offload" else {})
            model.gradient_checkpointing_enable(options)
            optimizer = AdamW(model.parameters(), lr=5e-7, states="8bit")
            loss = partial(logits_loss, model, shape)
        _watch(model, shape, tell)
        for number in range(shape.steps):
            tell(f"step {number}")
            measured = _measured(partial(_step, loss, optimizer), device)
    row = {"status": "measured"} | measured
    row["tokens_per_s"] = shape.length / row["seconds"]
    row["tflops"] = useful_operations(shape) / row["seconds"] / 1e12
    if shape.backward_layers:  # a part of a step has no rate
        del row["tokens_per_s"], row["tflops"]
    if planned is not None and variant != "two":
        row |= {"predicted_peak_bytes": planned.peak.total, "predicted_seconds": planned.step_seconds}
        row["settings"] = asdict(planned.settings)
    return row


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


def _step(loss, optimizer) -> None:
    with suppress(Enough):
        loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def _measured(step, device: torch.device) -> dict:
    """Seconds and peaks; device memory beyond nothing, that is with weights and states."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with Peak() as host:
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {"seconds": seconds, "peak_device_bytes": peak, "peak_host_bytes": host.start + host.bytes}


def _watch(model, shape: Shape, tell) -> None:
    """Tells layers as they pass, and ends the backward where it is to end."""
    layers = model.get_decoder().layers
    first = len(layers) - shape.backward_layers

    def before(number, _, args):
        if torch.is_grad_enabled() and args and args[0].requires_grad:
            args[0].register_hook(partial(after, number))
        tell(f"forward of layer {number} of {len(layers)}")

    def after(number, grad):
        tell(f"backward of layer {number} done")
        if shape.backward_layers and number == first:
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


# -- rows, files, command ----------------------------------------------------------------------------------------------


def rows(setting) -> Iterator[dict]:
    """For gpu_check: every variant of four layers of the 1.5B shape at 64K tokens, or the tiny one on the CPU."""
    shape = Shape("qwen2.5-1.5b", 65536, layers=4) if setting.on_gpu else TINY
    for name in VARIANTS:
        row = perform(shape, name)
        status = (
            "failed: " + row["status"] if row["status"].startswith("out of memory") and "logits" not in name else None
        )
        yield {"what": "step", "case": name, **asdict(shape)} | row | ({"status": status} if status else {})
        gc.collect()  # a model with features refers to itself: its memory must not count for the next variant
        if setting.on_gpu:
            torch.cuda.empty_cache()


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
