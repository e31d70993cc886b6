"""Attention for long pairs: the shared prefix computed once."""

from longpo_ops.attention.registration import (
    NAME,
    SharedPrefixHandle,
    check_ranks,
    explain_attention,
    register,
    use_shared_prefix,
)
from longpo_ops.attention.rope import check_rope, rope_depends_on_length, rotary_modules
from longpo_ops.attention.shared_prefix import shared_prefix_attention
from longpo_ops.attention.ulysses import check_heads, exchanged_numbers, head_plan

__all__ = [
    "NAME",
    "SharedPrefixHandle",
    "check_heads",
    "check_ranks",
    "check_rope",
    "exchanged_numbers",
    "explain_attention",
    "head_plan",
    "register",
    "rope_depends_on_length",
    "rotary_modules",
    "shared_prefix_attention",
    "use_shared_prefix",
]
