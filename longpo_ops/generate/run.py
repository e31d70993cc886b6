"""A run: documents to pairs in a folder, to be stopped and started at will. What `longpo generate` calls.

    files -> Listing, Task (a thread ahead) -> Steps (documents side by side) -> Store -> summary

Chunks are read at the model's own RoPE (`short_rope`), whole documents at a raised one (`rope`): questions and chosen
answers come from the model that is the reference. A local engine has one RoPE at a time, so where the two differ the run
goes over the documents twice: first all that chunks are asked, then, with an engine of its own, what whole documents are.
The journal stands between, some 20 kB a document, which are in memory until the document is finished. Two sets of servers
are asked side by side.

Else only documents under way are in memory: two texts more than the engine's concurrency at most. Not covered: several
processes in one folder, which its lock refuses.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..data import ChatFormat, join_context, read_pairs, tokenizer_fingerprint
from ..documents.listing import Listing, find_files
from ..engines import Engine, Request, Sampling, render
from ..engines.concurrency import side_by_side
from ..engines.fields import changed
from ..engines.judging import JUDGE_TOKENS, SELF, check_judge, judge_engine
from ..engines.settings import EngineSettings
from ..pretrained import read_config
from ..recipes import DEFAULT, fill, tell, title, warn
from ..runs.journal import check_folder
from .makers import MAKERS, Maker
from .prompts import Prompts
from .report import write_summary
from .selection import select
from .steps import Steps, Tally, Task
from .store import Store

OWN_CONTEXT = 30000  # tokens of the longest chunk: with its question and answer it fits the 32,768 of many models


@dataclass(frozen=True)
class GenerateRun(EngineSettings):
    """One run's settings: those of the engine, and these. None is what the recipe has (recipes.py).

    documents: folders, files, globs. length: tokens of the longest training sequence, document, questions and
    answers; in the official recipe a bound of the documents alone. recipe: "default" or "official". chunks: turns of a
    pair at most. questions: pool per chunk. min_chunk, max_chunk: tokens; by default a quarter of the length, at most
    30,000, and half of that. min_document, max_document: tokens; by default as many as leave room for all questions and
    answers, and more than half of that. join: "short" joins shorter documents of one folder. temperature, top_p: of the
    questions; answer_temperature, answer_top_p: of both answers. max_repeated: of chosen answers, max_repeated_rejected:
    of the others. prompts: folder with files of yours. rope: of local engines while they read whole documents, short_rope:
    while they read chunks; default the model's own. long_endpoints: servers that read the whole documents, where those at
    `endpoints` read chunks alone. reasoning_tokens: what a thinking model may write before a list or an answer, on top of
    their tokens and of the length. judge: URL of a server, with judge_model, the key in judge_key_variable and
    judge_options, or "self": it rates from 1 to 10 how faithful chosen answers are to their chunks. min_faithfulness: turns
    with less are left out; None stores the ratings alone.
    """

    model: str  # again, as the first of those that may be given by position
    documents: tuple[str, ...]
    length: int
    out: str
    recipe: str = DEFAULT
    chunks: int | None = None
    questions: int | None = None
    min_chunk: int | None = None
    max_chunk: int | None = None
    min_document: int | None = None
    max_document: int | None = None
    max_documents: int | None = None
    join: str | None = None
    column: str = "text"
    answer_tokens: int | None = None
    question_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    answer_temperature: float | None = None
    answer_top_p: float | None = None
    min_words: int | None = None
    max_repeated: float | None = None
    max_repeated_rejected: float | None = None
    max_overlap: float | None = None
    seed: int = 0
    prompts: str | None = None
    reference_logps: bool = False
    short_rope: dict | None = None
    long_endpoints: tuple[str, ...] = ()
    reasoning_tokens: int = 0
    judge: str | None = None
    judge_model: str | None = None
    judge_key_variable: str = "JUDGE_API_KEY"
    judge_options: dict | None = None
    min_faithfulness: float | None = None

    def __post_init__(self):
        """Raises ValueError for settings that make no sense, saying which."""
        for name, value in fill(self.recipe, "generate", self._given())[0].items():
            object.__setattr__(self, name, value)
        super().__post_init__()
        self.check_rope("short_rope")
        self.check_server("long_endpoints", self.long_endpoints, self.key_variable)
        if self.long_endpoints and not self.endpoints:
            raise ValueError("long_endpoints without endpoints; expected servers that read the chunks, too")
        self.require_positive("length", "chunks", "questions", "answer_tokens", "question_tokens")
        self.require_positive("max_documents", "max_chunk", "max_document")
        check_judge(self)
        if self.min_faithfulness is not None and not (self.judge and 1 <= self.min_faithfulness <= 10):
            raise ValueError(f"min_faithfulness is {self.min_faithfulness}; expected 1 to 10, and a judge")
        if self.reasoning_tokens < 0:
            raise ValueError(f"reasoning_tokens is {self.reasoning_tokens}; expected a whole number of tokens, or 0")
        if self.join not in (None, "short"):
            raise ValueError(f"join is {self.join!r}; expected 'short', or None, which leaves short documents out")
        if self.join and not self.maker.cuts:
            raise ValueError(
                f"join is {self.join!r}, and recipe {self.recipe!r} leaves short documents out; drop one of them"
            )
        for kind in ("", "answer_"):
            drawn, mass = getattr(self, f"{kind}temperature"), getattr(self, f"{kind}top_p")
            if not 0 <= drawn < math.inf or not 0 < mass <= 1:
                raise ValueError(f"{kind}temperature {drawn}, {kind}top_p {mass}; expected >= 0, and above 0 up to 1")
        for name in ("max_repeated", "max_repeated_rejected", "max_overlap"):
            if (share := getattr(self, name)) is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; expected a share from 0 to 1")
        if (self.rope or self.short_rope) and self.reference_logps:
            raise ValueError(
                "reference_logps with rope: the reference keeps its own RoPE; let `longpo train` compute its log-probs"
            )
        least, most = self.chunk_bounds()
        if not 0 < least <= most:
            raise ValueError(f"chunks of {least} to {most} tokens; expected 0 < min_chunk <= max_chunk")
        first, last = self.document_bounds()
        if first >= last:
            raise ValueError(
                f"documents of {first} to {last} tokens: {self.chunks} questions and answers of up to "
                f"{self.question_tokens} + {self.answer_tokens} tokens must fit beside the document in {self.length}; "
                "raise length, or lower chunks, question_tokens or answer_tokens"
                if self.maker.fits_answers
                else f"documents of more than {first} and fewer than {self.length} tokens: none can be; raise length, or "
                "lower min_document"
            )
        warn(tell(self.recipe, "generate", vars(self), self.changed))

    @property
    def maker(self) -> Maker:
        """What the recipe does beyond numbers."""
        return MAKERS[self.recipe]

    @property
    def changed(self) -> tuple[str, ...]:
        """Settings that the published recipe contradicts."""
        return fill(self.recipe, "generate", self._given())[1]

    @property
    def title(self) -> str:
        """The recipe, and what of it is changed (recipes.title)."""
        return title(self.recipe, self.changed)

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest sequence that is trained on, but for the chat template."""
        return self.length if self.maker.fits_answers else self.length + self._room()

    @property
    def reading_length(self) -> int:
        """Tokens of the longest request about a document, its reasoning and answer included."""
        return self.sequence_length + self.reasoning_tokens

    def document_bounds(self) -> tuple[int, int]:
        """A document is selected if it has more tokens than the first and at most as many as the second."""
        most = self.length - self._room() if self.maker.fits_answers else self.length - 1
        last = most if self.max_document is None else self.max_document
        return max(0, last // 2) if self.min_document is None else self.min_document, last

    def chunk_bounds(self) -> tuple[int, int]:
        """Least and most tokens of a chunk."""
        most = min(OWN_CONTEXT, self.length // 4) if self.max_chunk is None else self.max_chunk
        return most // 2 if self.min_chunk is None else self.min_chunk, most

    def short_length(self, chat: ChatFormat, prompts: Prompts) -> int:
        """Tokens of the longest request about a chunk, its answer included."""

        def around(instruction: str) -> int:
            return len(render(chat.tokenizer, Request(join_context("", instruction), None), chat.template_kwargs))

        wordings = [
            prompts.ask(self.questions, again=True),
            prompts.ask(self.questions, schema=self.engine != "transformers"),
        ]
        asked = max(map(around, wordings)) + self.question_tokens
        answered = max(around(prompts.instruct(i, "")) for i in range(len(prompts.lead_ins)))
        judged = around(prompts.ask_judge("", "", "")) + JUDGE_TOKENS if self.judge == SELF else 0
        answered = max(answered, judged) + self.question_tokens + self.answer_tokens
        return self.chunk_bounds()[1] + max(asked, answered) + self.reasoning_tokens

    def identity(self, tokenizer, prompts: Prompts) -> dict:
        """What decides the pairs: a folder holds those of one identity. Neither addresses nor keys are in it."""
        free = {"documents", "out", "max_documents", "endpoints", "concurrency", "timeout", "patience", "key_variable"}
        free |= {"prompts", "model", "engine_options", "trust_remote_code", "long_endpoints"}
        free |= {"judge", "judge_key_variable", "judge_options"} | (
            {"reasoning_tokens"} if not self.reasoning_tokens else set()
        )
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in free}
        named = {"model": self.model_name, "prompts": prompts.digest(self.judge is not None), "recipe": self.title}
        named |= {"own_fields": self.own_fields} if self.own_fields else {}
        if self.judge is not None:
            fields = changed(self.judge_options or {})
            named |= {"judge": self.judge if self.judge == SELF else "server"} | (
                {"judge_fields": fields} if fields else {}
            )
        return kept | named | {"tokenizer": tokenizer_fingerprint(tokenizer)}

    def now(self) -> dict:
        """The settings by name, with numbers in the place of those that follow from others."""
        (least, _), (first, last) = self.chunk_bounds(), self.document_bounds()
        bounds = {
            "min_chunk": least,
            "min_document": first,
            "max_document": last,
            "reading_length": self.reading_length,
        }
        return vars(self) | bounds

    def _given(self) -> dict:
        return {name: value for name, value in vars(self).items() if value is not None}

    def _room(self) -> int:
        """Tokens of all questions and answers."""
        return self.chunks * (self.question_tokens + self.answer_tokens)


@dataclass
class Result:
    """What a run did: outcomes of all finished documents, this listing, and this process's share."""

    listing: Listing
    outcomes: list[dict]
    tally: Tally
    seconds: float
    missing: int  # documents begun once that are no longer among the documents

    @property
    def made(self) -> int:
        """Pairs."""
        return sum(outcome["pairs"] for outcome in self.outcomes)


def check(run: GenerateRun) -> None:
    """Raises ValueError for a tokenizer, prompts and bounds of chunks that the run would refuse before it asks anybody."""
    chat = ChatFormat(run.load_tokenizer(), template_kwargs=run.template_kwargs)
    _phases(run, run.short_length(chat, Prompts.load(run.prompts, run.recipe)))


def generate(run: GenerateRun, progress=None) -> Result:
    """Run to the end, or go on with a run that was stopped; what there is lies in `run.out` at any time.

    progress(fraction, documents, pairs, tally) is called after every document. Raises ValueError for settings and
    inputs that cannot be used, EngineStopped (a ConnectionError) for an engine that is gone, OSError for a disk that
    is full: mend it and run the same again. Raises KeyboardInterrupt for Ctrl-C.
    """
    files, prompts = find_files(run.documents), Prompts.load(run.prompts, run.recipe)
    tokenizer, out = run.load_tokenizer(), Path(run.out)
    chat = ChatFormat(tokenizer, template_kwargs=run.template_kwargs)
    phases = _phases(run, run.short_length(chat, prompts))
    check_folder(out)
    store = Store(out, run.identity(tokenizer, prompts))
    try:
        return asyncio.run(_generate(run, files, store, chat, prompts, phases, progress))
    finally:
        store.close()


def generate_and_summarise(run: GenerateRun, progress=None) -> tuple[Result, dict]:
    """`generate`, then summary.json, lengths.png and summary.html beside the pairs (report.py); returns the summary too."""
    result = generate(run, progress)
    pairs = read_pairs(run.out, allow_equal=True) if result.made else ()
    return result, write_summary(result, pairs, run)


async def _generate(
    run: GenerateRun, files, store: Store, chat: ChatFormat, prompts: Prompts, phases, progress
) -> Result:
    began, tally, listing = time.monotonic(), Tally(), Listing()
    about = {"model": store.settings["model"], "engine": run.engine, "seed": run.seed, "recipe": run.title}
    about |= {"judge": run.judge_model or store.settings["judge"]} if run.judge else {}
    about |= {"template_kwargs": run.template_kwargs} if run.template_kwargs else {}
    steps = Steps(
        chat,
        prompts,
        run.maker,
        run.maker.filters(
            prompts.refusals, run.min_words, run.max_repeated, run.max_repeated_rejected, run.max_overlap
        ),
        asking=Sampling(run.question_tokens, run.temperature, run.top_p),
        answering=Sampling(run.answer_tokens, run.answer_temperature, run.answer_top_p),
        reasoning=run.reasoning_tokens,
        judged=run.judge is not None,
        min_faithfulness=run.min_faithfulness,
        questions=run.questions,
        turns=run.chunks,
        seed=run.seed,
        reference_logps=run.reference_logps,
        about=about,
        tally=tally,
    )
    for number, (short, long) in enumerate(phases):
        judge = short if run.judge == SELF else judge_engine(run) if run.judge and short else None
        listing, started = Listing(), [engine for engine in dict.fromkeys((short, long, judge)) if engine]
        try:
            for engine in started:
                await engine.start()
            steps.asks(short, long, judge)
            tasks = select(run, files, chat.tokenizer, listing, store.done)
            await _work(
                tasks,
                steps,
                store,
                sum(engine.concurrency for engine in started),
                _part_of(progress, number, len(phases)),
            )
        finally:
            for engine in started:
                await engine.close()
        if listing.selected == 0:
            raise ValueError(f"no document was selected. {listing}")
    missing = store.finish_all()
    return Result(listing, list(store.outcomes()), tally, time.monotonic() - began, missing)


def _phases(run: GenerateRun, short_length: int) -> list[tuple[Engine | None, Engine | None]]:
    """The engines that read chunks and whole documents, phase by phase. Raises ValueError where chunks are too long for the
    model's own RoPE.
    """
    if run.long_endpoints:
        longer = dataclasses.replace(run, endpoints=run.long_endpoints)
        return [(run.make_engine(short_length), longer.make_engine(run.reading_length))]
    if run.engine != "server":
        config = read_config(run.model, run.trust_remote_code)
        own = dict(getattr(config, "rope_parameters", None) or {})
        reads = getattr(config, "max_position_embeddings", None)
        if own | (run.short_rope or {}) != own | (run.rope or {}):
            if reads and reads < short_length and not run.short_rope:
                raise ValueError(
                    f"{run.model} reads {reads} tokens at its own RoPE, at which questions and chosen answers are made, and a "
                    f"chunk with its question and answer may take {short_length}; lower max_chunk, question_tokens or "
                    "answer_tokens, or give short_rope"
                )
            chunks = dataclasses.replace(run, rope=run.short_rope)
            return [(chunks.make_engine(short_length), None), (None, run.make_engine(run.reading_length))]
    engine = run.make_engine(run.reading_length)
    return [(engine, engine)]


def _part_of(progress, number: int, phases: int):
    """The progress of one of several passes over the same documents; only the last one finishes any."""
    if progress is None or phases == 1:
        return progress

    def told(fraction: float, documents: int, pairs: int, tally: Tally) -> None:
        progress((number + fraction) / phases, documents if number == phases - 1 else 0, pairs, tally)

    return told


async def _work(tasks: Iterator[Task | float], steps: Steps, store: Store, at_once: int, progress) -> None:
    """Documents side by side, as many as keep the engine busy; the next one is read and parted meanwhile."""
    queue: asyncio.Queue = asyncio.Queue(maxsize=1)
    workers = at_once + 1
    done, pairs, reached = 0, 0, 0.0

    def report(position: float, made: int) -> None:
        nonlocal done, pairs, reached
        done, pairs, reached = done + 1, pairs + made, max(reached, position)
        if progress is not None:
            progress(reached, done, pairs, steps.tally)

    async def feed():
        while (task := await asyncio.to_thread(next, tasks, None)) is not None:
            if isinstance(task, Task):
                await queue.put((task, store.shard_of(task.document.id)))
            else:
                report(task, 0)
        for _ in range(workers):
            await queue.put(None)

    async def work():
        while (item := await queue.get()) is not None:
            task, shard = item
            outcome = await steps.pair(task, shard)
            if outcome is not None:
                store.finish(task.document.id, outcome)
            report(task.position, outcome is not None and outcome.pair is not None)

    await side_by_side(feed(), *(work() for _ in range(workers)))
