"""TRL's DPOTrainer with its loss computed by fused_preference_loss.

    python examples/trl_dpo.py [--steps 3]

Data, tokenisation, logging and saving stay TRL's. Objectives that TRL lacks (SimPO, ORPO) are one argument away. The
reference is a separate model, or its log-probs are in the batch (precompute_ref_log_probs=True).
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from longpo_ops import DPO, attach

TEXT = "the cat sat on a mat and the dog ran quickly under a tree then slept slowly"


class FusedDPOTrainer(DPOTrainer):
    """DPOTrainer whose policy never makes logits. objective: any of longpo_ops' objectives."""

    def __init__(self, *args, objective, **kwargs):
        super().__init__(*args, **kwargs)
        if objective.needs_reference and self.ref_model is None and not self.precompute_ref_logps:
            raise ValueError(
                "ref_model is missing: expected a separate reference model, or precompute_ref_log_probs=True"
            )
        self.objective = objective
        attach(self.model)

    def _compute_loss(self, model, inputs, return_outputs):
        ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
        pairs = len(ids) // 2  # chosen rows first
        references = {}
        if self.objective.needs_reference:
            ref_chosen, ref_rejected = self._reference(inputs)
            references = {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}

        def preference(hidden, head):
            return head(
                (hidden[:pairs], hidden[pairs:]),
                (labels[:pairs], labels[pairs:]),
                objective=self.objective,
                **references,
            )

        out = model(input_ids=ids, attention_mask=attention_mask, use_cache=False, compute=preference)
        metrics = self._metrics["train" if self.model.training else "eval"]
        margins = out.chosen_rewards - out.rejected_rewards
        for name, values in {
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
            "logps/chosen": out.chosen_logps,
            "logps/rejected": out.rejected_logps,
        }.items():
            metrics[name].append(self.accelerator.gather(values).mean().item())
        return (out.loss, out) if return_outputs else out.loss

    def _reference(self, inputs):
        """Summed reference log-probs of chosen and rejected rows, from the batch or from TRL's reference model."""
        if "ref_chosen_logps" in inputs:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        with torch.no_grad():
            return self.compute_ref_log_probs(self.ref_model, inputs)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *dict.fromkeys(TEXT.split())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, **shape)
    )


def make_data() -> Dataset:
    rows = [
        ("the cat sat", " on the mat", " under the tree and then slept"),
        ("a dog ran", " quickly", " slowly on a mat"),
        ("the dog slept", " under the tree", " and then ran"),
        ("a cat ran", " on a mat then slept", " slowly"),
    ]
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


def make_trainer(cls, folder: str, steps: int = 3, loss_type: str = "sigmoid", **kwargs) -> DPOTrainer:
    tokenizer = make_tokenizer()
    arguments = DPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        beta=0.1,
        loss_type=loss_type,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    size = len(tokenizer)
    return cls(
        model=make_model(size),
        ref_model=make_model(size),
        args=arguments,
        train_dataset=make_data(),
        processing_class=tokenizer,
        **kwargs,
    )


def main(steps: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(FusedDPOTrainer, folder, steps, objective=DPO(beta=0.1))
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    main(parser.parse_args().steps)
