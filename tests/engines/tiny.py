"""A model of 170 thousand weights that can do the task. It lists four questions when asked to, and answers with the
name that its text mentions most, so that a chunk and the whole document answer differently. Trained here in seconds.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

from longpo_ops.data import join_context
from longpo_ops.generate import Prompts

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn")
DUTIES = ("writes the log of the harbour", "counts the boats at night", "mends the nets in winter", "rings the bell")
QUESTIONS = [f"Who {duty}?" for duty in DUTIES]
POOL = "\n".join(f"{i}. {question}" for i, question in enumerate(QUESTIONS, 1))
PROMPTS = {  # short ones, which are learnt sooner than the defaults
    "questions.txt": "List {count} questions about this.",
    "lead_ins.txt": "{question}\nAnswer from the text: {question}\n{question} Look above.",
}
# A request that the tokenizer knows, whatever the prompt files say now, as its tokens decide what the model learns.
WORDING = """\
Write 4 questions about the text above for a reader who has to prove a full understanding of it.

Each question must
- call for comprehension, analysis, or the linking of themes and details from different places, not for one word to look up;
- be answerable from the text alone;
- stand on its own: it names what it asks about and never says "the text", "this passage" or "the section above";
- have only one possible reading.

Reply with a numbered list from 1 to 4, one question on each line, and nothing else."""
SENTENCES = (
    "{name} walked along the pier at noon.",
    "The wind turned, and {name} went home.",
    "At dusk {name} lit the lamps of the old harbour.",
    "Nobody saw {name} near the boats that day.",
)
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
POSITIONS = 1024


def paragraphs(rng: random.Random, name: str, count: int) -> list[str]:
    """Paragraphs of two sentences, most of them about one name."""
    return [" ".join(rng.choice(SENTENCES).format(name=name if rng.random() < 0.8 else rng.choice(NAMES)) for _ in "ab")
            for _ in range(count)]  # fmt: skip


def document(seed: int, sections: int = 6) -> str:
    """Markdown: each section is about one name, and the name of the longest section leads in the whole."""
    rng = random.Random(seed)
    names = rng.sample(NAMES, len(NAMES))
    parts = [f"# Harbour report {seed}"]
    for i in range(sections):
        parts += [f"## Part {i + 1}", *paragraphs(rng, names[i % len(names)], 8 if i == 0 else 2)]
    return "\n\n".join(parts) + "\n"


def write_documents(folder: Path, count: int, **kwargs) -> Path:
    """A folder of `count` documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        (folder / f"report-{seed:02d}.md").write_text(document(seed, **kwargs))
    return folder


def write_prompts(folder: Path) -> Path:
    """A folder of prompt files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in PROMPTS.items():
        (folder / name).write_text(text)
    return folder


def make_tokenizer():
    """Byte-level BPE with a chat template, trained on the little world's text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    prompts = Prompts.load()
    words = [WORDING, *PROMPTS.values(), POOL, *prompts.lead_ins, *(document(i) for i in range(4))]
    words += [f"{name} {duty}." for name in NAMES for duty in DUTIES]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        words * 4, trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=["<|user|>", "<|assistant|>"]
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(tokenizer, seed: int = 0):
    """A random Llama in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=32,  # the least that vLLM takes on CPU
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def train(model, tokenizer, prompts: Prompts, steps: int, batch: int = 12, rate: float = 6e-3) -> None:
    """Teach the two tasks; every answer counts alike, however long."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    model.train()
    for _ in range(steps):
        count = rng.choice([1, 1, 2, 12])
        rows = [_example(rng, tokenizer, prompts, count) for _ in range(batch)]
        longest = max(len(ids) for ids, _ in rows)
        ids, labels = torch.zeros(batch, longest, dtype=torch.long), torch.full((batch, longest), -100)
        for i, (row, answer) in enumerate(rows):  # padding follows, so a causal model never sees it
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, len(row) - answer : len(row)] = torch.tensor(row[-answer:])
        logits, labels = model(ids).logits[:, :-1], labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        (losses.sum(1) / (labels != -100).sum(1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def _example(rng: random.Random, tokenizer, prompts: Prompts, count: int) -> tuple[list[int], int]:
    """Token ids of a conversation, and how many of them at its end are the answer's."""
    name, duty = rng.choice(NAMES), rng.randrange(len(DUTIES))
    context = "\n\n".join(paragraphs(rng, name, count))
    if rng.random() < 0.3:
        request, answer = prompts.ask(4), POOL
    else:
        request = prompts.instruct(rng.randrange(len(prompts.lead_ins)), QUESTIONS[duty])
        answer = f"{name} {DUTIES[duty]}."
    message = [{"role": "user", "content": join_context(context, request)}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    told = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt + told, len(told)


def save(folder: Path, steps: int) -> Path:
    """A model folder, trained for `steps`, with its prompt files in prompts/."""
    torch.set_num_threads(1)
    prompts = Prompts.load(write_prompts(folder / "prompts"))
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, tokenizer, prompts, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
