"""A transformers.Trainer that trains on short-to-long preference pairs, one pack of pairs at a time.

    pack -> model body with shared-prefix attention -> hidden (N, H) -> packed loss in the model's forward -> backward
    or separate: sequence by sequence through the model's own attention -> hidden of all, (N, H) -> the same loss (forward.py)

    L = lambda/P sum_pairs f + 1/P sum_pairs mean_t NLL     P = pairs of the step, over accumulation and ranks (Eq. 14)
      + c/P sum_packs P_k A_k                               a mixture of experts' load balancing A_k of pack k, P_k pairs
    A_k = sum_s T_s A_s / sum_s T_s                         of separate sequences s of T_s tokens; else of the pack at once

c is the config's router_aux_loss_coef, A_k the model's own auxiliary loss over every row of the pack, where the config
says output_router_logits. f and NLL read the same rows either way: a sequence's log-probs are its own.

What is ours: the loss (every method of methods.py), where the reference comes from, the normalisation by pairs, the
metrics, and that a run which trains nothing says so. The rest is transformers' Trainer, with the checkpoints of
checkpoints.py. A pack's rows may lie on several processes (ranks.py): each then has the whole pack on its host, runs the
model and the head on its own rows, and knows the whole pack's loss and metrics. Not covered: several packs in one forward.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import SaveStrategy

from ..data import TokenizedPair
from ..memory import search
from ..memory.cost import weight_bytes
from ..memory.optimizer import MasterOptimizer, float32_gradients
from ..memory.plan_report import allocator_advice, describe_settings
from ..memory.settings import Memory, named_optimizer
from ..ops.divergence import linear_kl
from ..ops.logprobs import linear_cross_entropy
from ..ops.objective import ROLES
from ..ops.preference import packed_objective_loss
from ..parallel import Shards
from ..runs.journal import write_atomically
from ..runs.usage import peak_bytes
from .arithmetic import Arithmetic, base_model, keep_float32_master, widen
from .checkpoints import check_one_folder
from .checks import (
    agreed_memory,
    balance_weight,
    check_not_empty,
    check_packs,
    check_pairs,
    check_positions,
    check_rates,
    check_shared_rows,
    check_trained,
    memory_file,
    packs_of,
    plan_memory,
    prepare_model,
    refuse_sharing,
    target_length,
    tell_anew,
)
from .config import LongPOConfig
from .forward import run
from .metrics import Totals, total
from .packed import Pack, PackedPairs, collate
from .ranks import RanksTrainer, check_ranks, weights_digest
from .reference import DataReference, Reference, ReferenceStore, on_device, precompute

log = logging.getLogger("longpo_ops.train")


class LongPOTrainer(RanksTrainer):
    """Trains a causal LM (or a PEFT model of one) on tokenised pairs.

    model: any causal LM that attach (ops/head.py) takes. Its forward is attached, and its attention set to shared-prefix
        attention, where that takes it and args.separate is off. `separate` says whether its sequences are separate ones.
    args: LongPOConfig. train_dataset, eval_dataset: sequences of TokenizedPair, in memory or a PairStore.
    reference_model: the frozen reference with its own RoPE settings, for methods that have one. None for
        reference="data", and for a PEFT policy, whose base is the reference under reference_config (default: its own).
    processing_class: the tokenizer, saved beside the model.

    16-bit weights that train at a rate below SMALL_STEP (arithmetic.py) become float32 ones that compute in bfloat16
    (autocast): such steps are lost in rounding otherwise. Checkpoints then hold float32 weights.

    Raises ValueError, before training, for a missing reference, for a record that lacks what the method reads, and where
    nothing could be trained (no parameter requires a gradient, a schedule whose every rate is 0), and on all ranks alike where
    they hold other settings or data; while training, at the first log or checkpoint after a loss that is not finite; at its
    end, if no weight has moved (not looked at where DeepSpeed shards them).
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
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("no parameter of the model requires a gradient, so there is nothing to train; thaw some")
        self.method = args.method
        self.objective = self.method.make_objective(args.objective_options or {})
        self._logged = Totals()  # of the steps since the last log
        self._evaluated: dict[int, dict[str, Tensor]] = {}  # of each pack of the evaluation at hand
        self._tokens, self._since = 0, 0.0  # trained on since the last log, and when the first of them came
        self._teacher_head: Tensor | None = None
        named = {"training data": train_dataset, "evaluation data": eval_dataset}
        check_ranks(args, named := {name: pairs for name, pairs in named.items() if pairs is not None})
        check_shared_rows(model, args)
        refuse_sharing(getattr(base_model(model), "is_quantized", False), args)
        check_one_folder(args)
        check_not_empty({"model": model, "reference_model": reference_model}, args)
        self.separate = prepare_model(model, args.separate) is not None
        check_trained(model, args, self.separate)
        if self.separate and args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = False  # else a pack's second forward changes what the first one saved
        self._target_length = target_length(model, args)
        datasets = list(named.values())
        longest = max(check_pairs(pairs, args, self._target_length, self.separate) for pairs in datasets)
        check_positions(model, longest)
        self.memory = (
            self._fitted(model, args, datasets, reference_model)
            if args.fit == "auto"
            else Memory.from_settings(args.memory)
        )
        args.gradient_checkpointing &= not self.memory.offload  # which does it itself
        check_packs(model, (self._packs(pairs, args) for pairs in datasets))
        if self.memory.states is None:
            keep_float32_master(model, args)
        self.reference = self._make_reference(model, args, datasets, reference_model, reference_config)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._packs(train_dataset, args),
            eval_dataset=None if eval_dataset is None else self._packs(eval_dataset, args),
            data_collator=collate,
            processing_class=processing_class,
            **kwargs,
        )
        self._untrained = weights_digest(model)
        self.model_accepts_loss_kwargs = True  # num_items_in_batch counts pairs, see _get_num_items_in_batch
        tell_anew()

    # -- memory ------------------------------------------------------------------------------------------------------

    def _fitted(self, model: nn.Module, args: LongPOConfig, datasets, reference_model: nn.Module | None) -> Memory:
        """What the planner chooses for the longest pack on this machine, or chose for the checkpoint it goes on from."""
        file = memory_file(args)
        if (kept := agreed_memory(args)) is not None:
            log.info("%s: goes on with what was planned when the run began, %s", file, kept)
            return kept
        planned = plan_memory(model, args, datasets, reference_model, self.separate)
        told = "; ".join([describe_settings(planned), *search.lossy_offers(planned, args.allow_lossy)])
        log.info("%d tokens, %.3g GiB predicted: %s", planned.work.length, planned.peak.total / 2**30, told)
        if advice := allocator_advice():
            log.warning("%s", advice)
        memory = Memory.from_plan(planned)
        if args.should_save:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, (json.dumps(dataclasses.asdict(memory), indent=1) + "\n").encode())
        return memory

    def train(self, *args, **kwargs):
        """Trainer's, with the layers tiled and offloaded as `memory` says. Raises ValueError if no weight has moved."""
        self._logged, self._tokens = Totals(), 0
        with self.memory.attached(self.model):
            output = super().train(*args, **kwargs)
        self.check_moved(
            self._untrained, "they are lost in rounding (16-bit weights keep few), or every gradient was 0"
        )
        return output

    def check_moved(self, untrained: list[int], why: str) -> None:
        """Raises ValueError where steps were made and the weights have the digest that they had before all of them."""
        steps = self.state.global_step
        if steps and not self.is_deepspeed_enabled and weights_digest(self.model) == untrained:
            raise ValueError(
                f"no weight has moved in {steps} steps of learning_rate={self.args.learning_rate:g}: {why}; raise it, or "
                "train and save in float32 (dtype)"
            )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Trainer's. Raises ValueError where each of its steps has a rate of 0."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        check_rates(scheduler, num_training_steps, self.args)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup >= num_training_steps:
            told = "warm-up takes %d steps and the run has %d: learning_rate is never reached"
            log.warning(told, warmup, num_training_steps)
        return scheduler

    def evaluate(self, *args, **kwargs):
        """Trainer's, computing as train() does."""
        with nullcontext() if self.is_in_train else self.memory.attached(self.model):
            return super().evaluate(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, or that of `memory`. Raises ValueError where another came with the trainer and `memory` has one."""
        held = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if self.memory.states is not None and not isinstance(held, MasterOptimizer):
            if held is not None or self.optimizer_cls_and_kwargs is not None:
                raise ValueError(
                    "optimizers, optimizer_cls_and_kwargs: the trainer was given an optimizer, and memory (states) or "
                    "fit='auto' one of its own; expected one of the two"
                )
            model, args = self.model if model is None else model, self.args
            decayed = set(self.get_decay_parameter_names(model))
            trained = [(name in decayed, p) for name, p in model.named_parameters() if p.requires_grad]
            if args.gradient_accumulation_steps > 1 and not self.is_fsdp_enabled:  # which gives gradients another dtype
                float32_gradients(p for _, p in trained)
            groups = [
                {"params": [p for d, p in trained if d == decays], "weight_decay": args.weight_decay * decays}
                for decays in (True, False)
            ]
            named = named_optimizer(args)
            self.optimizer = self.memory.make_optimizer(groups, **named)
            cost = weight_bytes(
                trained[0][1].dtype,
                self.memory.states,
                self.memory.master,
                optim=named["optim"],
                mixed_precision=args.mixed_precision,
                accumulation=args.gradient_accumulation_steps,
                fsdp=self.is_fsdp_enabled,
            )
            log.info("%s%s", cost, ", shared by the ranks" * self.is_fsdp_enabled)
        return super().create_optimizer(model)

    def _prepare_for_training(self, *args, **kwargs):
        """Trainer's. Sharded weights sum the gradients of several packs in float32 where `memory` has the optimizer. accelerate
        may have widened them: what they are before the first step is what none of them may still be."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled and not self.state.global_step:
            self._untrained = weights_digest(self.model)
        if self.is_fsdp_enabled and self.args.gradient_accumulation_steps > 1 and self.memory.states is not None:
            float32_gradients(self.model.parameters())
        return prepared

    def _packs(self, pairs: Sequence[TokenizedPair], args: LongPOConfig) -> PackedPairs:
        return packs_of(pairs, args, self._target_length, self.separate)

    # -- reference ---------------------------------------------------------------------------------------------------

    def _make_reference(self, model, args: LongPOConfig, datasets, reference_model, reference_config):
        """-> what answers for the reference: a ReferenceStore, a Reference, a DataReference, or None."""
        if self.method.reference is None:
            return None
        if args.reference == "data":
            return DataReference()
        policy, config = base_model(model), None
        if reference_model is not None:
            if reference_model is model:
                raise ValueError("reference_model is the policy itself; expected another model, which stays frozen")
            reference_model.requires_grad_(False)
            prepare_model(reference_model, args.separate)
            widen(reference_model, model)
        elif hasattr(model, "disable_adapter"):
            reference_model, config = model, reference_config or policy.config
        else:
            raise ValueError(
                f"objective {self.method.name!r} compares with a reference; expected reference_model, a PEFT policy, "
                "or reference='data' with log-probs in the data set"
            )
        alike = base_model(reference_model).config.model_type == policy.config.model_type
        arithmetic = Arithmetic.of_run(args.mixed_precision, self.memory.tile_rows if alike else None)
        reference = Reference(reference_model, self.method.reference, args.workspace_bytes, config, arithmetic)
        if args.reference == "online":
            return reference
        folder = args.reference_cache or os.path.join(args.output_dir, "reference")
        store = ReferenceStore(folder, reference.digest(), self.method.reference, args.process_index)
        with on_device(reference_model, args.device):
            for pairs in datasets:
                precompute(store, pairs, reference, self.method.constraint, args.process_index, args.world_size)
        args.distributed_state.wait_for_everyone()
        store.reload()
        return store

    def _references(self, pack: Pack) -> tuple[Tensor | None] | list[Tensor]:
        """(K,) log-probs of the pack's sequences, for methods that compare; hidden states (A, H) of each pair for a
        constraint. Asked before the policy's forward, as the policy may be the reference, too."""
        if self.method.constraint:
            return [self.reference.hidden(pair) for pair in pack.pairs]
        if self.objective is None or not self.objective.needs_reference:
            return (None,)
        numbers = [self.reference.logps(pair) for pair in pack.pairs]
        if self.method.sequence == "triples":
            logps = [number for first, others in numbers for number in (first, *others)]
        else:
            logps = [chosen for chosen, _ in numbers] + [number for _, rejected in numbers for number in rejected]
        return (torch.tensor(logps, dtype=torch.float64).to(self.args.device, non_blocking=True),)

    # -- loss --------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int | None:
        """Pairs of the whole step: what Eq. 14 divides by, instead of Trainer's tokens."""
        pairs = sum(inputs["pack"].batch.num_pairs for inputs in batch_samples)
        if self.args.world_size > 1:
            pairs = round(float(self._sum_over_packs(torch.tensor(pairs, device=device))))
        return pairs or None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A pack's share of the loss of a step of num_items_in_batch pairs, its own by default; its metrics are kept."""
        pack = inputs["pack"]
        if not self._tokens:
            self._since = time.perf_counter()
        loss, metrics = self._loss(model, pack, float(num_items_in_batch or pack.batch.num_pairs))
        self._logged.add(metrics)
        self._tokens += pack.batch.layout.length
        if num_items_in_batch is not None:
            loss = (
                loss * self.args.world_size
            )  # DDP and FSDP average over ranks; the step's pairs are those of all of them
        return (loss, {}) if return_outputs else loss

    def _loss(self, model, pack: Pack, num_pairs: float) -> tuple[Tensor, dict[str, Tensor]]:
        """A pack's share of the mean over num_pairs pairs, and its metrics: (2,) each, as Totals takes them."""
        device, batch = self.args.device, pack.batch
        compute = self._preference if self.objective is not None else self._supervised
        references = self._references(pack)
        shards = self._shards(batch, references)

        def at_the_head(hidden: Tensor, head):
            return compute(hidden, head, pack, references, num_pairs, shards)

        (loss, metrics), aux_loss = run(model, batch, at_the_head, device, shards, self._calls(batch))
        if aux_loss is not None:
            weight = balance_weight(base_model(self.model))
            loss = loss + weight * batch.num_pairs / num_pairs * aux_loss.to(loss)
            metrics["aux_loss"] = total(aux_loss * batch.num_pairs, batch.num_pairs)
        return loss, metrics | {"loss": total(loss * num_pairs, batch.num_pairs)}

    def _preference(self, hidden: Tensor, head, pack: Pack, references, num_pairs: float, shards: Shards | None):
        batch = pack.batch
        roles = torch.tensor([ROLES.index(role) for role in batch.roles])
        out = head(
            hidden,
            (batch.labels, batch.segments),
            loss=packed_objective_loss,
            groups=torch.tensor(batch.groups),
            roles=roles,
            num_groups=batch.num_pairs,
            nll_weights=batch.nll_weights if self.method.nll else None,
            ref_logps=references[0],
            objective=self.objective,
            denominator=num_pairs,
            workspace_bytes=self.args.workspace_bytes,
            sparse_hidden_gradient=self.args.sparse_hidden_gradient,
            correct_tokens=True,
            shards=shards,
        )
        sequences = {
            f"{what}/{role}": values[[k for k, theirs in enumerate(batch.roles) if theirs == role]]
            for what, values in (("rewards", out.rewards), ("logps", out.logps))
            for role in dict.fromkeys(batch.roles)
        }
        rejected_pair = [group for group, role in zip(batch.groups, batch.roles, strict=True) if role == "rejected"]
        margins = sequences["rewards/chosen"][rejected_pair] - sequences["rewards/rejected"]
        sequences |= {"rewards/margins": margins, "rewards/accuracies": margins > 0}
        if "anchor" in batch.roles:
            sequences["rewards/distances"] = (sequences["rewards/chosen"] - sequences["rewards/anchor"]).abs()
        pairs = {"preference_loss": out.objective_loss} | ({"nll_loss": out.nll_loss} if self.method.nll else {})
        metrics = {name: total(values, values.numel()) for name, values in sequences.items()}
        chosen = roles == ROLES.index("chosen")
        metrics["mean_token_accuracy"] = total(
            out.correct[chosen], int(chosen[batch.segments[batch.segments >= 0]].sum())
        )
        return out.loss, metrics | {name: total(share * num_pairs, batch.num_pairs) for name, share in pairs.items()}

    def _supervised(self, hidden: Tensor, head, pack: Pack, references, num_pairs: float, shards: Shards | None):
        batch = pack.batch
        nll = head(
            hidden,
            batch.labels,
            loss=linear_cross_entropy,
            row_weights=batch.nll_weights,
            reduction="sum",
            workspace_bytes=self.args.workspace_bytes,
            sparse_hidden_gradient=self.args.sparse_hidden_gradient,
            shards=shards,
        )
        metrics = {"nll_loss": total(nll, batch.num_pairs)}
        if not self.method.constraint:
            return nll / num_pairs, metrics
        kl = self._constraint(hidden, head, pack, torch.cat(references), shards)
        metrics["kl"] = total(kl, batch.num_pairs)
        return (nll + self.args.constraint_weight * kl) / num_pairs, metrics

    def _constraint(self, hidden: Tensor, head, pack: Pack, teacher: Tensor, shards: Shards | None) -> Tensor:
        """sum over pairs of the method's mean over answer rows of KL(policy on the long input || reference on the short).
        teacher: (answer rows, H) of all pairs."""
        answers = (pack.batch.segments >= 0).nonzero().squeeze(-1)
        weights = torch.cat([self._row_weights(pair) for pair in pack.pairs])
        if shards is not None:  # this rank's answer rows, maybe none
            first, end = torch.searchsorted(answers, torch.tensor([shards.rows.start, shards.rows.stop])).tolist()
            answers, weights, teacher = answers[first:end] - shards.rows.start, weights[first:end], teacher[first:end]
        if self._teacher_head is None:
            self._teacher_head = self.reference.head().to(hidden.device)
        return head(
            hidden[answers.to(hidden.device)],
            (),
            loss=lambda student, weight, **map: linear_kl(
                student,
                weight,
                teacher.to(student),
                self._teacher_head.to(weight.dtype),
                kind="reverse",
                row_weights=weights.to(student.device),
                reduction="sum",
                workspace_bytes=self.args.workspace_bytes,
                sparse_hidden_gradient=self.args.sparse_hidden_gradient,
                group=self.sequence_group,
                **map,
            ),
        )

    def _row_weights(self, pair: TokenizedPair) -> Tensor:
        """(A,) float64, what each answer row of a pair weighs in the constraint; they sum to 1. The answers of the short
        inputs are those of the long one, turn by turn (packed.select)."""
        counts = torch.tensor([len(sequence.answer_ids) for sequence in pair.ref_chosen])
        of_turn = len(counts) * counts if self.method.constraint == "turns" else counts.sum().expand(len(counts))
        return (1 / of_turn.double()).repeat_interleave(counts)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        pack = inputs["pack"]  # kept for evaluation_loop
        with torch.no_grad(), self.compute_loss_context_manager():
            _, metrics = self._loss(model, pack, float(pack.batch.num_pairs))
        self._evaluated[pack.index] = {name: share.cpu() for name, share in metrics.items()}
        return None, None, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Trainer's, with means over pairs, each counted once: the last round may give a pack to several processes."""
        began, self._evaluated = time.perf_counter(), {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        packs: dict[int, dict[str, Tensor]] = {}
        for of_process in gather_object([self._evaluated]):
            packs |= of_process
        means = Totals()
        for index in sorted(packs):
            means.add(packs[index])
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.means().items()})
        self._evaluated = {}
        self._since += time.perf_counter() - began
        return output

    # -- logs and checkpoints ----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's numbers with the paper's, tokens per second and peak memory since the last log. `loss` and `train_loss` are
        means over pairs, too, not over steps; `pairs` counts those of `loss`. Raises ValueError for a loss that is not
        finite: its step has spoilt the weights, so no checkpoint may follow."""
        if self._logged and logs.keys() & {"loss", "train_loss"}:
            logs |= self._logged.means(self._sum_over_packs)
            logs["pairs"] = self._logged.count("loss", self._sum_over_packs)
            tokens = self._sum_over_packs(torch.tensor(self._tokens, device=self.args.device))
            logs["tokens_per_second"] = float(tokens) / (time.perf_counter() - self._since)
            logs["peak_memory_gib"] = _peak_memory(self.args.device) / 2**30
            self._logged, self._tokens = Totals(), 0
        rows = [row for row in [*self.state.log_history, logs] if "pairs" in row]  # those before a checkpoint, too
        if "train_loss" in logs and rows:
            logs["train_loss"] = sum(row["loss"] * row["pairs"] for row in rows) / sum(row["pairs"] for row in rows)
        super().log(logs, start_time)
        self._check_finite(logs.get("loss", logs.get("train_loss", 0.0)))

    def _maybe_log_save_evaluate(self, tr_loss, *args, **kwargs):
        """A log comes before every checkpoint: it looks at the loss, and no sum since the last one is lost with a kill."""
        best = self.control.should_evaluate and self.args.save_strategy == SaveStrategy.BEST
        self.control.should_log |= self.control.should_save or best
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.state.global_step}, and its step has spoilt the weights; lower "
                "learning_rate, or check rope_theta, objective_options and the model. The same command goes on from the last "
                "checkpoint"
            )


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_bytes()
