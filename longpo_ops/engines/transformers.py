"""A transformers model in this process: one request at a time, so that a text never depends on what runs beside it.

Greedy texts and seeded draws are repeatable on CPU to the last bit. Memory: the model, and the key-value cache of one
request; scores need no logits (linear_logprobs).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import numpy as np

from ..pretrained import load_model, load_tokenizer, read_config, replace_rope, trying, use_right_attention
from . import Completion, Engine, EngineStopped, Request, RequestFailed, Sampling, render
from .reasoning import with_marks


class TransformersEngine(Engine):
    """model: a name or a folder. dtype: "auto" is the model's own. rope: entries of its config's rope_parameters to
    replace. length: tokens it has to read; a model for fewer is refused. template_kwargs: variables of the chat
    template.
    """

    def __init__(
        self,
        model: str,
        length: int | None = None,
        rope: dict | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        template_kwargs: dict | None = None,
    ):
        self.name, self.length, self.rope, self.dtype = model, length, dict(rope or {}), dtype
        self.trust_remote_code, self.template_kwargs = trust_remote_code, dict(template_kwargs or {})
        self._lock, self._stopped, self._attached = asyncio.Lock(), False, False

    async def start(self) -> None:
        """Raises ValueError for a model that cannot be loaded, is not whole, or reads too few tokens."""
        await asyncio.to_thread(self._load)

    async def close(self) -> None:
        self._stopped = True  # ends a text under way at its next token

    async def _answer(self, request: Request) -> Completion:
        async with self._lock:
            return await asyncio.to_thread(self._generate, request)

    async def _logps(self, token_ids: Sequence[int]) -> np.ndarray:
        async with self._lock:
            return await asyncio.to_thread(self._score, token_ids)

    def _load(self) -> None:
        import torch

        config = read_config(self.name, self.trust_remote_code)
        if self.rope:
            replace_rope(config, self.rope, self.length)
        positions = getattr(config, "max_position_embeddings", None)
        if self.length and positions and positions < self.length:
            raise ValueError(
                f"{self.name} reads {positions} tokens, {self.length} are wanted; give RoPE settings for longer texts, "
                "such as --rope '{\"rope_theta\": 1e7}'"
            )
        self.tokenizer = load_tokenizer(self.name, self.trust_remote_code, config.vocab_size)
        self.model = load_model(self.name, config, self.dtype, self.trust_remote_code).eval()
        use_right_attention(self.model)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        with trying(self.name, "config.json or generation_config.json: it cannot generate"):
            self._try()

    def _try(self) -> None:
        """One token after two. Raises what the model does, and ValueError where its numbers say nothing."""
        import torch

        weight = self.model.get_input_embeddings().weight
        rows, step = weight.shape[0], max(1, weight.shape[0] // 256)
        token = step * int(weight[::step].float().norm(dim=-1).argmax())  # that of padding may be zero in a good model
        ends = self._ends()
        if not all(type(end) is int for end in ends):
            raise ValueError(f"eos_token_id={ends}: expected ids of tokens, which are whole numbers")
        if ends and min(ends) >= rows:
            raise ValueError(f"eos_token_id={ends}: no text would end, as the embedding has {rows} rows")
        ids = torch.tensor([[token, token]], device=self.model.device)
        with torch.no_grad():
            best = float(self.model(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1).max())
        if not 1e-6 - math.log(rows) < best:  # NaN is not above it either
            raise ValueError(
                f"the likeliest token after two has the log-prob {best}; expected a finite number, and not that all "
                f"{rows} tokens are equally likely: look at its config, its weights and --dtype"
            )
        self._generate(Request("", Sampling(max_tokens=1), prompt_ids=(token, token)))

    def _check(self, ids: Sequence[int]) -> None:
        """A text may name a token that the model has no embedding for."""
        if len(ids) and max(ids) >= (rows := self.model.get_input_embeddings().weight.shape[0]):
            raise RequestFailed(
                "a token without an embedding", f"token {max(ids)} came, the model's embedding has {rows} rows"
            )

    def _generate(self, request: Request) -> Completion:
        import torch

        prompt, sampling = render(self.tokenizer, request, self.template_kwargs), request.sampling
        self._check(prompt)
        ids = torch.tensor([prompt], device=self.model.device)
        drawn = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0 if sampling.seed is None else sampling.seed)
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=sampling.max_tokens,
                stopping_criteria=[
                    lambda ids, scores, **_: torch.full(ids.shape[:1], self._stopped, device=ids.device)
                ],
                pad_token_id=self._ends()[0] if self._ends() else 0,
                return_dict_in_generate=True,
                output_logits=request.logprobs,
                **drawn,
            )
        if self._stopped:
            raise EngineStopped("the engine was closed")
        tokens = out.sequences[0, len(prompt) :].tolist()
        finish = "stop" if tokens and tokens[-1] in self._ends() else "length"
        logprobs = None
        if request.logprobs:
            steps = zip(out.logits, tokens, strict=True)
            logprobs = tuple(float(row[0].float().log_softmax(-1)[token]) for row, token in steps)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = with_marks(self.tokenizer, tokens, text)
        return Completion(text, finish, len(prompt), len(tokens), token_ids=tuple(tokens), logprobs=logprobs)

    def _score(self, token_ids: Sequence[int]) -> np.ndarray:
        import torch

        from ..ops.head import attach
        from ..ops.logprobs import linear_logprobs

        self._check(token_ids)
        ids = torch.as_tensor(np.asarray(token_ids, dtype=np.int64), device=self.model.device)[None]

        def compute(hidden, head):
            return head(hidden[0, :-1], ids[0, 1:], loss=linear_logprobs)

        if not self._attached:  # once: it takes two short forwards, and generate() goes on as before
            attach(self.model)
            self._attached = True
        with torch.no_grad():
            return self.model(ids, use_cache=False, compute=compute).double().cpu().numpy()

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
