"""What a model's name or folder holds: its config, its tokenizer, its weights; what is not whole is refused by name."""

from .config import DTYPES, loading, read_config, read_whole_config, replace_rope, text_config
from .tokenizer import check_ids, load_tokenizer
from .weights import build_empty, check_weights, explain_zeros, load_model, require_causal_lm

__all__ = [
    "DTYPES",
    "build_empty",
    "check_ids",
    "check_weights",
    "explain_zeros",
    "load_model",
    "load_tokenizer",
    "loading",
    "read_config",
    "read_whole_config",
    "replace_rope",
    "require_causal_lm",
    "text_config",
]
