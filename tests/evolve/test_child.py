"""Stages in processes of their own: what they are told, what they say, and that none is left behind.

Whole stages in such processes are in test_run.py, beside the run whose table theirs is compared with.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from longpo_ops.evolve import Evolution, evolve, plan, processes
from longpo_ops.evolve.child import ENDED, TASK, machine
from longpo_ops.evolve.processes import Apart, check_launch, command, end, environment
from longpo_ops.evolve.run import _is_apart
from longpo_ops.evolve.work import from_plain, to_plain
from longpo_ops.runs.locks import Lock

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lock(tmp_path):
    """A folder's, held by this process."""
    with Lock(tmp_path / "work/lock") as held:
        yield held


# -- which stages, and what they are told -------------------------------------------------------------------------------


def test_which_stages_have_processes_of_their_own(make_settings, tmp_path, monkeypatch):
    alone = Evolution.from_settings(settings := make_settings(tmp_path / "out"))
    launched = Evolution.from_settings(settings | {"launch": "torchrun --nproc-per-node 2"})
    pairs, _, train, evaluate = (stage.run for stage in plan(alone)[1:5])
    for gpu, of_alone, of_launched in (
        (False, [False] * 3, [False, True, False]),
        (True, [True, False, True], [True] * 3),
    ):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda gpu=gpu: gpu)
        assert [_is_apart(alone, run) for run in (pairs, train, evaluate)] == of_alone  # the training has use_cpu
        assert [_is_apart(launched, run) for run in (pairs, train, evaluate)] == of_launched


def test_runs_are_the_same_in_another_process(make_settings, tmp_path):
    for stage in plan(Evolution.from_settings(make_settings(tmp_path / "out"))):
        assert from_plain(json.loads(json.dumps(to_plain(stage.run)))) == stage.run


def test_the_recipe_is_filled_in_where_the_training_runs(make_settings, tmp_path, monkeypatch):
    settings = make_settings(tmp_path / "out", rope_theta=1e7, train={"use_cpu": True})
    settings |= {"recipe": "official", "launch": ["torchrun"]}
    run = next(stage.run for stage in plan(Evolution.from_settings(settings)) if stage.kind == "train")
    monkeypatch.setenv("WORLD_SIZE", "4")
    there = from_plain(to_plain(run))
    assert there.settings()["gradient_accumulation_steps"] == 2 and there.title == "official"
    monkeypatch.delenv("WORLD_SIZE")
    settings["rounds"][0]["train"] = {"gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="round 'one': train: gradient_accumulation_steps beside launch"):
        plan(Evolution.from_settings(settings))


# -- the launcher --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ("no-such-launcher --nproc 2", "no program 'no-such-launcher' is to be found"),
        (["env", "--config_file", "no/such.yaml"], r"--config_file no/such\.yaml: no such file"),
        (["env", "--config_file=no/such.yaml"], r"--config_file no/such\.yaml: no such file"),
    ],
)
def test_a_launcher_that_cannot_run_is_refused_before_anything_runs(make_settings, tmp_path, launch, message):
    settings = make_settings(tmp_path / "out") | {"launch": launch}
    with pytest.raises(ValueError, match=f"launch: {message}"):
        evolve(Evolution.from_settings(settings))
    assert not (tmp_path / "out").exists()


def test_how_a_task_is_started(tmp_path):
    check_launch(())
    module = "longpo_ops.evolve.child"
    assert command((), tmp_path) == [sys.executable, "-m", module, str(tmp_path)]
    assert command(("torchrun", "--nproc-per-node", "8"), tmp_path)[3:] == ["-m", module, str(tmp_path)]
    assert command(("deepspeed", "--module"), tmp_path) == ["deepspeed", "--module", module, str(tmp_path)]
    assert environment()["TQDM_DISABLE"] == "1"


def test_a_launcher_that_fails_by_itself_is_named_with_its_last_words(tmp_path, lock):
    task = Apart(tmp_path / "task", ["sh", "-c", "echo cannot reach node2; exit 3", "--"])
    with pytest.raises(
        ValueError, match=r"^sh ended with code 3, .*task/log ends with\n\$ sh -c .*\ncannot reach node2$"
    ):
        task.run({"check": {}}, lock, lambda *_: None)
    killed = Apart(tmp_path / "task", ["sh", "-c", "kill -9 $$", "--"])
    with pytest.raises(ValueError, match=r"^sh was ended by SIGKILL"):
        killed.run({"check": {}}, lock, lambda *_: None)


def test_out_of_memory_and_faults_are_told_apart(tmp_path, lock):
    def said(how: dict) -> Apart:
        script = f"echo '{json.dumps(how)}' > {tmp_path}/task/ended.json"
        return Apart(tmp_path / "task", ["sh", "-c", script, "--"])

    with pytest.raises(MemoryError, match=r"^tried to allocate; see .*/log$"):
        said({"kind": "memory", "error": "tried to allocate"}).run({}, lock, lambda *_: None)
    with pytest.raises(ValueError, match=r"^KeyError: a; its traceback is in .*/log$"):
        said({"kind": "KeyError", "error": "a"}).run({}, lock, lambda *_: None)
    said({"error": None}).run({}, lock, lambda *_: None)


def test_a_task_left_behind_by_an_earlier_version_is_for_its_owner_alone(tmp_path, lock):
    (tmp_path / "task").mkdir()
    (left := tmp_path / "task" / TASK).write_text("{}")
    left.chmod(0o644)
    Apart(
        tmp_path / "task",
        ["sh", "-c", f"test $(stat -c %a {left}) = 600 && echo '{{\"error\": null}}' > {left.parent / ENDED}", "--"],
    ).run({}, lock, lambda *_: None)
    assert not left.exists()


# -- nothing is left -----------------------------------------------------------------------------------------------------

# Starts a process in a session of its own, as torchrun does, that does not mind SIGINT; both say so.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
if sys.argv[1:]:
    subprocess.Popen([sys.executable, "-c", open(sys.argv[1]).read()], start_new_session=True)
print("ready", flush=True)
time.sleep(600)
"""


def family(process: subprocess.Popen, number: int) -> list[psutil.Process]:
    """A process and all below it, once they are so many."""
    root, until = psutil.Process(process.pid), time.monotonic() + 60
    while len(found := [root, *root.children(recursive=True)]) < number:
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def test_sessions_below_a_launcher_end_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SIGNALS", ((signal.SIGINT, 0.2), (signal.SIGTERM, 30.0), (signal.SIGKILL, 5.0)))
    (tmp_path / "code.py").write_text(STUBBORN)
    words = [sys.executable, str(tmp_path / "code.py"), str(tmp_path / "code.py")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
    found = family(process, 2)
    for _ in found:
        process.stdout.readline()
    end(process)
    assert process.returncode == -signal.SIGTERM and not psutil.wait_procs(found, 30)[1]


def test_what_stops_the_loop_stops_the_task_which_holds_the_folder_until_then(tmp_path, lock, monkeypatch):
    seen = []

    def stop(*_):
        seen.extend(family(task_process[0], 2))
        os.close(lock.file)  # as if evolve were gone
        lock.file = None
        with pytest.raises(
            ValueError, match=rf"another run is at work in .*process {os.getpid()} on .*or what it started"
        ):
            Lock(tmp_path / "work/lock")
        raise KeyboardInterrupt

    task_process, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: task_process.append(popen(*a, **k)) or task_process[0])
    with pytest.raises(KeyboardInterrupt):
        Apart(tmp_path / "task", ["sh", "-c", "sleep 600 & wait", "--"]).run({}, lock, stop)
    assert len(seen) == 2 and not psutil.wait_procs(seen, 30)[1]
    Lock(tmp_path / "work/lock").close()


WATCHED = """
import subprocess, sys
from pathlib import Path
from longpo_ops.evolve import child
subprocess.Popen(["sleep", "600"], start_new_session=True)
child._watch(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize("gone", ["evolve", "launcher"])
def test_a_process_ends_with_evolve_and_with_its_launcher(tmp_path, gone):
    with open(tmp_path / "parent", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        words = [sys.executable, "-c", WATCHED, str(tmp_path), machine()]
        process = subprocess.Popen(["sh", "-c", '"$@" & wait', "sh", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            found = family(process, 3)
            time.sleep(0.3)
            assert all(each.is_running() for each in found)
            if gone == "launcher":
                process.kill()
            else:
                fcntl.flock(held, fcntl.LOCK_UN)
            assert not psutil.wait_procs(found[1:], 60)[1]
        finally:
            end(process)


def test_a_process_elsewhere_does_not_look_at_locks(tmp_path):
    (tmp_path / "parent").write_bytes(b"")  # free
    words = [sys.executable, "-c", WATCHED, str(tmp_path), "another machine"]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        found = family(process, 2)
        time.sleep(1.5)
        assert all(each.is_running() for each in found)
    finally:
        end(process)
        assert shutil.which("sleep") and not psutil.wait_procs(found, 30)[1]
