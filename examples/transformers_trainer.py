"""Preference training with transformers.Trainer: one method of a subclass, and no logits.

    python examples/transformers_trainer.py [--steps 10]

Trainer wraps, clips, schedules and saves as ever. `longpo_ops.train.LongPOTrainer` is the full form: shared prefixes,
reference cache, every method.
"""

import argparse
import tempfile

import torch
from bare_loop import PAIRS, make_model, make_pairs
from transformers import Trainer, TrainingArguments

from longpo_ops import SimPO


class PreferenceTrainer(Trainer):
    """Rows alternate: the chosen sequence of a pair, then its rejected one."""

    def __init__(self, *args, objective, **kwargs):
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs, not over tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]

        def preference(hidden, head):
            return head((hidden[::2], hidden[1::2]), (labels[::2], labels[1::2]), objective=self.objective)

        out = model(input_ids=inputs["input_ids"], use_cache=False, compute=preference)
        return (out.loss, {"margins": out.chosen_rewards - out.rejected_rewards}) if return_outputs else out.loss


def main(steps: int) -> list[float]:
    model, (ids, labels) = make_model(), make_pairs()
    rows = [{"input_ids": ids[row], "labels": labels[row]} for pair in range(PAIRS) for row in (pair, PAIRS + pair)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=2 * PAIRS,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = PreferenceTrainer(model, arguments, train_dataset=rows, objective=SimPO(beta=2.0, gamma=0.5))
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    main(parser.parse_args().steps)
