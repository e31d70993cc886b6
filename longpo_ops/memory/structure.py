"""What a model is made of, as far as a plan needs it: layers by kind, and numbers of weights by what becomes of them.

Layers are of one kind where modules, shapes, flags (is_sliding, use_rope) and the config's layer type are the same: what one of
them takes, all take. Found on the meta device, so that mixtures whose first layers are dense, and layers that see windows or
chunks by turns, are planned as they are. A structure that the planner does not know is refused by name.

Tests: tests/memory/test_plan_structures.py.
"""

from __future__ import annotations

import copy
import functools
from typing import NamedTuple

import torch
from torch import nn

from longpo_ops.memory.adapters import Adapters
from longpo_ops.memory.stand_in import attend

NAME = "longpo_ops_plan"  # of the attention that a traced model is built with
BY_HAND = "set memory by hand, and fit to 'off'"
SEEN = {"full_attention": None, "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


class Config(NamedTuple):
    """A config that hashes by what it says."""

    key: str
    config: object

    @classmethod
    def of(cls, config) -> Config:
        return cls(config.to_json_string(use_diff=False), config)

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return self.key == other.key


class Weights(NamedTuple):
    """Numbers of weights. each: of every layer, all experts of a mixture included. kinds: for every layer the first one that is
    alike. tied: whether the head is the embedding.

    With adapters: total, each and embedding are the frozen base's; quantised are those of it that are kept in base_bits.
    trained: numbers that have gradients and states, by layer and in all; largest: of the largest weight among them.
    """

    total: int
    each: tuple[int, ...]
    kinds: tuple[int, ...]
    embedding: int
    largest: int
    tied: bool
    trained: int
    trained_each: tuple[int, ...]
    quantised: int = 0

    @property
    def layers(self) -> int:
        return len(self.each)

    @property
    def layer(self) -> int:
        """Of the largest layer."""
        return max(self.each)

    @property
    def counts(self) -> dict[int, int]:
        """Layers of each kind, by its first one."""
        return {kind: self.kinds.count(kind) for kind in dict.fromkeys(self.kinds)}


def weights_of(config, adapters: Adapters | None = None) -> Weights:
    """Raises ValueError for a model whose structure the planner does not know."""
    return _weights(Config.of(config), adapters)


@functools.lru_cache(maxsize=64)
def _weights(config: Config, adapters: Adapters | None) -> Weights:
    model = build(config.config)
    layers = check_structure(model, config.config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total, each = _numbers(model.parameters()), tuple(_numbers(layer.parameters()) for layer in layers)
    kinds = _kinds(layers, config.config)
    quantised = 0
    if adapters is not None:
        quantised = adapters.put_on(model)
    return Weights(
        total=total,
        each=each,
        kinds=kinds,
        embedding=embedding.numel(),
        largest=max(p.numel() for p in model.parameters() if p.requires_grad),
        tied=embedding is head,
        trained=_numbers(p for p in model.parameters() if p.requires_grad),
        trained_each=tuple(_numbers(p for p in layer.parameters() if p.requires_grad) for layer in layers),
        quantised=quantised,
    )


def _numbers(parameters) -> int:
    return sum(p.numel() for p in parameters)


def build(config, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model on the meta device, all layers or the first few. Raises ValueError for what is no causal LM, and for one whose
    attention, or layers, the planner cannot reach."""
    from transformers import AttentionInterface

    from longpo_ops.pretrained import BrokenModel, build_empty

    AttentionInterface.register(NAME, attend)
    config = copy.deepcopy(config) if layers is None else first_layers(config, layers)
    try:
        model = build_empty(config, dtype=dtype, attn_implementation=NAME)
    except BrokenModel as error:
        if NAME not in str(error.__cause__):
            raise
        raise ValueError(
            f"model {config.name_or_path!r}: a model of type {config.model_type!r} cannot be planned: it takes no "
            "attention but those of its own code, and the planner puts one of its own in place"
        ) from error
    body_of(model)
    return model


def body_of(model: nn.Module) -> nn.Module:
    """What has the layers. Raises ValueError where they are elsewhere than in `layers`."""
    for child in model.children():
        if isinstance(getattr(child, "layers", None), nn.ModuleList):
            return child
    body = getattr(model, model.base_model_prefix, model)
    raise ValueError(
        f"model {model.config.name_or_path!r}: {type(model).__name__} cannot be planned: the planner looks for the layers in "
        f"`layers` of the body, and a {type(body).__name__} has them elsewhere; {BY_HAND}"
    )


def check_structure(model: nn.Module, config) -> nn.ModuleList:
    """-> the layers. Raises ValueError where what a step of them takes is not known, saying what to do."""
    layers = body_of(model).layers
    name = f"model {config.name_or_path!r}: {type(model).__name__} cannot be planned"
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"{name}: it has no gradient checkpointing, which every plan rests on; {BY_HAND}")
    for i, layer in enumerate(layers):
        kind, state = layer_type(config, i), _state(layer)
        if state or kind not in SEEN:
            raise ValueError(
                f"{name}: layer {i} ({f'a {state}' if state else kind}) carries a state from token to token, and the planner "
                f"does not know what its kernels take; {BY_HAND}"
            )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"{name} with output_router_logits: what the loss of its experts' load takes is not known; set it to false in "
            f"config.json, or {BY_HAND}"
        )
    return layers


def _state(layer: nn.Module) -> str | None:
    """What in a layer mixes rows and is no attention: a convolution over them, or the decay of a recurrence (A_log)."""
    for module in layer.modules():
        if isinstance(module, nn.Conv1d) or any(name == "A_log" for name, _ in module.named_parameters(recurse=False)):
            return type(module).__name__
    return None


def layer_type(config, layer: int) -> str:
    types = getattr(config, "layer_types", None)
    if types:
        return types[layer]
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def window_of(config, layer: int) -> int | None:
    """Keys that a query of the layer sees at most, itself included; of chunks as many as on average; None for all."""
    kind = layer_type(config, layer)
    keys = getattr(config, SEEN[kind], None) if SEEN[kind] else None
    return max(1, keys // 2) if keys and kind == "chunked_attention" else keys


def _kinds(layers: nn.ModuleList, config) -> tuple[int, ...]:
    first: dict[tuple, int] = {}
    return tuple(first.setdefault((layer_type(config, i), *_looks(layer)), i) for i, layer in enumerate(layers))


def _looks(layer: nn.Module) -> tuple:
    modules = tuple((name, type(m).__name__, _flags(m)) for name, m in layer.named_modules())
    return modules, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())


def _flags(module: nn.Module) -> tuple:
    return tuple((name, value) for name, value in sorted(vars(module).items()) if isinstance(value, bool))


def first_layers(config, layers: int):
    """A copy of a config that has its first layers only; lists that say something of every layer are cut with them."""
    config, before = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == before:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config


def one_layer(
    config, layer: int, dtype: torch.dtype, adapters: Adapters | None = None
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """-> a model whose only layer is that one of the config, its body, and the layer. Other kinds of layers leave what the body
    computes for them: each layer type its own positions."""
    kinds = weights_of(config).kinds
    model = build(config, 1 + max(kinds), dtype)
    if adapters is not None:
        adapters.put_on(model)
    body = body_of(model)
    body.layers = body.layers[layer : layer + 1]
    if types := getattr(body.config, "layer_types", None):
        body.config.layer_types = [types[layer], *types[:layer], *types[layer + 1 :]]
    body.config.num_hidden_layers = 1
    return model, body, body.layers[0]
