"""Both launchers and the real command line, on the tiny model: two processes share every pack and the run is that of one.

The first launch loses a rank: all of it ends, and the same command goes on from the checkpoint.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file

from longpo_ops.train.checkpoints import checkpoints

from ..processes import killed_once, longpo
from ..train.tiny import ROOT, text_pairs, write_lines
from .ranks import GPUS

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "longpo_ops.cli"]
SIZES = ["--num_processes", "2", "--parallelism_config_cp_size", "2", "--main_process_port", "0"]
FILE = str(ROOT / "examples" / "launch" / "fsdp2-sp8.yaml")
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", FILE, *SIZES, "-m", "longpo_ops.cli"]
WITH_A_KILL = f"""
import os, runpy
runpy.run_path({str(GPUS / "sitecustomize.py")!r})
if os.environ.get("RANK") == "1":
    exec(os.environ["TO_BE_KILLED"])
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with pairs and the settings of a run."""
    folder = tmp_path_factory.mktemp("home")
    pairs = text_pairs(4)
    for pair in pairs:
        pair["document"] = " ".join(pair["document"].split()[:60])
        pair["turns"][0]["chunk"] = " ".join(pair["turns"][0]["chunk"].split()[:20])
    write_lines(folder / "pairs.jsonl", pairs)
    settings = {
        "model": str(ROOT / "examples" / "tiny" / "model"), "data": str(folder / "pairs.jsonl"), "use_cpu": True,
        "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def start(launcher: list[str], home, output, *more: str, kill: str = "") -> subprocess.Popen:
    paths = str(GPUS)
    if kill:
        (home / "killed").mkdir()
        (home / "killed" / "sitecustomize.py").write_text(WITH_A_KILL)
        paths = str(home / "killed")
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TO_BE_KILLED": kill}
    train = ["train", "--config", str(home / "run.yaml"), "--output-dir", str(output), *more]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *launcher, *train], env=environment, cwd=home, **streams)


@pytest.fixture(scope="module")
def alone(home):
    done = longpo("train", "--config", home / "run.yaml", "--output-dir", home / "alone")
    assert done.returncode == 0, done.stderr
    return home / "alone"


def state(folder) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def is_the_run_of_one(folder, alone, said: str) -> None:
    """Its logs, weights and files; and one process told of it."""
    history, history_alone = state(folder)["log_history"], state(alone)["log_history"]
    assert [row["step"] for row in history] == [row["step"] for row in history_alone]
    for row, row_alone in zip(history[:-1], history_alone[:-1], strict=True):
        for name in ("loss", "nll_loss", "rewards/margins", "grad_norm", "learning_rate", "pairs"):
            assert row[name] == pytest.approx(row_alone[name], rel=1e-4, abs=1e-4), name
    weights, weights_alone = (load_file(each / "model.safetensors") for each in (folder, alone))
    before = load_file(ROOT / "examples" / "tiny" / "model" / "model.safetensors")
    assert weights.keys() == weights_alone.keys()
    for name, weight in weights.items():
        assert (weight - weights_alone[name]).norm() <= 0.01 * (weights_alone[name] - before[name]).norm(), name
    assert {path.name for path in alone.iterdir()} == {path.name for path in folder.iterdir()}
    assert json.loads((folder / "run.json").read_text())["finished"]["step"] == 4
    assert said.count("records kept") == 1 and said.count("'train_loss'") == 1


def test_a_rank_is_killed_and_the_same_command_goes_on(home, alone):
    """By torchrun."""
    output, more = home / "torchrun", ("--set", "sequence_parallel=2")
    kill = killed_once(output / "checkpoint-2" / "manifest.json")
    started = start(TORCHRUN, home, output, *more, kill=kill)
    while not (output / "checkpoint-2" / "manifest.json").exists():
        assert started.poll() is None, started.communicate()[0]
        time.sleep(0.05)
    said, _ = started.communicate(timeout=60)
    assert started.returncode != 0 and "exitcode  : -9" in said, said
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2"]
    assert "finished" not in json.loads((output / "run.json").read_text())

    again = start(TORCHRUN, home, output, *more)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0 and "going on from" in said, said
    is_the_run_of_one(output, alone, said)


def test_accelerate_launch_with_the_file_of_the_examples(home, alone):
    started = start(ACCELERATE, home, home / "accelerate")
    said, _ = started.communicate(timeout=240)
    assert started.returncode == 0, said
    is_the_run_of_one(home / "accelerate", alone, said)
