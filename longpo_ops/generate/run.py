"""A run: documents to pairs in a folder, to be stopped and started at will. What `longpo generate` calls.

    files -> Listing, Task (a thread ahead) -> Steps (documents side by side) -> Store -> summary

Only documents under way are in memory: two texts more than the engine's concurrency at most. Not covered: several
processes in one folder, which its lock refuses.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..data import ChatFormat, read_pairs, tokenizer_fingerprint
from ..documents.chunks import Chunker
from ..documents.listing import Listing, find_files, read_documents
from ..documents.readers import TOO_LONG
from ..engines import Sampling
from ..engines.concurrency import side_by_side
from ..engines.settings import EngineSettings
from ..runs.journal import check_folder
from .filters import Filters
from .prompts import Prompts
from .report import write_summary
from .steps import Steps, Tally, Task
from .store import Store

TOO_SHORT = "shorter than wanted"


@dataclass(frozen=True)
class GenerateRun(EngineSettings):
    """One run's settings: those of the engine, and these.

    documents: folders, files, globs. length: tokens of the longest training sequence, document, questions and
    answers. chunks: turns of a pair at most. questions: pool per chunk. min_chunk, max_chunk: tokens; default a
    quarter of the length, at most 32768, and half of that. min_document, max_document: tokens; default more than half
    the length, and as many as leave room for all questions and answers. temperature, top_p: of the questions; answers
    are greedy. prompts: folder with files of your own.
    """

    model: str  # again, as the first of those that may be given by position
    documents: tuple[str, ...]
    length: int
    out: str
    chunks: int = 4
    questions: int = 4
    min_chunk: int | None = None
    max_chunk: int | None = None
    min_document: int | None = None
    max_document: int | None = None
    max_documents: int | None = None
    column: str = "text"
    answer_tokens: int = 1024
    question_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    min_words: int = 3
    max_repeated: float = 0.4
    max_overlap: float = 0.9
    seed: int = 0
    prompts: str | None = None
    reference_logps: bool = False

    def __post_init__(self):
        """Raises ValueError for settings that make no sense, saying which."""
        super().__post_init__()
        self.require_positive("length", "chunks", "questions", "answer_tokens", "question_tokens")
        self.require_positive("max_documents", "max_chunk", "max_document")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature}, top_p {self.top_p}; expected >= 0, and above 0 up to 1")
        if self.rope and self.reference_logps:
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
            )

    def document_bounds(self) -> tuple[int, int]:
        """A document is selected if it has more tokens than the first and at most as many as the second."""
        room = self.chunks * (self.question_tokens + self.answer_tokens)
        first = self.length // 2 if self.min_document is None else self.min_document
        return first, self.length - room if self.max_document is None else self.max_document

    def chunk_bounds(self) -> tuple[int, int]:
        """Least and most tokens of a chunk."""
        most = min(32768, self.length // 4) if self.max_chunk is None else self.max_chunk
        return most // 2 if self.min_chunk is None else self.min_chunk, most

    def identity(self, tokenizer, prompts: Prompts) -> dict:
        """What decides the pairs: a folder holds those of one identity. Neither addresses nor keys are in it."""
        free = {"documents", "out", "max_documents", "endpoints", "concurrency", "timeout", "patience", "key_variable"}
        free |= {"prompts", "model", "engine_options", "trust_remote_code"}
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in free}
        named = {"model": self.model_name, "prompts": prompts.digest()}
        return kept | named | {"tokenizer": tokenizer_fingerprint(tokenizer)}


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


def select(
    run: GenerateRun, files: list[tuple[Path, str]], tokenizer, listing: Listing, done=lambda document: False
) -> Iterator[Task | float]:
    """Stream the tasks of a run in the order of its documents; for a document that is done only its position."""
    (first, last), chunker = run.document_bounds(), Chunker(tokenizer, *run.chunk_bounds())
    for document in read_documents(files, listing, run.column, last):
        if listing.selected == run.max_documents:
            return
        found = [] if done(document.id) else _chunks(chunker, document.text, first, last)
        if isinstance(found, str):
            listing.skipped[found] += 1
            continue
        listing.selected += 1
        position = max(document.position, listing.selected / (run.max_documents or float("inf")))
        if not found:
            yield position
            continue
        (chunks, tokens), draw = found, random.Random(f"{run.seed}|{document.id}|chunks")
        picked = sorted(draw.sample(range(len(chunks)), min(run.chunks, len(chunks))))
        yield Task(listing.selected, position, document, tokens, tuple(chunks[i] for i in picked))


def _chunks(chunker: Chunker, text: str, first: int, last: int) -> tuple[list, int] | str:
    """The candidate chunks of a text and its tokens, or why it is left out."""
    if len(text.encode()) <= first:  # a token takes a byte at least
        return TOO_SHORT
    starts = chunker.starts(text)
    if not first < len(starts) <= last:
        return TOO_SHORT if len(starts) <= first else TOO_LONG
    chunks = chunker.chunks(text, starts)
    return (chunks, len(starts)) if chunks else "shorter than one chunk"


def generate(run: GenerateRun, progress=None) -> Result:
    """Run to the end, or go on with a run that was stopped; what there is lies in `run.out` at any time.

    progress(fraction, documents, pairs, tally) is called after every document. Raises ValueError for settings and
    inputs that cannot be used, EngineStopped (a ConnectionError) for an engine that is gone, OSError for a disk that
    is full: mend it and run the same again. Raises KeyboardInterrupt for Ctrl-C.
    """
    files, prompts = find_files(run.documents), Prompts.load(run.prompts)
    tokenizer, out = run.load_tokenizer(), Path(run.out)
    chat = ChatFormat(tokenizer, template_kwargs=run.template_kwargs)
    check_folder(out)
    store = Store(out, run.identity(tokenizer, prompts))
    try:
        return asyncio.run(_generate(run, files, store, chat, prompts, progress))
    finally:
        store.close()


def generate_and_summarise(run: GenerateRun, progress=None) -> tuple[Result, dict]:
    """`generate`, then summary.json, lengths.png and summary.html beside the pairs (report.py); returns the summary too."""
    result = generate(run, progress)
    return result, write_summary(result, read_pairs(run.out) if result.made else (), Path(run.out))


async def _generate(run: GenerateRun, files, store: Store, chat: ChatFormat, prompts: Prompts, progress) -> Result:
    engine, listing, began = run.make_engine(run.length), Listing(), time.monotonic()
    steps = Steps(
        engine,
        chat,
        prompts,
        Filters(prompts.refusals, run.min_words, run.max_repeated, run.max_overlap),
        asking=Sampling(run.question_tokens, run.temperature, run.top_p),
        answering=Sampling(run.answer_tokens),
        questions=run.questions,
        seed=run.seed,
        reference_logps=run.reference_logps,
        about={"model": store.settings["model"], "engine": run.engine, "seed": run.seed},
    )
    try:
        await engine.start()
        await _work(select(run, files, chat.tokenizer, listing, store.done), steps, store, progress)
    finally:
        await engine.close()
    if listing.selected == 0:
        raise ValueError(f"no document was selected. {listing}")
    missing = store.finish_all()
    return Result(listing, list(store.outcomes()), steps.tally, time.monotonic() - began, missing)


async def _work(tasks: Iterator[Task | float], steps: Steps, store: Store, progress) -> None:
    """Documents side by side, as many as keep the engine busy; the next one is read and parted meanwhile."""
    queue: asyncio.Queue = asyncio.Queue(maxsize=1)
    workers = steps.engine.concurrency + 1
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
            store.finish(task.document.id, outcome)
            report(task.position, outcome.pair is not None)

    await side_by_side(feed(), *(work() for _ in range(workers)))
