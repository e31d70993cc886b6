"""DPO by TRL's trainer, with its loss, its references and its batches from here: no logits, no padding, each prompt once.

    python examples/trl_dpo.py [--model NAME] [--data rows.jsonl] [--steps 6]

Rows have prompt, chosen and rejected, as TRL takes them (texts or messages). What differs from a script of TRL's own is one
name.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from trl import DPOConfig

from longpo_ops.integrations.trl import FusedDPOTrainer

TINY = Path(__file__).parent / "tiny" / "model"
ROWS = [
    {"prompt": f"The port of {i} is ", "chosen": f"open, and {i} ships lie in it.", "rejected": "closed."}
    for i in range(8)
]


def main(model: str, data: str | None, steps: int) -> list[float]:
    rows = Dataset.from_json(data) if data else Dataset.from_list(ROWS)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            loss_type="sigmoid",  # or ipo, hinge, robust, ...: docs/objectives.md
            beta=0.1,
            max_length=None,  # TRL cuts at 1,024 tokens otherwise
            precompute_ref_log_probs=True,  # the reference reads all once, and then leaves memory
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            max_steps=steps,
            logging_steps=1,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
        )
        trainer = FusedDPOTrainer(model, args=args, train_dataset=rows)
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=6)
    main(**vars(parser.parse_args()))
