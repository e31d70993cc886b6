"""The command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped with Ctrl-C.

What a command does is its own module's; options of several commands are engines/options.py's.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from . import launch
from .demo.commands import demo
from .doctor.commands import doctor
from .engines import options
from .evaluate.commands import Evaluate, evaluate
from .evolve.commands import evolve
from .generate.commands import generate, pairs
from .memory.commands import plan
from .runs import disk, terminal
from .runs.settings_file import assigned, read_yaml

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def about() -> None:
    """Preference training of language models on long contexts."""


@app.command()
def train(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options below override it.")] = None,
    model: Annotated[str | None, typer.Option(help="Causal LM: a name or a folder.")] = None,
    text_only: Annotated[
        bool | None,
        typer.Option("--text-only", help="Of a model that also sees or hears: its text model, saved alone."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Pairs: a file or a folder (JSON Lines, Parquet).")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Where checkpoints, figure and card go.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="longpo, hinge, ipo, kto_pair, dpo, simpo, orpo, logo, solopo, solopo_simpo, solopo_orpo, sft_chosen, "
            "sft_rejected, sft_constraint, sft_constraint_official, another objective of docs/objectives.md, or module:Class."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="default, or official: what is not set is the published recipe's.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many steps.")] = None,
    rope_theta: Annotated[
        float | None, typer.Option(help="RoPE base of the policy; a reference on short inputs keeps its own.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="LoRA of this rank; 0 is full fine-tuning.")] = None,
    separate: Annotated[
        bool | None,
        typer.Option("--separate", help="Sequences one by one, by the model's own attention, not packed."),
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="LoRA's scale times the rank; default twice the rank.")
    ] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Of what adapters read, from 0 to 1.")] = None,
    lora_target_modules: Annotated[
        str | None,
        typer.Option(help="Layers with adapters, by their names with commas, or all-linear (never the head)."),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="How the weights under adapters are stored (QLoRA): none, int8 or nf4.")
    ] = None,
    fit: Annotated[str | None, typer.Option(help="auto: choose memory settings that fit this machine.")] = None,
    host_bytes: Annotated[
        int | None, typer.Option(help="Of fit: memory of the host, where more can be had than is available now.")
    ] = None,
    template_kwargs: options.TemplateKwargs = None,
    on_bad_record: Annotated[
        str | None, typer.Option(help="raise, or skip: leave bad records out and count them.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other setting as name=value (YAML), repeatable: TrainRun and LongPOConfig fields."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, print counts, lengths, settings and plan, then stop.")
    ] = False,
) -> None:
    """Train a model on short-to-long preference pairs, or go on with a run that was stopped."""
    given = dict(locals())
    for name in ("config", "set_", "dry_run"):
        del given[name]
    given["template_kwargs"] = options.from_json("--template-kwargs", template_kwargs)
    settings = _settings(config, set_ or []) | {name: value for name, value in given.items() if value is not None}
    from .train.run import TrainRun, check_output, prepare
    from .train.run import train as run_training

    with terminal.wrong_usage((ValueError, TypeError)):
        run = TrainRun.from_settings(settings)
        run.config()
    if not dry_run:
        with terminal.resumable(f"its whole checkpoints are in {run.output_dir}"):
            trainer = run_training(run)
        trainer.accelerator.end_training()  # a process group left to the interpreter's exit may abort it
        return
    prepared = prepare(run)
    check_output(run, prepared)
    rows = {"sequences": f"separate: {prepared.separate}" if prepared.separate else "packed: a prefix is shared"}
    for name, value in (prepared.describe() | rows | run.all_settings()).items():
        typer.echo(f"{name:32s}{getattr(value, 'value', value)}")
    if (plan_of_run := prepared.plan) is not None:
        from .memory.plan_report import print_plan

        apart = " in separate sequences" * (prepared.separate is not None)
        title = f"{run.model}, one pack of {plan_of_run.work.length:,} tokens{apart}"
        print_plan(plan_of_run, title, prepared.config.allow_lossy)


app.command(name="demo")(demo)
app.command(name="doctor")(doctor)
app.command(name="plan")(plan)
app.command(name="evaluate", cls=Evaluate)(evaluate)
app.command(name="evolve")(evolve)
app.command(name="generate")(generate)
app.add_typer(pairs, name="pairs")


def _settings(config: Path | None, assignments: list[str]) -> dict[str, Any]:
    """A YAML file, then name=value pairs over it."""
    settings: dict[str, Any] = {}
    with terminal.wrong_usage():
        if config is not None:
            if not config.is_file():
                raise ValueError(f"--config {config}: no such file")
            settings = read_yaml(config, f"--config {config}") or {}
            if not isinstance(settings, dict):
                raise ValueError(f"--config {config}: expected names and values, got {type(settings).__name__}")
        return settings | assigned(assignments)


def _speak_once() -> None:
    """Of the processes of a launcher the first one says what goes on; the others tell errors alone."""
    if launch.rank():
        warnings.simplefilter("ignore")
        quiet = {
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        os.environ.update(quiet)
    logging.basicConfig(level=logging.ERROR if launch.rank() else logging.INFO, format="%(message)s")


def _who() -> str:
    """Which process tells an error, where there are several."""
    return f"rank {launch.rank()}: " if launch.processes() > 1 else ""


def main() -> None:
    """The console script: one line for a failure that says what to do, a traceback for a bug."""
    _speak_once()
    with suppress(AttributeError):  # of a stream that is no file's
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: a path may hold bytes that are no UTF-8
    for name in ("torchao", "torch.utils._pytree"):  # their warnings at import concern nobody here
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"{_who()}error: {disk.told(error) if isinstance(error, OSError) else error}", err=True)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        from .pretrained import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        advice = "train with --fit auto, or shorter texts; `longpo plan` says what fits"
        typer.echo(f"{_who()}error: out of memory: {error}\n{advice}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
