"""What a model's name or folder holds: its config, its tokenizer, its weights; what is not whole is refused by name."""

from .config import DTYPES, read_config, read_whole_config, replace_rope
from .loading import BrokenModel, is_out_of_memory, loading, trying
from .own_attention import use_right_attention
from .quantised import NONE, check_scheme, check_trainable, is_plain, plain_parts
from .template import render as render_chat
from .text_part import check_whole, text_config
from .tokenizer import check_ids, load_tokenizer
from .weights import (
    build_empty,
    check_stored_head,
    check_weights,
    explain_zeros,
    load_model,
    require_causal_lm,
    save_text_model,
)

__all__ = [
    "DTYPES",
    "NONE",
    "BrokenModel",
    "build_empty",
    "check_ids",
    "check_scheme",
    "check_stored_head",
    "check_trainable",
    "check_weights",
    "check_whole",
    "explain_zeros",
    "is_out_of_memory",
    "is_plain",
    "load_model",
    "load_tokenizer",
    "loading",
    "plain_parts",
    "read_config",
    "read_whole_config",
    "render_chat",
    "replace_rope",
    "require_causal_lm",
    "save_text_model",
    "text_config",
    "trying",
    "use_right_attention",
]
