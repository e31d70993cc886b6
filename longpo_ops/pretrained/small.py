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
from collections.abc import Sequence
from typing import Any

WIDTH, HEADS, INNER, VOCABULARY, POSITIONS = 64, 4, 96, 128, 512
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
LAST = "num_kv_shared_layers"  # a number of the last layers
READ = ("max_position_embeddings", "original_max_position_embeddings", "n_positions", "max_seq_len")
WINDOW = re.compile(r"(.*_)?(window|chunk)(_size)?|local_attention")
TOKEN = re.compile(r".*_(token_id|token_ids|idx|index)")
KEPT = re.compile(r".*(window|chunk|position|layer|factor|length|max).*")  # no widths, whatever number they have
HIDDEN = re.compile("hidden_size|n_embd|d_model|emb_dim|embedding_dim")
HEAD_COUNT = re.compile("(decoder_|encoder_|num_|n_|num_decoder_|num_encoder_|swa_num_|index_n_)?(attention_)?heads?")
KEY_HEADS = re.compile("(swa_)?num_(global_)?(key_value|kv)_heads|num_query_groups")
HEAD_SIZE = re.compile("(swa_|global_|attention_|index_)?head_dim|kv_channels|attention_head_size|d_head|dim_head")
AT_MOST = {  # by what the name of a size says of it
    re.compile("(.*_)?vocab(_size)?(_per_layer_input)?"): VOCABULARY,
    re.compile("(num_|num_local_|n_routed_|moe_num_)experts|zero_expert_num"): 4,
    re.compile("(num_|n_)?experts_per_tok(en)?|moe_top_?k|moe_k|router_top_k|(mamba_)?n_groups?|num_expert_group"): 2,
    re.compile("topk_group"): 1,
    re.compile(".*_rank|d_rel"): 16,
}
FIXED = {  # sizes that belong together, as heads and their widths do
    re.compile(".*intermediate_size.*|.*ffn_(hidden_)?(dim|size)|feed_forward_size|dim_ff|dff|d_inner|n_inner"): INNER,
    re.compile("qk_nope_head_dim|v_head_dim|mamba_d_head|mamba_head_?dim|mamba_d_state|ssm_state_size|state_size"): 16,
    re.compile("qk_rope_head_dim|rotary_dim|mamba_n_heads|mamba_num_heads"): 8,
    re.compile("qk_head_dim"): 24,
    re.compile("linear_num_key_heads"): 2,
    re.compile("linear_num_value_heads|linear_num_heads|mamba_dt_rank|time_step_rank"): 4,
    re.compile("linear_(key_|value_)?head_dim|hidden_size_per_layer_input"): 8,
    re.compile("mamba_d_ssm"): 2 * WIDTH,
}


def small_config(config: Any, window: int | None = None, layers: Sequence[int] | None = None):
    """-> a copy of a transformers config (its text part, of one with parts) cut in width.

    window: of windows and chunks that are longer; RoPE then is that of a context of POSITIONS at least. layers: indices of
    those that are kept, in order; what the config lists layer by layer is listed for these. Never raises for what it does not
    know: it leaves it.
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
        if isinstance(value, list | tuple) and layers is not None and depth:
            _put(part, name, value := _of_layers(name, value, depth, layers))
        if name in DEPTH and layers is not None and value == depth:
            _put(part, name, len(layers))
        elif name == LAST and layers is not None and depth:
            _put(part, name, sum(i >= depth - value for i in layers))
        elif (new := _smaller(name, value, sizes, window)) != value:
            _put(part, name, new)
    if isinstance(rope := values.get("rope_parameters"), dict):
        _put(part, "rope_parameters", _shrink_rope(rope, _rotary_size(_entries(part)), window))
    if spec := getattr(part, "_heterogeneity_spec", None):
        spec.per_layer_overrides = {
            place: {k: _smaller_of_layer(k, v, sizes, window) for k, v in spec.per_layer_overrides.get(i, {}).items()}
            for place, i in enumerate(range(depth) if layers is None else layers)
        }


def _of_layers(name: str, value: list | tuple, depth: int, layers: Sequence[int]) -> list | tuple:
    """What a list says of the kept layers: it has an entry for each layer, or the numbers of some."""
    numbers = all(type(n) is int and 0 <= n < depth for n in value) and sorted(set(value)) == list(value)
    if numbers and ("layer" in name or len(value) == depth):
        return type(value)(i for i, n in enumerate(layers) if n in value)
    return type(value)(value[i] for i in layers) if len(value) == depth else value


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
        hidden, heads = (
            next((v for k, v in values.items() if names.fullmatch(k) and type(v) is int), None)
            for names in (HIDDEN, HEAD_COUNT)
        )
        return cls(hidden, heads or HEADS, values.get("qk_rope_head_dim")) if hidden else None


def _smaller(name: str, value: Any, sizes: _Sizes | None, window: int | None) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_smaller(name, each, sizes, window) for each in value)
    if type(value) is not int:
        return value
    if window is not None and WINDOW.fullmatch(name):
        return min(value, window + ("chunk" in name))
    if window is not None and name in READ:
        return max(value, POSITIONS)
    if TOKEN.fullmatch(name):
        return value if value < VOCABULARY else value % VOCABULARY
    if KEPT.fullmatch(name) and not name.endswith("per_layer_input"):
        return value
    if sizes is not None and sizes.hidden <= WIDTH:
        return min(value, VOCABULARY) if name == "vocab_size" else value
    told = [None if sizes is None else _width(name, value, sizes)]
    told += [n for names, n in FIXED.items() if names.fullmatch(name)]
    told += [min(value, n) for names, n in AT_MOST.items() if names.fullmatch(name)]
    return next((new for new in told if new is not None), value)


def _smaller_of_layer(name: str, value: Any, sizes: _Sizes | None, window: int | None) -> Any:
    """What a layer has of its own; heads of a size of their own keep one."""
    wide = HEAD_SIZE.fullmatch(name) and sizes is not None and sizes.hidden > WIDTH
    return 2 * WIDTH // HEADS if wide else _smaller(name, value, sizes, window)


def _width(name: str, value: int, sizes: _Sizes) -> int | None:
    """Of what goes with the width of the model and its heads; None of what does not."""
    if HEAD_COUNT.fullmatch(name):
        return min(value, HEADS)
    if KEY_HEADS.fullmatch(name):
        return min(value, HEADS if value == sizes.heads else HEADS // 2)
    if HEAD_SIZE.fullmatch(name):
        share = value * sizes.heads / sizes.hidden  # of the width that all heads take
        return 8 if value == sizes.rotary else {1.0: WIDTH // HEADS, 2.0: 2 * WIDTH // HEADS}.get(share, 24)
    if value == sizes.hidden or (value == 2 * sizes.hidden and name.endswith("hidden_size")):
        return WIDTH * value // sizes.hidden
    return None


def _rotary_size(values: dict[str, Any]) -> int:
    own = values.get("qk_rope_head_dim") or values.get("head_dim")
    heads = next((v for k, v in values.items() if HEAD_COUNT.fullmatch(k) and type(v) is int), HEADS)
    return own or next((v for k, v in values.items() if HIDDEN.fullmatch(k) and type(v) is int), WIDTH) // heads


def _shrink_rope(rope: dict, head_size: int, window: int | None) -> dict:
    """Lists of one number for each pair of columns, to as many as there are left."""
    if any(isinstance(each, dict) for each in rope.values()):
        return {
            k: _shrink_rope(each, head_size, window) if isinstance(each, dict) else each for k, each in rope.items()
        }
    pairs = int(head_size * (rope.get("partial_rotary_factor") or 1.0)) // 2
    new = {k: v[:pairs] if k in ("short_factor", "long_factor") and isinstance(v, list) else v for k, v in rope.items()}
    new |= {name: max(rope[name], POSITIONS) for name in READ if window is not None and type(rope.get(name)) is int}
    if isinstance(sections := new.get("mrope_section"), list):
        part = pairs // len(sections)
        new["mrope_section"] = [pairs - part * (len(sections) - 1)] + [part] * (len(sections) - 1)
    return new
