"""TRL's DPOTrainer with our loss, references and batches.

    dataset --TRL's tokenisation--> prompt, chosen, rejected ids --PackCollator--> one pack of B pairs
    [prompt | chosen | rejected] per pair, no padding -> body with shared-prefix attention -> hidden (N, H)
      -> packed_preference_loss: float32 logits, float64 sums, 6 N H V operations
    L = sum_m w_m / B sum_b f_m(S)         f_m the objective of loss_type m, as TRL averages over the pairs of a batch

A prompt of P tokens with answers of C and R is P + C + R + 1 rows where TRL has 2 (P + max(C, R)), and its body runs them once.
Models that share no prefix run sequence by sequence, unpadded (train/forward.py). References: TRL's columns
(precompute_ref_log_probs), computed on packs; else ref_model, or the policy without its adapters, on the same pack as the
policy. Everything else is TRL's: its options (trl_options.py says which are refused), its data, metrics by its names,
checkpoints.

Metrics: rewards/chosen, /rejected, /margins, /accuracies, logps/chosen, /rejected, mean_token_accuracy, num_tokens. Not logged,
as they read whole rows of logits: entropy, logits/chosen, logits/rejected. Not covered: FSDP, DeepSpeed, vision.

Tests: tests/integrations/test_trl.py.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, ProcessorMixin
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..data import PairBatch, TokenizedPair, TokenSequence, pack
from ..data.tokenized import IGNORE
from ..kinds import check_object
from ..ops.logprobs import linear_logprobs
from ..ops.objective import Objective
from ..ops.preference import packed_preference_loss
from ..train.checks import check_separate, prepare_model
from ..train.forward import run
from .trl_losses import make_objective, own_objective
from .trl_options import check_model, check_options, check_version


@dataclass(frozen=True, slots=True)
class PreferencePack:
    """A pack of a batch on its way through a DataLoader. Without a `to` it stays on the host, where its rows are planned."""

    batch: PairBatch
    tokens: int  # of all sequences, a prompt counted once for each
    ref_logps: Tensor | None  # (2, B) float64, chosen and rejected, where the data set holds them


class PackCollator:
    """Rows of TRL's tokenised data set -> {"pack": PreferencePack}. separate: of a model that shares no prefix.

    max_length: of a sequence, prompt and answer; what is beyond is cut off, as TRL does (truncation_mode="keep_start").
    """

    def __init__(self, max_length: int | None):
        self.max_length, self.separate = max_length, False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, PreferencePack]:
        pairs = [self._pair(row) for row in rows]
        batch, ref_logps = pack(pairs, separate=self.separate), None
        if "ref_chosen_logps" in rows[0]:
            columns = [[row[f"ref_{side}_logps"] for row in rows] for side in ("chosen", "rejected")]
            ref_logps = torch.tensor(columns, dtype=torch.float64)
        tokens = sum(len(sequence) for pair in pairs for sequence in (pair.chosen, *pair.rejected))
        return {"pack": PreferencePack(batch, tokens, ref_logps)}

    def _pair(self, row: dict[str, Any]) -> TokenizedPair:
        if not row["prompt_ids"]:
            raise ValueError(
                f"prompt_ids is empty (chosen_ids {row['chosen_ids'][:8]}): nothing precedes the first token of the answers, "
                "which TRL leaves out of its sums; expected a prompt of at least one token, such as a begin-of-sequence token"
            )
        chosen, rejected = (self._sequence(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected"))
        return TokenizedPair("row", chosen, (rejected,))

    def _sequence(self, prompt: list[int], answer: list[int]) -> TokenSequence:
        ids = np.array([*prompt, *answer], dtype=np.int64)[: self.max_length]
        labels = ids.copy()
        labels[: len(prompt)] = IGNORE
        if len(ids) <= len(prompt):
            raise ValueError(
                f"a prompt of {len(prompt)} tokens with an answer of {len(answer)}: no token of the answer is left within "
                f"max_length={self.max_length}; raise it, or leave the row out"
            )
        return TokenSequence(ids, labels)


class FusedDPOTrainer(DPOTrainer):
    """DPOTrainer that makes no logits, pads nothing and reads a prompt once. Arguments as of TRL's, and:

    objective: an object of longpo_ops' objectives (SimPO(), ORPO(), one's own) in the place of args.loss_type.

    Raises ValueError, before anything is loaded, for another version of TRL, an option that cannot be honoured
    (trl_options.py), a data_collator, compute_metrics, a vision model, and adapters that read tokens of their own (prompt
    learning); for a model that prepare_model (train/checks.py) refuses; in a batch, for a prompt or an answer without tokens.
    Source: arXiv 2305.18290 and what each objective names.
    """

    def __init__(
        self,
        model,
        ref_model=None,
        args: DPOConfig | None = None,
        data_collator=None,
        *more,
        objective: Objective | None = None,
        compute_metrics=None,
        processing_class=None,
        peft_config=None,
        **kwargs,
    ):
        check_version()
        if more:
            raise ValueError(f"{len(more)} arguments came by position after data_collator; give them by name")
        self._refuse(model, data_collator, compute_metrics, processing_class, peft_config)
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path or type(model).__name__
            args = DPOConfig(f"{name.split('/')[-1]}-DPO")
        check_object("args", args, DPOConfig, "a DPOConfig")
        check_object("objective", objective, Objective | None, "an object of longpo_ops.ops.objectives, or None")
        check_options(args)
        self.objective = make_objective(args) if objective is None else own_objective(objective, args)
        self._own_rewards = objective is not None
        check_model(self._config(model, args), args)
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=PackCollator(args.max_length),
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        self._prepare_models()

    @staticmethod
    def _refuse(model, data_collator, compute_metrics, processing_class, peft_config) -> None:
        if data_collator is not None:
            raise ValueError("data_collator: a batch is a pack, which this trainer makes itself; leave it out")
        if compute_metrics is not None:
            raise ValueError(
                "compute_metrics: it reads logits, and none are made; leave it out, or use TRL's DPOTrainer"
            )
        if isinstance(processing_class, ProcessorMixin):
            raise ValueError(
                f"processing_class: {type(processing_class).__name__} also reads pictures or sound, which packs do not hold; "
                "give its tokenizer, and a text model"
            )
        adapters = [] if peft_config is None else [peft_config]
        adapters += (getattr(model, "peft_config", None) or {}).values()
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters):
            raise ValueError(
                "peft_config: prompt learning puts rows of its own before a text; expected LoRA or its like"
            )

    @staticmethod
    def _config(model, args: DPOConfig):
        if not isinstance(model, str):
            return model.config
        named = {k: v for k, v in (args.model_init_kwargs or {}).items() if k in ("revision", "token", "cache_dir")}
        return AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, **named)

    def _prepare_models(self) -> None:
        """Shared-prefix attention and a forward that stops at the hidden states, where they are not there yet."""
        collator = self.data_collator
        for model in filter(None, (self.model, self.ref_model)):
            if not hasattr(_causal(model), "_longpo_ops_attached"):
                collator.separate |= prepare_model(self.accelerator.unwrap_model(model)) is not None
        if collator.separate:
            check_separate(self.model, self.args, None)
            if self.args.ddp_broadcast_buffers is None:
                self.args.ddp_broadcast_buffers = False  # else a pack's second forward changes what the first one saved

    # -- references --------------------------------------------------------------------------------------------------

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        """TRL's, on packs, under a key of its own: sums of 16-bit logits are other numbers."""
        self._prepare_models()
        self._precompute_model_hash = f"{self._precompute_model_hash}-longpo_ops-{self.args.mixed_precision}"
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, PreferencePack]) -> tuple[Tensor, Tensor]:
        """(B,) and (B,) float64: what the reference says of chosen and rejected answers."""
        batch = inputs["pack"].batch
        adapters: Any = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            adapters = use_adapter(policy, "ref" if "ref" in policy.peft_config else None)

        def sums(hidden: Tensor, head) -> Tensor:
            labels = batch.labels.where(batch.segments >= 0, IGNORE)
            logps = head(hidden, labels, loss=linear_logprobs).double()
            segments = batch.segments.to(logps.device)
            into = logps.new_zeros(2 * batch.num_pairs)
            return into.index_add_(0, segments.clamp(min=0), logps.where(segments >= 0, 0.0))

        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapters,
            self.accelerator.autocast(),
        ):
            return run(model, batch, sums, self.accelerator.device)[0].chunk(2)

    def _references(self, inputs: dict[str, PreferencePack]) -> tuple[Tensor | None, Tensor | None]:
        if not self.objective.needs_reference:
            return None, None
        if self.precompute_ref_logps:
            return inputs["pack"].ref_logps.to(self.accelerator.device).unbind()
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)

    # -- loss --------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs: dict[str, PreferencePack], return_outputs: bool):
        if return_outputs:
            raise ValueError(
                "return_outputs: logits are not made; expected prediction_loss_only=True, or TRL's DPOTrainer"
            )
        pack = inputs["pack"]
        references, batch = self._references(inputs), pack.batch  # before the policy, which may be the reference, too

        def loss(hidden: Tensor, head):
            return head(
                hidden,
                (batch.labels, batch.segments),
                loss=packed_preference_loss,
                num_chosen=batch.num_pairs,
                rejected_pair=torch.tensor(batch.rejected_pair),
                ref_chosen_logps=references[0],
                ref_rejected_logps=references[1],
                objective=self.objective,
                correct_tokens=True,
            )

        out, _ = run(model, batch, loss, self.accelerator.device)
        self._note(pack, out, references)
        return out.loss

    def _note(self, pack: PreferencePack, out, references) -> None:
        """TRL's metrics. Its rewards are beta (log pi - log pi_ref) whatever the loss; `objective` has its own."""
        mode = "train" if self.model.training else "eval"
        chosen, rejected = out.chosen_rewards, out.rejected_rewards
        if not self._own_rewards:
            chosen, rejected = (
                self.beta * (logps - reference.to(logps))
                for logps, reference in zip((out.chosen_logps, out.rejected_logps), references, strict=True)
            )
        for name, values in {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": out.chosen_logps,
            "logps/rejected": out.rejected_logps,
        }.items():
            self._metrics[mode][name].append(self.accelerator.gather(values).mean().item())
        segments, count = pack.batch.segments, pack.batch.num_pairs
        answer_tokens = int(((segments >= 0) & (segments < count)).sum())  # of chosen answers, which the accuracy is of
        sums = torch.stack([out.chosen_correct.sum(), out.chosen_correct.new_tensor(answer_tokens)])
        correct, answer_tokens = self.accelerator.gather(sums).view(-1, 2).sum(0).tolist()
        self._metrics[mode]["mean_token_accuracy"].append(correct / answer_tokens)
        if mode == "train":
            tokens = torch.tensor(pack.tokens, device=self.accelerator.device)
            self._total_train_tokens += self.accelerator.gather(tokens).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def _causal(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
