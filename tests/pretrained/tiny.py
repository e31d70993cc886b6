"""Folders of tiny models: as they are saved, and with something changed in their weights or config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma4Config,
    Llama4Config,
    LlamaConfig,
    Mistral3Config,
    MixtralConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

SIZES = dict(
    vocab_size=704,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
EYE = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
LLAMA4_EYE = EYE | dict(intermediate_size=64, vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)
LLAMA4 = SIZES | dict(intermediate_size_mlp=48, num_local_experts=2)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_EYE = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
THREE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1])  # positions in time, height and width
WITH_PICTURES = {
    "gemma3": lambda: Gemma3Config(text_config=SIZES | {"sliding_window": 16}, vision_config=EYE),
    "mistral3": lambda: Mistral3Config(
        text_config=SIZES | {"model_type": "mistral"}, vision_config=EYE | {"model_type": "pixtral"}
    ),
    "llama4": lambda: Llama4Config(text_config=LLAMA4, vision_config=LLAMA4_EYE),
    "gemma4": lambda: Gemma4Config(
        text_config=SIZES
        | {"sliding_window": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
        | {"vocab_size_per_layer_input": 704, "num_kv_shared_layers": 0, "pad_token_id": 0},
        vision_config=EYE | {"num_key_value_heads": 2, "head_dim": 8},
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(text_config=SIZES | {"rope_parameters": THREE}, vision_config=QWEN_EYE),
    "qwen3_vl": lambda: Qwen3VLConfig(text_config=SIZES | {"rope_parameters": THREE}, vision_config=QWEN_EYE),
    "smolvlm": lambda: SmolVLMConfig(
        text_config=SIZES | {"model_type": "llama"}, vision_config=EYE, pad_token_id=0, scale_factor=1
    ),
}


def llama(**more) -> LlamaConfig:
    return LlamaConfig(**SIZES | more)


def mixtral() -> MixtralConfig:
    return MixtralConfig(**SIZES, num_local_experts=4)


def save(folder: Path, config, **options):
    """A model of a config, whose weights are random, those of norms and biases of one with pictures, too, in a folder -> it."""
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for weight in model.parameters() if hasattr(config, "vision_config") else ():
        torch.nn.init.normal_(weight, 0.0 if weight.ndim > 1 else 0.5, 0.2)
    model.save_pretrained(folder, **options)
    return model


def change(folder: Path, weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None, **config) -> str:
    """Changes the weights of a folder, and entries of its config."""
    if weights is not None:
        file = folder / "model.safetensors"
        save_file(weights(load_file(file)), file, metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return str(folder)
