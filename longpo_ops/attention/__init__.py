"""Attention for long pairs: the shared prefix computed once."""

from longpo_ops.attention.registration import NAME, SharedPrefixHandle, explain_attention, register, use_shared_prefix
from longpo_ops.attention.rope import check_rope, rope_depends_on_length
from longpo_ops.attention.shared_prefix import shared_prefix_attention

__all__ = [
    "NAME",
    "SharedPrefixHandle",
    "check_rope",
    "explain_attention",
    "register",
    "rope_depends_on_length",
    "shared_prefix_attention",
    "use_shared_prefix",
]
