"""`longpo generate`, and `longpo pairs show | stats | validate | merge | convert`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from ..engines import options
from ..pretrained import load_tokenizer
from ..recipes import DEFAULT, OFFICIAL, RECIPES, check_recipe
from ..runs import terminal
from ..runs.page import printable

Paths = Annotated[list[Path], typer.Argument(help="Files or folders of pairs.", exists=True)]


def _of(name: str, what: str, otherwise: str = "none") -> Any:
    """The option of a number that the recipes have."""
    given = (RECIPES[recipe]["generate"].get(name) for recipe in (DEFAULT, OFFICIAL))
    ours, published = (otherwise if value is None else value for value in given)
    return typer.Option(help=f"{what}: {ours}; in the official recipe {published}.")


pairs = typer.Typer(no_args_is_help=True, help="Look at, check, join and convert preference pairs.")


def generate(
    model: options.Model,
    documents: Annotated[list[str], typer.Option(help="Folder, file or glob of documents, repeatable.")],
    length: Annotated[
        int,
        typer.Option(help="Tokens of the longest training sequence; in the official recipe of the longest document."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the pairs; an unfinished run in it goes on.")],
    engine: options.EngineName = None,
    endpoint: options.Endpoints = None,
    served_model: options.ServedModel = None,
    api_key_variable: options.KeyVariable = "OPENAI_API_KEY",
    concurrency: options.Concurrency = 64,
    timeout: options.Timeout = 1800.0,
    patience: options.Patience = 300.0,
    long_endpoint: Annotated[
        list[str] | None, typer.Option(help="URL of a server that reads whole documents; --endpoint then reads chunks.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="default, or official: the published one. Its numbers can be changed.")
    ] = DEFAULT,
    chunks: Annotated[int | None, _of("chunks", "Chunks per document: turns of a pair at most")] = None,
    questions: Annotated[int | None, _of("questions", "Questions in the pool of a chunk")] = None,
    min_chunk: Annotated[int | None, _of("min_chunk", "Tokens", "half of the most")] = None,
    max_chunk: Annotated[int | None, _of("max_chunk", "Tokens", "length / 4, at most 30000")] = None,
    min_document: Annotated[
        int | None, _of("min_document", "Documents must have more tokens", "max_document / 2")
    ] = None,
    max_document: Annotated[
        int | None,
        typer.Option(help="Tokens; what questions and answers leave, in the official recipe below the length."),
    ] = None,
    max_documents: Annotated[int | None, typer.Option(help="Stop after this many selected documents.")] = None,
    join: Annotated[
        str | None, typer.Option(help="short: documents that are too short are joined with others of their folder.")
    ] = None,
    column: Annotated[str, typer.Option(help="Text column of JSON Lines and Parquet.")] = "text",
    answer_tokens: Annotated[int | None, _of("answer_tokens", "Longest answer")] = None,
    question_tokens: Annotated[int | None, _of("question_tokens", "Longest pool of questions")] = None,
    temperature: Annotated[float | None, _of("temperature", "Of the questions")] = None,
    top_p: Annotated[float | None, _of("top_p", "Of the questions")] = None,
    answer_temperature: Annotated[float | None, _of("answer_temperature", "Of both answers")] = None,
    answer_top_p: Annotated[float | None, _of("answer_top_p", "Of both answers")] = None,
    min_words: Annotated[int | None, _of("min_words", "Shorter answers are left out")] = None,
    max_repeated: Annotated[
        float | None, _of("max_repeated", "Share of repetition from which a chosen answer is left out")
    ] = None,
    max_repeated_rejected: Annotated[float | None, _of("max_repeated_rejected", "The same of rejected answers")] = None,
    max_overlap: Annotated[
        float | None, _of("max_overlap", "Share in common from which chosen and rejected are too alike")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    prompts: Annotated[Path | None, typer.Option(help="Folder with questions.txt, lead_ins.txt, ...")] = None,
    reference_logps: Annotated[bool, typer.Option(help="Store the reference's log-probs with the pairs.")] = False,
    rope: Annotated[
        str | None, typer.Option(help='RoPE entries for reading whole documents, as JSON: {"rope_theta": 1e7}.')
    ] = None,
    short_rope: Annotated[
        str | None, typer.Option(help="RoPE entries for reading chunks; default the model's own, as the reference has.")
    ] = None,
    reasoning_tokens: Annotated[
        int, typer.Option(help="What a thinking model may write before a list or an answer, beside their tokens.")
    ] = 0,
    judge: Annotated[
        str | None,
        typer.Option(help="URL of a server that rates how faithful chosen answers are to their chunks, or self."),
    ] = None,
    judge_model: options.JudgeModel = None,
    judge_key_variable: options.JudgeKeyVariable = "JUDGE_API_KEY",
    judge_option: options.JudgeOptions = None,
    min_faithfulness: Annotated[
        float | None, typer.Option(help="With --judge: turns rated lower are left out; 1 to 10. Default: none are.")
    ] = None,
    template_kwargs: options.TemplateKwargs = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    engine_option: options.EngineOptions = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List and part the documents, then stop.")] = False,
) -> None:
    """Make short-to-long preference pairs from long documents, or go on with a run that was stopped."""
    given = dict(locals())
    for name in ("dry_run", "long_endpoint", "judge_option"):
        given.pop(name)
    from .run import GenerateRun

    given = options.engine_fields(given) | {
        "documents": tuple(documents),
        "short_rope": options.from_json("--short-rope", short_rope),
        "long_endpoints": tuple(long_endpoint or ()),
        "judge_options": options.assignments("--judge-option", judge_option),
        "out": str(out),
        "prompts": None if prompts is None else str(prompts),
    }
    with terminal.wrong_usage():
        run = GenerateRun(**given)
    (_list if dry_run else _generate)(run)


def _list(run) -> None:
    """What would be asked about."""
    from ..documents.listing import Listing, find_files
    from .advice import advice
    from .report import describe
    from .selection import select

    listing, lengths = Listing(), {"document": [], "chunk": []}
    for task in select(run, find_files(run.documents), run.load_tokenizer(), listing):
        lengths["document"].append(task.tokens)
        lengths["chunk"] += [tokens for *_, tokens in task.chunks]
    typer.echo(str(listing))
    for line in advice("documents", listing.selected, listing.skipped, run.now()):
        typer.echo(f"  {line}")
    for kind, values in lengths.items():
        table = describe(values) if values else {"number": 0}
        terminal.print_values((f"{kind} tokens, {name}", f"{value:,}") for name, value in table.items())


def _generate(run) -> None:
    from .report import values_of
    from .run import generate_and_summarise

    out = Path(run.out)
    with terminal.resumable(f"what was generated is in {out}"), _progress() as progress:
        result, summary = generate_and_summarise(run, progress)
    terminal.print_values(values_of(result, summary))
    if result.missing:
        typer.echo(
            f"{result.missing} documents begun before are no longer among the documents; put them back to go on",
            err=True,
        )
    if not result.made:
        raise ValueError(
            f"no pair came of {summary['documents']} documents; see what was left out, and {out}/summary.html"
        )
    typer.echo(f"{result.made:,} pairs in {out}; see {out}/summary.html")


@contextmanager
def _progress() -> Iterator:
    """A bar with documents, pairs, tokens per second and time left; gives what `generate` calls."""
    began = time.monotonic()
    with terminal.bars(percentage=False) as bar:
        task = bar.add_task("reading documents", total=1.0)

        def update(fraction, documents, made, tally) -> None:
            speed = (tally.prompt_tokens + tally.tokens) / max(1e-9, time.monotonic() - began)
            text = f"{documents:,} documents, {made:,} pairs, {speed:,.0f} tokens/s"
            bar.update(task, completed=fraction, description=text)

        yield update


@pairs.command()
def show(
    path: Paths,
    number: Annotated[int, typer.Option(help="How many, the first ones.", min=1)] = 3,
    id: Annotated[str | None, typer.Option(help="Only the pair of this id.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page instead.")] = None,
) -> None:
    """Chosen beside rejected, differences marked."""
    from ..runs.journal import write_text
    from .report import pairs_page, show_pair

    chosen, how_many = _first(path, number, id)
    if not chosen:
        which = "no pair" if id is None else f"no pair with id {id!r}"
        raise ValueError(f"{which} in {', '.join(map(str, path))}")
    if html is not None:
        write_text(html, pairs_page(chosen, "Preference pairs", how_many))
        typer.echo(f"{html} holds {how_many}")
        return
    for pair in chosen:
        show_pair(pair, terminal.console())
    typer.echo(how_many)


def _first(paths: list[Path], number: int, id: str | None) -> tuple[list, str]:
    """The first pairs, all or those of an id, and how many of how many these are. Where no id is wanted, those that are not
    shown are counted and not looked at."""
    from ..data.pairs import pair_of
    from ..data.records import count_records, read_records
    from ..runs.page import told

    records = (record for path in paths for record in read_records(path))
    pairs = (pair_of(record, where, allow_equal=True) for where, record in records)
    if id is not None:
        found = [pair for pair in pairs if pair.id == id]
        there = len(found)
    else:
        found = list(islice(pairs, number))
        try:
            there = sum(map(count_records, paths))
        except ValueError as error:  # a file behind the pairs that are shown
            return found, f"{len(found):,} pairs; how many there are cannot be said: {error}"
    found = found[:number]
    return found, told(len(found), there, "pairs", f"--number {there} shows all")


@pairs.command()
def stats(
    path: Paths, model: Annotated[str | None, typer.Option(help="Count tokens with this model's tokenizer.")] = None
) -> None:
    """How many pairs and turns, and how long everything is."""
    from .report import describe

    unit, measure = "characters", len
    if model is not None:
        encode = load_tokenizer(model)
        unit, measure = "tokens", lambda text: len(encode(text, add_special_tokens=False, verbose=False)["input_ids"])
    turns: list[int] = []
    lengths: dict[str, list[int]] = {name: [] for name in ("document", "chunk", "instruction", "chosen", "rejected")}
    for pair in _read(path):
        turns.append(len(pair.turns))
        lengths["document"].append(measure(pair.document))
        for turn in pair.turns:
            for name in ("chunk", "instruction", "chosen"):
                lengths[name] += [measure(text)] if (text := getattr(turn, name)) else []  # a context has no question
            lengths["rejected"] += map(measure, turn.rejected)
    table = [("pairs", f"{len(turns):,}"), ("turns", f"{sum(turns):,}")]
    for name, values in filter(lambda named: named[1], lengths.items()):
        table += [
            (f"{name} {unit}, {what}", f"{value:,}") for what, value in describe(values).items() if what != "number"
        ]
    terminal.print_values(table)


@pairs.command()
def validate(
    path: Paths,
    model: Annotated[str | None, typer.Option(help="Also lay out and tokenise every pair as training does.")] = None,
    max_length: Annotated[int | None, typer.Option(help="With --model: tokens of the longest sequence.")] = None,
    template_kwargs: options.TemplateKwargs = None,
    recipe: Annotated[
        str, typer.Option(help="Of the training; the official one takes pairs of equal answers.")
    ] = DEFAULT,
    number: Annotated[int, typer.Option(help="How many bad records of each kind to tell.", min=1)] = 10,
) -> None:
    """Check every record; exit code 1 if training would refuse one."""
    from ..data import DataReport, read_pairs, tokenized_pairs
    from ..data.chat import format_of

    report, chat = DataReport(tell=number), None
    with terminal.wrong_usage():
        equal = check_recipe(recipe) == OFFICIAL
    variables = options.from_json("--template-kwargs", template_kwargs)
    if model is None and variables:
        raise typer.BadParameter("--template-kwargs: expected with --model, whose chat template reads them")
    if model is not None:
        chat = format_of(load_tokenizer(model), max_length, template_kwargs=variables)
    for each in path:
        if chat is None:
            read = read_pairs(each, "skip", report, equal)
        else:
            read = tokenized_pairs(each, chat, None, "skip", report, equal)
        for _ in read:
            pass
    typer.echo(printable(report))
    if report.untold:
        typer.echo(f"{report.untold:,} bad records are not told; --number {max(report.skipped.values())} tells all")
    raise typer.Exit(1 if report.skipped else 0)


@pairs.command()
def merge(
    path: Paths, out: Annotated[Path, typer.Option(help="A .jsonl, .jsonl.gz or .parquet file; must not exist.")]
) -> None:
    """Join pairs into one file, each once; two different ones of the same id are an error."""
    from ..data import write_pairs
    from ..runs.disk import writing

    if out.exists():
        raise ValueError(f"{out} exists; expected a new file")
    seen: dict[str, bytes] = {}

    def distinct() -> Iterator:
        for pair in _read(path):
            digest = hashlib.sha256(json.dumps(pair.to_record(), sort_keys=True).encode()).digest()
            before = seen.setdefault(pair.id, digest)
            if before is digest:
                yield pair
            elif before != digest:
                raise ValueError(f"two different pairs have the id {pair.id!r}; leave one of their files out")

    with writing(out):
        made = write_pairs(distinct(), out)
    typer.echo(f"{made:,} pairs in {out}")


@pairs.command()
def convert(
    path: Annotated[Path, typer.Argument(help="A file, or a folder of files or of save_to_disk.", exists=True)],
    kind: Annotated[
        str, typer.Option("--from", help="Whose columns the rows have: trl, ultrafeedback or messages (docs/data.md).")
    ],
    out: Annotated[Path, typer.Option(help="A .jsonl or .jsonl.gz file; must not exist.")],
    on_bad_record: Annotated[str, typer.Option(help="raise, or skip: leave bad rows out and tell them.")] = "raise",
    number: Annotated[int, typer.Option(help="How many bad rows of each kind to tell.", min=1)] = 10,
) -> None:
    """Make pairs of prompts with chosen and rejected answers: JSON Lines, JSON arrays, Parquet, CSV, save_to_disk."""
    from ..data import DataReport, write_pairs
    from ..data.convert import read_converted
    from ..runs.disk import writing

    report = DataReport(tell=number)
    with terminal.wrong_usage():
        converted = read_converted(path, kind, on_bad_record, report)
    if out.exists():
        raise ValueError(f"{out} exists; expected a new file")
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(
            f"cannot write {out}; expected a name ending in .jsonl or .jsonl.gz, as contexts have no one type"
        )
    with writing(out):
        made = write_pairs(converted, out)
    typer.echo(f"{printable(report)}\n{made:,} pairs in {out}")


def _read(paths: list[Path]) -> Iterator:
    from ..data import read_pairs

    for path in paths:
        yield from read_pairs(path, allow_equal=True)
