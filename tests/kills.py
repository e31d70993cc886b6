"""Every command that runs for a while, killed at random moments and run again, ends with the files of a run that nobody killed.

    python -m tests.kills [--kills 100] [--seed 0] [--command train ...] [--folder FOLDER]

A trial is a command in an empty folder: killed by SIGKILL, run again, killed again, until it comes to its end; then all its
files are compared, byte for byte. Every other kill comes after a random time; the rest just before a random one of the run's
operations on files (an opening for writing, a renaming, a removal, a new folder), of which a run has tens within milliseconds.
Not compared are TIMES in JSON, and files of VARYING: pages and pictures that show times, locks, caches of `datasets`.

The short form is tests/test_kills.py.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.engines import tiny
from tests.evaluate.conftest import NEEDLES
from tests.processes import Started
from tests.train.tiny import text_pairs, write_home, write_lines

WATCHED = """
import os, signal, sys
out, number, counted = sys.argv[1:4]
del sys.argv[1:4]
writes, seen = os.O_WRONLY | os.O_RDWR | os.O_CREAT, 0
def look(event, arguments):
    global seen
    changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
    if (changes or event == "open" and arguments[2] & writes) and str(arguments[0]).startswith(out):
        seen += 1
        if seen == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(look)
from longpo_ops.cli import main
try:
    main()
finally:
    with open(counted, "w") as file:
        file.write(str(seen))
"""
TIMES = re.compile(
    r"seconds|exact|\w+_runtime|\w+_per_second|peak_memory_gib|(host|device)_bytes|trainer_state\.json|time"
)
VARYING = re.compile(r"(.*/)?(lock|training\.png|report\.html|data/mapped/.*|\.all\.jsonl\.\w+\.partial)")
KEY = re.compile(r"pairs-[0-9a-f]{16}")  # which the times of files are in
SHOWN = {  # of pages: what is of the last process alone
    ".md": re.compile(r".*(tokens_per_second|peak_memory_gib|[Ss]econds| s\b).*\n|## What it cost[\s\S]*"),
    ".html": re.compile(r"<tr><td>(requests|tokens \w+) now</td>.*?</tr>|<tr><td>(of them|tokens per|seconds).*?</tr>"),
}


@dataclass
class Command:
    """A command line whose output is the folder `out`, with the files and the duration of a run that nobody killed."""

    name: str
    out: Path
    arguments: list[str]
    ended: str = ""  # how one that writes a single file refuses to do it again
    whole: dict[str, bytes] = field(default_factory=dict)
    operations: int = 0
    seconds: float = 0.0

    def run(self, operation: int = 0, seconds: float = 300.0) -> int | None:
        """Its exit code, killed before an operation of that number, or after so many seconds."""
        counted = self.out.with_name(f"{self.name}.counted")
        counted.unlink(missing_ok=True)
        process = Started(WATCHED, self.out, operation, counted, *self.arguments, environment={"HF_HUB_OFFLINE": "1"})
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        process.kill()
        _, error = process.communicate()
        if self.ended and process.returncode == 1 and self.ended in error:
            return 0
        if process.returncode not in (0, -signal.SIGKILL):
            raise AssertionError(f"{self.name} ended with {process.returncode}: {error[-3000:]}")
        if counted.exists():
            self.operations = max(self.operations, int(counted.read_text()))
        return process.returncode

    def measure(self) -> None:
        """The run that nobody kills."""
        began = time.monotonic()
        assert self.run() == 0
        self.seconds, self.whole = time.monotonic() - began, results(self.out)
        assert self.operations > 1 and self.whole

    def trial(self, draw: random.Random, most: int, timed: bool = True) -> list[str]:
        """At most so many kills, and the run after them -> where they came. timed: also after times, which another machine
        does not repeat. Raises AssertionError where files differ."""
        shutil.rmtree(self.out, ignore_errors=True)
        kills = []
        while len(kills) < most:
            if timed and draw.random() < 0.5:
                moment = {"seconds": draw.uniform(0, self.seconds)}
            else:
                moment = {"operation": draw.randrange(1, self.operations + 1)}
            if self.run(**moment) == 0:
                break
            kills += [" ".join(f"{name} {value:.3g}" for name, value in moment.items())]
        else:
            assert self.run() == 0, f"{self.name}: killed by somebody else"
        self.compare(f"{self.name}, killed at {', '.join(kills)}")
        return kills

    def compare(self, what: str) -> None:
        """The files of a run with those of the one that nobody killed."""
        found = results(self.out)
        lost, left = sorted({*self.whole} - {*found}), sorted({*found} - {*self.whole})
        other = sorted(name for name in {*found} & {*self.whole} if found[name] != self.whole[name])
        assert not (lost or left or other), f"{what}: lost {lost}, left over {left}, other bytes in {other}"


def results(out: Path) -> dict[str, bytes]:
    """The files of a run by their names, without what times decide."""
    paths = [path for path in sorted(out.rglob("*")) if path.is_file()]
    names = {KEY.sub("pairs-KEY", path.relative_to(out).as_posix()): path for path in paths}
    assert len(names) == len(paths), f"{out}: pairs were tokenised twice"
    return {name: _timeless(path) for name, path in names.items() if not VARYING.fullmatch(name)}


def _timeless(path: Path) -> bytes:
    if path.suffix == ".json":
        return json.dumps(_without_times(json.loads(KEY.sub("pairs-KEY", path.read_text())))).encode()
    return SHOWN[path.suffix].sub("", path.read_text()).encode() if path.suffix in SHOWN else path.read_bytes()


def _without_times(value):
    if isinstance(value, dict):
        return {name: _without_times(each) for name, each in value.items() if not TIMES.fullmatch(name)}
    return [_without_times(each) for each in value] if isinstance(value, list) else value


# -- the commands ------------------------------------------------------------------------------------------------------


def commands(folder: Path, model: Path | None = None) -> list[Command]:
    """All of them, of tiny models, with what they read below a folder. model: that of tests/engines, trained."""
    model = model or tiny.save(folder / "model", steps=160)
    documents = tiny.write_documents(folder / "documents", 3)
    home = write_home(folder / "home")
    write_lines(home / "pairs.jsonl", text_pairs(3))
    (folder / "names.yaml").write_text(NEEDLES)
    sizes = {"min_document": 256, "min_chunk": 48, "max_chunk": 128, "question_tokens": 80, "answer_tokens": 24}
    return [
        _train(folder, home, "train", max_steps=3),
        _train(folder, home, "train-constraint", objective="sft_constraint", lora_rank=2, max_steps=1),
        _generate(folder, model, documents, sizes),
        _evaluate(folder, model, documents),
        _evolve(folder, model, documents, sizes),
        Command(
            "merge",
            folder / "merge",
            ["pairs", "merge", f"{home}/pairs.jsonl", f"--out={folder}/merge/all.jsonl"],
            "exists; expected a new file",
        ),
    ]


def _train(folder: Path, home: Path, name: str, **settings) -> Command:
    given = {"model": f"{home}/model", "data": f"{home}/pairs.jsonl", "output_dir": f"{folder}/{name}", "use_cpu": True}
    given |= {
        "save_steps": 1,
        "save_total_limit": 2,
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2,
    } | settings
    return Command(
        name, folder / name, ["train", *(f"--set={key}={json.dumps(value)}" for key, value in given.items())]
    )


def _generate(folder: Path, model: Path, documents: Path, sizes: dict) -> Command:
    arguments = [
        "generate",
        f"--model={model}",
        f"--documents={documents}",
        f"--out={folder}/generate",
        "--length=1024",
    ]
    arguments += [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    return Command(
        "generate",
        folder / "generate",
        [*arguments, f"--prompts={model}/prompts", "--max-documents=1", "--reference-logps"],
    )


def _evaluate(folder: Path, model: Path, documents: Path) -> Command:
    arguments = [
        "evaluate",
        f"--model={model}",
        f"--out={folder}/evaluate",
        f"--needles={folder}/names.yaml",
        "--samples=4",
    ]
    arguments += [f"--texts={documents}", f"--perplexity={documents}", "--length=96", "--length=160"]
    return Command("evaluate", folder / "evaluate", arguments)


def _evolve(folder: Path, model: Path, documents: Path, sizes: dict) -> Command:
    training = {
        "learning_rate": 1e-4,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "save_steps": 1,
        "use_cpu": True,
    }
    first = {"name": "one", "length": 1024, "documents": str(documents), "rope_theta": 2e4, "train": training}
    first |= {"generate": sizes | {"prompts": f"{model}/prompts", "max_documents": 1}}
    evaluate = {
        "tasks": ["names"],
        "needles": f"{folder}/names.yaml",
        "texts": [str(documents)],
        "lengths": [96],
        "samples": 2,
    }
    settings = {"model": str(model), "out": f"{folder}/evolve", "evaluate": evaluate, "rounds": [first]}
    (folder / "evolve.yaml").write_text(yaml.safe_dump(settings))
    return Command("evolve", folder / "evolve", ["evolve", f"--config={folder}/evolve.yaml"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="Of all commands together.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", action="append", help="Only this one, repeatable.")
    options = parser.parse_args()
    draw, done, wrong = random.Random(options.seed), {}, []
    with tempfile.TemporaryDirectory() as folder:
        chosen = [each for each in commands(Path(folder)) if not options.command or each.name in options.command]
        Started("").communicate()  # which waits for the imports
        for each in chosen:
            each.measure()
            print(
                f"{each.name}: {each.seconds:.1f} s, {each.operations} operations, {len(each.whole)} files", flush=True
            )
        while (left := options.kills - sum(done.values())) > 0:
            each = min(chosen, key=lambda each: done.get(each.name, 0))
            try:
                kills = each.trial(draw, min(left, draw.randint(1, 4)))
                print(f"{each.name}: the same files after kills at {', '.join(kills) or 'no time'}", flush=True)
            except AssertionError as error:
                kills = ["?"]
                wrong.append(str(error))
                print(f"WRONG {error}", flush=True)
            done[each.name] = done.get(each.name, 0) + len(kills)
    print(f"{sum(done.values())} kills ({done}), seed {options.seed}: {len(wrong)} trials went wrong")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
