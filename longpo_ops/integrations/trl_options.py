"""What FusedDPOTrainer does with each option of TRL's DPOTrainer: takes it as TRL does, or refuses it by name.

    DPOConfig's own options    OWN: each is taken, or refused unless it has a value that changes nothing
    those of Trainer           taken, but for REFUSED: what reads logits, padding or layers that are not there
    options that are in neither are refused where they are set: TRL was not read with them

Everything here looks at names and values alone, so that nothing is loaded before it is refused.

Tests: tests/integrations/test_trl.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import trl
from transformers import TrainingArguments
from trl import DPOConfig

from .. import launch

VERSIONS = ("1.16",)  # whose code was read, and whose numbers the tests compare with

Refused = tuple[tuple[Any, ...], str]  # values that change nothing, and why others are refused, with what to do

# DPOConfig's own options: None where it is taken as TRL takes it.
OWN: dict[str, Refused | None] = {
    **dict.fromkeys(("learning_rate", "logging_steps", "gradient_checkpointing", "bf16", "lr_scheduler_kwargs")),
    **dict.fromkeys(("torch_empty_cache_steps", "model_init_kwargs", "trust_remote_code", "dataset_num_proc")),
    **dict.fromkeys(("max_length", "precompute_ref_log_probs", "precompute_ref_batch_size", "pad_token", "beta")),
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")),
    **dict.fromkeys(("loss_type", "loss_weights", "label_smoothing", "discopop_tau")),  # trl_losses.py looks
    **dict.fromkeys(("f_divergence_type", "f_alpha_divergence_coef")),
    "padding_free": None,  # nothing is padded, with it or without
    "router_aux_loss_coef": None,  # check_model looks at it
    "disable_dropout": ((True,), "a pack drops a shared prefix out once for both answers; leave it True"),
    "truncation_mode": (
        ("keep_start",),
        "answers of unequal length would lose unequal beginnings of the prompt, which then is not shared; use 'keep_start', or "
        "shorten prompts before",
    ),
    "pad_to_multiple_of": ((None,), "nothing is padded; leave it out"),
    "ld_alpha": ((None,), "log-probs are summed with one weight for all tokens; leave it out, or use TRL's DPOTrainer"),
    "use_weighting": ((False,), "its weights need sums over the vocabulary that are not made; use TRL's DPOTrainer"),
    "activation_offloading": (
        (False,),
        "TRL's hooks do not know the packs; use longpo_ops.train.LongPOTrainer with memory={'offload': ...}",
    ),
    "use_liger_kernel": ((False,), "its kernels replace layers and losses that are replaced here; leave it False"),
}

# Trainer's options that are not taken.
REFUSED: dict[str, Refused] = {
    "neftune_noise_alpha": (
        (None,),
        "a pack would draw the noise of a shared prefix once for both answers; leave it out",
    ),
    "torch_compile": ((False,), "each pack has a layout of its own, which would be compiled anew; leave it False"),
    "parallelism_config": (
        (None,),
        "packs of this trainer are not cut over processes; use longpo_ops.train.LongPOTrainer",
    ),
    "fsdp": ((None, "", [], False), "it was not tried with this trainer; use longpo_ops.train.LongPOTrainer"),
    "deepspeed": ((None,), "it was not tried with this trainer; use longpo_ops.train.LongPOTrainer"),
}


def check_version() -> None:
    """Raises ValueError for a TRL that this was not written for."""
    if ".".join(trl.__version__.split(".")[:2]) not in VERSIONS:
        raise ValueError(
            f"trl {trl.__version__}: FusedDPOTrainer is written for TRL {' and '.join(VERSIONS)}, whose numbers it is held to; "
            f"install trl=={VERSIONS[-1]}.*, or use longpo_ops.train.LongPOTrainer, which needs no TRL"
        )


def check_options(args: DPOConfig) -> None:
    """Raises ValueError naming an option that cannot be honoured, or that nothing is known of."""
    for name, launched in (("fsdp", launch.is_sharded()), ("deepspeed", launch.is_deepspeed())):
        if launched:
            raise ValueError(f"{name} in the launcher's file: {REFUSED[name][1]}")
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        rule = OWN.get(field.name) or REFUSED.get(field.name)
        if rule is not None and not any(value is plain or value == plain for plain in rule[0]):
            raise ValueError(f"{field.name}={value!r}: {rule[1]}")
        if field.name not in known_options() and field.init and value != _default(field):
            raise ValueError(
                f"{field.name}={value!r}: FusedDPOTrainer does not know this option of {type(args).__name__}; leave it out, or "
                "use TRL's DPOTrainer"
            )


def known_options() -> set[str]:
    """Names of all options that something is known of."""
    return set(OWN) | {field.name for field in dataclasses.fields(TrainingArguments)}


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def check_model(config, args: DPOConfig) -> None:
    """Raises ValueError for a model that TRL would train with more than text and answers: by its config alone."""
    text = config.get_text_config()
    if text is not config:
        raise ValueError(
            f"model: {type(config).__name__} also reads pictures or sound, and its batches would; expected a text model: "
            "longpo_ops.pretrained.save_text_model saves its text part as one"
        )
    coefficient = args.router_aux_loss_coef
    coefficient = getattr(text, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
    if coefficient and hasattr(text, "output_router_logits"):
        raise ValueError(
            f"router_aux_loss_coef={coefficient:g}: the load of a mixture's experts is counted over a pack, which holds a "
            "prompt once, and would not be TRL's; set it to 0.0, or use longpo_ops.train.LongPOTrainer, which counts so"
        )
