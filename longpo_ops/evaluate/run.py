"""A model's evaluation in a folder, to be stopped and started at will. What `longpo evaluate` calls.

    tasks, lengths --make_samples--> Sample --engine, greedy--> text --score--> Cell     tables, heat map
    held-out text --windows--> Engine.score --> perplexity by length
    harness tasks, with their shots --> EngineLM
    published files --> Sample, or a conversation --> text --> score, or a judge's rating

    OUT/run.json                 which model answers, and how: the folder takes no other
    OUT/work/00000.journal       every answer, as soon as it is there
    OUT/work/lock                held by the process that is at work
    OUT/results.json, .md        what was measured: running, written after every length; finished; or stopped, and by what
    OUT/heatmap.png, answers.jsonl, values.jsonl (of windows, and of the harness)

Answers are kept under the digest of what was asked, so tasks, lengths, samples and texts may change between two runs in one
folder: what was asked before is not asked again. Lengths go from the shortest to the longest. Memory: the samples of two
tasks at a length (one under way, the next one made meanwhile), answers, token ids of the held-out text, published files.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..data import tokenizer_fingerprint
from ..engines.address import shown
from ..engines.fields import check_fields
from ..engines.settings import EngineSettings
from ..runs.journal import Shard, check_folder, check_settings
from ..runs.locks import Lock
from .plan import Plan
from .report import LOCK, Scores
from .shots import HarnessTask, harness_tasks
from .tasks import TASKS
from .work import Evaluation

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
        work = Evaluation(plan, journal, progress)
        try:
            return asyncio.run(work.run())
        except BaseException as error:
            work.stop(error)
            raise
        finally:
            journal.close()


def _locked(out: Path) -> Lock:
    """The folder, for this run alone. Raises ValueError for one that is somebody else's, or not writable."""
    try:
        check_folder(out)
        return Lock(out / LOCK)
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
