"""Which engine answers, and with which settings: what every run that asks a model has in common.

Tests: tests/pretrained/test_config.py, tests/evaluate/test_run.py.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from ..pretrained import DTYPES, load_tokenizer, read_config
from . import NAMES, Engine


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The model and the engine of a run.

    model: a name or a folder; its tokenizer and chat template are used here, its weights by the local engines.
    rope: entries of the model's rope_parameters that are replaced, for local engines. endpoints, served_model,
    concurrency, timeout, patience, key_variable: of servers. template_kwargs: variables of the chat template.
    engine_options: vLLM's engine arguments, or further fields of every request to a server.
    """

    model: str
    engine: str = "transformers"
    rope: dict | None = None
    template_kwargs: dict | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    endpoints: tuple[str, ...] = ()
    served_model: str | None = None
    concurrency: int = 64
    timeout: float = 1800.0
    patience: float = 300.0
    key_variable: str = "OPENAI_API_KEY"
    engine_options: dict | None = None

    def __post_init__(self):
        """Raises ValueError for settings that make no sense, saying which."""
        if self.engine not in NAMES:
            raise ValueError(f"engine {self.engine!r}; expected one of {', '.join(NAMES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if (self.engine == "server") != bool(self.endpoints):
            raise ValueError(
                f"engine {self.engine!r} with endpoints {list(self.endpoints)}; expected endpoints for 'server' only"
            )
        self.require_positive("concurrency", "timeout", "patience")
        self.check_rope("rope")

    def check_rope(self, name: str) -> None:
        """Raises ValueError for entries with which no model reads anything, and for a server, which has its own."""
        rope = getattr(self, name)
        _check_rope(name, rope or {})
        if rope and self.engine == "server":
            flag = json.dumps({"rope_parameters": rope})
            raise ValueError(
                f"{name}: a running server keeps its own; start it with them: vllm serve --hf-overrides '{flag}'"
            )

    @property
    def model_name(self) -> str:
        """The model's name, or that of its folder, wherever it lies."""
        return Path(self.model).name if Path(self.model).exists() else self.model

    def require_positive(self, *names: str) -> None:
        """Raises ValueError for a field that is neither None nor above 0."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; expected more than 0")

    def load_tokenizer(self):
        """The model's tokenizer. Raises ValueError for a model that has none or cannot be found, and for a tokenizer that
        loses text or, with a local engine, belongs to another model."""
        if self.engine == "server":
            return load_tokenizer(self.model, self.trust_remote_code)
        config = read_config(self.model, self.trust_remote_code)
        return load_tokenizer(self.model, self.trust_remote_code, config.vocab_size)

    def make_engine(self, length: int) -> Engine:
        """The engine, not started, that reads `length` tokens. Raises ValueError for options it does not know."""
        local = dict(length=length, rope=self.rope, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        local["template_kwargs"] = self.template_kwargs
        options = self.engine_options or {}
        if self.engine == "vllm":
            from .vllm import VLLMEngine

            return VLLMEngine(self.model, **local, concurrency=self.concurrency, options=options)
        if self.engine == "transformers":
            if options:
                raise ValueError(f"engine options {sorted(options)}; the transformers engine has none")
            from .transformers import TransformersEngine

            return TransformersEngine(self.model, **local)
        from .server import ServerEngine

        return ServerEngine(
            self.endpoints,
            self.served_model,
            concurrency=self.concurrency,
            timeout=self.timeout,
            patience=self.patience,
            key_variable=self.key_variable,
            template_kwargs=self.template_kwargs,
            extra=options,
        )


def _check_rope(what: str, rope: dict) -> None:
    """Raises ValueError for entries with which no model reads anything, and for misspelt names.

    Models know further names (mrope_section, mscale), and some have entries by type of layer.
    """
    if not rope:
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

    names, kinds = list(RopeParameters.__annotations__), ["default", *ROPE_INIT_FUNCTIONS]
    for name, value in rope.items():
        if isinstance(value, dict):
            _check_rope(what, value)
        elif name not in names and (near := difflib.get_close_matches(str(name), names, 1, 0.66)):
            raise ValueError(f"{what}: {name} is none of its entries; did you mean {near[0]}?")
    theta, kind = rope.get("rope_theta", 1.0), rope.get("rope_type", "default")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"{what}: rope_theta is {theta!r}; expected a number above 0")
    if kind not in kinds and difflib.get_close_matches(str(kind), kinds, 1, 0.66):  # remote code may have its own
        raise ValueError(f"{what}: rope_type is {kind!r}; expected one of {', '.join(dict.fromkeys(kinds))}")
