"""Runs that are killed at every stage of a checkpoint's life go on with the same numbers; what is not whole is named."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longpo_ops.train import LongPOConfig, last_checkpoint
from longpo_ops.train.checkpoints import (
    MANIFEST,
    check_checkpoint,
    checkpoints,
    discard,
    one_run,
    rotate,
    write_manifest,
)

from ..processes import CLI, SMALL_FILES, killed_in, longpo
from ..processes import run as run_process
from .tiny import run_settings, run_tiny, text_pairs, write_home, write_lines

STEPS = {"max_steps": 5, "save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """With three pairs: two steps an epoch, so that odd numbers of steps end inside one."""
    home = write_home(tmp_path_factory.mktemp("home"))
    write_lines(home / "pairs.jsonl", text_pairs(3))
    return home


def losses(output: Path) -> list[tuple]:
    state = json.loads((output / "trainer_state.json").read_text())
    names = ("step", "loss", "grad_norm", "learning_rate", "nll_loss", "preference_loss", "rewards/margins")
    return [tuple(row[name] for name in names) for row in state["log_history"] if "loss" in row]


def left(output: Path) -> dict[str, tuple[int, bytes]]:
    """When each file of the run was written, and its bytes."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and "mapped" not in path.parts]
    files = [path for path in files if path.name != "lock"]
    return {str(path.relative_to(output)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


# -- killed ----------------------------------------------------------------------------------------------------------

TORN = """
import os, signal
import torch
real = torch.save
def torn(value, file, *args, **kwargs):  # the disk takes half of a file, then the process is gone
    real(value, file, *args, **kwargs)
    if "checkpoint-2/optimizer" in str(file):
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = torn
"""
MODULE = "longpo_ops.train.checkpoints"
KILLS = {  # where -> the last checkpoint that is whole then
    "a file of checkpoint 2 is half written": (TORN, 1),
    "before its manifest": (killed_in(MODULE, "write_manifest", "checkpoint-2"), 1),
    "before its rename": (killed_in(MODULE, "publish", "checkpoint-3"), 2),
    "between rename and rotation": (killed_in("os", "replace", ".partial/checkpoint-4", after=True), 4),
    "in the middle of deleting the third": (killed_in("os", "unlink", "optimizer.pt", after=True), 5),
    "after the last checkpoint": (killed_in(f"{MODULE}:CheckpointedTrainer", "_finalize_training"), 5),
    "while the model is saved": (killed_in("torch", "save", "/killed/training_args.bin"), 5),
    "while the report is written": (killed_in("longpo_ops.train.report", "draw_curves", "training.png", after=True), 5),
    "before the end is put down": (killed_in("longpo_ops.train.identity:Identity", "end"), 5),
}


@pytest.mark.slow
def test_a_run_that_is_killed_at_every_stage_ends_with_the_same_bytes(home, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trainer = run_tiny(home, whole, **STEPS)
    settings = run_settings(home, killed, **STEPS)
    arguments = ["train", *(f"--set={name}={json.dumps(value)}" for name, value in settings.items())]
    for stage, (code, at) in KILLS.items():
        done = run_process(code + CLI, *arguments)
        assert done.returncode == -signal.SIGKILL, f"{stage}: {done.stderr[-3000:]}"
        check_checkpoint(last_checkpoint(killed))
        assert last_checkpoint(killed) == str(killed / f"checkpoint-{at}"), stage
        if stage.startswith("in the middle"):
            assert (killed / ".removed").is_dir() and not (killed / ".removed" / "optimizer.pt").exists()
    done = longpo(*arguments)
    assert done.returncode == 0 and f"going on from {killed / 'checkpoint-5'}" in done.stderr, done.stderr[-3000:]
    assert [row[0] for row in losses(whole)] == [1, 2, 3, 4, 5] and losses(killed) == losses(whole)
    assert weights(killed) == weights(whole)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        ours, theirs = ((output / "checkpoint-5" / name).read_bytes() for output in (killed, whole))
        assert ours == theirs, name
    assert [path.name for path in checkpoints(killed)] == ["checkpoint-4", "checkpoint-5"]
    assert not (killed / ".partial").exists() and not (killed / ".removed").exists()
    assert trainer.state.log_history[-1]["train_loss"] == final(killed)["train_loss"]

    before = left(killed)  # a run that is done stays as it is, to the last file
    done = longpo(*arguments)
    assert done.returncode == 0 and "ended at step 5: nothing is left to do" in done.stderr
    assert left(killed) == before


@pytest.mark.parametrize("file", ["optimizer.pt", "model.safetensors"])
def test_a_disk_that_refuses_is_told_and_the_run_goes_on_to_the_same_bytes(home, tmp_path, file):
    """torch tells of no reason, safetensors in words of its own; here the system refuses in the middle of a file."""
    run_tiny(home, tmp_path / "whole", **STEPS)
    size = (tmp_path / "whole/checkpoint-5" / file).stat().st_size
    settings = run_settings(home, tmp_path / "out", **STEPS)
    arguments = ["train", *(f"--set={name}={json.dumps(value)}" for name, value in settings.items())]
    done = run_process(SMALL_FILES.format(size - 1) + CLI, *arguments)
    said = f"error: {tmp_path}/out/.partial: File too large; its whole checkpoints are in {tmp_path}/out; raise the limit of"
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "out/.partial").exists()  # its half would take the room
    run_tiny(home, tmp_path / "out", **STEPS)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_a_full_cache_of_a_library_is_not_told_as_the_runs_own_folder(tmp_path):
    config = LongPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True)
    with pytest.raises(OSError, match="No space left") as refusal, one_run(config), open("/dev/full", "w") as cache:
        cache.write("x")
        cache.flush()
    assert refusal.value.filename is None


def test_a_refused_run_leaves_somebodys_folder_as_it_was(home, tmp_path):
    for name in (".partial", ".removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match="nothere"):
        run_tiny(home, tmp_path, **STEPS, model=str(tmp_path / "nothere"))
    with pytest.raises(ValueError, match=r"no-pairs\.jsonl does not exist"):
        run_tiny(home, tmp_path, **STEPS, data=str(tmp_path / "no-pairs.jsonl"))
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match=f"{tmp_path}/.partial is of no run in output_dir.*give another"):
        run_tiny(home, tmp_path, **STEPS)
    assert set(before) <= set(tmp_path.rglob("*"))


def final(output: Path) -> dict:
    return json.loads((output / "trainer_state.json").read_text())["log_history"][-1]


def forget(output: Path, step: int) -> None:
    """What a kill leaves just after checkpoint `step`."""
    for path in checkpoints(output):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    run = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({name: value for name, value in run.items() if name != "finished"}))


def test_losses_are_those_of_an_unbroken_run_where_logs_are_rarer_than_checkpoints(home, tmp_path):
    more = {"max_steps": 5, "save_steps": 3, "logging_steps": 5, "learning_rate": 1e-3}
    run_tiny(home, tmp_path, **more)
    whole, expected = losses(tmp_path), final(tmp_path)["train_loss"]
    forget(tmp_path, 3)
    run_tiny(home, tmp_path, **more)
    assert losses(tmp_path) == whole and [row[0] for row in whole] == [3, 5]
    assert final(tmp_path)["train_loss"] == expected
    assert expected == pytest.approx(
        (5 * whole[0][1] + 3 * whole[1][1]) / 8
    )  # of all pairs, not of those after the kill


# -- the last step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_finished_run_is_left_alone_and_what_is_missing_of_it_comes_back(home, tmp_path, caplog, strategy):
    more = {"max_steps": 1, "learning_rate": 1e-3, "save_strategy": strategy}
    trained = run_tiny(home, tmp_path, **more)
    before = left(tmp_path)
    with caplog.at_level("INFO"):
        again = run_tiny(home, tmp_path, **more)
    assert "ended at step 1: nothing is left to do" in caplog.text and left(tmp_path) == before
    assert again.state.global_step == 1
    assert torch.equal(again.model.lm_head.weight, trained.model.lm_head.weight)
    (tmp_path / "model.safetensors").unlink()
    run_tiny(home, tmp_path, **more)
    assert weights(tmp_path) == before["model.safetensors"][1]


def test_a_finished_run_of_adapters_comes_back_with_them(home, tmp_path):
    more = {"max_steps": 1, "learning_rate": 1e-2, "lora_rank": 2, "objective": "sft_chosen"}
    trained, again = (run_tiny(home, tmp_path, **more) for _ in range(2))
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (again, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any("lora_B" in name and bool(p.any()) for name, p in ours.items())


def test_a_longer_run_goes_on_by_its_own_schedule_and_a_shorter_one_is_refused(home, tmp_path, caplog):
    def rates(trainer):
        return [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]

    more = {"learning_rate": 1e-3, "warmup_steps": 0, "objective": "sft_chosen"}
    whole = rates(run_tiny(home, tmp_path / "whole", max_steps=5, **more))
    run_tiny(home, tmp_path / "out", max_steps=3, **more)
    longer = rates(run_tiny(home, tmp_path / "out", max_steps=5, **more))
    assert "max_steps=3 became 5: the learning rate follows the schedule of the new length" in caplog.text
    assert longer[3:] == whole[3:] and longer[:3] != whole[:3]
    with pytest.raises(ValueError, match=r"the finished model in .*out is beyond the 4 steps that this run has"):
        run_tiny(home, tmp_path / "out", max_steps=4, **more)
    with caplog.at_level("INFO"):
        run_tiny(home, tmp_path / "out", max_steps=5, **more)
    assert "ended at step 5: nothing is left to do" in caplog.text


def test_a_start_that_is_refused_leaves_the_run_as_it_was(home, tmp_path):
    more = {"learning_rate": 1e-3, "objective": "sft_chosen", "max_steps": -1}
    run_tiny(home, tmp_path, num_train_epochs=2, **more)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"is beyond the 2 steps that this run has \(4 are made\)"):
        run_tiny(home, tmp_path, num_train_epochs=1, **more)
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_checkpoint_without_an_optimizer_does_not_go_on(home, tmp_path):
    more = {"learning_rate": 1e-3, "save_only_model": True, "save_steps": 1, "objective": "sft_chosen"}
    run_tiny(home, tmp_path, max_steps=1, **more)
    before = weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    run_tiny(home, tmp_path, max_steps=1, **more)  # no step is left
    assert weights(tmp_path) == before
    with pytest.raises(ValueError, match=r"checkpoint-1 holds a model and no optimizer \(save_only_model\)"):
        run_tiny(home, tmp_path, max_steps=2, **more)


# -- what is not whole -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(home, tmp_path_factory) -> Path:
    """A run with two checkpoints, not yet at its end."""
    output = tmp_path_factory.mktemp("two")
    run_tiny(home, output, max_steps=2, save_steps=1, learning_rate=1e-3, objective="sft_chosen")
    return output


FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "config.json",
    MANIFEST,
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone_or_cut_or_of_other_bytes_is_named(two, name):
    file = two / "checkpoint-2" / name
    whole = file.read_bytes()
    try:
        for damaged in (None, whole[: len(whole) // 2], bytes(len(whole))):
            file.unlink(missing_ok=True) if damaged is None else file.write_bytes(damaged)
            told = "is missing" if damaged is None else "is damaged"
            with pytest.raises(ValueError, match=rf"{name} {told}.*; remove .*checkpoint-2 .*the checkpoint before it"):
                check_checkpoint(two / "checkpoint-2")
    finally:
        file.write_bytes(whole)
    check_checkpoint(two / "checkpoint-2")


def test_a_run_refuses_a_damaged_checkpoint_and_goes_on_from_the_one_before_it(home, two, tmp_path):
    output = Path(shutil.copytree(two, tmp_path / "out"))
    more = {"save_steps": 1, "learning_rate": 1e-3, "objective": "sft_chosen", "max_steps": 3}
    (output / "checkpoint-2" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"scheduler\.pt is missing"):
        run_tiny(home, output, **more)
    shutil.rmtree(output / "checkpoint-2")
    trainer = run_tiny(home, output, **more)
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3]


def test_a_run_does_not_go_on_with_the_state_of_another_optimizer(home, tmp_path):
    more = {"objective": "sft_chosen", "learning_rate": 1e-3}
    run_tiny(home, tmp_path, max_steps=1, memory={"states": "float32"}, **more)
    with pytest.raises(
        ValueError, match=r"its checkpoint-1 is of another run \(memory=\{.*'states': 'float32'.* became"
    ):
        run_tiny(home, tmp_path, max_steps=2, **more)
    values = json.loads((tmp_path / "run.json").read_text())
    del values["memory"]  # which earlier versions did not tell
    (tmp_path / "run.json").write_text(json.dumps(values))
    file = tmp_path / "checkpoint-1/optimizer.pt"
    kept = torch.load(file, weights_only=True)
    kept["state"] = {
        i: {"master": None, "pieces": [state]} for i, state in kept["state"].items()
    }  # nor had they torch's names
    torch.save(kept, file)
    (file.parent / MANIFEST).unlink()
    write_manifest(file.parent, True, 2)
    with pytest.raises(ValueError, match=r"checkpoint-1: its optimizer state has no 'step'.*memory: states"):
        run_tiny(home, tmp_path, max_steps=2, **more)
    with pytest.raises(ValueError, match="go on with the settings it began with"):
        run_tiny(home, tmp_path, max_steps=2, memory={"states": "float32", "master": "float32"}, **more)


# -- which are kept --------------------------------------------------------------------------------------------------


def made(run: Path, *steps: int) -> None:
    for step in steps:
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(step))
        write_manifest(folder, resumable=True, packs=1)


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [2, 9, 10, 100]),
        (0, None, [2, 9, 10, 100]),
        (3, None, [9, 10, 100]),
        (1, None, [100]),
        (2, 9, [9, 100]),
        (1, 2, [2, 100]),
        (9, 2, [2, 9, 10, 100]),
    ],
)
def test_the_oldest_by_number_go_and_neither_the_best_nor_the_last(tmp_path, limit, best, kept):
    made(tmp_path, 100, 9, 10, 2)  # whose times say otherwise
    for name in ("checkpoint-1.kept", "checkpoint-x", "my-checkpoint-3"):  # somebody's own
        (tmp_path / name).mkdir()
    rotate(tmp_path, limit, None if best is None else f"/elsewhere/checkpoint-{best}")
    assert [int(path.name.partition("-")[2]) for path in checkpoints(tmp_path)] == kept
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3 + len(kept)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_what_is_deleted_leaves_its_name_before_its_files(tmp_path, monkeypatch):
    made(tmp_path, 1, 2)
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: seen.append((Path(path).name, Path(path).exists())))
    discard(tmp_path / "checkpoint-1")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert seen == [(".removed", False), (".removed", True)]


def test_the_best_checkpoint_is_kept_and_loaded_also_where_the_folder_has_moved(home, tmp_path):
    more = {
        **{"max_steps": 4, "save_steps": 1, "eval_data": str(home / "pairs.jsonl"), "eval_strategy": "steps"},
        **{"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
        **{"greater_is_better": True, "save_total_limit": 2, "learning_rate": 1e-2, "warmup_steps": 0},
    }
    trainer = run_tiny(home, tmp_path / "out", **more)
    best = Path(trainer.state.best_model_checkpoint)
    assert best == tmp_path / "out" / "checkpoint-1" and best.is_dir()
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    kept = (best / "model.safetensors").read_bytes()
    assert torch.equal(
        *(load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (best, tmp_path / "out"))
    )
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    (moved / "model.safetensors").unlink()
    run_tiny(home, moved, **more)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (moved, moved / "checkpoint-1"))
    assert (
        torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
        and kept == (moved / "checkpoint-1" / "model.safetensors").read_bytes()
    )
    shutil.rmtree(moved / "checkpoint-1")
    (moved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint-1, the best so far, is gone; put it back"):
        run_tiny(home, moved, **more)
