"""How long one sample of each of RULER's tasks takes to make, and how close to the length it comes.

One core (the process pins itself), one sample per task in the order of the table, so the first prose task also reads the
text. No tokenizer is downloaded: three are trained here on Python's documentation and standard library, or --model names
one that lies at hand.

    bytes         byte-level BPE over words, as Llama 3 and Qwen have it
    whole         the same merges without parting into words, as Mistral's and Llama 2's: the text is one long word
    tiny          the 640 tokens of the tests

    python -m benchmarks.loop.evaluate [--length 131072] [--vocabulary 32000] [--model FOLDER] [--out benchmarks/results]

Not covered: the engine's answers and their scores.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from longpo_ops.evaluate.samples import Counter
from longpo_ops.evaluate.sources import Texts
from longpo_ops.evaluate.tasks import TASKS, make_samples

from ..stamp import RESULTS, host_class, stamp

TRAINING = 12_000_000  # characters of the standard library's sources beside the documentation
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--model", help="a folder with a tokenizer, instead of those trained here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    for name, tokenizer in tokenizers(options):
        rows += [{"tokenizer": name, "vocabulary": len(tokenizer)} | row for row in measure(tokenizer, options.length)]
    told = {
        "length": options.length,
        "vocabulary": options.vocabulary,
        "model": options.model and Path(options.model).name,
    }
    content = stamp(options=told, cores=1, rows=rows)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{content['date'][:10]}-evaluate-{host_class()}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))


def measure(tokenizer, length: int) -> list[dict]:
    """Seconds and the filled share of one sample per task; ours is checked by counting again."""
    texts, counter, rows = Texts(), Counter(tokenizer), []
    for name in TASKS:
        began = time.perf_counter()
        (sample,) = make_samples(name, length, 1, tokenizer, texts=texts)
        seconds = time.perf_counter() - began
        began = time.perf_counter()
        used = counter.count(sample.prompt, sample.prefill) + sample.max_tokens
        once = time.perf_counter() - began
        if used > length:
            raise RuntimeError(f"{name} takes {used} tokens of {length}")
        rows.append({"task": name, "seconds": seconds, "tokenising_once_s": once, "tokens": used, "length": length})
    return rows


def tokenizers(options: argparse.Namespace):
    """(name, tokenizer) one after another."""
    if options.model:
        from transformers import AutoTokenizer

        yield Path(options.model).name, AutoTokenizer.from_pretrained(options.model)
        return
    from tests.engines.tiny import make_tokenizer

    yield "bytes", train(options.vocabulary, whole=False)
    yield "whole", train(options.vocabulary, whole=True)
    yield "tiny", make_tokenizer()


def train(vocabulary: int, whole: bool):
    """A byte-level BPE; or one of characters whose pre-tokeniser is taken away after the training."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=whole))
    special = ["<unk>", "<|end|>", "<|user|>", "<|assistant|>"]
    if whole:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=\u2581(?!\u2581))|(?=\n)"), "isolated")
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(training_text(), trainer)
    if whole:
        tokenizer.pre_tokenizer = None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|end|>", additional_special_tokens=special[2:]
    )
    fast.chat_template = TEMPLATE
    return fast


def training_text():
    """The documentation, then the standard library's sources."""
    yield from Texts().documents
    size = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if size < TRAINING and "site-packages" not in file.parts:
            text = file.read_text(encoding="utf-8", errors="replace")
            size += len(text)
            yield text


def table(rows: list[dict]) -> str:
    """Seconds of one sample, and the share of the length that it fills, per tokenizer."""
    names = list(dict.fromkeys(row["tokenizer"] for row in rows))
    lines = [
        "| task | " + " | ".join(f"{name}, s | filled" for name in names) + " |",
        "|---" * (2 * len(names) + 1) + "|",
    ]
    for task in TASKS:
        cells = [row for row in rows if row["task"] == task]
        lines.append(
            f"| {task} | "
            + " | ".join(f"{row['seconds']:.2f} | {row['tokens'] / row['length']:.1%}" for row in cells)
            + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
