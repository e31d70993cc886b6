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
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data import tokenizer_fingerprint
from ..engines import Engine, EngineStopped, Request, Sampling
from ..engines.address import shown
from ..engines.fields import check_fields
from ..engines.settings import EngineSettings
from ..pretrained import is_out_of_memory
from ..runs.journal import Shard, check_folder, check_settings, write_text
from ..runs.locks import Lock
from ..runs.page import printable
from .answers import Answers
from .judge import ratings
from .mt_bench import MTBench
from .perplexity import measure
from .plan import Plan
from .published import Published
from .report import Cell, Scores, tenth
from .samples import Sample, score
from .shots import HarnessTask, harness_tasks
from .tasks import TASKS, comparable

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
    reasoning_tokens: what a thinking model may write before an answer, on top of the answer's tokens and of `lengths`.
    judge: URL of an OpenAI-compatible server that rates chats, with judge_model, the key in judge_key_variable, and
    judge_options, fields of its requests (engines/fields.py).
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
    reasoning_tokens: int = 0
    judge: str | None = None
    judge_model: str | None = None
    judge_key_variable: str = "JUDGE_API_KEY"
    judge_options: dict | None = None

    def __post_init__(self):
        """Raises ValueError for settings that make no sense, saying which."""
        super().__post_init__()
        self.require_positive("samples")
        if type(self.reasoning_tokens) is not int or self.reasoning_tokens < 0:
            raise ValueError(f"reasoning_tokens is {self.reasoning_tokens!r}; expected a whole number of tokens, or 0")
        self.check_server("judge", () if self.judge is None else (self.judge,), self.judge_key_variable)
        check_fields(self.judge_options or {}, "--judge-option")
        if self.judge is None and (self.judge_model or self.judge_options):
            raise ValueError("judge_model or judge_options without a judge; expected the URL of its server, too")
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
        """Tokens of the longest text; 0 where only the harness asks."""
        return max([*self.lengths, *(self.perplexity_lengths if self.perplexity else ())], default=0)

    @property
    def reads(self) -> int:
        """Tokens that the engine must be able to read, reasoning included; 0 as `longest`."""
        return self.longest and self.longest + self.reasoning_tokens

    @property
    def judge_shown(self) -> str | None:
        """The judge's address as settings files may hold it."""
        return None if self.judge is None else shown(self.judge)

    def identity(self, tokenizer) -> dict:
        """What decides an answer besides what is asked. Neither addresses nor keys are in it."""
        kept = ("engine", "served_model", "rope", "dtype", "template_kwargs")
        weights = None if self.engine == "server" else weights_digest(Path(self.model))
        named = {"model": self.model_name, "weights": weights, "tokenizer": tokenizer_fingerprint(tokenizer)}
        fields = {"own_fields": self.own_fields} if self.own_fields else {}
        return named | {each: getattr(self, each) for each in kept} | fields


Progress = Callable[[int, int, str], None]


def evaluate(run: EvaluateRun, progress: Progress | None = None) -> Scores:
    """Run to the end, or go on with a run that was stopped; what there is lies in `run.out` at any time.

    progress(done, total, label) counts tokens that are read. Raises ValueError for settings and inputs that cannot be
    used and for lengths that do not fit into memory, EngineStopped (a ConnectionError) for an engine that is gone,
    OSError for a disk that is full: mend it and run the same again. Raises KeyboardInterrupt for Ctrl-C.
    """
    plan, out = Plan(run), Path(run.out)
    plan.check()
    with _locked(out):
        check_settings(out / "run.json", run.identity(plan.tokenizer))
        journal = Shard(out / "work" / "00000.journal", 0)
        try:
            return asyncio.run(_Evaluation(plan, journal, progress).run())
        finally:
            journal.close()


def _locked(out: Path) -> Lock:
    """The folder, for this run alone. Raises ValueError for one that is somebody else's, or not writable."""
    try:
        check_folder(out)
        return Lock(out / "work" / "lock")
    except OSError as error:
        raise ValueError(f"{out} cannot be written to ({error.strerror}); give another folder with --out") from error


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


class _Evaluation:
    """One process's work on a plan."""

    def __init__(self, plan: Plan, journal: Shard, progress: Progress | None):
        self.plan, self.run_, self.journal, self.progress = plan, plan.run, journal, progress
        self.done, self.total, self.label = 0, plan.tokens(), "loading the model"
        self.began = time.monotonic()
        self.whole = True  # False where a number is not what it would be had no request failed
        self.records: list[dict[str, Any]] = []  # of answers.jsonl
        self.found = Scores(about=_about(plan), complete=False)

    async def run(self) -> Scores:
        engine = self.run_.make_engine(self.run_.reads or None)
        try:
            self._tell(0)
            await self._start(engine)
            more = dict(opens=self._opens, more=self.run_.reasoning_tokens, tokenizer=self.plan.tokenizer)
            self.answers = Answers(engine, self.journal, **more)
            self._note_left_out()
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
            self._save(complete=self.whole)
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
            cells[task] = Cell.of(scores, comparable(task, plan.texts), self._cut(samples))
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
        value = 0.0 if sample.id in self.answers.cut else None if text is None else score(sample, text)
        self._keep(sample, text, value)
        self._tell(sample.length, f"{sample.task}, {sample.length:,} tokens")
        return value

    async def _text(self, sample: Sample) -> str | None:
        content, prefill = sample.prompt, sample.prefill
        if prefill and not self.run_.prefill:
            content, prefill = f"{content}\n{prefill.strip()}", ""
        request = Request(content, Sampling(sample.max_tokens), prefill=prefill)
        found = await self.answers.generate(sample.id, request)
        return None if found is None else found["text"]

    def _opens(self, request: Request) -> str:
        """The mark with which the chat template begins the reasoning; a server renders a begun answer without its generation
        prompt."""
        return "" if request.prefill and self.run_.engine == "server" else self.plan.opens_reasoning

    def _cut(self, samples: Sequence[Sample]) -> int:
        """How many were cut off inside the reasoning; a note says what to do."""
        cut = sum(sample.id in self.answers.cut for sample in samples)
        if cut:
            kind, told = samples[0].task, f" at {samples[0].length} tokens" * bool(samples[0].length)
            self._note(f"{kind}{told}: {cut} of {len(samples)} answers were cut off inside the model's reasoning and score 0: "
                       f"raise --reasoning-tokens (now {self.run_.reasoning_tokens})")  # fmt: skip
        return cut

    async def _perplexity(self, length: int) -> None:
        label = f"perplexity, {length:,} tokens"
        value, counts = await measure(self.plan.windows[length], self.answers, lambda tokens: self._tell(tokens, label))
        found, counted = self.found.perplexity, self.found.counts | {f"perplexity/{length}": counts}
        self.found = replace(self.found, perplexity=found | ({} if value is None else {length: value}), counts=counted)
        if counts["failed"]:
            self.whole = False
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
        lost = [f"{task} {name}" for task, found in details.items() for name, value in found.items()
                if value is None and "_stderr," not in name]  # fmt: skip
        if lost:
            self.whole = False
            self._note(f"lm-evaluation-harness: no finite {', '.join(lost)}, last: {self.answers.last_failure}")
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
            scores, unheard = await ratings(self.run_, self.journal, each.judge_prompts(texts))
            if unheard:
                self._note(f"{each.name}: {unheard} of the judge's answers were cut off inside its reasoning and rate nothing: "
                           f"raise --reasoning-tokens (now {self.run_.reasoning_tokens})")  # fmt: skip
        else:
            scores = [None if text is None else score(sample, text.lstrip()) for sample, text in zip(samples, texts)]
        for sample, text, value in zip(samples, texts, scores):
            self._keep(sample, text, value)
        cut = self._cut(samples)
        failed = texts.count(None) - cut
        values = [0.0 if text is None else value for text, value in zip(texts, scores)]
        unjudged = values.count(None)
        counts = {"samples": len(texts), "failed": failed} | counts | {"unjudged": unjudged}
        counts |= {"cut off in reasoning": cut} if cut else {}
        published = dict(self.found.published)
        if len(texts) - unjudged > failed + cut or not unjudged:
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
        record |= {"references": list(sample.references), "answer": text, "score": value}
        thought = self.answers.reasoning.get(sample.id)
        self.records.append(record | ({"reasoning": thought} if thought else {}))

    def _note_failures(self, what: str, cell: Cell) -> None:
        if cell.failed:
            last = self.answers.last_failure
            self._note(f"{what}: {cell.failed} of {cell.samples} requests failed and score 0, last: {last}")

    def _note_left_out(self) -> None:
        """Files that were to be read and gave no text."""
        found = {"texts": self.plan.texts.left_out} if self.plan.tasks else {}
        for windows in self.plan.windows.values():  # of the same files at every length
            found["perplexity"] = windows.left_out
        for what, left_out in found.items():
            for reason, count in left_out:
                self._note(f"{what}: {count} left out: {reason}")

    def _note(self, text: str) -> None:
        text = printable(text)  # it may quote a server
        self.found = replace(self.found, notes=(*self.found.notes, text))

    def _save(self, complete: bool = False) -> None:
        self.found = replace(self.found, seconds=time.monotonic() - self.began, complete=complete)
        out = Path(self.run_.out)
        records = sorted(self.records, key=lambda record: _natural(record["id"]))
        lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        write_text(out / "answers.jsonl", lines)
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
    asked |= {"reasoning_tokens": run.reasoning_tokens} if run.reasoning_tokens else {}
    return {name: identity[name] for name in (*names, "own_fields") if name in identity} | asked
