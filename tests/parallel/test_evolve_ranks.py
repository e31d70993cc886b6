"""A round whose training torchrun starts: stopped by Ctrl-C, which leaves no process, and gone on with to its end."""

from __future__ import annotations

import json
import signal
import sys
import time

import psutil
import yaml

from tests.engines.conftest import documents, model, tokenizer  # noqa: F401
from tests.evolve.conftest import make_settings  # noqa: F401
from tests.processes import CLI, Started

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
STEPS = 5


def test_a_round_trained_by_two_processes(make_settings, tmp_path):  # noqa: F811
    settings, out = make_settings(tmp_path / "out"), tmp_path / "out"
    settings["rounds"][0]["train"] |= {"max_steps": STEPS}
    settings["evaluate"] |= {"lengths": [128], "samples": 2, "perplexity": []}
    settings |= {"launch": TORCHRUN, "retention": [{"measure": "accuracy", "within": 1.0}]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))

    begun = Started(CLI, "evolve", "--config", tmp_path / "run.yaml")
    until = time.monotonic() + 300
    while not (out / "one/train/checkpoint-1/trainer_state.json").exists():
        assert begun.poll() is None and time.monotonic() < until, begun.communicate(1)
        time.sleep(0.02)
    family = psutil.Process(begun.pid).children(recursive=True)
    ranks = [each for each in family if "longpo_ops.evolve.child" in " ".join(each.cmdline())]
    assert len(ranks) >= 3  # torchrun and two of its processes
    begun.send_signal(signal.SIGINT)
    _, told = begun.communicate(120)
    assert begun.returncode == 130 and "run the same command again to go on" in told
    assert not [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert not json.loads((out / "one/train.json").read_text())["done"]

    done = Started(CLI, "evolve", "--config", tmp_path / "run.yaml")
    printed, told = done.communicate()
    assert done.returncode == 0, told
    assert f"promoted: {out}/one/train" in printed
    trained = json.loads((out / "one/train/run.json").read_text())
    assert (trained["processes"], trained["packs_per_step"]) == (2, 2)
    assert json.loads((out / "one/train/trainer_state.json").read_text())["global_step"] == STEPS
    assert [row["row"] for row in json.loads((out / "results.json").read_text())["rows"]] == [
        "base",
        "untrained",
        "after",
    ]
    assert "going on from" in (out / "one/train.process/log").read_text()
