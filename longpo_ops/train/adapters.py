"""LoRA on a frozen body: which weights get adapters, by the names that PEFT has for its options, and which are left without.

    y = x W^T + s (drop(x) A^T) B^T     W (out, in), A (r, in), B (out, r) = 0 at first     s = alpha / r, or alpha / sqrt(r)

A and B are float32 beside 16-bit weights, and compute so but under autocast. The base with its adapters off is the reference,
so nothing else of it may train: no bias, no copy of a module (modules_to_save), no embedding and no head, which a tied model
would share with its adapters. Not covered: DoRA, AdaLoRA and other kinds than LoRA.

Tests: tests/train/test_qlora.py.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable

from torch import nn

from ..pretrained import is_plain

log = logging.getLogger("longpo_ops.train")

ALL_LINEAR = "all-linear"


def add_adapters(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str = ALL_LINEAR,
    target_parameters: str | None = None,
    use_rslora: bool = False,
) -> nn.Module:
    """-> a causal LM as a PEFT model, whose adapters alone train.

    target_modules: names of linear layers as PEFT takes them, with commas, or "all-linear": every one but the head.
    target_parameters: names of fused experts' weights, (experts, out, in), which are no layers; of some mixtures (Mixtral,
    Qwen3) PEFT adds them and the router to "all-linear", of others not: which, is told. alpha: default 2 rank.

    Raises ValueError for names that the model has not, for its head and embeddings, for dropout with fused experts, and for
    what PEFT makes no adapters on.
    """
    from peft import LoraConfig, get_peft_model

    modules, parameters = _names(target_modules), _names(target_parameters)
    fused, linear = _fused(model), _linear(model)
    if target_modules == ALL_LINEAR:
        _check_reached(model)
    else:
        _check_modules(model, modules)
    _check_parameters(parameters, fused, dropout)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        use_rslora=use_rslora,
        target_modules=ALL_LINEAR if target_modules == ALL_LINEAR else modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    model.enable_input_require_grads()
    try:
        with warnings.catch_warnings():
            # PEFT calls the ranks ignored that it gives fused experts itself, and uses them.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"lora_target_modules={target_modules}, lora_dropout={dropout}: PEFT makes no such adapters ({error}); expected "
            f"names of layers, some of {', '.join(linear)}, and no dropout of fused experts"
        ) from error
    if target_modules == ALL_LINEAR:
        made = adapted.base_model.targeted_parameter_names
        _tell_experts(set(fused) - set(made), [name for name in made if not any(_means(p, name) for p in parameters)])
    return adapted


def _tell_experts(left: set[str], added: list[str]) -> None:
    """left: fused weights that got no adapters. added: weights that got some although nobody named them."""
    if added:
        log.info("all-linear: PEFT also makes adapters on %s, which are no linear layers", ", ".join(_kinds(added)))
    if left:
        log.warning(
            "%d fused weights of experts get no adapters, as they are no linear layers: name them to train them, too "
            "(lora_target_parameters=%s)",
            len(left),
            ",".join(_kinds(left)),
        )


def _fused(model: nn.Module) -> list[str]:
    """Names of weights that hold a matrix for each expert. Convolutions have three dimensions, too, as have rows of factors."""
    weights = [
        (f"{path}.{name}".lstrip("."), weight)
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if not isinstance(module, nn.Conv1d)
    ]
    return [name for name, weight in weights if weight.ndim == 3 and min(weight.shape) > 1]


def _names(given: str | None) -> list[str]:
    return [name.strip() for name in (given or "").split(",") if name.strip()]


def _means(given: str, name: str) -> bool:
    """Whether PEFT takes a module or parameter of this name for one of the given name."""
    return name == given or name.endswith(f".{given}")


def _kinds(names: Iterable[str]) -> list[str]:
    """Names below their layer, each once."""
    return sorted({re.sub(r"^.*\.\d+\.", "", name) for name in names})


def _check_modules(model: nn.Module, given: list[str]) -> None:
    expected = f"expected {ALL_LINEAR}, or some of {', '.join(_linear(model))}"
    for target in given:
        found = [module for name, module in model.named_modules() if _means(target, name)]
        if not found:
            raise ValueError(f"lora_target_modules: no layer is named {target!r}; {expected}")
        if any(module is model.get_output_embeddings() or isinstance(module, nn.Embedding) for module in found):
            raise ValueError(
                f"lora_target_modules: {target!r} is the head or an embedding, which stay as they are; {expected}"
            )


def _check_reached(model: nn.Module) -> None:
    """Raises ValueError for quantised layers that "all-linear" passes over, as they are of a library's own kind."""
    left = [
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        and any(
            w.ndim == 2 and not is_plain(w)
            for w in (*module._parameters.values(), *module._buffers.values())
            if w is not None
        )
    ]
    if left:
        raise ValueError(
            f"lora_target_modules={ALL_LINEAR}: {len(left)} quantised layers are none that PEFT calls linear ({left[0]}, ...); "
            f"name them: {','.join(_kinds(left))}"
        )


def _linear(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    return sorted({name.rpartition(".")[2] for name in names})


def _check_parameters(given: list[str], fused: list[str], dropout: float) -> None:
    for target in given:
        if not any(_means(target, name) for name in fused):
            raise ValueError(
                f"lora_target_parameters: no fused weight is named {target!r}; expected some of "
                f"{', '.join(_kinds(fused)) or 'none, as this model has none: name layers in lora_target_modules'}"
            )
    if given and dropout:
        raise ValueError(f"lora_dropout={dropout} with lora_target_parameters, which PEFT drops nothing of: expected 0")
