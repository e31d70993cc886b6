"""One document to one pair: ask about chunks, answer from the chunk, answer from the whole.

    chunk C_i --pool of questions, one drawn, a lead-in drawn--> I_i    asked again once where the pool cannot be read
    of the chunks whose list counts at most `turns` are drawn, where the recipe asks about all of them
    y_S^i = answer(C_i, I_i)      chosen
    y_L^i = answer(document, I_i) rejected, each question on its own
    turn i kept if neither answer is filtered, nor the chosen one by a judge; the kept turns are one conversation (Eq. 13)

What a thinking model writes before its list of questions or its answer is left out (engines/reasoning.py); where nothing
else comes, the request has failed.

Requests of a document run side by side, but the first that reads the whole document runs ahead of the others: they
find its prefill in the engine's prefix cache. Every finished request is in the journal before anything is made of it.
Where chunks and documents are read by engines one after the other, `pair` is asked for twice and gives no outcome at first.

What is drawn depends on the seed, the document's text and the number of the chunk, on nothing else: question and lead-in
by random.Random("SEED|DOCUMENT|CHUNK"), turns by random.Random("SEED|DOCUMENT|turns"), a sampled text with the first
31 bits of the SHA-256 of "SEED|DOCUMENT|STEP", a pool's step being its chunk's number, with "again/" in front the second
time.

An engine that is `structured` is given the JSON schema of a pool, the first time: a small model that is held to JSON may
write on until its tokens end. The second pool is asked for in words, and begun for the model ("1."), where the engine can go
on from that. Neither is done where the model may reason first.

A judge rates chosen answers that nothing else is wrong with, by the first engine that reads chunks, or one of its own.

Tests: tests/generate/test_run.py, tests/generate/test_steps.py, tests/generate/test_judge.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

from ..data import BadRecord, ChatFormat, Pair, Turn, join_context
from ..documents.listing import Document
from ..engines import Completion, Engine, NoSchema, Request, RequestFailed, Sampling
from ..engines.concurrency import Gate, side_by_side
from ..engines.judging import JUDGE_TOKENS, rating
from ..engines.reasoning import opens_reasoning, part_completion, thinks
from ..runs.journal import Outcome, Shard
from .filters import Filters
from .makers import Maker
from .prompts import Prompts, list_schema

CUT = "cut off inside the reasoning"
BEGUN = "1."  # how a list begins
AGAIN = "lists read at the second asking"  # beside the reasons, though nothing was left out
FAILED = "failed"  # in the journal, in the place of a completion: why there is none


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


@dataclass(eq=False)
class Asked:
    """An engine and the order in which documents get at it. opened: by its chat template (opens_reasoning)."""

    engine: Engine
    opened: str = ""

    def __post_init__(self):
        self.gate = Gate(self.engine.concurrency)


@dataclass
class Steps:
    """Makes pairs with engines. Raises OSError when a result cannot be kept, EngineStopped when an engine is gone."""

    chat: ChatFormat
    prompts: Prompts
    maker: Maker
    filters: Filters
    asking: Sampling  # of the pool of questions
    answering: Sampling
    questions: int = 4
    turns: int = 4
    seed: int = 0
    reference_logps: bool = False
    reasoning: int = 0  # tokens before a list or an answer, beside theirs
    min_faithfulness: float | None = None
    about: dict = field(default_factory=dict)  # goes into every pair's provenance
    tally: Tally = field(default_factory=Tally)
    short: Asked | None = None  # reads chunks; None where that is over
    long: Asked | None = None  # reads documents; None where that is still to come
    judged: bool = False
    judge: Asked | None = None  # rates chosen answers; None without one, or where that is over

    def __post_init__(self):
        self.opened = opens_reasoning(self.chat.tokenizer, self.chat.template_kwargs)
        self.thinks = thinks(self.chat.tokenizer, self.chat.template_kwargs)
        more = self.reasoning
        self.asking, self.answering = (
            replace(each, max_tokens=each.max_tokens + more) for each in (self.asking, self.answering)
        )

    def asks(self, short: Engine | None, long: Engine | None, judge: Engine | None = None) -> None:
        """Which started engines read what from now on."""
        asked = {engine: Asked(engine) for engine in (judge, short, long) if engine is not None}
        for own in {short, long} & asked.keys():
            asked[own].opened = self.opened
        self.short, self.long, self.judge = (asked.get(engine) for engine in (short, long, judge))

    async def pair(self, task: Task, shard: Shard) -> Outcome | None:
        """The outcome of one document, or None without an engine that reads whole ones; results that its shard holds
        already are not asked for again.
        """
        work = _DocumentWork(self, task, shard)
        asked = await work.asked()
        if self.long is None:
            await side_by_side(*(work.prepared(i, instruction) for i, instruction in asked))
            return None
        turns = await side_by_side(*(work.turn(i, instruction) for i, instruction in asked))
        kept = [(task.chunks[i], *turn) for (i, _), turn in zip(asked, turns) if turn is not None]
        if not kept:
            return Outcome(None, dict(work.counts), {"document": [task.tokens]})
        document = task.document
        lengths = {
            "document": [task.tokens],
            "chunk": [chunk[2] for chunk, *_ in kept],
            "chosen": [chosen.tokens for _, _, chosen, *_ in kept],
            "rejected": [rejected.tokens for _, _, _, rejected, _ in kept],
        }
        spans = [[begin, end] for (begin, end, _), *_ in kept]
        provenance = self.about | {"source": document.source, "document_tokens": task.tokens, "chunks": spans}
        provenance |= {"faithfulness": [score for *_, score in kept]} if self.judged else {}
        provenance |= document.place
        pair = Pair(document.id, document.text, tuple(turn for _, turn, *_ in kept), provenance)
        if self.reference_logps:
            pair = await work.with_logps(pair)
        return Outcome(pair, dict(work.counts), lengths)

    def draw(self, document: str, *what) -> random.Random:
        """The generator of one draw."""
        return random.Random("|".join(map(str, (self.seed, document, *what))))

    def seed_of(self, document: str, what) -> int:
        """The seed of one request that is sampled."""
        digest = hashlib.sha256(f"{self.seed}|{document}|{what}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


@dataclass
class _DocumentWork:
    """The requests of one document."""

    steps: Steps
    task: Task
    shard: Shard
    counts: Counter[str] = field(default_factory=Counter)
    ahead: asyncio.Lock = field(default_factory=asyncio.Lock)
    prefilled: bool = False

    async def asked(self) -> list[tuple[int, str]]:
        """The chunks that turns are about, and what is asked about each."""
        found = await side_by_side(*(self.instruction(i) for i in range(len(self.task.chunks))))
        asked = [(i, instruction) for i, instruction in enumerate(found) if instruction is not None]
        if len(asked) <= self.steps.turns:
            return asked
        return self.steps.draw(self.task.document.id, "turns").sample(asked, self.steps.turns)

    async def turn(self, i: int, instruction: str) -> tuple[Turn, Completion, Completion, float | None] | None:
        """The turn about a chunk with its completions and its rating, or None, counted by reason."""
        try:
            chosen, rejected = await side_by_side(self.chosen(i, instruction), self.rejected(i, instruction))
        except RequestFailed as failure:
            self.fail(failure, failure.reason)
            return None
        turn = Turn(instruction, self.chunk(i), chosen.text, (rejected.text,))
        reason, score = self.steps.filters.reject(chosen, rejected) or self.untrainable(turn), None
        if reason is None and self.steps.judged:
            score, reason = await self.judged(i, instruction, chosen)
        if reason is not None:
            self.counts[reason] += 1
            return None
        return turn, chosen, rejected, score

    async def judged(self, i: int, instruction: str, chosen: Completion) -> tuple[float | None, str | None]:
        """How faithful a chosen answer is to its chunk, 1 to 10, None where the judge does not say; and why that is too
        little, or None."""
        steps, sampling = self.steps, Sampling(JUDGE_TOKENS + self.steps.reasoning)
        prompt = steps.prompts.ask_judge(self.chunk(i), instruction, chosen.text)
        try:
            said = await self.ask(f"judge/{i}", Request(prompt, sampling), steps.judge)
            score = rating(said.text)
        except RequestFailed as failure:
            steps.tally.last_failure, score = str(failure), None
        if score is None:
            return None, None if steps.min_faithfulness is None else "unjudged"
        score = round(10 * score, 2)
        least = steps.min_faithfulness
        return score, "unfaithful" if least is not None and score < least else None

    def chunk(self, i: int) -> str:
        begin, end, _ = self.task.chunks[i]
        return self.task.document.text[begin:end]

    async def instruction(self, i: int) -> str | None:
        """A drawn question about a chunk with a drawn lead-in; None, counted, where the pool is no list of questions."""
        steps, document = self.steps, self.task.document.id
        try:
            questions = await self.listed(i)
        except RequestFailed as failure:
            self.fail(failure, failure.reason)
            return None
        if isinstance(questions, str):
            self.counts[questions] += 1
            return None
        draw = steps.draw(document, i)
        question, lead_in = draw.randrange(len(questions)), draw.randrange(len(steps.prompts.lead_ins))
        if not steps.maker.counts(questions[question]):
            self.counts["blank line in the question"] += 1
            return None
        return steps.prompts.instruct(lead_in, questions[question])

    async def listed(self, i: int) -> list[str] | str:
        """The questions about a chunk, or why its list cannot be read at the second time either. Raises RequestFailed."""
        steps, why = self.steps, ""
        for again in (False, True) if steps.prompts.again else (False,):
            try:
                found = steps.maker.questions(await self.pool(i, again), steps.questions)
            except RequestFailed as failure:
                if failure.reason != CUT:
                    raise
                steps.tally.last_failure, found = str(failure), f"questions: {CUT}"
            if not isinstance(found, str):
                self.counts.update([AGAIN] if again else [])
                return found
            why = found
        return why

    async def pool(self, i: int, again: bool) -> Completion:
        """What the model writes when it is asked for questions about a chunk. Raises RequestFailed."""
        steps = self.steps
        step, what = (f"questions-again/{i}", f"again/{i}") if again else (f"questions/{i}", i)
        sampling = replace(steps.asking, seed=steps.seed_of(self.task.document.id, what))

        def request(schema: dict | None, prefill: str = "") -> Request:
            wording = steps.prompts.ask(steps.questions, again, schema is not None)
            return Request(join_context(self.chunk(i), wording), sampling, schema=schema, prefill=prefill)

        engine = None if steps.thinks or steps.short is None else steps.short.engine
        if engine is not None and engine.structured and steps.prompts.json and not again:
            with suppress(NoSchema):
                return await self.ask(step, request(list_schema(steps.questions)), steps.short)
        begun = BEGUN if again and engine is not None and engine.prefills else ""
        return await self.ask(step, request(None, begun), steps.short)

    async def prepared(self, i: int, instruction: str) -> None:
        """Puts the chosen answer and its rating, or why there is none, into the journal."""
        with suppress(RequestFailed):
            chosen = await self.chosen(i, instruction)
            if self.steps.judged and self.steps.filters.answer(chosen.text, chosen.finish) is None:
                await self.judged(i, instruction, chosen)

    async def chosen(self, i: int, instruction: str) -> Completion:
        return await self.answer(f"chosen/{i}", self.chunk(i), instruction, self.steps.short)

    async def answer(
        self, step: str, context: str, instruction: str, asked: Asked | None, group: str = ""
    ) -> Completion:
        sampling = self.steps.answering
        if sampling.temperature > 0:
            sampling = replace(sampling, seed=self.steps.seed_of(self.task.document.id, step))
        return await self.ask(step, Request(join_context(context, instruction), sampling, group), asked)

    async def rejected(self, i: int, instruction: str) -> Completion:
        document, step = self.task.document, f"rejected/{i}"
        async with self.ahead:
            if not self.prefilled:
                answer = await self.answer(step, document.text, instruction, self.steps.long, document.id)
                self.prefilled = True
                return answer
        return await self.answer(step, document.text, instruction, self.steps.long, document.id)

    async def ask(self, step: str, request: Request, asked: Asked | None) -> Completion:
        """The completion of a step, from the journal or from the engine. Raises RequestFailed."""
        kept = self.shard.result(self.task.document.id, step)
        if kept is not None and FAILED in kept:
            raise RequestFailed(kept[FAILED], kept["detail"])
        if kept is not None:
            return Completion(**kept)
        if asked is None:
            raise ValueError(
                f"{self.task.document.source} was not there, or had another text, when the chunks were read; run the same "
                "command again"
            )
        await asked.gate.enter(self.task.number)
        try:
            answer = await asked.engine.generate(request)
            text = self.without_reasoning(answer, asked)
        except NoSchema:
            raise
        except RequestFailed as failure:
            if self.steps.long is None:  # the engine that comes next must not be asked in its place
                self.shard.record(self.task.document.id, step, {FAILED: failure.reason, "detail": str(failure)})
            raise
        finally:
            asked.gate.leave()
        text = (request.prefill + text).strip().encode("utf-8", "replace").decode("utf-8")
        tally = self.steps.tally
        tally.requests += 1
        tally.prompt_tokens += answer.prompt_tokens
        tally.cached_tokens += answer.cached_tokens
        tally.tokens += answer.tokens
        answer = replace(self.limited(answer, text, request.sampling), token_ids=None, logprobs=None, reasoning="")
        value = {name: part for name, part in asdict(answer).items() if part not in (None, "") or name == "text"}
        self.shard.record(self.task.document.id, step, value)
        return answer

    def limited(self, answer: Completion, text: str, sampling: Sampling) -> Completion:
        """The completion with its text, without what only tokens that reasoning left made room for."""
        if not self.steps.reasoning:
            return replace(answer, text=text)
        tokenizer, limit = self.steps.chat.tokenizer, sampling.max_tokens - self.steps.reasoning
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= limit:
            return replace(answer, text=text, tokens=len(ids))
        text = tokenizer.decode(ids[:limit], clean_up_tokenization_spaces=False).strip()
        return replace(answer, text=text, tokens=limit, finish="length")

    def without_reasoning(self, answer: Completion, asked: Asked) -> str:
        """Raises RequestFailed where nothing else is there."""
        text = part_completion(answer, asked.opened, asked.engine.whole).answer
        if text is None:
            advice = "raise reasoning_tokens, or ask without reasoning (template_kwargs)"
            raise RequestFailed(CUT, f"{answer.tokens} tokens were written and no answer; {advice}")
        return text

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
        asked = self.steps.short
        await asked.gate.enter(self.task.number)
        try:
            scores = await asked.engine.score(sequence.ids)
        finally:
            asked.gate.leave()
        value = min(0.0, float(scores[sequence.labels[1:] != -100].sum()))
        self.shard.record(self.task.document.id, step, value)
        return value
