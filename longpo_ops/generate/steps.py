"""One document to one pair, as the paper has it: ask about chunks, answer from the chunk, answer from the whole.

    chunk C_i --pool of questions, one drawn, a lead-in drawn--> I_i
    y_S^i = greedy(C_i, I_i)      chosen
    y_L^i = greedy(document, I_i) rejected, each question on its own
    turn i kept if neither answer is filtered; the kept turns are one conversation (Eq. 13)

Requests of a document run side by side, but the first that reads the whole document runs ahead of the others: they
find its prefill in the engine's prefix cache. Every finished request is in the journal before anything is made of it.
What is drawn depends on the seed, the document's text and the number of the chunk, on nothing else.

Tests: tests/generate/test_run.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from dataclasses import asdict, dataclass, field, replace

from ..data import BadRecord, ChatFormat, Pair, Turn, join_context
from ..documents.listing import Document
from ..engines import Completion, Engine, Request, RequestFailed, Sampling
from ..engines.concurrency import Gate, side_by_side
from ..runs.journal import Outcome, Shard
from .filters import Filters
from .prompts import Prompts, parse_questions


@dataclass(frozen=True)
class Task:
    """A selected document: its number, how much of the whole work ends with it (0 to 1), its tokens, and its chunks as
    (first character, end, tokens).
    """

    number: int
    position: float
    document: Document
    tokens: int
    chunks: tuple[tuple[int, int, int], ...]


@dataclass
class Tally:
    """What the engine did in this process."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    last_failure: str = ""


@dataclass
class Steps:
    """Makes pairs with an engine. Raises OSError when a result cannot be kept, EngineStopped when the engine is
    gone.
    """

    engine: Engine
    chat: ChatFormat
    prompts: Prompts
    filters: Filters
    asking: Sampling  # of the pool of questions
    answering: Sampling
    questions: int = 4
    seed: int = 0
    reference_logps: bool = False
    about: dict = field(default_factory=dict)  # goes into every pair's provenance
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self):
        self.gate = Gate(self.engine.concurrency)

    async def pair(self, task: Task, shard: Shard) -> Outcome:
        """The outcome of one document; results that its shard holds already are not asked for again."""
        work = _DocumentWork(self, task, shard)
        turns = await side_by_side(*(work.turn(i, chunk) for i, chunk in enumerate(task.chunks)))
        kept = [(chunk, *turn) for chunk, turn in zip(task.chunks, turns) if turn is not None]
        if not kept:
            return Outcome(None, dict(work.counts), {"document": [task.tokens]})
        document = task.document
        lengths = {
            "document": [task.tokens],
            "chunk": [chunk[2] for chunk, *_ in kept],
            "chosen": [chosen.tokens for _, _, chosen, _ in kept],
            "rejected": [rejected.tokens for _, _, _, rejected in kept],
        }
        spans = [[begin, end] for (begin, end, _), *_ in kept]
        provenance = self.about | {"source": document.source, "document_tokens": task.tokens, "chunks": spans}
        pair = Pair(document.id, document.text, tuple(turn for _, turn, *_ in kept), provenance)
        if self.reference_logps:
            pair = await work.with_logps(pair)
        return Outcome(pair, dict(work.counts), lengths)

    def draw(self, document: str, *what) -> random.Random:
        """The generator of one draw."""
        return random.Random("|".join(map(str, (self.seed, document, *what))))


@dataclass
class _DocumentWork:
    """The requests of one document."""

    steps: Steps
    task: Task
    shard: Shard
    counts: Counter[str] = field(default_factory=Counter)
    ahead: asyncio.Lock = field(default_factory=asyncio.Lock)
    prefilled: bool = False

    async def turn(self, i: int, chunk: tuple[int, int, int]) -> tuple[Turn, Completion, Completion] | None:
        """The turn about a chunk with its completions, or None, counted by reason."""
        text = self.task.document.text[chunk[0] : chunk[1]]
        try:
            instruction = await self.instruction(i, text)
            if instruction is None:
                self.counts["unparsable question list"] += 1
                return None
            chosen, rejected = await side_by_side(
                self.answer(f"chosen/{i}", text, instruction), self.answer_from_document(f"rejected/{i}", instruction)
            )
        except RequestFailed as failure:
            self.fail(failure, failure.reason)
            return None
        turn = Turn(instruction, text, chosen.text, (rejected.text,))
        reason = self.steps.filters.reject(chosen, rejected) or self.untrainable(turn)
        if reason is not None:
            self.counts[reason] += 1
            return None
        return turn, chosen, rejected

    async def instruction(self, i: int, chunk: str) -> str | None:
        """A drawn question about a chunk with a drawn lead-in; None where the pool is no list of questions."""
        steps, document = self.steps, self.task.document.id
        seed = int.from_bytes(hashlib.sha256(f"{steps.seed}|{document}|{i}".encode()).digest()[:4], "big") >> 1
        request = Request(join_context(chunk, steps.prompts.ask(steps.questions)), replace(steps.asking, seed=seed))
        pool = await self.ask(f"questions/{i}", request)
        questions = parse_questions(pool.text, steps.questions) if pool.finish == "stop" else None
        if questions is None:
            return None
        draw = steps.draw(document, i)
        question, lead_in = draw.randrange(len(questions)), draw.randrange(len(steps.prompts.lead_ins))
        return steps.prompts.instruct(lead_in, questions[question])

    async def answer(self, step: str, context: str, instruction: str, group: str = "") -> Completion:
        return await self.ask(step, Request(join_context(context, instruction), self.steps.answering, group))

    async def answer_from_document(self, step: str, instruction: str) -> Completion:
        document = self.task.document
        async with self.ahead:
            if not self.prefilled:
                answer = await self.answer(step, document.text, instruction, document.id)
                self.prefilled = True
                return answer
        return await self.answer(step, document.text, instruction, document.id)

    async def ask(self, step: str, request: Request) -> Completion:
        """The completion of a step, from the journal or from the engine."""
        kept = self.shard.result(self.task.document.id, step)
        if kept is not None:
            return Completion(**kept)
        await self.steps.gate.enter(self.task.number)
        try:
            answer = await self.steps.engine.generate(request)
        finally:
            self.steps.gate.leave()
        text = answer.text.strip().encode("utf-8", "replace").decode("utf-8")
        answer = replace(answer, text=text, token_ids=None, logprobs=None)
        tally = self.steps.tally
        tally.requests += 1
        tally.prompt_tokens += answer.prompt_tokens
        tally.cached_tokens += answer.cached_tokens
        tally.tokens += answer.tokens
        value = {name: part for name, part in asdict(answer).items() if part is not None}
        self.shard.record(self.task.document.id, step, value)
        return answer

    def untrainable(self, turn: Turn) -> str | None:
        """Why training would refuse the turn, whatever its document, or None."""
        try:
            self.steps.chat.tokenize(Pair("turn", "-", (replace(turn, chunk="-"),)))
        except BadRecord as bad:
            return bad.reason
        return None

    async def with_logps(self, pair: Pair) -> Pair:
        """The pair with the reference's log-probs of its answers under the short inputs, summed over turns."""
        tokenized = await asyncio.to_thread(self.steps.chat.tokenize, pair)
        chosen, rejected = tokenized.ref_chosen, tokenized.ref_rejected[0]
        scored = [self.logp(f"score/chosen/{i}", sequence) for i, sequence in enumerate(chosen)]
        scored += [self.logp(f"score/rejected/{i}", sequence) for i, sequence in enumerate(rejected)]
        try:
            logps = await side_by_side(*scored)
        except RequestFailed as failure:
            self.fail(failure, "no reference log-probs")
            return pair
        turns = len(chosen)
        return replace(pair, ref_chosen_logp=sum(logps[:turns]), ref_rejected_logps=(sum(logps[turns:]),))

    def fail(self, failure: RequestFailed, reason: str) -> None:
        self.counts[reason] += 1
        self.steps.tally.last_failure = str(failure)

    async def logp(self, step: str, sequence) -> float:
        """The summed log-prob of one answer; at most 0, as rounding must not make it more."""
        kept = self.shard.result(self.task.document.id, step)
        if kept is not None:
            return kept
        await self.steps.gate.enter(self.task.number)
        try:
            scores = await self.steps.engine.score(sequence.ids)
        finally:
            self.steps.gate.leave()
        value = min(0.0, float(scores[sequence.labels[1:] != -100].sum()))
        self.shard.record(self.task.document.id, step, value)
        return value
