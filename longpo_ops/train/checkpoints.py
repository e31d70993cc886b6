"""A transformers.Trainer whose checkpoints are whole, and which goes on from them to the step that the run ends with.

    OUT/.partial/checkpoint-4     while it is written, by all processes
    OUT/checkpoint-4              once every byte is on the disk; its manifest.json names the files, written last
    OUT/.removed                  one that is being deleted
    OUT/data/lock                 held by the run, of several processes by the first one

A checkpoint appears under its name by a rename and leaves it by one, so a kill at any moment leaves no half of one there.
Checkpoints are ordered by their numbers, never by time. One that lacks a file of its manifest, or holds other bytes, is
refused by name: whoever knows what befell the disk decides whether to remove it and go on from the one before.

The digest of a file is of its size and of the MiB at either end: cut off, emptied and exchanged files are seen, a bit that
flips in the middle of the weights is not. Machines that do not share the output folder are refused at the start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..runs.disk import writing
from ..runs.journal import sync
from ..runs.locks import Lock, clear_partials
from .states import gather, is_sharded, load_optimizer, load_weights

log = logging.getLogger("longpo_ops.train")

PARTIAL, REMOVED, MANIFEST = ".partial", ".removed", "manifest.json"
END = 2**20  # bytes


class CheckpointedTrainer(Trainer):
    """Trainer that writes whole checkpoints, and goes on from those alone.

    train(resume_from_checkpoint) makes the steps that are left and none beyond. Raises ValueError, before the first one,
    for a checkpoint from which the run cannot go on (check_going_on), or that is of another optimizer.
    """

    _partial: Path | None = None  # where all that super() writes for a checkpoint goes

    def _get_output_dir(self, trial) -> str:
        return str(self._partial) if self._partial is not None else super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; under FSDP, too, a folder that from_pretrained reads. Only a checkpoint holds shards."""
        if _internal_call or not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        whole = gather(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=whole)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model, trial) -> None:
        run = Path(super()._get_output_dir(trial))
        partial = run / PARTIAL
        if self.args.should_save:
            clear_leftovers(run)
        self.accelerator.wait_for_everyone()  # before another process writes there
        self._partial = partial
        try:
            with writing(partial):
                super()._save_checkpoint(model, trial)
        except OSError:  # half of it would take the room that the other half had not
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            self._partial = None
        self.accelerator.wait_for_everyone()
        step = self.state.global_step
        if self.state.best_global_step == step:  # Trainer looks too early for a folder of shards
            self.state.best_model_checkpoint = str(run / f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if self.args.should_save:
            (written,) = partial.iterdir()
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            write_manifest(written, not self.args.save_only_model, packs_per_step(self.args))
            publish(written, run / written.name)
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # the best of them may be asked for at once

    def _is_foreign(self, checkpoint: str) -> bool:
        """Whether it holds whole weights and the run has shards, or the other way."""
        return is_sharded(checkpoint) != self.is_fsdp_enabled and not self.is_deepspeed_enabled

    def _reads_itself(self, checkpoint: str) -> bool:
        """Whether Trainer reads its weights: of whole models it would pass over those whose names differ in the files."""
        trusted = self.is_deepspeed_enabled or self.is_fsdp_enabled or hasattr(self.model, "get_base_model")
        return trusted and not self._is_foreign(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint(resume_from_checkpoint)
        if self._reads_itself(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(resume_from_checkpoint, self.model)

    def _load_best_model(self) -> None:
        check_checkpoint(best := self.state.best_model_checkpoint)
        if self._reads_itself(best):
            super()._load_best_model()
        else:
            load_weights(best, self.model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's, where as many processes wrote it: others begin random states anew, all of them alike."""
        if checkpoint is None or len(list(Path(checkpoint).glob("rng_state*.pth"))) == self.args.world_size:
            super()._load_rng_state(checkpoint)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        begun = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial)
        if checkpoint is None:
            return begun
        check_going_on(checkpoint, max_steps, self.args)
        best = best_checkpoint(checkpoint, self.args.output_dir)
        self.state.best_model_checkpoint = str(best) if best is not None and best.is_dir() else None
        return begun

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            if checkpoint is not None and self._is_foreign(checkpoint):
                load_optimizer(checkpoint, self.model, self.optimizer)
                self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
        except KeyError as error:
            raise ValueError(
                f"{checkpoint}: its optimizer state has no {error}, so it is another optimizer's; go on with the settings it "
                "began with (fit, memory: states and master, optim), or give another output_dir"
            ) from error
        scheduler = self.lr_scheduler
        if checkpoint is not None and isinstance(scheduler, LambdaLR):  # the rate kept is that of the steps it had then
            groups = zip(self.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            for group, rate, factor in groups:
                group["lr"] = rate * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what is logged

    def _run_epoch(self, *args, **kwargs) -> None:
        """None where the run's steps are made: Trainer itself looks after a step only, and would make one more."""
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        log.info("step %d was the last one: no step is left to make", self.state.global_step)
        self.control.should_training_stop = True

    def _finalize_training(self, *args, **kwargs):
        if self.args.should_save:
            run, limit, best = Path(self.args.output_dir), self.args.save_total_limit, self.state.best_model_checkpoint
            clear_leftovers(run)
            rotate(run, limit, best, keep_last=best is None or limit != 1)  # Trainer's own way would leave halves
        return super()._finalize_training(*args, **kwargs)

    def restore(self, folder: str | os.PathLike) -> None:
        """The model and state that save_model and save_state wrote there. Models of DeepSpeed stay as they are."""
        if hasattr(self.model, "get_base_model") and not self.is_fsdp_enabled:
            self.model.load_adapter(str(folder), self.model.active_adapters[0], is_trainable=True)
        elif not self.is_deepspeed_enabled:
            load_weights(folder, self.model)
        self.state = TrainerState.load_from_json(str(Path(folder, TRAINER_STATE_NAME)))


# -- folders -----------------------------------------------------------------------------------------------------------


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run, by their numbers."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: str | os.PathLike) -> int:
    """The step after which a checkpoint was written."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint of a run, or None."""
    found = checkpoints(output_dir)
    return str(found[-1]) if found else None


def check_one_folder(args: TrainingArguments) -> None:
    """A collective of all processes. Raises ValueError, on all of them, where they do not share output_dir: each would write
    its shards where the others cannot read them."""
    if args.world_size == 1:
        return
    (name,) = broadcast_object_list([f".seen-by-all-{os.urandom(8).hex()}"])
    mark = Path(args.output_dir, name)
    if args.process_index == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    args.distributed_state.wait_for_everyone()
    blind = gather_object([] if mark.exists() else [args.process_index])
    if args.process_index == 0:
        mark.unlink(missing_ok=True)
    if blind:
        raise ValueError(
            f"output_dir={args.output_dir}: {len(blind)} of {args.world_size} processes, process {blind[0]} the first, do not "
            "see what process 0 writes there; expected a folder that all machines share"
        )


@contextmanager
def one_run(args: TrainingArguments) -> Iterator[None]:
    """A collective of all processes of a run, which alone is at work in output_dir within it: the first one holds the lock,
    and clears the files that a killed run has left half written. Raises ValueError where another run is at work there, and
    OSError where it cannot be written, on all of them."""
    lock, refusal, out = None, [None], Path(args.output_dir)
    if args.process_index == 0:
        try:
            lock = Lock(out / "data" / "lock")
            clear_partials(*out.glob("reference/*"), *out.glob("reference/*/hidden"))
        except (ValueError, OSError) as error:
            refusal = [error]
    if args.world_size > 1:
        broadcast_object_list(refusal)
    try:
        if refusal[0] is not None:
            raise refusal[0]
        with writing(out, elsewhere=True):
            yield
    finally:
        if lock is not None:
            lock.close()


def packs_per_step(args: TrainingArguments) -> int:
    """Of all processes; those that share the rows of a pack count it once."""
    return args.gradient_accumulation_steps * args.data_ranks


def advise_packs(packs: int, data_ranks: int) -> str:
    """What to set so that a step has so many packs, with data_ranks processes or groups that have packs of their own."""
    told = f"{data_ranks} process{'es (over sequence_parallel)' if data_ranks > 1 else ''}"
    if packs % data_ranks:
        return f"{told} cannot share {packs} evenly, start as many as divide it"
    return f"with {told} set gradient_accumulation_steps to {packs // data_ranks} to keep it"


def write_manifest(folder: Path, resumable: bool, packs: int) -> None:
    """The files below a folder, each with its size and digest. resumable: whether an optimizer is among them. packs: of a
    step."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    described = {path.relative_to(folder).as_posix(): describe_file(path) for path in files}
    told = {"resumable": resumable, "packs_per_step": packs, "files": described}
    (folder / MANIFEST).write_text(json.dumps(told, indent=1) + "\n")


def check_checkpoint(folder: str | os.PathLike) -> None:
    """Raises ValueError naming a file of a checkpoint that is gone, cut off or otherwise not what was written there."""
    advice = f"remove {folder} to go on from the checkpoint before it, or to start over where there is none"
    for name, (size, digest) in _read_manifest(folder)["files"].items():
        file = Path(folder, name)
        if not file.is_file():
            raise ValueError(f"{file} is missing; {advice}")
        if (came := file.stat().st_size) != size or _digest(file) != digest:
            told = f"{came} bytes, {size} were written" if came != size else "other bytes than were written"
            raise ValueError(f"{file} is damaged ({told}); {advice}")


def check_going_on(checkpoint: str | os.PathLike, steps: int, args: TrainingArguments) -> None:
    """Raises ValueError where a run of so many steps cannot go on from a checkpoint: one that is not whole, is beyond them,
    has no optimizer or steps of other sizes although steps are left, or whose best model so far went missing although it
    will be asked for."""
    check_checkpoint(checkpoint)
    left = steps - _state(checkpoint).global_step
    if left < 0:
        raise ValueError(
            f"{checkpoint} is beyond the {steps} steps that this run has; raise max_steps or num_train_epochs, give another "
            "output_dir, or remove the checkpoints beyond them"
        )
    if left and not _read_manifest(checkpoint)["resumable"]:
        raise ValueError(
            f"{checkpoint} holds a model and no optimizer (save_only_model), so none of the {left} steps that are left can be "
            "made from it; give another output_dir, or remove this one's checkpoints to start over"
        )
    packs = _read_manifest(checkpoint)["packs_per_step"]
    if left and packs not in (None, now := packs_per_step(args)):
        told = f"{checkpoint} is of a run with {packs} packs a step, and this one has {now}"
        raise ValueError(f"{told}: {advise_packs(packs, args.data_ranks)}")
    best = best_checkpoint(checkpoint, args.output_dir)
    if args.load_best_model_at_end and best is not None and not best.is_dir():
        raise ValueError(
            f"{best}, the best so far, is gone; put it back, or set load_best_model_at_end to false for the last model"
        )


def best_checkpoint(checkpoint: str | os.PathLike, output_dir: str | os.PathLike) -> Path | None:
    """The best one when a checkpoint was written, under the name that its folder has now."""
    recorded = _state(checkpoint).best_model_checkpoint
    return None if recorded is None else Path(output_dir, Path(recorded).name)


def _state(checkpoint: str | os.PathLike) -> TrainerState:
    return TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))


def _read_manifest(folder: str | os.PathLike) -> dict:
    file = Path(folder, MANIFEST)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        packs = manifest.get("packs_per_step")  # earlier versions did not name it
        return {"resumable": bool(manifest["resumable"]), "packs_per_step": packs, "files": dict(manifest["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        told = "is damaged" if file.exists() else "is missing"
        raise ValueError(
            f"{file} {told}, so nobody knows whether the checkpoint is whole (earlier versions wrote none); remove {folder} "
            "to go on from the checkpoint before it, or to start over where there is none"
        ) from None


def describe_file(file: Path) -> list:
    """[bytes, digest]"""
    return [file.stat().st_size, _digest(file)]


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        digest = hashlib.sha256(opened.read(END))
        if (size := file.stat().st_size) > END:
            opened.seek(max(END, size - END))
            digest.update(opened.read())
    return digest.hexdigest()[:32]


def publish(written: Path, place: Path) -> None:
    """Puts a folder under its name in one step, once all of it is on the disk."""
    for path in [*written.rglob("*"), written]:
        sync(path)
    discard(place)
    os.replace(written, place)
    written.parent.rmdir()
    sync(place.parent)


def rotate(run: Path, limit: int | None, best: str | None, keep_last: bool = True) -> None:
    """Deletes the oldest checkpoints but `limit` (None or below 1: none), and never the best one nor the last."""
    found = checkpoints(run)
    kept = {path for path in found if best is not None and path.name == Path(best).name}
    kept |= set(found[-1:]) if keep_last else set()
    spare = [path for path in found if path not in kept]
    if limit is not None and limit > 0:
        for path in spare[: max(0, len(found) - max(limit, len(kept)))]:
            discard(path)


def discard(folder: Path) -> None:
    """Deletes a folder that must not be seen in parts."""
    removed = folder.with_name(REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        os.replace(folder, removed)
        shutil.rmtree(removed, ignore_errors=True)


def clear_leftovers(run: Path) -> None:
    """What a killed process was writing or deleting."""
    for name in (PARTIAL, REMOVED):
        shutil.rmtree(run / name, ignore_errors=True)


def clear_killed(args: TrainingArguments, ours: bool) -> None:
    """What a killed run has left half done in output_dir, where a run is. ours: whether one is. Raises ValueError, on all
    processes, where none is: those folders are somebody's, and the checkpoints would be written over them."""
    run = Path(args.output_dir)
    for name in (PARTIAL, REMOVED):
        if not ours and (run / name).exists():
            raise ValueError(
                f"{run / name} is of no run in output_dir, and checkpoints would be written over it; move it away, or give "
                "another output_dir"
            )
    if ours and args.should_save:
        clear_leftovers(run)
