"""Answers read from the prompts alone, without the code that made them; and tokenizers to make prompts with."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from longpo_ops.evaluate.samples import Sample
from tests.engines import tiny


@cache
def tokenizer():
    """640 tokens, so that words are many tokens each."""
    return tiny.make_tokenizer()


def used(sample: Sample, tokens=None) -> int:
    """Tokens of prompt, template, prefill and answer."""
    tokens = tokens or tokenizer()
    text = tokens.apply_chat_template(
        [{"role": "user", "content": sample.prompt}], tokenize=False, add_generation_prompt=True
    )
    return len(tokens(text + sample.prefill, add_special_tokens=False)["input_ids"]) + sample.max_tokens


def answer(sample: Sample) -> list[str]:
    """What the prompt says, in the references' order where the prompt has one."""
    return {"niah": needles, "vt": chain, "cwe": common, "fwe": frequent, "qa": cloze}[sample.task.split("_")[0]](
        sample.prompt
    )


def needles(prompt: str) -> list[str]:
    keys = re.search(r"special magic \w+ for (.*) mentioned in the provided text\?$", prompt)[1]
    found = []
    for key in re.split(r", and |, ", keys):
        found += re.findall(rf"One of the special magic \w+ for {re.escape(key)} is: ([\w-]+)\.", prompt)
    return found


def chain(prompt: str) -> list[str]:
    text = prompt.rpartition("Memorize and track")[2]
    value = re.search(r"assigned the value (\d+) in the text above\.$", text)[1]
    told = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
    held = [value]
    while more := [name for name, source in told if source in held and name not in held]:
        held += more
    return held[1:]


def common(prompt: str) -> list[str]:
    text = prompt.rpartition("Memorize the ones")[2]
    counts = Counter(re.findall(r"\d+\. (\S+)", text)).most_common(11)
    assert counts[9][1] > counts[10][1]
    return [word for word, _ in counts[:10]]


def frequent(prompt: str) -> list[str]:
    counts = Counter(re.search(r"coded words\. (.*)\nQuestion", prompt)[1].split())
    ranks = counts.most_common(5)
    assert ranks[0][0] == "..." and len({count for _, count in ranks}) == 5
    return [word for word, _ in ranks[1:4]]


def cloze(prompt: str) -> list[str]:
    head, _, question = prompt.rpartition("\n\nQuestion: ")
    sentences = re.findall(r"\"(.*?____.*?)\"(?= and \"|$)", question)
    assert sentences
    return [re.search(re.escape(sentence).replace("____", r"(\w+)"), head)[1] for sentence in sentences]
