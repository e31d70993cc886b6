"""One process's work on a plan: asks everything, scores it, and writes what is measured after every length.

    tasks, lengths --make_samples--> Sample --Answers--> text --score--> Cell
    held-out text, harness tasks, published files --> numbers, each with its count and its interval

Tests: tests/evaluate/test_run.py, tests/evaluate/test_states.py.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines import Engine, EngineStopped, Request, Sampling
from ..pretrained import is_out_of_memory
from ..runs.journal import Shard
from ..runs.page import printable
from .answers import Answers
from .intervals import Interval, Z
from .judge import ratings
from .kept import ANSWERS, VALUES, digest, write_lines
from .mt_bench import MTBench
from .perplexity import interval_of_perplexity, measure
from .plan import Plan
from .published import Published
from .report import FINISHED, RESULTS, RUNNING, STOPPED, Cell, Scores, tenth
from .samples import Sample, score
from .tasks import comparable

if TYPE_CHECKING:
    from .run import Progress


class Evaluation:
    """One process's work on a plan."""

    def __init__(self, plan: Plan, journal: Shard, progress: Progress | None):
        self.plan, self.run_, self.journal, self.progress = plan, plan.run, journal, progress
        self.done, self.total, self.label = 0, plan.tokens(), "loading the model"
        self.began = time.monotonic()
        self.whole = True  # False where a number is not what it would be had no request failed
        self.records: list[dict[str, Any]] = []  # of answers.jsonl
        self.values: list[dict[str, Any]] = []  # of values.jsonl
        self.written = False  # whether results.* are this process's
        self.found = Scores(about=_about(plan), complete=False)

    async def run(self) -> Scores:
        engine = self.run_.make_engine(self.run_.reads or None)
        try:
            self._tell(0)
            await self._start(engine)
            more = dict(opens=self._opens, more=self.run_.reasoning_tokens, tokenizer=self.plan.tokenizer)
            self.answers = Answers(engine, self.journal, **more)
            self._note_left_out()
            if not (Path(self.run_.out) / RESULTS).exists():
                self._save()
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
            self._save(FINISHED, complete=self.whole)
        finally:
            await engine.close()
        return self.found

    def stop(self, error: BaseException) -> None:
        """Says in the results of this process, if it has written any, that it was stopped, and by what."""
        if self.written and self.found.state == RUNNING:
            why = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else printable(f"{error}" or type(error).__name__)
            with suppress(OSError):  # the error that stops it says so
                self._write(STOPPED, why)

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
        name, windows = f"perplexity/{length}", self.plan.windows[length]
        value, counts, nats = await measure(windows, self.answers, lambda tokens: self._tell(tokens, label))
        self.values += [
            {"of": name, "id": i, "asked": digest(str(windows.ids[i].tolist())), "value": each}
            for i, each in nats.items()
        ]
        self._bound(name, interval_of_perplexity(list(nats.values())))
        found, counted = self.found.perplexity, self.found.counts | {name: counts}
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
        numbers, details, settings, values = await module.run_tasks(tasks, manager, model)
        self.found = replace(self.found, harness=numbers, details=details, harness_settings=settings)
        self.values += values
        for task, value in numbers.items():
            counts = {f"harness/{task}": {"questions": settings[task]["questions"]}}
            self.found = replace(self.found, counts=self.found.counts | counts)
            if error := settings[task]["stderr"]:  # 0, where all answers are alike, is no error bar
                self._bound(f"harness/{task}", (value - Z * error, value + Z * error))
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
            asked = each.judge_prompts(texts)
            scores, unheard, again = await ratings(self.run_, self.journal, asked, each.tries)
            counts |= {"rated again": again} if again else {}
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
        published, told = dict(self.found.published), {each.name: counts}
        if len(texts) - unjudged > failed + cut or not unjudged:
            for name, part in each.parts(values).items():
                if judged := [value for value in part if value is not None]:
                    published |= {name: Cell.of(judged).score}
                    told |= {name: counts if name == each.name else {"samples": len(judged)}}
                    self._bound(f"published/{name}", Cell.of(each.units(name, part)).interval)
        self.found = replace(self.found, published=published, counts=self.found.counts | told)
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
        record |= {
            "asked": digest(sample.prompt),
            "references": list(sample.references),
            "answer": text,
            "score": value,
        }
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

    def _save(self, state: str = RUNNING, complete: bool = False) -> None:
        out = Path(self.run_.out)
        write_lines(out / ANSWERS, sorted(self.records, key=lambda record: _natural(record["id"])))
        if self.values:
            write_lines(out / VALUES, self.values)
        else:
            (out / VALUES).unlink(missing_ok=True)
        self._write(state, f"process {os.getpid()} on {platform.node()}" if state == RUNNING else "", complete)

    def _write(self, state: str, why: str, complete: bool = False) -> None:
        self.found = replace(self.found, seconds=time.monotonic() - self.began, state=state, why=why, complete=complete)
        self.found.save(self.run_.out)
        self.written = True

    def _bound(self, name: str, interval: Interval | None) -> None:
        """Keeps the interval of a number that is no cell."""
        if interval is not None:
            self.found = replace(self.found, intervals=self.found.intervals | {name: interval})


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
