"""Training on preference pairs: the trainer, its settings, the reference and the packs it draws."""

from .checkpoints import last_checkpoint
from .config import LongPOConfig
from .methods import METHODS, Method
from .packed import PackedPairs, PairStore
from .reference import Reference, ReferenceStore
from .trainer import LongPOTrainer

__all__ = [
    "METHODS",
    "LongPOConfig",
    "LongPOTrainer",
    "Method",
    "PackedPairs",
    "PairStore",
    "Reference",
    "ReferenceStore",
    "last_checkpoint",
]
