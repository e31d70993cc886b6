"""What a training run is: the settings that decide its weights, and the content of its data and models, not their paths.

    OUT/run.json     settings; "recipe": its title; "contents": digests; "finished": the step it ended at and the files it
                     left, once all are written
    OUT/data         tokenised pairs with a digest each, and digests of weights by path, size and time

A folder goes on with the run it holds, and with no other: what has changed is told in words. Files may be moved, renamed
and touched. Decided, because a checkpoint would carry the old value on or the steps after it be those of neither run:
objective, data, tokenizer, models, optimizer, schedule, clipping, precision, storage in 8 bits, seeds, packs a step, and
whether sequences are separate, by which packs fill and experts are balanced. Free:
tiling, offload, devices, whether the reference is computed before or on the fly, the number of processes and how many share
the rows of a pack, as long as a step has as many packs (random states, of dropout say, are then begun anew), logging, saving,
and evaluation where it decides no weights (load_best_model_at_end, save_strategy best and a scheduler that looks at it do).
max_steps and num_train_epochs may be raised; the learning rate then follows the longer schedule from there on, so the weights
are not those of a run that was as long from its beginning.

Cost. A model's weights are read once (about a second per GB), and again when their size or time changes. A model by its
name on a hub is its commit, or its config alone where no commit is known. Not covered: code that trust_remote_code loads,
and weights that a link hides.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..memory.settings import Memory
from ..pretrained import loading, read_whole_config
from ..runs.journal import write_atomically
from .checkpoints import advise_packs, describe_file, packs_per_step
from .checks import kept_memory, needs_reference
from .config import LongPOConfig
from .packed import PairStore, read_digests
from .states import weight_files

if TYPE_CHECKING:
    from .run import Prepared, TrainRun

log = logging.getLogger("longpo_ops.train")

PATHS = ("model", "reference_model", "data", "eval_data")  # told, and not compared
DECIDING = {
    "run": (
        *(
            "rope_theta",
            "max_position_embeddings",
            "max_length",
            "cut_document",
            "system",
            "template_kwargs",
            "nll_tokens",
        ),
        *("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "use_rslora"),
        *("quantization", "dtype"),
    ),
    "config": (
        *("objective", "objective_options", "constraint_weight", "pack_tokens", "target_length", "separate"),
        "sparse_hidden_gradient",
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
        *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("bf16", "fp16", "tf32", "neftune_noise_alpha", "seed", "data_seed", "ignore_data_skip"),
        *("dataloader_drop_last", "train_sampling_strategy", "accelerator_config"),
    ),
}
# None: of a method without a reference, of a plan that is not made yet, or of an earlier version
DERIVED = ("reference_from", "memory")
EARLIER = {  # of earlier versions, which had no choice
    **{"nll_tokens": "contents", "template_kwargs": None, "separate": False, "sparse_hidden_gradient": False},
    **{"lora_dropout": 0.0, "lora_target_parameters": None, "use_rslora": False, "quantization": "none"},
}
RENAMED = {"lora_targets": "lora_target_modules"}
LENGTH = ("max_steps", "num_train_epochs")
WEIGHTS = "*.safetensors*"
READ = (WEIGHTS, "*config.json", "tokenizer*", "trainer_state.json")  # what a run leaves, for programs
SHOWN = ("training.png", "README.md")  # for people, who may edit them


@dataclass
class Identity:
    """Of a run with its output folder; `values` is what run.json holds of it. evaluated: whether evaluation decides weights.
    steps: of the whole run. data_ranks: processes, or groups of them, with packs of their own."""

    folder: Path
    values: dict[str, Any]
    evaluated: bool
    steps: int
    data_ranks: int

    @classmethod
    def of(cls, run: TrainRun, prepared: Prepared) -> Identity:
        """Raises ValueError for a model whose files cannot be read."""
        config, tokenizer = prepared.config, prepared.tokenizer
        folder, given = Path(run.output_dir), config.to_dict()
        cache = Weights(folder / "data" / "weights.json")
        contents = {
            "tokenizer": tokenizer_digest(tokenizer),
            "chat template": _digest(tokenizer.chat_template),
            "data": _data(prepared.pairs),
            "eval_data": _data(prepared.evaluation),
            "model": model_identity(run, run.model, cache),
            "reference_model": _reference_identity(run, cache) if needs_reference(config) else None,
        }
        settings = run.settings()
        values = {"recipe": run.title} | {name: settings[name] for name in (*PATHS, *DECIDING["run"])}
        values |= {name: given[name] for name in (*DECIDING["config"], *LENGTH)}
        values["objective_options"] = config.objective_options or {}
        if code := config.method.code:
            contents["objective"] = code
        values["separate"] = prepared.separate is not None  # asked for or not
        values |= {"reference_from": _reference_from(config), "memory": _memory(config)}
        values["packs_per_step"] = packs_per_step(config)
        values |= {"processes": config.world_size, "contents": contents}
        evaluated = config.load_best_model_at_end or given["save_strategy"] == "best"
        evaluated = evaluated or given["lr_scheduler_type"] == "reduce_lr_on_plateau"
        return cls(folder, json.loads(json.dumps(values)), evaluated, prepared.steps, config.data_ranks)

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
            if ended and ended["step"] > self.steps:
                raise ValueError(
                    f"the finished model in {self.folder} is beyond the {self.steps} steps that this run has "
                    f"({ended['step']} are made); raise max_steps or num_train_epochs, or give another output_dir"
                )
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

    def keep_memory(self, memory: Memory) -> None:
        """What `fit: auto` has chosen since."""
        self.values["memory"] = _stored(memory)

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
        except (OSError, ValueError):
            theirs = None
        if _is_understood(theirs):
            return theirs
        held = checkpoint or next(self.folder.glob(WEIGHTS), None)
        if held is None:
            return {}
        raise ValueError(
            f"{self.file} is missing, damaged or of an earlier version, so nobody knows of which run "
            f"{Path(held).name} is; give another output_dir, or remove this one to start over"
        )

    def _compare(self, theirs: dict[str, Any], checkpoint: str | None) -> None:
        theirs = EARLIER | {RENAMED.get(name, name): value for name, value in theirs.items()}
        theirs["objective_options"] = theirs["objective_options"] or {}
        both = [name for name in DERIVED if None not in (theirs.get(name), self.values[name])]
        names = (*DECIDING["run"], *DECIDING["config"], *both)
        before, now = theirs["contents"], self.values["contents"]
        changed = [f"{n}={theirs.get(n)!r} became {self.values[n]!r}" for n in names if theirs.get(n) != self.values[n]]
        if (packs := theirs["packs_per_step"]) != (here := self.values["packs_per_step"]):
            changed.append(f"packs_per_step={packs} became {here}: {advise_packs(packs, self.data_ranks)}")
        changed += [f"another {name}" for name in ("tokenizer", "chat template") if before[name] != now[name]]
        if theirs["objective"] == self.values["objective"] and before.get("objective") != now.get("objective"):
            changed.append(f"other code of objective {self.values['objective']}")
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


def holds_run(folder: str) -> bool:
    """Whether a run began or left weights there."""
    return any(found for pattern in ("run.json", WEIGHTS) for found in Path(folder).glob(pattern))


def _length(values: dict[str, Any]) -> list:
    return [values[name] for name in LENGTH]


def _is_understood(values: Any) -> bool:
    """Whether it is a run.json with all that is compared."""
    try:
        contents, ended = values["contents"], values.get("finished")
        parts = {name: contents[name] for name in ("data", "eval_data", "model", "reference_model")}
        told = {"tokenizer", "chat template"} <= contents.keys()
        told &= {"objective_options", "packs_per_step", "processes", *LENGTH} <= values.keys()
        told &= all(part is None or isinstance(part, dict) for part in parts.values())
        told &= all(not part or {"records", "file"} <= part.keys() for part in (parts["data"], parts["eval_data"]))
        return told and (ended is None or (isinstance(ended["step"], int) and isinstance(ended["files"], dict | list)))
    except (KeyError, TypeError, AttributeError):
        return False


def _reference_from(config: LongPOConfig) -> str | None:
    """Whose log-probs the method compares with; a model's are the same, computed before or on the fly."""
    return config.method.reference and ("data" if config.reference == "data" else "model")


def _memory(config: LongPOConfig) -> dict[str, Any] | None:
    memory = kept_memory(config) if config.fit == "auto" else Memory.from_settings(config.memory)
    return None if memory is None else _stored(memory)


def _stored(memory: Memory) -> dict[str, Any]:
    """What memory settings do to numbers: layer inputs in 8 bits, and the optimizer that is ours."""
    return {
        "store": memory.store if memory.offload else "exact",
        "states": memory.states,
        "master": memory.master if memory.states else None,
    }


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


def _reference_identity(run: TrainRun, weights: Weights) -> dict[str, str]:
    found = model_identity(run, run.reference_model or run.model, weights)
    read = [run.settings()["rope_theta"], run.max_position_embeddings]
    return found | ({"RoPE": _digest(read)} if run.reference_is_policy() and any(read) else {})


def model_identity(run: TrainRun, name: str, weights: Weights) -> dict[str, str]:
    """Digests of a folder's config and weights, or the commit of a hub's model."""
    folder = Path(name)
    with loading(name):
        if not folder.is_dir():
            config = read_whole_config(name, run.trust_remote_code)
            commit = getattr(config, "_commit_hash", None)
            return {"commit": commit} if commit else {"config": _config_digest(config.to_dict())}
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {
            "config": _config_digest(config),
            "weights": _digest([weights.digest(file) for file in weight_files(folder)]),
        }


def _config_digest(config: dict[str, Any]) -> str:
    return _digest({k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"})


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
