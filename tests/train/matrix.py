"""Every causal LM of the installed transformers: what training makes of it, and whether its numbers are right.

    outcome(kind)   a small model of the kind's default config, every parameter random, goes to the trainer; a step that it
                    takes, packed or separate, is held against plain logits of separate sequences in loss, log-probs and
                    every gradient

As a script it writes the matrix of docs/models.md, which the tests hold against what comes of each kind:

    python -m tests.train.matrix [KIND ...]

Without names it writes the page, with names it prints their rows. Not covered: numbers of real size, which only weights have.
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longpo_ops.attention.proof import prove
from longpo_ops.pretrained.probe import Refused, build, pick_layers, randomise
from longpo_ops.pretrained.small import small_config
from longpo_ops.pretrained.text_part import check_text_part, has_parts
from longpo_ops.train.forward import shares_prefix

from .step import errors, make, plain_step, step_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"
WINDOW = 5
TOLERANCE = 2e-3  # of float32: roundings stay below 1e-4, faults above 1e-2
WAYS = {
    "packed": "The prefix of a pair is computed once, as was proved.",
    "separate": "Sequences are computed one by one, by the model's own attention.",
    "text part": "The text model inside is trained with `--text-only`.",
    "refused": "No training.",
    "not tried": "No small model of the default config came to be, so that there is nothing to compare with.",
}
ROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[22, 22, 20])
TOLD = {  # what default configs do not say that their models need; or fewer layers, where they cannot be cut
    "cohere_compass_text": dict(rope_parameters=dict(full_attention=ROPE, sliding_attention=ROPE)),
    "deepseek_v2": dict(num_experts_per_tok=2, topk_group=1, n_group=1),
    "dots1": dict(n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 16),
    "hrm_text": dict(num_hidden_layers=32, num_layers_per_stack=4),
    "hunyuan_v1_dense": dict(head_dim=128),
    "hunyuan_v1_moe": dict(head_dim=128),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 16),
    "laguna": dict(num_hidden_layers=8),
    "longcat_flash": dict(num_layers=2, num_hidden_layers=4),
    "minimax": dict(num_hidden_layers=8),
    "ministral": dict(head_dim=128),
    "nemotron": dict(num_key_value_heads=8),
    "xlstm": dict(num_hidden_layers=2, num_blocks=2),
    "zamba": dict(num_hidden_layers=12),
    "zamba2": dict(num_hidden_layers=12, layers_block_type=["mamba", "mamba", "hybrid"] * 4),
    **{kind: dict(decoder_layers=2) for kind in ("pegasus", "mvp", "mbart", "marian")},
    "prophetnet": dict(num_decoder_layers=2),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """way: one of WAYS. why: of all but packed. off: the largest error of a step, where one was taken."""

    kind: str
    way: str
    why: str = ""
    off: float | None = None


def kinds() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def outcome(kind: str) -> Row:
    """Raises what the library raises, but for a refusal (ValueError), which is a row."""
    try:
        config = AutoConfig.for_model(kind, **TOLD.get(kind, {}))
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if not has_parts(config):
            with torch.device("meta"):
                model_class._from_config(copy.deepcopy(config))
    except Exception as error:  # of transformers' own code
        return Row(kind, "not tried", _first(error))
    if has_parts(config):
        return _of_text_part(kind, config)
    policy = _small_model(model_class, config)
    plain = copy.deepcopy(policy)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = make(folder, policy)
        except ValueError as refused:
            return Row(kind, "refused", _first(refused))
        own = "eager" if shares_prefix(policy) else policy.config._attn_implementation
        plain.set_attn_implementation(own)  # eager attention is the equation
        try:
            truth = plain_step(plain)
        except Exception as error:  # of transformers' own code
            return Row(kind, "not tried", _first(error))
        off = max(errors(step_of(trainer, policy.eval()), truth).values())
    if shares_prefix(policy):
        return Row(kind, "packed", off=off)
    return Row(kind, "separate", prove(policy).reason, off)


def _of_text_part(kind: str, config) -> Row:
    config.name_or_path = kind
    try:
        check_text_part(config)
    except (ValueError, ImportError) as refused:
        return Row(kind, "refused", _first(refused))
    return Row(kind, "text part", f"`{config.get_text_config().model_type}`")


def _small_model(model_class, config):
    """float32, in eval mode; a layer of each kind where the config can be cut to those."""
    try:
        layers, _ = pick_layers(model_class, config)
    except Refused:
        layers = None
    model = build(model_class, small_config(config, WINDOW, layers))
    randomise(model)
    return model


def _first(error: Exception) -> str:
    """A reason as a cell of a table."""
    told = re.sub(r"^model '.*?': (it cannot be trained: )?(model: )?", "", " ".join(str(error).split()))
    return (told if isinstance(error, ValueError) else f"{type(error).__name__}: {told}")[:240].replace("|", "\\|")


# --- the page ---------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    by_way = {way: [row for row in rows if row.way == way] for way in WAYS}
    counts = ", ".join(f"{len(found)} {way}" for way, found in by_way.items())
    lines = [
        f"Default configs of all {len(rows)} causal LMs of transformers {transformers.__version__} with torch "
        f"{torch.__version__.partition('+')[0]}: {counts}.",
    ]
    for way, found in by_way.items():
        lines += ["", f"**{way.capitalize()}** ({len(found)}). {WAYS[way]}", ""]
        if way == "packed":
            lines.append(", ".join(f"`{row.kind}`" for row in found))
        else:
            lines += ["| model type | why |", "|---|---|", *(f"| `{row.kind}` | {row.why} |" for row in found)]
    return "\n".join(lines)


def written() -> tuple[str, dict[str, str]]:
    """-> the version of transformers that the page tells of, and the way of each kind."""
    page = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    version = re.search(r"causal LMs of transformers (\S+)", page)[1]
    ways = {}
    for part in re.split(r"^\*\*", page, flags=re.MULTILINE)[1:]:
        way, _, body = part.partition("**")
        told = body if way == "Packed" else "\n".join(re.findall(r"^\| `[^`]+`", body, re.MULTILINE))
        ways |= dict.fromkeys(re.findall(r"`([^`]+)`", told), way.lower())
    return version, ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    named = parser.parse_args().kinds
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for kind in named or kinds():
        rows.append(outcome(kind))
        print(*(x for x in (kind, rows[-1].way, rows[-1].off, rows[-1].why) if x is not None), flush=True)
    if named:
        return
    if wrong := [row for row in rows if row.off is not None and not row.off <= TOLERANCE]:
        raise SystemExit(f"wrong: {wrong}")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
