"""What the frozen reference says about the answers: computed once and kept on disk, or on the fly.

For pair i the reference reads the SHORT inputs, one per turn (Eq. 12-13), or for plain DPO the long one, or for SoLoPO both,
all that the policy reads, where it keeps a number for each sequence (data/triples.py) in place of the sums:

    r_k = sum over turns and answer tokens of log pi_S(y | x_S)

A short pair is packed like a long one, chunk and question read once for chosen and rejected answers. For the
full-vocabulary constraint the reference's hidden states at the chosen answer rows (A, H) are kept instead, and its head
once.

It computes as the policy does (arithmetic.py). On disk: one folder per key, the digest of model parameters, config,
arithmetic and reading. In it `logps-<rank>.jsonl`, a line per pair with its content digest, values and a checksum,
appended as they are computed, so a killed run goes on; what is damaged or of other content is computed again. Hidden
states are one safetensors file per pair, written atomically. Not covered: a reference that changes while the policy
trains.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attention import rotary_modules
from ..data import PairBatch, TokenizedPair, pack
from ..data.triples import pack_triples, with_short
from ..ops.logprobs import linear_logprobs
from ..pretrained import plain_parts
from ..runs.disk import writing
from ..runs.journal import write_atomically
from .arithmetic import Arithmetic, base_model
from .forward import run, shares_prefix
from .states import other_names


def readings(pair: TokenizedPair, reading: str) -> tuple[TokenizedPair, ...]:
    """The pairs the reference reads for one pair: its short inputs, itself, or both. Raises ValueError naming the record."""
    if reading == "both":
        return with_short(pair)
    if reading == "long":
        return (pair,)
    short = pair.short_pairs()
    if not short:
        raise ValueError(
            f"record {pair.id!r}: no short inputs (ref_chosen, ref_rejected); the reference has nothing to read: give pairs "
            "with chunks, or an objective that needs none (dpo, simpo, orpo)"
        )
    return short


def pair_digest(pair: TokenizedPair, reading: str) -> str:
    """Of every id and label the reference reads."""
    digest = hashlib.sha256(reading.encode())
    for part in readings(pair, reading):
        for sequence in (part.chosen, *part.rejected):
            digest.update(np.int64(len(sequence)).tobytes() + sequence.ids.tobytes() + sequence.labels.tobytes())
    return digest.hexdigest()[:32]


def model_digest(model: nn.Module, config=None, arithmetic: Arithmetic | None = None) -> str:
    """Of a model's config, weights and arithmetic; of a PEFT model's base, when the reference's `config` is given. Reads every
    weight once (about a second per GB), of quantised ones codes and scales, whether parameters or not."""
    described = (config or model.config).to_dict()
    described = {k: v for k, v in described.items() if not k.startswith("_") and k != "transformers_version"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    digest.update(str(arithmetic or Arithmetic()).encode())
    trained = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}
    skipped = other_names(model) | (trained if config is not None else set())
    for name, tensor in sorted(model.state_dict().items()):
        if name not in skipped:
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            for part in plain_parts(tensor):
                digest.update(_bytes(part))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


class Reference:
    """A frozen model that reads the short inputs of pairs, the long ones or both, on the fly.

    model: a causal LM, its forward attached (ops/head.py), with shared-prefix attention (use_shared_prefix) or its own: it
        then reads sequence by sequence (forward.py).
    A PEFT policy serves as its own reference: adapters off, and RoPE as `config`, the reference's own, has it.
    arithmetic: the policy's.
    """

    def __init__(
        self,
        model: nn.Module,
        reading: str,
        workspace_bytes: int | None = None,
        config=None,
        arithmetic: Arithmetic | None = None,
    ):
        self.model, self.reading, self.workspace_bytes, self.config = model, reading, workspace_bytes, config
        self.arithmetic = arithmetic or Arithmetic()

    def digest(self) -> str:
        """The key of what it says."""
        key = model_digest(self.model, self.config, self.arithmetic)
        return key if shares_prefix(self.model) else f"{key}-separate"

    def _pack(self, pair: TokenizedPair) -> PairBatch:
        return pack([pair], separate=not shares_prefix(self.model))

    def logps(self, pair: TokenizedPair) -> tuple[float, tuple[float, ...]]:
        """-> summed answer log-probs of the chosen and of each rejected conversation; of "both" those of the first sequence
        and of the others. Raises ValueError where the model gives none that are finite."""
        if self.reading == "both":
            sums = self._sums(pack_triples([pair], separate=not shares_prefix(self.model))).tolist()
        else:
            sums = sum(self._sums(self._pack(part)) for part in readings(pair, self.reading)).tolist()
        if not all(map(math.isfinite, sums)):
            raise ValueError(
                f"record {pair.id!r}: the reference's log-probs are {', '.join(map(str, sums))}; expected finite numbers: its "
                "weights or its dtype do not suffice for this text"
            )
        return sums[0], tuple(sums[1:])

    def hidden(self, pair: TokenizedPair) -> Tensor:
        """-> (A, H) hidden states of the chosen answer rows, all turns in order."""
        batches = (self._pack(replace(part, rejected=())) for part in readings(pair, self.reading))
        return torch.cat([self._run(b, lambda h, head, b=b: h[(b.segments >= 0).to(h.device)]) for b in batches])

    def head(self) -> Tensor:
        """(V, H)."""
        return base_model(self.model).get_output_embeddings().weight.detach()

    def _sums(self, batch: PairBatch) -> Tensor:
        """(K,) float64, on the host."""

        def compute(hidden, head):
            labels = batch.labels.where(batch.segments >= 0, -100)
            return head(hidden, labels, loss=linear_logprobs, workspace_bytes=self.workspace_bytes).cpu().double()

        logps, segments = self._run(batch, compute), batch.segments
        sums = torch.zeros(len(batch.roles), dtype=torch.float64)
        return sums.index_add_(0, segments.clamp(min=0), logps.where(segments >= 0, 0.0))

    @torch.no_grad()
    def _run(self, batch: PairBatch, compute) -> Tensor:
        device, training = next(self.model.parameters()).device, self.model.training
        self.model.eval()
        try:
            plain = contextlib.nullcontext() if self.config is None else without_adapters(self.model, self.config)
            with plain, self.arithmetic.of(self.model):
                return run(self.model, batch, compute, device)[0]
        finally:
            self.model.train(training)


class DataReference:
    """Log-probs that the data set itself holds."""

    def logps(self, pair: TokenizedPair) -> tuple[float, tuple[float, ...]]:
        """Raises ValueError naming the record that has none."""
        if pair.ref_chosen_logp is None or pair.ref_rejected_logps is None:
            raise ValueError(
                f"record {pair.id!r}: no reference log-probs (ref_chosen_logp, ref_rejected_logps); "
                "use reference='precompute', or store them with the data"
            )
        return pair.ref_chosen_logp, pair.ref_rejected_logps


@contextlib.contextmanager
def without_adapters(model: nn.Module, config) -> Iterator[None]:
    """A PEFT model as its base model, with RoPE as `config` has it. Raises ValueError where that is another, and the model has
    no module of transformers' for it."""
    causal = base_model(model)
    found = [(parent, name, getattr(parent, name)) for parent, name in rotary_modules(causal)]
    theirs, ours = (getattr(each, "rope_parameters", None) for each in (config, causal.config))
    if not found and theirs != ours:
        raise ValueError(
            f"reference_config: rope_parameters={theirs}, the policy's are {ours}, and {type(causal).__name__} has no rotary "
            "module to exchange; expected the same, or reference_model"
        )
    try:
        for parent, name, rotary in found:
            setattr(parent, name, type(rotary)(config=config).to(next(rotary.buffers())))  # its device and dtype, too
        with model.disable_adapter():
            yield
    finally:
        for parent, name, rotary in found:
            setattr(parent, name, rotary)


@contextlib.contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """A model that lies on the host, on `device`; then on the host again, from where Trainer places or shards it. A model
    that lies elsewhere, or on several devices, stays there."""
    host = torch.device("cpu")
    moves = device != host and all(p.device == host for p in model.parameters())
    try:
        yield model.to(device) if moves else model
    finally:
        if moves:
            model.to(host)


class ReferenceStore:
    """What a reference said, on disk: values by the content of the pair, under a key of the model and its reading."""

    def __init__(self, folder: str | os.PathLike, key: str, reading: str, rank: int = 0):
        self.folder, self.reading = Path(folder) / f"{key}-{reading}", reading
        self.folder.mkdir(parents=True, exist_ok=True)
        self._own = self.folder / f"logps-{rank}.jsonl"  # each process appends to a file of its own
        self._logps: dict[str, tuple[float, tuple[float, ...]]] = {}
        self._cut_broken_lines()
        self.reload()

    # -- log-probs ---------------------------------------------------------------------------------------------------

    def _cut_broken_lines(self) -> None:
        """Appending must not join a line that a killed process left unfinished."""
        lines = self._own.read_bytes().splitlines(keepends=True) if self._own.exists() else []
        good = [line for line in lines if _value(line) is not None]
        if len(good) != len(lines):
            write_atomically(self._own, b"".join(good))

    def reload(self) -> None:
        """Takes in what all processes have written."""
        lines = (line for path in self.folder.glob("logps-*.jsonl") for line in path.read_bytes().splitlines(True))
        self._logps |= dict(value for line in lines if (value := _value(line)) is not None)

    def has_logps(self, pair: TokenizedPair) -> bool:
        return pair_digest(pair, self.reading) in self._logps

    def add_logps(self, pair: TokenizedPair, chosen: float, rejected: tuple[float, ...]) -> None:
        digest = pair_digest(pair, self.reading)
        with writing(self._own), open(self._own, "ab") as file:
            file.write(_line(digest, chosen, rejected))
        self._logps[digest] = chosen, rejected

    def logps(self, pair: TokenizedPair) -> tuple[float, tuple[float, ...]]:
        """As Reference.logps. Raises KeyError for a pair that is not here."""
        return self._logps[pair_digest(pair, self.reading)]

    # -- hidden states of the constraint -----------------------------------------------------------------------------

    def _hidden_path(self, pair: TokenizedPair) -> Path:
        return self.folder / "hidden" / f"{pair_digest(pair, self.reading)}.safetensors"

    def has_hidden(self, pair: TokenizedPair) -> bool:
        return _load_tensor(self._hidden_path(pair)) is not None

    def hidden(self, pair: TokenizedPair) -> Tensor:
        """(A, H). Raises ValueError where the file went missing or bad since it was precomputed."""
        hidden = _load_tensor(self._hidden_path(pair))
        if hidden is None:
            raise ValueError(f"record {pair.id!r}: {self._hidden_path(pair)} is damaged; start again to compute it")
        return hidden

    def add_hidden(self, pair: TokenizedPair, hidden: Tensor) -> None:
        _save_tensor(self._hidden_path(pair), hidden)

    def head(self) -> Tensor | None:
        """(V, H), or None."""
        return _load_tensor(self.folder / "head.safetensors")

    def add_head(self, weight: Tensor) -> None:
        _save_tensor(self.folder / "head.safetensors", weight)


def precompute(
    store: ReferenceStore,
    pairs: Sequence[TokenizedPair],
    reference: Reference,
    constraint: bool,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Fills the store with what this process's share of `pairs` still lacks, under a progress bar of the first one, which
    alone adds the head: the others have it once all are through."""
    if constraint:
        if rank == 0 and store.head() is None:
            store.add_head(reference.head())
        known, add = store.has_hidden, lambda pair: store.add_hidden(pair, reference.hidden(pair))
    else:
        known, add = store.has_logps, lambda pair: store.add_logps(pair, *reference.logps(pair))
    share = range(rank, len(pairs), world_size)
    missing = [i for i in share if not known(pairs[i])]
    known_before = f"{len(share) - len(missing)} of {len(share)} pairs known"
    shown = {"desc": f"reference ({known_before})", "unit": "pair", "disable": rank > 0}
    for i in tqdm(missing, **shown) if missing else ():
        add(pairs[i])


def _line(digest: str, chosen: float, rejected: tuple[float, ...]) -> bytes:
    body = json.dumps([digest, chosen, list(rejected)], allow_nan=False)
    return json.dumps([body, hashlib.sha256(body.encode()).hexdigest()[:16]]).encode() + b"\n"


def _value(line: bytes) -> tuple[str, tuple[float, tuple[float, ...]]] | None:
    """The entry of a line, or None where it is broken or no number."""
    try:
        body, checksum = json.loads(line)
        if hashlib.sha256(body.encode()).hexdigest()[:16] != checksum or not line.endswith(b"\n"):
            return None
        digest, chosen, rejected = json.loads(body)
    except (ValueError, TypeError, AttributeError):
        return None
    return (digest, (chosen, tuple(rejected))) if all(map(math.isfinite, (chosen, *rejected))) else None


def _save_tensor(path: Path, tensor: Tensor) -> None:
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    data = tensor.detach().cpu().contiguous()
    checksum = hashlib.sha256(_bytes(data)).hexdigest()
    write_atomically(path, save({"tensor": data}, metadata={"sha256": checksum}))


def _load_tensor(path: Path) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensor, checksum = file.get_tensor("tensor"), file.metadata()["sha256"]
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
    return tensor if hashlib.sha256(_bytes(tensor)).hexdigest() == checksum else None
