"""What a training run is: the settings that decide its weights, and the content of its data and models, not their paths.

    OUT/run.json     settings; "contents": digests; "finished": the step it ended at and the files it left, once all are written
    OUT/data         tokenised pairs with a digest each, and digests of weights by path, size and time

A folder goes on with the run it holds, and with no other: what has changed is told in words. Files may be moved, renamed
and touched. Decided, because a checkpoint would carry the old value on or the steps after it be those of neither run:
objective, data, tokenizer, models, optimizer, schedule, clipping, precision, seeds, packs a step. Free: tiling, offload,
devices, the number of processes as long as a step has as many packs (random states, of dropout say, are then begun anew),
logging, saving, and evaluation where it decides no weights (load_best_model_at_end, save_strategy best and a scheduler
that looks at it do). max_steps and num_train_epochs may be raised; the learning rate then follows the longer schedule
from there on, so the weights are not those of a run that was as long from its beginning.

Cost. A model's weights are read once (about a second per GB), and again when their size or time changes. A model by its
name on a hub is its commit. Not covered: code that trust_remote_code loads, and weights that a link hides.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pretrained import loading
from ..runs.journal import write_atomically
from .checkpoints import describe_file, step_of
from .checks import needs_reference
from .config import LongPOConfig
from .packed import PairStore, read_digests

log = logging.getLogger("longpo_ops.train")

PATHS = ("model", "reference_model", "data", "eval_data")  # told, and not compared
DECIDING = {
    "run": (
        *("rope_theta", "max_position_embeddings", "max_length", "cut_document", "system"),
        *("lora_rank", "lora_alpha", "lora_targets", "dtype"),
    ),
    "config": (
        *("objective", "objective_options", "constraint_weight", "reference", "pack_tokens", "target_length"),
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
        *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("bf16", "fp16", "tf32", "neftune_noise_alpha", "seed", "data_seed", "ignore_data_skip"),
        *("dataloader_drop_last", "train_sampling_strategy", "accelerator_config"),
    ),
}
LENGTH = ("max_steps", "num_train_epochs")
READ = ("*.safetensors*", "*config.json", "tokenizer*", "trainer_state.json")  # what a run leaves, for programs
SHOWN = ("training.png", "README.md")  # for people, who may edit them


@dataclass
class Identity:
    """Of a run with its output folder; `values` is what run.json holds of it. evaluated: whether evaluation decides weights."""

    folder: Path
    values: dict[str, Any]
    evaluated: bool

    @classmethod
    def of(cls, run, config: LongPOConfig, tokenizer, pairs: PairStore, evaluation: PairStore | None) -> Identity:
        """run: a TrainRun. Raises ValueError for a model whose files cannot be read."""
        folder, given = Path(run.output_dir), config.to_dict()
        cache = Weights(folder / "data" / "weights.json")
        contents = {
            "tokenizer": tokenizer_digest(tokenizer),
            "chat template": _digest(tokenizer.chat_template),
            "data": _data(pairs),
            "eval_data": _data(evaluation),
            "model": _model(run, run.model, cache),
            "reference_model": _model(run, run.reference_model or run.model, cache)
            if needs_reference(config)
            else None,
        }
        values = {name: getattr(run, name) for name in (*PATHS, *DECIDING["run"])}
        values |= {name: given[name] for name in (*DECIDING["config"], *LENGTH)}
        values["packs_per_step"] = config.gradient_accumulation_steps * config.world_size
        values |= {"processes": config.world_size, "contents": contents}
        evaluated = config.load_best_model_at_end or given["save_strategy"] == "best"
        evaluated = evaluated or given["lr_scheduler_type"] == "reduce_lr_on_plateau"
        return cls(folder, json.loads(json.dumps(values)), evaluated)

    @property
    def file(self) -> Path:
        return self.folder / "run.json"

    def begin(self, checkpoint: str | None) -> int | None:
        """-> the step at which this very run ended before with all its files, or None: then it is under way. Nothing is
        written. Raises ValueError where the folder holds another run, or this one beyond max_steps."""
        theirs = self._read(checkpoint)
        if checkpoint is not None or "finished" in theirs:
            self._compare(theirs, checkpoint)
            ended = theirs.get("finished")
            self._check_length(checkpoint, ended["step"] if ended else 0)
            whole = ended and self._is_whole(ended["files"])
            if whole and _length(theirs) == _length(self.values):
                return ended["step"]
            if whole and checkpoint is None:
                raise ValueError(
                    f"output_dir={self.folder}: holds the finished model of {ended['step']} steps and no checkpoint to go on "
                    "from (save_strategy), so a run of another length (max_steps, num_train_epochs) would begin anew and "
                    "write over it; give another output_dir"
                )
        return None

    def under_way(self) -> None:
        """The first step is about to be made, and no checkpoint of it is there: what began is put down."""
        self._write(self.values)

    def end(self, step: int) -> None:
        """All is written: what lies in the folder now is what the run leaves."""
        left = {pattern: sorted(self.folder.glob(pattern)) for pattern in (*READ, *SHOWN)}
        files = {path.name: describe_file(path) for pattern in READ for path in left[pattern]}
        files |= {path.name: None for pattern in SHOWN for path in left[pattern]}
        self._write(self.values | {"finished": {"step": step, "files": files}})

    def _is_whole(self, files: dict[str, list | None] | list[str]) -> bool:
        """Whether all that the run left is there as it was written; earlier versions knew no more than names."""
        described = files if isinstance(files, dict) else dict.fromkeys(files)
        for name, written in described.items():
            file = self.folder / name
            if not file.is_file() or (written is not None and describe_file(file) != written):
                told = (
                    "%s is missing or holds other bytes than the finished run left, which is therefore taken up again"
                )
                log.warning(told, file)
                return False
        return True

    def _write(self, values: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, (json.dumps(values, indent=1) + "\n").encode())

    def _read(self, checkpoint: str | None) -> dict[str, Any]:
        try:
            theirs = json.loads(self.file.read_text(encoding="utf-8"))
            return theirs if isinstance(theirs["contents"], dict) else {}
        except (OSError, ValueError, KeyError, TypeError):
            if checkpoint is None:
                return {}
            raise ValueError(
                f"{self.file} is missing, damaged or of an earlier version, so nobody knows of which run "
                f"{Path(checkpoint).name} is; give another output_dir, or remove this one to start over"
            ) from None

    def _check_length(self, checkpoint: str | None, ended: int) -> None:
        """max_steps counts steps; how many num_train_epochs make is known when the trainer is, which refuses the same."""
        steps, at = self.values["max_steps"], step_of(checkpoint) if checkpoint else 0
        if 0 < steps < max(at, ended):
            held = checkpoint if at >= ended else f"the finished model in {self.folder}"
            raise ValueError(
                f"{held} is beyond the {steps} steps that this run has (max_steps={steps}, {max(at, ended)} are made); "
                "raise it, or give another output_dir"
            )

    def _compare(self, theirs: dict[str, Any], checkpoint: str | None) -> None:
        names = (*DECIDING["run"], *DECIDING["config"], "packs_per_step")
        before, now = theirs["contents"], self.values["contents"]
        changed = [f"{n}={theirs.get(n)!r} became {self.values[n]!r}" for n in names if theirs.get(n) != self.values[n]]
        changed += [f"another {name}" for name in ("tokenizer", "chat template") if before[name] != now[name]]
        for name in ("data", "eval_data"):
            if (before[name] or {}).get("digest") != (now[name] or {}).get("digest"):
                told = f"{name}: {_what_became(self.folder, before[name], now[name])}"
                if name == "data" or self.evaluated:
                    changed.append(told)
                else:
                    log.warning("%s; metrics from here on are of these", told)
        for name in ("model", "reference_model"):
            old, new = before[name] or {}, now[name] or {}
            parts = sorted(part for part in {*old, *new} if old.get(part) != new.get(part))
            if parts and old and new:  # a run that has none now is of another method or reference, which is told
                changed.append(f"other {' and '.join(parts)} of {name} ({self.values[name] or self.values['model']})")
        if changed:
            held = Path(checkpoint).name if checkpoint else "finished model"
            raise ValueError(
                f"output_dir={self.folder}: its {held} is of another run ({'; '.join(changed)}); "
                "give another output_dir, or remove this one to start over"
            )
        if _length(theirs) != _length(self.values):
            longer = ", ".join(
                f"{n}={theirs[n]!r} became {self.values[n]!r}" for n in LENGTH if theirs[n] != self.values[n]
            )
            then = "the learning rate follows the schedule of the new length from here" if checkpoint else "begun anew"
            log.warning("%s: %s", longer, then)
        if theirs["processes"] != self.values["processes"]:
            told = "%d processes became %d: random states (dropout) are begun anew, all else goes on"
            log.warning(told, theirs["processes"], self.values["processes"])


def _length(values: dict[str, Any]) -> list:
    return [values[name] for name in LENGTH]


def _data(pairs: PairStore | None) -> dict[str, Any] | None:
    """Counted and digested without the ids, which train nothing; the file is where they can be told by name."""
    if pairs is None:
        return None
    digests = [digest for _, digest in pairs.records]
    return {"records": len(digests), "digest": _digest(digests), "file": pairs.path.name}


def _what_became(folder: Path, before: dict | None, now: dict | None) -> str:
    """In words; records are named where the pairs of then are still there."""
    if before is None or now is None:
        return " became ".join("none" if data is None else f"{data['records']} records" for data in (before, now))
    count = f"{before['records']} records became {now['records']}"
    try:
        old, new = (dict(read_digests(folder / "data" / data["file"])) for data in (before, now))
    except OSError:
        return count
    parts = {
        "gone": [record for record in old if record not in new],
        "added": [record for record in new if record not in old],
        "changed": [record for record in new if record in old and old[record] != new[record]],
    }
    told = [f"{len(ids)} {what}, {ids[0]!r} the first" for what, ids in parts.items() if ids]
    return f"{count} ({'; '.join(told) or 'in another order'})"


def tokenizer_digest(tokenizer) -> str:
    """Of all that decides which ids a text gets: normaliser, merges, added and special tokens."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    whole = json.loads(fast.to_str()) if fast is not None else sorted(tokenizer.get_vocab().items())
    if fast is not None:
        whole |= {"truncation": None, "padding": None}  # a state that calls leave behind
    return _digest([type(tokenizer).__name__, whole, {n: str(t) for n, t in tokenizer.special_tokens_map.items()}])


def _model(run, name: str, weights: Weights) -> dict[str, str]:
    """Digests of a folder's config and weights, or the commit of a hub's model."""
    folder = Path(name)
    with loading(name):
        if not folder.is_dir():
            return {"commit": str(getattr(run._auto_config(name), "_commit_hash", None))}
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = {
            key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"
        }
        return {"config": _digest(config), "weights": _digest([weights.digest(file) for file in weight_files(folder)])}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads of a model's folder."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors", "adapter_model.safetensors"]
    if not (folder / names[0]).exists() and index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [folder / name for name in names if (folder / name).exists()]


class Weights:
    """Digests of large files, kept on disk: a file is read again when its size or time has changed."""

    def __init__(self, file: Path):
        self._file = file
        try:
            self._known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def digest(self, file: Path) -> str:
        key, stat = str(file.resolve()), file.stat()
        known = self._known.get(key, [])
        if known[:2] != [stat.st_size, stat.st_mtime_ns]:
            digest = hashlib.sha256()
            with open(file, "rb") as opened:
                while part := opened.read(2**24):
                    digest.update(part)
            known = self._known[key] = [stat.st_size, stat.st_mtime_ns, digest.hexdigest()[:32]]
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(self._known).encode())
        return known[2]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
