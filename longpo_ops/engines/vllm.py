"""vLLM in this process: its asynchronous engine, which batches whatever is under way and spreads it over ranks.

Prefix caching is on: the questions of one document share its prefill. With data parallelism all requests of a group
go to the same rank, as each rank has a cache of its own. (vLLM's synchronous `LLM` knows no data parallelism in one
process, and gives a batch back only when all of it is done.)

Weights are vLLM's to load: it refuses missing and unknown ones itself; that they are finite is not checked.

Tests: tests/vllm/test_offline.py, tests/vllm/test_served.py.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence

from ..pretrained import load_tokenizer, read_config, read_whole_config, replace_rope
from . import Completion, Engine, EngineStopped, Request, RequestFailed, as_finish, render
from .reasoning import with_marks


class VLLMEngine(Engine):
    """length: vLLM's max_model_len. rope: entries of the config's rope_parameters that are replaced. options: any
    further field of vLLM's AsyncEngineArgs, say tensor_parallel_size, data_parallel_size or gpu_memory_utilization.
    """

    def __init__(
        self,
        model: str,
        length: int | None = None,
        rope: dict | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        template_kwargs: dict | None = None,
        concurrency: int = 64,
        options: dict | None = None,
    ):
        arguments = dict(
            model=model,
            max_model_len=length,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            enable_prefix_caching=True,
        )
        self.arguments = arguments | dict(options or {})
        self.rope, self.template_kwargs = dict(rope or {}), dict(template_kwargs or {})
        self.ranks = int(self.arguments.get("data_parallel_size", 1))
        self.concurrency = concurrency * self.ranks
        self._engine, self._numbers = None, itertools.count()

    structured = True

    async def start(self) -> None:
        """Raises ValueError where vLLM is not installed or refuses the settings."""
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ValueError(f"vLLM cannot be imported ({error}); install it, or use another --engine") from None
        name, trust = self.arguments["model"], self.arguments["trust_remote_code"]
        if self.rope:
            self.arguments["hf_overrides"] = self._overrides(name, trust) | (self.arguments.get("hf_overrides") or {})
        self.tokenizer = load_tokenizer(name, trust, read_config(name, trust).vocab_size)
        try:
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self.arguments))
        except TypeError as error:
            raise ValueError(f"vLLM refuses an engine option: {error}") from None

    def _overrides(self, name: str, trust_remote_code: bool) -> dict:
        """What vLLM lays over the model's config. RoPE entries replace those of the same name, the others stay."""
        whole = read_whole_config(name, trust_remote_code)
        config = whole.get_text_config()
        replace_rope(config, self.rope, self.arguments["max_model_len"])
        laid = {entry: getattr(config, entry) for entry in ("rope_parameters", "max_position_embeddings")}
        parts = [part for part in whole.sub_configs if getattr(whole, part, None) is config]
        return {parts[0]: laid} if parts else laid

    async def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    async def _answer(self, request: Request) -> Completion:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        sampling = request.sampling
        out = await self._ask(
            render(self.tokenizer, request, self.template_kwargs),
            SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                logprobs=0 if request.logprobs else None,
                structured_outputs=StructuredOutputsParams(json=request.schema) if request.schema else None,
            ),
            request.group,
        )
        answer = out.outputs[0]
        logprobs = None
        if answer.logprobs is not None:
            logprobs = tuple(_of(answer.logprobs, answer.token_ids))
        return Completion(
            text=with_marks(self.tokenizer, answer.token_ids, answer.text),
            finish=as_finish(answer.finish_reason),
            prompt_tokens=len(out.prompt_token_ids),
            tokens=len(answer.token_ids),
            cached_tokens=out.num_cached_tokens or 0,
            token_ids=tuple(answer.token_ids),
            logprobs=logprobs,
        )

    async def _logps(self, token_ids: Sequence[int]) -> list[float | None]:
        from vllm import SamplingParams

        ids = list(map(int, token_ids))
        out = await self._ask(ids, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0), "")
        return _of(out.prompt_logprobs[1:], ids[1:])

    async def _ask(self, ids: list[int], sampling, group: str):
        from vllm.exceptions import VLLMClientError, VLLMServerError
        from vllm.v1.engine.exceptions import EngineDeadError

        rank = zlib.crc32(group.encode()) % self.ranks if self.ranks > 1 and group else None
        try:
            final = None
            async for out in self._engine.generate(
                {"prompt_token_ids": ids}, sampling, f"longpo-{next(self._numbers)}", data_parallel_rank=rank
            ):
                final = out
        except EngineDeadError as error:
            raise EngineStopped(f"vLLM died: {error}; what was generated is kept, run the same command again") from None
        except (ValueError, VLLMClientError) as error:  # longer than max_model_len, say
            raise RequestFailed("the engine refused", str(error)) from None
        except VLLMServerError as error:
            raise RequestFailed("the engine failed", str(error)) from None
        if final is None or not final.outputs:
            raise RequestFailed("the engine failed", "vLLM gave no output")
        return final


def _of(rows: Sequence[dict | None], ids: Sequence[int]) -> list[float | None]:
    """The log-prob of each token in its row of vLLM's, None where it is in none."""
    found = [(row or {}).get(token) for row, token in zip(rows, ids)]
    return [None if each is None else each.logprob for each in found]
