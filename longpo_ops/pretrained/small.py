"""A transformers config cut in width: the same class and the same kinds of layers, with a few thousand weights a layer.

    small_config(config)                 its depth, windows and chunks stay: for what code makes of them
    small_config(config, window=W)       windows and chunks of W rows and W + 1 at most: for what numbers they give
    small_config(config, layers=[0, 5])  only these layers, of what the config says layer by layer

Sizes are told by their names, as configs have no other sign of what a number is; what no name tells stays. Sizes that are equal
stay equal, and so do one, and the share of the width that heads take, as code goes by them. Whether a model can be built of the
result, and whether its layers are still of the same kinds, is for the caller to look at.

Tests: tests/pretrained/test_small.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

WIDTH, HEADS, INNER, VOCABULARY, EXPERTS, CHOSEN = 64, 4, 96, 128, 4, 2
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "sliding_window_size", "local_attention")


def _name(*names: str) -> re.Pattern:
    return re.compile("|".join(f"(?:{name})" for name in names))


HIDDEN = _name("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim")
HEAD_COUNT = _name(r"(decoder_|encoder_|num_|n_|num_decoder_|num_encoder_|swa_num_|index_n_)?(attention_)?heads?")
KEY_HEADS = _name(r"(swa_)?num_(global_)?(key_value|kv)_heads", "num_query_groups")
HEAD_SIZE = _name(r"(swa_|global_|attention_|index_)?head_dim", "kv_channels", "attention_head_size", "d_head", "dim_head")
RULES: tuple[tuple[re.Pattern, Callable[[int], int]], ...] = (
    (_name("vocab_size", ".*_vocab_size", "vocab_size_per_layer_input"), lambda n: min(n, VOCABULARY)),
    (_name(".*intermediate_size.*", ".*ffn_(hidden_)?dim", ".*ffn_hidden_size", "dim_ff", "dff", "d_inner", "n_inner"), lambda n: INNER),
    (_name("feed_forward_size"), lambda n: INNER),
    (_name("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), lambda n: min(n, EXPERTS)),
    (_name("(num_|n_)?experts_per_tok(en)?", "num_experts_per_tok(en)?", "moe_top_?k", "moe_k", "router_top_k"), lambda n: min(n, CHOSEN)),
    (_name("n_group", "num_expert_group"), lambda n: min(n, 2)),
    (_name("topk_group"), lambda n: 1),
    (_name("qk_nope_head_dim", "v_head_dim"), lambda n: 16),
    (_name("qk_rope_head_dim", "rotary_dim"), lambda n: 8),
    (_name("qk_head_dim"), lambda n: 24),
    (_name(".*lora_rank", ".*_rank", "d_rel"), lambda n: min(n, 16)),
    (_name("linear_num_key_heads"), lambda n: 2),
    (_name("linear_num_value_heads", "linear_num_heads"), lambda n: 4),
    (_name("linear_(key_|value_)?head_dim", "hidden_size_per_layer_input"), lambda n: 8),
    (_name("mamba_n_heads", "mamba_num_heads"), lambda n: 8),
    (_name("mamba_d_head", "mamba_head_dim", "mamba_headdim", "mamba_d_state", "ssm_state_size", "state_size"), lambda n: 16),
    (_name("mamba_d_ssm"), lambda n: 2 * WIDTH),
    (_name("mamba_dt_rank", "time_step_rank"), lambda n: 4),
    (_name("index_topk"), lambda n: n),
)
TOKEN = re.compile(r".*_(token_id|token_ids|idx|index)$")
KEPT = re.compile(r".*(window|chunk|position|layer|factor|length|max).*")  # no widths, whatever number they have


def small_config(config: Any, window: int | None = None, layers: Sequence[int] | None = None):
    """-> a copy of a transformers config (its text part, of one with parts) cut in width.

    window: of windows and chunks that are longer. layers: indices of those that are kept, in order; what the config lists layer by
    layer is listed for these. Never raises for what it does not know: it leaves it.
    """
    small = copy.deepcopy(config.get_text_config())
    _shrink(small, small, window, layers)
    return small


def _shrink(part: Any, whole: Any, window: int | None, layers: Sequence[int] | None) -> None:
    values = _entries(part)
    sizes = _Sizes.of(values) or _Sizes.of(_entries(whole))
    depth = next((values[name] for name in DEPTH if isinstance(values.get(name), int)), None)
    for name, value in values.items():
        if hasattr(value, "to_dict") or (isinstance(value, dict) and name.endswith("_config")):
            _shrink(value, whole, window, layers)
            continue
        if isinstance(value, list | tuple) and layers is not None and depth and len(value) == depth:
            numbers = range(depth) if list(value) == list(range(depth)) else value  # of all layers, by their numbers
            value = type(value)(range(len(layers)) if numbers is not value else (value[i] for i in layers))
            _put(part, name, value)
        if name in DEPTH and layers is not None and value == depth:
            _put(part, name, len(layers))
        elif (new := _smaller(name, value, sizes, window)) != value:
            _put(part, name, new)
    if isinstance(rope := values.get("rope_parameters"), dict):
        _put(part, "rope_parameters", _shrink_rope(rope, _head_size(_entries(part), sizes)))


def _entries(part: Any) -> dict[str, Any]:
    return part if isinstance(part, dict) else {k: v for k, v in vars(part).items() if not k.startswith("_")}


def _put(part: Any, name: str, value: Any) -> None:
    if isinstance(part, dict):
        part[name] = value
    else:
        part.__dict__[name] = value  # past attribute maps and checks of single fields


class _Sizes:
    """What the real config's widths were."""

    def __init__(self, hidden: int, heads: int, rotary: int | None):
        self.hidden, self.heads, self.rotary = hidden, heads, rotary

    @classmethod
    def of(cls, values: dict[str, Any]) -> _Sizes | None:
        hidden = next((v for k, v in values.items() if HIDDEN.fullmatch(k) and isinstance(v, int)), None)
        heads = next((v for k, v in values.items() if HEAD_COUNT.fullmatch(k) and isinstance(v, int)), None)
        return None if hidden is None or not heads else cls(hidden, heads, values.get("qk_rope_head_dim"))


def _smaller(name: str, value: Any, sizes: _Sizes | None, window: int | None) -> Any:
    if isinstance(value, list | tuple) and not isinstance(value, str):
        return type(value)(_smaller(name, each, sizes, window) for each in value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name in WINDOWS and window is not None:
        return min(value, window + name.startswith("attention_chunk"))
    if TOKEN.fullmatch(name):
        return value if value < VOCABULARY else value % VOCABULARY
    if KEPT.fullmatch(name) and not name.endswith("per_layer_input"):
        return value
    if sizes is not None:
        if HEAD_COUNT.fullmatch(name):
            return min(value, HEADS)
        if KEY_HEADS.fullmatch(name):
            return min(value, HEADS) if value == sizes.heads else min(value, HEADS // 2)
        if HEAD_SIZE.fullmatch(name):
            return 8 if value == sizes.rotary else _new_head_size(value, sizes)
        if value == sizes.hidden and value > WIDTH:
            return WIDTH
        if value == 2 * sizes.hidden and name.endswith("hidden_size"):
            return 2 * WIDTH
    return next((rule(value) for pattern, rule in RULES if pattern.fullmatch(name)), value)


def _new_head_size(value: int, sizes: _Sizes) -> int:
    ratio = value * sizes.heads / sizes.hidden
    return {1.0: WIDTH // HEADS, 2.0: 2 * WIDTH // HEADS}.get(ratio, 24)


def _head_size(values: dict[str, Any], sizes: _Sizes | None) -> int:
    rotary = values.get("qk_rope_head_dim") or values.get("head_dim")
    return rotary or WIDTH // HEADS


def _shrink_rope(rope: dict, head_size: int) -> dict:
    """Lists of one number for each pair of columns, to as many as there are left."""
    if any(isinstance(each, dict) for each in rope.values()):
        return {k: _shrink_rope(each, head_size) if isinstance(each, dict) else each for k, each in rope.items()}
    pairs = int(head_size * (rope.get("partial_rotary_factor") or 1.0)) // 2
    new = {k: v[:pairs] if k in ("short_factor", "long_factor") and isinstance(v, list) else v for k, v in rope.items()}
    if isinstance(sections := new.get("mrope_section"), list):
        part = pairs // len(sections)
        new["mrope_section"] = [pairs - part * (len(sections) - 1)] + [part] * (len(sections) - 1)
    return new
