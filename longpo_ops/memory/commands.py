"""`longpo plan`: will a step fit, with which settings, and how long will it take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..runs import terminal


def plan(
    model: Annotated[
        str,
        typer.Option(
            help="A name or folder of any causal LM, or one carried here: mistral-7b, llama-3-8b, mixtral-8x7b, qwen3-30b-a3b, "
            "qwen2.5-1.5b, -7b, -32b or -72b."
        ),
    ],
    length: Annotated[int, typer.Option(help="Tokens of a pack: prefix, chosen and rejected tails.")] = 524288,
    tail: Annotated[
        list[int] | None, typer.Option(help="Tokens of a rejected tail, repeatable; part of --length.")
    ] = None,
    device_gib: Annotated[float, typer.Option(help="Memory of the device.")] = 141.0,
    host_gib: Annotated[float, typer.Option(help="Memory of the host.")] = 128.0,
    disk_gib: Annotated[float, typer.Option(help="Disk space for layer inputs.")] = 0.0,
    gpus: Annotated[int, typer.Option(help="GPUs, over all of which FSDP2 shards the weights.")] = 1,
    sequence_parallel: Annotated[
        int | None, typer.Option(help="GPUs that share the rows of a pack; default: every divisor of --gpus is tried.")
    ] = None,
    gpus_per_node: Annotated[
        int, typer.Option(help="GPUs of a machine; its --host-gib and --disk-gib are shared by them.")
    ] = 8,
    mixed_precision: Annotated[
        str, typer.Option(help="accelerate's, of several GPUs: no, or bf16, which keeps float32 weights and gradients.")
    ] = "no",
    inside_gb_s: Annotated[float, typer.Option(help="What a GPU sends to others of its machine, GB/s (NVLink).")] = 300,
    between_gb_s: Annotated[float, typer.Option(help="What a GPU sends to other machines, GB/s (400 Gbit/s).")] = 45,
    lora_rank: Annotated[
        int,
        typer.Option(
            help="LoRA of this rank on a frozen base; 0 is full fine-tuning. This and the next as in training."
        ),
    ] = 0,
    lora_target_modules: Annotated[
        str, typer.Option(help="Linear layers that get adapters, with commas, or all-linear.")
    ] = "all-linear",
    lora_target_parameters: Annotated[
        str, typer.Option(help="Weights of fused experts that get adapters, with commas.")
    ] = "",
    quantization: Annotated[str, typer.Option(help="Of the frozen base: none, int8 or nf4.")] = "none",
    accumulation: Annotated[int, typer.Option(help="Packs a step accumulates gradients over.")] = 8,
    max_grad_norm: Annotated[float, typer.Option(help="Gradient clipping; 0 for none.")] = 1.0,
    optim: Annotated[
        str, typer.Option(help="Optimizer, by its name in training: adamw_torch, adamw_torch_fused or rmsprop.")
    ] = "adamw_torch",
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16, float16 or float32.")] = "bfloat16",
    workspace_gib: Annotated[float, typer.Option(help="Scratch of the loss.")] = 2.0,
    online: Annotated[bool, typer.Option("--online", help="Keep a reference model beside the policy.")] = False,
    allow_lossy: Annotated[
        str, typer.Option(help="nothing, states (8-bit optimizer states), or all (layer inputs in 8 bits, too).")
    ] = "nothing",
    device_reserve_gib: Annotated[
        float, typer.Option(help="Device memory to leave free, beside a tenth for the prediction's error.")
    ] = 2.0,
    host_reserve_gib: Annotated[float, typer.Option(help="Host memory to leave free.")] = 8.0,
    longest: Annotated[
        bool, typer.Option("--longest", help="The longest length that fits, instead of --length.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw memory over the step into this PNG.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Predict memory and time of a training step, and choose settings that fit. Nothing is allocated.

    Defaults are those of `longpo train` on one H200. With --gpus, all numbers are of one of them.
    """
    import json

    import torch

    from . import plan as planner
    from . import search
    from .mesh import Mesh
    from .plan_report import as_json, draw_plan, print_plan, print_splits
    from .splits import best, splits
    from .trace import read_config

    gib, config = planner.GIB, read_config(model)
    with terminal.wrong_usage():
        search.check_lossy(allow_lossy)
        if dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype={dtype!r}: expected bfloat16, float16 or float32")
        if online and gpus > 1:
            raise ValueError(
                f"online with gpus={gpus}: a reference beside a sharded policy is not supported; leave it out"
            )
        kind = getattr(torch, dtype)
        adapters = _adapters(config, lora_rank, lora_target_modules, lora_target_parameters, quantization)
        mesh = Mesh(gpus, sequence_parallel or 1, gpus_per_node, mixed_precision)
        work = planner.Work(
            config,
            length,
            tuple(tail or ()),
            accumulation,
            max_grad_norm,
            kind,
            int(workspace_gib * gib),
            planner.weights_of(config).total * kind.itemsize if online and adapters is None else 0,
            optim,
            mesh,
            adapters,
        )
    tried = []
    try:
        machine = planner.Machine(
            int(device_gib * gib),
            int(host_gib * gib),
            int(disk_gib * gib),
            inside_node=inside_gb_s * 1e9,
            between_nodes=between_gb_s * 1e9,
            device_reserve=int(device_reserve_gib * gib),
            host_reserve=int(host_reserve_gib * gib),
        ).shared_by(mesh.on_node)
        if gpus > 1 and sequence_parallel is None:
            tried = splits(work, machine, allow_lossy, longest)
            found = best(tried, longest)
        elif longest:
            found = search.longest(work, machine, allow_lossy=allow_lossy)
        else:
            found = search.fit(work, machine, allow_lossy)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    title = f"{model}, one pack of {found.work.length:,} tokens"
    if json_:
        typer.echo(json.dumps(as_json(found, allow_lossy, tried), indent=1))
    else:
        if tried:
            print_splits(tried, found)
        print_plan(found, title, allow_lossy)
    if picture is not None:
        draw_plan(found, title, picture)
        if not json_:
            typer.echo(f"Picture: {picture}")


def _adapters(config, rank: int, modules: str, parameters: str, quantization: str):
    """What is trained; None for all weights. Raises ValueError for settings of adapters without a rank."""
    from .adapters import ALL_LINEAR, NONE, Adapters, scheme_of

    if not rank:
        given = {"lora_target_modules": modules != ALL_LINEAR, "lora_target_parameters": parameters}
        if idle := [name for name, is_set in (given | {"quantization": quantization != NONE}).items() if is_set]:
            raise ValueError(f"{', '.join(idle)}: of adapters, and lora_rank is 0; set it (16, say), or leave them out")
        return None
    names = {
        which: tuple(name.strip() for name in given.split(",") if name.strip())
        for which, given in (("modules", modules), ("parameters", parameters))
    }
    targets = ALL_LINEAR if modules == ALL_LINEAR else names["modules"]
    return Adapters(
        rank, targets, names["parameters"], quantization=quantization if quantization != NONE else scheme_of(config)
    )
