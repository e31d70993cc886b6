"""A transformers.Trainer that trains on short-to-long preference pairs, one packed row of pairs at a time.

    row -> model body with shared-prefix attention -> hidden (N, H) -> packed loss in the model's forward -> backward

    L = lambda/P sum_pairs f + 1/P sum_pairs mean_t NLL        P = pairs of the step, over accumulation and ranks (Eq. 14)

What is ours: the loss (every method of methods.py), where the reference comes from, the normalisation by pairs, the
metrics, and checkpoints that appear under their name only when they are whole. The rest is transformers' Trainer.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from ..attention import use_shared_prefix
from ..data import TokenizedPair
from ..ops.divergence import linear_kl
from ..ops.head import attach
from ..ops.logprobs import linear_cross_entropy
from ..ops.preference import packed_preference_loss
from .config import LongPOConfig
from .reference import DataReference, Reference, ReferenceStore, base_model, model_digest, precompute, readings
from .rows import PairRows, Row, collate, select

PARTIAL = ".partial"


class LongPOTrainer(Trainer):
    """Trains a causal LM (or a PEFT model of one) on tokenised pairs.

    model: of a family that shared-prefix attention knows. Its attention is set and its forward attached (ops/head.py).
    args: LongPOConfig. train_dataset, eval_dataset: sequences of TokenizedPair, in memory or a PairStore.
    reference_model: the frozen reference with its own RoPE settings, for methods that have one. None for a PEFT policy, whose
        base model is the reference under reference_config (default: the policy's config), and for reference="data".
    processing_class: the tokenizer, saved beside the model.

    Raises ValueError, before training, for a missing reference and for a record that lacks what the method reads.
    """

    def __init__(
        self,
        model: nn.Module,
        args: LongPOConfig,
        train_dataset: Sequence[TokenizedPair],
        eval_dataset: Sequence[TokenizedPair] | None = None,
        *,
        reference_model: nn.Module | None = None,
        reference_config=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        self.method = args.method
        self.objective = self.method.make_objective(args.objective_options or {})
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._tokens, self._since = 0, time.perf_counter()
        datasets = [pairs for pairs in (train_dataset, eval_dataset) if pairs is not None]
        for pairs in datasets:
            for pair in pairs:
                self._check(pair, args)
        use_shared_prefix(base_model(model))
        attach(model)
        self.reference = self._make_reference(model, args, datasets, reference_model, reference_config)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._rows(train_dataset, args),
            eval_dataset=None if eval_dataset is None else self._rows(eval_dataset, args),
            data_collator=collate,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # num_items_in_batch counts pairs, see _get_num_items_in_batch

    def _rows(self, pairs: Sequence[TokenizedPair], args: LongPOConfig) -> PairRows:
        options = {"row_tokens": args.row_tokens, "target_length": args.target_length, "seed": args.seed}
        return PairRows(pairs, self.method, **options)

    def _check(self, pair: TokenizedPair, args: LongPOConfig) -> None:
        """Raises ValueError for a record that lacks what the method reads of it."""
        select(pair, self.method)
        if self.method.reference is not None:
            DataReference().logps(pair) if args.reference == "data" else readings(pair, self.method.reference)

    # -- reference ---------------------------------------------------------------------------------------------------

    def _make_reference(self, model, args: LongPOConfig, datasets, reference_model, reference_config):
        """-> what answers for the reference: a ReferenceStore, a Reference, a DataReference, or None."""
        if self.method.reference is None:
            return None
        if args.reference == "data":
            return DataReference()
        if reference_model is not None:
            reference_model.requires_grad_(False)
            use_shared_prefix(reference_model)
            reference = Reference(attach(reference_model), self.method.reference, args.workspace_bytes)
        elif hasattr(model, "disable_adapter"):
            config = reference_config or base_model(model).config
            reference = Reference(model, self.method.reference, args.workspace_bytes, config)
        else:
            raise ValueError(
                f"objective {self.method.name!r} compares with a reference; expected reference_model, a PEFT policy, or "
                "reference='data' with log-probs in the data set"
            )
        if args.reference == "online":
            return reference
        folder = args.reference_cache or os.path.join(args.output_dir, "reference")
        store = ReferenceStore(folder, model_digest(reference.model, reference.config), self.method.reference)
        for pairs in datasets:
            precompute(store, pairs, reference, self.method.constraint)
        return store

    def _reference_logps(self, row: Row) -> tuple[Tensor | None, Tensor | None]:
        """(B,) and (R,) log-probs of the row's pairs, for methods that compare."""
        if self.objective is None or not self.objective.needs_reference:
            return None, None
        chosen, rejected = zip(*(self.reference.logps(pair) for pair in row.pairs), strict=True)
        as_tensor = torch.tensor(chosen, dtype=torch.float64), torch.tensor(sum(rejected, ()), dtype=torch.float64)
        return tuple(t.to(self.args.device, non_blocking=True) for t in as_tensor)

    # -- loss --------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int | None:
        """Pairs of the whole step: what Eq. 14 divides by, instead of Trainer's tokens."""
        pairs = sum(inputs["row"].batch.num_pairs for inputs in batch_samples)
        if self.args.world_size > 1:
            pairs = int(self.accelerator.gather(torch.tensor([pairs], device=device)).sum())
        return pairs or None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A row's share of the step's loss; its metrics are kept for the next log."""
        row, device = inputs["row"], self.args.device
        num_pairs = float(num_items_in_batch or row.batch.num_pairs)
        compute = self._preference if self.objective is not None else self._supervised
        references = self._reference_logps(row)
        loss, metrics = model(
            input_ids=row.batch.input_ids.to(device, non_blocking=True),
            position_ids=row.batch.position_ids.to(device, non_blocking=True),
            shared_prefix_layout=row.batch.layout,
            use_cache=False,
            compute=lambda hidden, head: compute(hidden[0], head, row, references, num_pairs),
        )
        for name, values in metrics.items():
            self._sums[name].append(values.detach().float().reshape(-1))
        self._tokens += row.batch.layout.length
        loss = loss * self.args.world_size  # DDP averages over ranks; num_pairs counts the pairs of all of them
        return (loss, {}) if return_outputs else loss

    def _preference(self, hidden: Tensor, head, row: Row, references, num_pairs: float):
        batch = row.batch
        ref_chosen, ref_rejected = references
        out = head(
            hidden,
            (batch.labels, batch.segments),
            loss=packed_preference_loss,
            num_chosen=batch.num_pairs,
            rejected_pair=torch.tensor(batch.rejected_pair),
            nll_weights=batch.nll_weights if self.method.nll else None,
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
            objective=self.objective,
            num_pairs=num_pairs,
            workspace_bytes=self.args.workspace_bytes,
        )
        margins = out.chosen_rewards[list(batch.rejected_pair)] - out.rejected_rewards
        own = num_pairs / batch.num_pairs  # the two losses as means over this row's pairs
        metrics = {
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": margins > 0,
            "logps/chosen": out.chosen_logps,
            "logps/rejected": out.rejected_logps,
            "preference_loss": out.preference_loss * own,
        }
        return out.loss, metrics | ({"nll_loss": out.nll_loss * own} if self.method.nll else {})

    def _supervised(self, hidden: Tensor, head, row: Row, references, num_pairs: float):
        batch, scratch = row.batch, self.args.workspace_bytes
        nll = head(
            hidden,
            batch.labels,
            loss=linear_cross_entropy,
            row_weights=batch.nll_weights,
            reduction="sum",
            workspace_bytes=scratch,
        )
        metrics = {"nll_loss": nll / batch.num_pairs}
        if not self.method.constraint:
            return nll / num_pairs, metrics
        kl = self._constraint(hidden, head, row)
        metrics["kl"] = kl / batch.num_pairs
        return (nll + self.args.constraint_weight * kl) / num_pairs, metrics

    def _constraint(self, hidden: Tensor, head, row: Row) -> Tensor:
        """sum over pairs of mean over answer rows of KL(policy on the long input || reference on the short one)."""
        answers = (row.batch.segments >= 0).nonzero().squeeze(-1).to(hidden.device)
        teacher = [self.reference.hidden(pair) for pair in row.pairs]
        counts = torch.tensor([len(t) for t in teacher])
        if int(counts.sum()) != len(answers):
            raise ValueError(
                f"records {[pair.id for pair in row.pairs]}: {len(answers)} answer tokens in the long input, "
                f"{int(counts.sum())} in the short ones; expected the same answers in both"
            )
        weights = (1.0 / counts).repeat_interleave(counts)
        return head(
            hidden[answers],
            (),
            loss=lambda student, weight, **map: linear_kl(
                student,
                weight,
                torch.cat(teacher).to(student),
                self.reference.head().to(weight),
                kind="reverse",
                row_weights=weights.to(student.device),
                reduction="sum",
                workspace_bytes=self.args.workspace_bytes,
                **map,
            ),
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluation: the loss alone; metrics gather in log as they do in training."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    # -- logs and checkpoints ----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's numbers with the paper's, tokens per second and peak memory since the last log."""
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        for name, values in self._sums.items():
            logs[prefix + name] = float(torch.cat(values).mean())
        if self._sums and not prefix:
            logs["tokens_per_second"] = self._tokens / (time.perf_counter() - self._since)
            logs["peak_memory_gib"] = _peak_memory(self.args.device) / 2**30
        self._sums.clear()
        self._tokens, self._since = 0, time.perf_counter()
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        """Writes a checkpoint beside its place and renames it when it is whole."""
        run = Path(super()._get_output_dir(trial))
        self._partial = run / PARTIAL
        if self.args.should_save:
            shutil.rmtree(self._partial, ignore_errors=True)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._partial = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for whole in (run / PARTIAL).iterdir():
                shutil.rmtree(run / whole.name, ignore_errors=True)
                os.replace(whole, run / whole.name)
            (run / PARTIAL).rmdir()
            rotate_checkpoints(output_dir=str(run), save_total_limit=self.args.save_total_limit, use_mtime=True)

    _partial: Path | None = None

    def _get_output_dir(self, trial) -> str:
        return str(self._partial) if self._partial is not None else super()._get_output_dir(trial)


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest whole checkpoint of a run, or None."""
    return get_last_checkpoint(str(output_dir)) if os.path.isdir(output_dir) else None


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
