"""`longpo evaluate`, and `longpo evaluate compare`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..engines import options
from ..runs import terminal


class Evaluate(typer.core.TyperCommand):
    """A command with options of its own, and beside them `compare A B`, which takes none of them."""

    def make_context(self, info_name, args, parent=None, **extra):
        if args[:1] == ["compare"]:
            inner = typer.main.get_command(_COMPARE)
            return inner.make_context(f"{info_name} compare", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)


def evaluate(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder of the results; an unfinished evaluation in it goes on.")],
    length: Annotated[list[int] | None, typer.Option(help="Tokens of prompt and answer, repeatable.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Names, with commas or repeatable; default RULER's 13, or those of --needles."),
    ] = None,
    needles: Annotated[Path | None, typer.Option(help="YAML file, or folder of them: your own needle tasks.")] = None,
    samples: Annotated[int, typer.Option(help="Of each task at each length; windows of a perplexity.")] = 100,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    texts: Annotated[
        list[str] | None, typer.Option(help="Prose to hide needles in: folder, file or glob, repeatable.")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="SQuAD's or HotpotQA's JSON, or a folder with both.")] = None,
    perplexity: Annotated[
        list[str] | None, typer.Option(help="Held-out text: folder, file or glob, repeatable.")
    ] = None,
    perplexity_length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a window, repeatable; default those of --length.")
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(help="lm-evaluation-harness TASK[:SHOTS][:METRIC], names or YAML files, as --tasks."),
    ] = None,
    short: Annotated[
        str | None, typer.Option(help="A set of them: official (MMLU, ARC-C, HellaSwag, Winogrande, with their shots).")
    ] = None,
    published: Annotated[
        list[str] | None, typer.Option(help="InfiniteBench's, LongBench-Chat's, MT-Bench's files, or a folder.")
    ] = None,
    prefill: Annotated[bool, typer.Option(help="Begin the answers for the model; else its message ends so.")] = True,
    reasoning_tokens: Annotated[
        int, typer.Option(help="Tokens that a thinking model may write before an answer, beside those of the answer.")
    ] = 0,
    judge: Annotated[str | None, typer.Option(help="URL of a server that rates the answers of chats.")] = None,
    judge_model: options.JudgeModel = None,
    judge_key_variable: options.JudgeKeyVariable = "JUDGE_API_KEY",
    judge_option: options.JudgeOptions = None,
    engine: options.EngineName = None,
    endpoint: options.Endpoints = None,
    served_model: options.ServedModel = None,
    api_key_variable: options.KeyVariable = "OPENAI_API_KEY",
    concurrency: options.Concurrency = 64,
    timeout: options.Timeout = 1800.0,
    patience: options.Patience = 300.0,
    rope: options.Rope = None,
    template_kwargs: options.TemplateKwargs = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    engine_option: options.EngineOptions = None,
) -> None:
    """Measure a model by length and depth, or go on with an evaluation that was stopped.

    longpo evaluate compare A B: two evaluations' folders against each other.
    """
    given = options.engine_fields(dict(locals()))
    given["judge_options"] = options.assignments("--judge-option", given.pop("judge_option"))
    from .own import load_tasks
    from .run import EvaluateRun
    from .tasks import TASKS, find_task

    with terminal.wrong_usage():
        own = {} if needles is None else load_tasks(needles)
        names = _names(tasks) if tasks or not length else tuple(own or TASKS)
        for name in names:
            find_task(name)
    given |= {
        "out": str(out),
        "lengths": tuple(given.pop("length") or ()),
        "perplexity_lengths": tuple(given.pop("perplexity_length") or ()),
        "tasks": names,
        "harness": _names(harness),
        "needles": None if needles is None else str(needles),
        "questions": None if questions is None else str(questions),
    }
    given |= {name: tuple(given[name] or ()) for name in ("texts", "perplexity", "published")}
    with terminal.wrong_usage():
        run = EvaluateRun(**given)
    _evaluate(run)


def _names(given: list[str] | None) -> tuple[str, ...]:
    return tuple(name.strip() for each in given or () for name in each.split(",") if name.strip())


def _evaluate(run) -> None:
    from rich.markdown import Markdown

    from .report import RESULTS, TABLES
    from .run import evaluate as run_evaluation
    from .tables import markdown

    with terminal.resumable(f"the answers are in {run.out}"), _progress() as progress:
        scores = run_evaluation(run, progress)
    terminal.console().print(Markdown(markdown(scores, picture=False)))
    typer.echo(f"see {run.out}/{TABLES} and {RESULTS}")


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of an evaluation.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Folder of another one.", metavar="B")],
    out: Annotated[Path | None, typer.Option(help="JSON file for the same numbers.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """What evaluation B has more than A, sample by sample, and whether that shows."""
    from rich.markdown import Markdown

    from .comparison import compare as compare_runs
    from .comparison import markdown

    with terminal.wrong_usage():
        found = compare_runs(first, second, seed)
    if out is not None:
        found.save(out)
    terminal.console().print(Markdown(markdown(found)))
    if out is not None:
        typer.echo(f"see {out}")


_COMPARE = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_COMPARE.command()(compare)


@contextmanager
def _progress() -> Iterator:
    """A bar with what is asked and the time left; gives what `evaluate` calls."""
    with terminal.bars() as bar:
        task = bar.add_task("reading tasks and texts", total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)
