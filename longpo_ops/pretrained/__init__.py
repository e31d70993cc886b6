"""What a model's name or folder holds: its config, its tokenizer, its weights; what is not whole is refused by name."""

from .config import DTYPES, read_config, read_whole_config, replace_rope, text_config
from .loading import BrokenModel, is_out_of_memory, loading, trying
from .template import render as render_chat
from .tokenizer import check_ids, load_tokenizer
from .weights import build_empty, check_stored_head, check_weights, explain_zeros, load_model, require_causal_lm

__all__ = [
    "DTYPES",
    "BrokenModel",
    "build_empty",
    "check_ids",
    "check_stored_head",
    "check_weights",
    "explain_zeros",
    "is_out_of_memory",
    "load_model",
    "load_tokenizer",
    "loading",
    "read_config",
    "read_whole_config",
    "render_chat",
    "replace_rope",
    "require_causal_lm",
    "text_config",
    "trying",
]
