"""A model's evaluation in a folder, to be stopped and started at will. What `longpo evaluate` calls.

    tasks, lengths --make_samples--> Sample --engine, greedy--> text --score--> Cell     tables, heat map
    held-out text --windows--> Engine.score --> perplexity by length
    harness tasks, with their shots --> EngineLM
    published files --> Sample, or a conversation --> text --> score, or a judge's rating

    OUT/run.json                 which model answers, and how: the folder takes no other
    OUT/work/00000.journal       every answer, as soon as it is there
    OUT/results.json, .md        what was measured; written after every length, complete at the end
    OUT/heatmap.png, answers.jsonl

Answers are kept under the digest of what was asked, so tasks, lengths, samples and texts may change between two runs in one
folder: what was asked before is not asked again. Lengths go from the shortest to the longest. Memory: the samples of two
tasks at a length (one under way, the next one made meanwhile), answers, token ids of the held-out text, published files.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data import tokenizer_fingerprint
from ..engines import Engine, EngineStopped, Request, Sampling
from ..engines.settings import EngineSettings
from ..pretrained import is_out_of_memory, read_config
from ..runs.journal import Shard, check_folder, check_settings, locked, write_atomically
from ..runs.page import printable
from .answers import Answers
from .judge import ratings
from .mt_bench import MTBench
from .own import load_tasks
from .perplexity import Windows, measure, read_windows
from .published import Published, read_published
from .report import Cell, Scores, tenth
from .samples import Counter, Sample, score
from .shots import HarnessTask, harness_tasks
from .sources import Texts
from .tasks import TASKS, comparable, find_task, make_samples

BLOCKS, BLOCK = 16, 4096  # of every file of weights, what tells one model from another


@dataclass(frozen=True, kw_only=True)
class EvaluateRun(EngineSettings):
    """One evaluation's settings: those of the engine, and these.

    lengths: tokens of prompt and answer. tasks: names of RULER's tasks and of your own. needles: YAML file or folder of
    your own needle tasks. samples: of a task and length, and windows of a perplexity. texts: files, folders, globs of
    prose; default Python's documentation. questions: SQuAD's or HotpotQA's JSON, or a folder with both. perplexity:
    files, folders, globs of held-out text, at `perplexity_lengths` (default `lengths`). harness: lm-evaluation-harness
    tasks, TASK[:SHOTS][:METRIC], TASK a name or a YAML file. short: a named set of them, "official" the published recipe's.
    published: files of InfiniteBench and LongBench-Chat, cut to the longest length, and of MT-Bench.
    prefill: the engine goes on with a begun answer; False: its beginning is the end of the user's message.
    judge: URL of an OpenAI-compatible server that rates chats, with judge_model and the key in judge_key_variable.
    """

    out: str
    lengths: tuple[int, ...] = ()
    tasks: tuple[str, ...] = tuple(TASKS)
    needles: str | None = None
    samples: int = 100
    seed: int = 0
    texts: tuple[str, ...] = ()
    questions: str | None = None
    perplexity: tuple[str, ...] = ()
    perplexity_lengths: tuple[int, ...] = ()
    harness: tuple[str, ...] = ()
    short: str | None = None
    published: tuple[str, ...] = ()
    prefill: bool = True
    judge: str | None = None
    judge_model: str | None = None
    judge_key_variable: str = "JUDGE_API_KEY"

    def __post_init__(self):
        """Raises ValueError for settings that make no sense, saying which."""
        super().__post_init__()
        self.require_positive("samples")
        for name in ("lengths", "perplexity_lengths"):
            if wrong := [value for value in getattr(self, name) if type(value) is not int or value <= 0]:
                raise ValueError(f"{name} has {wrong[0]!r}; expected whole numbers of tokens above 0")
        if not (self.harness_tasks or self.tasks or self.perplexity or self.published):
            raise ValueError("nothing to evaluate; name tasks, held-out text for perplexity, harness or published ones")
        needy = ["tasks"] if self.tasks else []
        needy += ["perplexity"] if self.perplexity and not self.perplexity_lengths else []
        if needy and not self.lengths:
            raise ValueError(f"no lengths for {', '.join(needy)}; expected numbers of tokens, such as --length 4096")

    @property
    def harness_tasks(self) -> tuple[HarnessTask, ...]:
        """Those of `short`, then those of `harness`, each once."""
        return harness_tasks(self.short, self.harness)

    @property
    def longest(self) -> int:
        """Tokens that the engine must be able to read; 0 where only the harness asks."""
        return max([*self.lengths, *(self.perplexity_lengths if self.perplexity else ())], default=0)

    def identity(self, tokenizer) -> dict:
        """What decides an answer besides what is asked. Neither addresses nor keys are in it."""
        kept = ("engine", "served_model", "rope", "dtype", "template_kwargs")
        weights = None if self.engine == "server" else weights_digest(Path(self.model))
        named = {"model": self.model_name, "weights": weights, "tokenizer": tokenizer_fingerprint(tokenizer)}
        return named | {each: getattr(self, each) for each in kept}


Progress = Callable[[int, int, str], None]


def evaluate(run: EvaluateRun, progress: Progress | None = None) -> Scores:
    """Run to the end, or go on with a run that was stopped; what there is lies in `run.out` at any time.

    progress(done, total, label) counts tokens that are read. Raises ValueError for settings and inputs that cannot be
    used and for lengths that do not fit into memory, EngineStopped (a ConnectionError) for an engine that is gone,
    OSError for a disk that is full: mend it and run the same again. Raises KeyboardInterrupt for Ctrl-C.
    """
    plan, out = Plan(run), Path(run.out)
    plan.check()
    work = _prepare(out)
    lock = locked(work / "lock")
    try:
        check_settings(out / "run.json", run.identity(plan.tokenizer))
        journal = Shard(work / "00000.journal", 0)
        try:
            return asyncio.run(_Evaluation(plan, journal, progress).run())
        finally:
            journal.close()
    finally:
        os.close(lock)


def _prepare(out: Path) -> Path:
    """The folder for a run's own files. Raises ValueError for a folder that is somebody else's or not writable."""
    try:
        check_folder(out)
        work = out / "work"
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(work / "writable", b"")
        (work / "writable").unlink()
    except OSError as error:
        raise ValueError(f"{out} cannot be written to ({error.strerror}); give another folder with --out") from error
    return work


def weights_digest(folder: Path) -> str | None:
    """Of a few blocks of every file of weights, so that a model trained on in its folder is another; None for names."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for i in range(BLOCKS):
                file.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


class Plan:
    """What a run will ask, read and checked before any engine is started."""

    def __init__(self, run: EvaluateRun):
        self.run = run
        self.tasks = tuple(dict.fromkeys(run.tasks))
        self.lengths = sorted(set(run.lengths))
        self.texts = Texts(tuple(run.texts), run.questions)
        self.tokenizer = run.load_tokenizer()

    @cached_property
    def windows(self) -> dict[int, Windows]:
        """By length."""
        run = self.run
        if not run.perplexity:
            return {}
        lengths = run.perplexity_lengths or run.lengths
        return {each.length: each for each in read_windows(run.perplexity, lengths, run.samples, self.tokenizer)}

    @cached_property
    def published(self) -> list[Published | MTBench]:
        found = read_published(self.run.published)
        if not self.lengths and (cut := [each.name for each in found if not isinstance(each, MTBench)]):
            raise ValueError(f"no lengths for {', '.join(cut)}; expected numbers of tokens, such as --length 4096")
        return found

    @cached_property
    def counter(self) -> Counter:
        return Counter(self.tokenizer, self.run.template_kwargs or {})

    @cached_property
    def room(self) -> int:
        """Tokens of the harness's longest prompts and of conversations: those of the run, or what the model reads."""
        return self.run.longest or _positions(self.run)

    @cached_property
    def harness(self):
        """Our module harness, and the harness's tasks. Raises ValueError without the package."""
        try:
            from . import harness
        except ImportError as error:
            raise ValueError(
                f"tasks of lm-evaluation-harness need the package lm_eval ({error}): pip install 'longpo_ops[evaluate]'"
            ) from None
        return harness, harness.check_tasks(self.run.harness_tasks)

    def check(self) -> None:
        """Raises ValueError for whatever cannot be asked."""
        run = self.run
        if run.needles is not None:
            own = load_tasks(run.needles)
            if not set(own) & set(self.tasks):
                raise ValueError(
                    f"needles: none of {', '.join(own)} of {run.needles} is among the tasks; name them, too"
                )
        for task in self.tasks:
            find_task(task)
        if self.tasks and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the heat map needs matplotlib: pip install 'longpo_ops[generate]'")
        if self.tasks or run.published:
            _ = self.counter
        for task in self.tasks:  # the shortest is the one that may not fit
            self.samples(task, self.lengths[0], 1)
        if run.harness_tasks:
            _ = self.harness, self.room
        for each in self.published:
            if isinstance(each, MTBench):
                each.check(self.room, self.counter)
            else:
                each.sample(0, run.longest, self.counter)
        _ = self.windows

    def samples(self, task: str, length: int, count: int) -> list[Sample]:
        run = self.run
        kwargs = dict(seed=run.seed, texts=self.texts, template_kwargs=run.template_kwargs)
        return make_samples(task, length, count, self.tokenizer, **kwargs)

    def tokens(self) -> int:
        """That will be read, about; without the harness's, which are known once it has made its requests."""
        asked = sum(self.lengths) * len(self.tasks) * self.run.samples
        scored = sum(length * len(each.ids) for length, each in self.windows.items())
        return asked + scored + self.run.longest * sum(len(each.records) for each in self.published)


class _Evaluation:
    """One process's work on a plan."""

    def __init__(self, plan: Plan, journal: Shard, progress: Progress | None):
        self.plan, self.run_, self.journal, self.progress = plan, plan.run, journal, progress
        self.done, self.total, self.label = 0, plan.tokens(), "loading the model"
        self.began = time.monotonic()
        self.records: list[dict[str, Any]] = []  # of answers.jsonl
        self.found = Scores(about=_about(plan), complete=False)

    async def run(self) -> Scores:
        engine = self.run_.make_engine(self.run_.longest or None)
        try:
            self._tell(0)
            await self._start(engine)
            self.answers = Answers(engine, self.journal)
            if self.run_.harness_tasks:
                await self._harness()
            for length in sorted({*self.plan.lengths, *self.plan.windows}):
                self.answers.reading = length
                if length in self.plan.lengths:
                    await self._tasks(length)
                if length in self.plan.windows:
                    await self._perplexity(length)
                self._save()
            self.answers.reading = self.run_.longest
            if self.run_.short and not any(isinstance(each, MTBench) for each in self.plan.published):
                self._note(
                    f"short: {self.run_.short}: MT-Bench belongs to it and was not asked, as its file is not named"
                )
            for each in self.plan.published:
                await self._published(each)
            self._save(complete=True)
        finally:
            await engine.close()
        return self.found

    async def _start(self, engine: Engine) -> None:
        try:
            await engine.start()
        except EngineStopped:
            raise
        except (MemoryError, RuntimeError) as error:
            what = "the model does not fit into memory" if is_out_of_memory(error) else "the engine did not start"
            raise ValueError(
                f"{what} for texts of {self.run_.longest} tokens ({str(error).strip().splitlines()[-1][:300]}); leave the "
                "longest --length out, or use a smaller --dtype or a larger machine"
            ) from error

    # -- the parts -----------------------------------------------------------------------------------------------------

    async def _tasks(self, length: int) -> None:
        """All tasks at a length; the samples of the next one are made while one is answered."""
        plan, cells, depths = self.plan, {}, {}

        def make(i: int):
            samples = self.run_.samples
            return asyncio.create_task(asyncio.to_thread(plan.samples, plan.tasks[i], length, samples))

        making = make(0) if plan.tasks else None
        for i, task in enumerate(plan.tasks):
            samples = await making
            making = make(i + 1) if i + 1 < len(plan.tasks) else None
            scores = await self.answers.each(samples, self._ask)
            cells[task] = Cell.of(scores, comparable(task, plan.texts))
            self._note_failures(f"{task} at {length} tokens", cells[task])
            for sample, value in zip(samples, scores):
                if sample.depth is not None:
                    depths.setdefault(tenth(sample.depth), []).append(value)
        tasks = {task: self.found.tasks.get(task, {}) | {length: cells[task]} for task in plan.tasks}
        tenths = {place: Cell.of(depths[place]) for place in sorted(depths)}
        self.found = replace(self.found, tasks=tasks, depths=self.found.depths | ({length: tenths} if tenths else {}))

    async def _ask(self, sample: Sample) -> float | None:
        """The score of the model's answer, None where the request failed."""
        text = await self._text(sample)
        value = None if text is None else score(sample, text)
        self._keep(sample, text, value)
        self._tell(sample.length, f"{sample.task}, {sample.length:,} tokens")
        return value

    async def _text(self, sample: Sample) -> str | None:
        content, prefill = sample.prompt, sample.prefill
        if prefill and not self.run_.prefill:
            content, prefill = f"{content}\n{prefill.strip()}", ""
        found = await self.answers.generate(sample.id, Request(content, Sampling(sample.max_tokens), prefill=prefill))
        return None if found is None else found["text"]

    async def _perplexity(self, length: int) -> None:
        label = f"perplexity, {length:,} tokens"
        value, counts = await measure(self.plan.windows[length], self.answers, lambda tokens: self._tell(tokens, label))
        found, counted = self.found.perplexity, self.found.counts | {f"perplexity/{length}": counts}
        self.found = replace(self.found, perplexity=found | ({} if value is None else {length: value}), counts=counted)
        if counts["failed"]:
            self._note(f"perplexity at {length} tokens: {counts['failed']} of {counts['windows']} windows failed, last: "
                       f"{self.answers.last_failure}")  # fmt: skip

    async def _harness(self) -> None:
        module, manager = self.plan.harness
        tasks, tokenizer, length = self.run_.harness_tasks, self.plan.tokenizer, self.plan.room

        def tell(tokens: int) -> None:
            self.total += tokens
            self._tell(tokens, "lm-evaluation-harness")

        model = module.EngineLM(self.answers, tokenizer, length, tell)
        numbers, details, settings = await module.run_tasks(tasks, manager, model)
        self.found = replace(self.found, harness=numbers, details=details, harness_settings=settings)
        if model.cut or model.failed:
            counts = {"failed": model.failed, "cut": model.cut}
            self.found = replace(self.found, counts=self.found.counts | {"harness": counts})
            self._note(
                f"lm-evaluation-harness: {model.failed} requests failed, and {model.cut} contexts lost their beginning "
                f"because they take more than {length} tokens"
            )

    async def _published(self, each: Published | MTBench) -> None:
        longest, counter, counts = self.run_.longest, self.plan.counter, {"truncated": 0, "unjudged": 0}

        async def ask(number: int) -> list[tuple[Sample, str | None]]:
            if isinstance(each, MTBench):
                answered = await each.converse(number, self.answers, self.run_.seed)
            else:
                sample, cut = await asyncio.to_thread(each.sample, number, longest, counter)
                counts["truncated"] += cut
                answered = [(sample, await self._text(sample))]
            self._tell(longest, each.name + (f", up to {longest:,} tokens" if longest else ""))
            return answered

        found = await self.answers.each(range(len(each.records)), ask)
        samples, texts = zip(*(pair for answered in found for pair in answered))
        if each.judged:
            scores = await ratings(self.run_, self.journal, each.judge_prompts(texts))
        else:
            scores = [None if text is None else score(sample, text.lstrip()) for sample, text in zip(samples, texts)]
        for sample, text, value in zip(samples, texts, scores):
            self._keep(sample, text, value)
        failed = texts.count(None)
        values = [0.0 if text is None else value for text, value in zip(texts, scores)]
        unjudged = values.count(None)
        counts = {"samples": len(texts), "failed": failed} | counts | {"unjudged": unjudged}
        published = dict(self.found.published)
        if len(texts) - unjudged > failed or not unjudged:
            for name, part in each.parts(values).items():
                judged = [value for value in part if value is not None]
                published |= {name: Cell.of(judged).score} if judged else {}
        self.found = replace(self.found, published=published, counts=self.found.counts | {each.name: counts})
        if counts["truncated"]:
            self._note(f"{each.name}: {counts['truncated']} of {len(texts)} inputs lost their middle, to fit {longest:,} "
                       "tokens with the answer")  # fmt: skip
        if unjudged:
            self._note(f"{each.name}: {unjudged} of {len(texts)} answers are unjudged and not in the score; they are in "
                       "answers.jsonl" + ("" if self.run_.judge else ": name a judge with --judge"))  # fmt: skip
        if failed:
            self._note(f"{each.name}: {failed} of {len(texts)} requests failed, last: {self.answers.last_failure}")
        self._save()

    # -- what is told and kept -----------------------------------------------------------------------------------------

    def _tell(self, tokens: int, label: str | None = None) -> None:
        self.done, self.label = self.done + tokens, label or self.label
        if self.progress is not None:
            self.progress(self.done, max(1, self.total), self.label)

    def _keep(self, sample: Sample, text: str | None, value: float | None) -> None:
        record = {name: getattr(sample, name) for name in ("id", "task", "length", "depth", "prefill")}
        self.records.append(record | {"references": list(sample.references), "answer": text, "score": value})

    def _note_failures(self, what: str, cell: Cell) -> None:
        if cell.failed:
            last = self.answers.last_failure
            self._note(f"{what}: {cell.failed} of {cell.samples} requests failed and score 0, last: {last}")

    def _note(self, text: str) -> None:
        text = printable(text)  # it may quote a server
        self.found = replace(self.found, notes=(*self.found.notes, text))

    def _save(self, complete: bool = False) -> None:
        self.found = replace(self.found, seconds=time.monotonic() - self.began, complete=complete)
        out = Path(self.run_.out)
        records = sorted(self.records, key=lambda record: _natural(record["id"]))
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(out / "answers.jsonl", lines.encode("utf-8", "backslashreplace"))
        self.found.save(out)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts task/length/2 before task/length/10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split("/")]


def _about(plan: Plan) -> dict[str, Any]:
    """Which model was asked what, for the reader of the results."""
    run = plan.run
    identity = run.identity(plan.tokenizer)
    names = ("model", "engine", "served_model", "rope", "dtype", "template_kwargs")
    asked = {name: getattr(run, name) for name in ("short", "samples", "seed", "prefill")}
    return {name: identity[name] for name in names} | asked


def _positions(run: EvaluateRun) -> int:
    """How many tokens the model's config says it reads. Raises ValueError where it does not say."""
    try:
        return int(read_config(run.model, run.trust_remote_code).max_position_embeddings)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{run.model} does not say how many tokens it reads ({str(error).splitlines()[0]}); give a --length"
        ) from error
