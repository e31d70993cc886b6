"""Training on preference pairs: the trainer, its settings, the reference and the rows it draws."""

from .config import LongPOConfig
from .methods import METHODS, Method
from .reference import Reference, ReferenceStore
from .rows import PairRows, PairStore
from .trainer import LongPOTrainer, last_checkpoint

__all__ = [
    "METHODS",
    "LongPOConfig",
    "LongPOTrainer",
    "Method",
    "PairRows",
    "PairStore",
    "Reference",
    "ReferenceStore",
    "last_checkpoint",
]
