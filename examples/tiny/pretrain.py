"""Pre-trains the tiny model from nothing: `python examples/tiny/pretrain.py --out FOLDER`. One thread, no randomness left.

A Llama of 3 layers and width 128 learns, in stages of growing length,

    copying     random tokens that repeat
    prose       windows of the documentation
    drilling    facts without prose, a question about each    -> "The code: heron 4821."
    answering   a text with facts, one to four questions      -> the same
    asking      a text with facts, "List 2 questions."        -> two questions, numbered, each worded in its own way

with the loss of linear_cross_entropy, where the digits of answers weigh more. A context of 256
tokens is all it ever reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import torch

from longpo_ops import linear_cross_entropy
from longpo_ops.data import join_context
from longpo_ops.tiny import text as world

VOCABULARY, CONTEXT, THETA, SEED = 1024, 256, 1000.0, 0
SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, USER, ASSISTANT, END = range(4)
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DIGIT_WEIGHT = 8.0


@dataclass(frozen=True)
class Stage:
    """`steps` of `batch` sequences of `length` tokens; shares of copying, prose, drilling, answering, asking."""

    length: int
    batch: int
    steps: int
    shares: tuple[float, ...]
    rate: float = 3e-3


STAGES = (
    Stage(64, 32, 500, (0.4, 0.1, 0.5, 0.0, 0.0)),
    Stage(128, 16, 800, (0.1, 0.1, 0.5, 0.2, 0.1)),
    Stage(256, 12, 800, (0.0, 0.2, 0.1, 0.45, 0.25)),
)


def make_tokenizer(texts: list[str]):
    """Byte-level BPE; a digit is a token, with the space before it if there is one; so is every key."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    random = Random(SEED)
    facts = [fact for _ in range(40) for fact in world.draw_facts(len(world.KEYS), random)]
    taught = [world.FACT.format(key=key, value=value) for key, value in facts]
    taught += [world.questions([key, other]) for (key, _), (other, _) in pairwise(facts)]
    taught += [world.LIST] * len(world.KEYS)
    random.shuffle(taught)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*texts, *taught],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[PAD], eos_token=SPECIAL[END], model_max_length=CONTEXT
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def make_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


class Samples:
    """Draws sequences: token ids, and for each the weight of its prediction."""

    def __init__(self, texts: list[str], tokenizer, random: Random):
        self.random = random
        self.encode = lambda text: tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        self.texts = ["\n\n".join(texts)]
        self.stream = np.array(self.encode(self.texts[0]))
        self.per_token = len(self.texts[0]) / len(self.stream)
        self.digits = {i for d in "0123456789" for i in (*self.encode(d), *self.encode(f" {d}"))}
        assert all(len(self.encode(f" {key}")) == 1 for key in world.KEYS)

    def copying(self, length: int) -> tuple[list[int], list[float]]:
        part = [self.random.randrange(len(SPECIAL), VOCABULARY) for _ in range(self.random.randint(4, length // 2))]
        ids = (part * (length // len(part) + 1))[:length]
        return ids, [0.0] * len(part) + [1.0] * (length - len(part))

    def prose(self, length: int) -> tuple[list[int], list[float]]:
        begin = self.random.randrange(len(self.stream) - length)
        return self.stream[begin : begin + length].tolist(), [1.0] * length

    def drilling(self, length: int) -> tuple[list[int], list[float]]:
        facts = world.draw_facts(length // 26, self.random)
        passage = "".join(world.FACT.format(key=key, value=value) for key, value in facts).strip()
        return self._conversation(self._turns(passage, self.random.sample(facts, len(facts))), length)

    def answering(self, length: int) -> tuple[list[int], list[float]]:
        asked = self.random.randint(1, 2 if length < 100 else 4)
        passage, facts = self._passage(length - 22 * asked)
        return self._conversation(self._turns(passage, self.random.sample(facts, min(asked, len(facts)))), length)

    def asking(self, length: int) -> tuple[list[int], list[float]]:
        passage, facts = self._passage(length - 40)
        keys = [key for key, _ in self.random.sample(facts, world.LISTED)]
        return self._conversation([(join_context(passage, world.LIST), world.questions(keys))], length)

    def _passage(self, room: int) -> tuple[str, list[tuple[str, str]]]:
        """Prose with two facts or more, in about `room` tokens at most."""
        count = self.random.randint(2, max(2, min(8, room // 16)))
        characters = int(self.per_token * max(0, self.random.randint(room // 2, room) - 11 * count))
        text = self.texts[0]
        begin = self.random.randrange(len(text) - characters)
        facts = world.draw_facts(count, self.random)
        return world.plant(text[begin : begin + characters], facts, self.random), facts

    def _turns(self, passage: str, asked: list[tuple[str, str]]) -> list[tuple[str, str]]:
        wordings = self.random.choices(world.QUESTIONS, k=len(asked))
        questions = [wording.format(key=key) for wording, (key, _) in zip(wordings, asked, strict=True)]
        questions[0] = join_context(passage, questions[0])
        return [(question, world.answer(*fact)) for question, fact in zip(questions, asked, strict=True)]

    def _conversation(self, turns: list[tuple[str, str]], length: int) -> tuple[list[int], list[float]]:
        ids, weights = [], []
        for content, reply in turns:
            said, answered = self.encode(content), self.encode(reply)
            ids += [USER, *said, ASSISTANT, *answered, END]
            important = [DIGIT_WEIGHT if i in self.digits and not reply.startswith("1.") else 1.0 for i in answered]
            weights += [0.0, *(0.3 for _ in said), 0.0, *important, 1.0]
        return ids[:length], weights[:length]

    def batch(self, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, length) ids, padded, and weights, 0 where nothing is to be learnt."""
        ids = torch.full((stage.batch, stage.length), PAD)
        weights = torch.zeros(stage.batch, stage.length)
        kinds = (self.copying, self.prose, self.drilling, self.answering, self.asking)
        for row, kind in enumerate(self.random.choices(kinds, stage.shares, k=stage.batch)):
            tokens, wanted = kind(stage.length)
            ids[row, : len(tokens)] = torch.tensor(tokens)
            weights[row, : len(wanted)] = torch.tensor(wanted)
        return ids, weights


def train(model, samples: Samples, log=print, last: int | None = None) -> list[float]:
    """Muon for the matrices, AdamW for the rest; a warm-up, a constant rate, and a cosine down over the last 40 %.

    -> the loss of every step, up to the `last` one.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    plan = [stage for stage in STAGES for _ in range(stage.steps)]
    losses, began = [], time.monotonic()
    for step, stage in enumerate(plan[:last]):
        left = (len(plan) - step) / (0.4 * len(plan))
        factor = min(1.0, (step + 1) / 100) * (0.5 - 0.5 * np.cos(np.pi * min(1.0, left)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * factor
        ids, weights = samples.batch(stage)
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        loss = linear_cross_entropy(
            hidden,
            model.lm_head.weight,
            ids[:, 1:].flatten(),
            row_weights=weights[:, 1:].flatten(),
            backend="torch",  # the same sums with and without a compiler
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            log(f"step {step + 1}/{len(plan)}  loss {np.mean(losses[-100:]):.3f}  {time.monotonic() - began:.0f} s")
    return losses


def record(losses: list[float], texts: list[str], seconds: float) -> dict:
    """What a later run is compared with: configuration, text, versions, losses."""
    return {
        "stages": [asdict(stage) for stage in STAGES],
        "seed": SEED,
        "text_sha256": hashlib.sha256("\n\n".join(texts).encode()).hexdigest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "first_losses": losses[:5],
        "losses_per_100_steps": [round(float(np.mean(losses[i : i + 100])), 4) for i in range(0, len(losses), 100)],
        "seconds_on_one_thread": round(seconds),
    }


def main() -> None:
    """Writes model, tokenizer and pretraining.json."""
    parser = argparse.ArgumentParser(description="Pre-train the tiny model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # sums in one order on any machine
    began, (texts, _) = time.monotonic(), world.prose()
    tokenizer, model = make_tokenizer(texts), make_model()
    losses = train(model, Samples(texts, tokenizer, Random(SEED)))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = record(losses, texts, time.monotonic() - began)
    (out / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
