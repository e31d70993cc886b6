"""What a model's name or folder holds: whatever cannot be loaded of it is one message that names the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")  # of weights; auto is the one they are stored in


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Within it transformers loads a config, a tokenizer or weights of the model `name`. Raises ValueError if it cannot."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        why = f"its safetensors cannot be read ({error}); fetch the model again"
        raise ValueError(f"model {name!r} cannot be loaded: {why}") from error
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and type(error) is not Exception:  # which tokenizers raises
            raise
        why = " ".join(str(error).split()) + (
            "" if Path(name).exists() else " (no folder of that name is here, either)"
        )
        raise ValueError(f"model {name!r} cannot be loaded: {why}") from error


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer of a model. Raises ValueError if it cannot be loaded."""
    from transformers import AutoTokenizer

    with loading(name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def replace_rope(config, rope: dict, length: int | None) -> None:
    """Put entries into the rope_parameters of a transformers config, the others stay, and let it read `length` tokens.

    Raises ValueError where the entries and those of the config make no whole.
    """
    before = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(entries, dict) for entries in before.values()):
        if not all(kind in before and isinstance(entries, dict) for kind, entries in rope.items()):
            kinds = ", ".join(before)
            raise ValueError(f"rope: {rope}; this model has entries by type of layer, expected some under {kinds}")
        rope = {kind: {**(before[kind] or {}), **entries} for kind, entries in rope.items()}
    config.rope_parameters = {**before, **rope}
    config.max_position_embeddings = max(config.max_position_embeddings, length or 0)
    try:
        config.validate_rope()
    except KeyError as error:
        raise ValueError(f"rope: {error.args[0]}") from None
