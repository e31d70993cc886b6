"""Which engine answers, and with which settings: what every run that asks a model has in common.

Tests: tests/engines/test_settings.py, tests/pretrained/test_config.py, tests/evaluate/test_run.py.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..pretrained import DTYPES, load_tokenizer, read_config
from ..pretrained.template_kwargs import check_template_kwargs, check_values
from ..runs.validate import check_kinds
from . import NAMES, Engine
from .address import KEY, check_url, read_key
from .fields import changed, check_fields

SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
# Of a server that is one of several which share a model's ranks. One that waits for the others would wait for ever here.
OF_SERVERS = (
    *("data_parallel_rank", "data_parallel_start_rank", "data_parallel_size_local", "data_parallel_external_lb"),
    *("data_parallel_hybrid_lb", "data_parallel_multi_port_external_lb", "nnodes", "node_rank", "headless"),
)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The model and the engine of a run.

    model: a name or a folder; its tokenizer and chat template are used here, its weights by the local engines.
    rope: entries of the model's rope_parameters that are replaced, for local engines. endpoints, served_model,
    concurrency, timeout, patience, key_variable: of servers. template_kwargs: variables of the chat template.
    engine_options: vLLM's engine arguments, among them tensor_parallel_size and data_parallel_size, or fields of every
    request to a server that are added, renamed or left out (fields.py).
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
    key_variable: str = KEY
    engine_options: dict | None = None

    def __post_init__(self):
        """Raises ValueError for settings that make no sense, saying which."""
        check_kinds({each.name: getattr(self, each.name) for each in fields(self)}, type(self))
        if self.engine not in NAMES:
            raise ValueError(f"engine {self.engine!r}; expected one of {', '.join(NAMES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if (self.engine == "server") != bool(self.endpoints):
            raise ValueError(
                f"engine {self.engine!r} with {len(self.endpoints) or 'no'} endpoints; expected endpoints for 'server' only"
            )
        self.check_server("endpoints", self.endpoints, self.key_variable)
        self.require_positive("concurrency", "timeout", "patience")
        check_values(self.template_kwargs)
        self._check_options(self.engine_options or {})
        self.check_rope("rope")

    def _check_options(self, options: dict) -> None:
        """Raises ValueError for options that are not the engine's, and for ranks that this process cannot have."""
        if self.engine == "transformers" and options:
            raise ValueError(
                f"engine options {sorted(options)}; the transformers engine has none, and one device: take vllm, or servers"
            )
        if self.engine == "server" and (wrong := [name for name in options if name in (*SIZES, *OF_SERVERS)]):
            flag = f"--{wrong[0].replace('_', '-')} {options[wrong[0]]}"
            raise ValueError(
                f"engine option {wrong[0]}: a request cannot change the ranks of a running server; start it with them: "
                f"vllm serve {self.model} {flag}"
            )
        if self.engine == "server":
            check_fields(options)
        if self.engine == "vllm":
            _check_ranks(options)

    @staticmethod
    def check_server(name: str, urls: Sequence[str], key_variable: str) -> None:
        """Raises ValueError, without repeating either, for a URL that is none or holds a key, and a key no header can hold."""
        for url in urls:
            check_url(url, name)
        if urls:
            read_key(key_variable)

    @property
    def own_fields(self) -> dict:
        """What the options change of a server's requests (fields.changed)."""
        return changed(self.engine_options or {}) if self.engine == "server" else {}

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
        """The model's tokenizer. Raises ValueError for a model that has none or cannot be found, for a tokenizer that
        loses text or, with a local engine, belongs to another model, and for template_kwargs that its template ignores."""
        rows = None if self.engine == "server" else read_config(self.model, self.trust_remote_code).vocab_size
        tokenizer = load_tokenizer(self.model, self.trust_remote_code, rows)
        own = "a server may have another template: --engine-option 'chat_template_kwargs={}' sends it unchecked"
        check_template_kwargs(tokenizer, self.template_kwargs, own if self.engine == "server" else "")
        return tokenizer

    def make_engine(self, length: int) -> Engine:
        """The engine, not started, that reads `length` tokens. Raises ValueError for options it does not know."""
        local = dict(length=length, rope=self.rope, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        local["template_kwargs"] = self.template_kwargs
        options = self.engine_options or {}
        if self.engine == "vllm":
            from .vllm import VLLMEngine

            return VLLMEngine(self.model, **local, concurrency=self.concurrency, options=options)
        if self.engine == "transformers":
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
            options=options,
        )


def _check_ranks(options: dict) -> None:
    """Raises ValueError for ranks that are no number, more than there are GPUs, or partly another process's."""
    for name in SIZES:
        value = options.get(name, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"engine option {name}={value!r}: expected a whole number of ranks, at least 1")
    if wrong := [name for name in OF_SERVERS if name in options]:
        raise ValueError(
            f"engine option {wrong[0]}: vLLM in this process starts all its ranks on this machine; expected "
            "data_parallel_size alone, or servers (vllm serve, on every machine) and their endpoints"
        )
    import torch

    wanted, there = math.prod(options.get(name, 1) for name in SIZES), torch.cuda.device_count()
    ray = "ray" in (options.get("distributed_executor_backend"), options.get("data_parallel_backend"))
    if torch.cuda.is_available() and wanted > there and not ray:
        sizes = ", ".join(f"{name}={options[name]}" for name in SIZES if name in options)
        raise ValueError(f"engine options {sizes} take {wanted} GPUs; there are {there} here")


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
