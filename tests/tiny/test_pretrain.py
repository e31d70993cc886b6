"""The shipped tiny model is what its script makes, and can do what the demo asks of it."""

import asyncio
import hashlib
import json
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longpo_ops.data import ChatFormat, Pair, Turn, join_context
from longpo_ops.demo.run import TINY
from longpo_ops.engines import Request, Sampling
from longpo_ops.engines.transformers import TransformersEngine
from longpo_ops.generate import Prompts
from longpo_ops.generate.questions import parse_questions
from longpo_ops.tiny import pretrain, text

MODEL = TINY / "model"


@pytest.fixture(scope="module")
def kept():
    return json.loads((MODEL / "pretraining.json").read_text())


def test_the_shipped_configuration_is_the_scripts(kept):
    shipped, fresh = AutoModelForCausalLM.from_pretrained(MODEL), pretrain.make_model()
    ours, theirs = shipped.config.to_dict(), fresh.config.to_dict()
    saved = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    assert {n: v for n, v in ours.items() if n not in saved} == {n: v for n, v in theirs.items() if n not in saved}
    assert {n: p.shape for n, p in shipped.named_parameters()} == {n: p.shape for n, p in fresh.named_parameters()}
    assert [tuple(stage["shares"]) for stage in kept["stages"]] == [stage.shares for stage in pretrain.STAGES]
    assert [stage["steps"] for stage in kept["stages"]] == [stage.steps for stage in pretrain.STAGES]


def test_a_few_steps_again_are_those_of_the_shipped_model(kept):
    texts, held_out = text.prose()
    assert not set(texts) & set(held_out)
    if hashlib.sha256("\n\n".join(texts).encode()).hexdigest() != kept["text_sha256"]:
        pytest.skip(f"this Python's documentation is not that of {kept['python']}, which the model has read")
    tokenizer = pretrain.make_tokenizer(texts)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(MODEL).get_vocab()
    samples = pretrain.Samples(texts, tokenizer, Random(pretrain.SEED))
    count = len(kept["first_losses"])
    losses = pretrain.train(pretrain.make_model(), samples, log=lambda line: None, last=count)
    assert losses == pytest.approx(kept["first_losses"], rel=1e-4)
    assert losses[-1] < losses[0]


def test_its_template_makes_pairs(tmp_path):
    chat = ChatFormat(AutoTokenizer.from_pretrained(MODEL))
    pair = chat.tokenize(
        Pair("a", "A document.", (Turn("Why?", "A chunk.", "The code: heron 1234.", ("The code: fox 1.",)),))
    )
    said = chat.tokenizer.decode([t for t in pair.chosen.labels if t != -100])
    assert said == "The code: heron 1234.<|end|>"


async def _said(engine, texts, instruct, tokens):
    requests = [Request(join_context(content, instruct(i)), Sampling(tokens)) for i, content in enumerate(texts)]
    return await engine.batch(requests)


def test_it_asks_and_answers_about_prose_it_has_not_read():
    torch.set_num_threads(1)
    random, prompts, source = Random(1), Prompts.load(TINY / "prompts"), "\n\n".join(text.prose()[1])
    texts, facts = [], []
    for _ in range(24):
        begin = random.randrange(len(source) - 400)
        facts.append(text.draw_facts(3, random))
        texts.append(text.plant(source[begin : begin + 400], facts[-1], random))
    engine = TransformersEngine(str(MODEL))

    async def ask():
        await engine.start()
        lists = await _said(engine, texts, lambda i: prompts.ask(2), 40)
        answers = await _said(engine, texts, lambda i: text.QUESTIONS[i % 2].format(key=facts[i][i % 3][0]), 16)
        return lists, answers

    lists, answers = asyncio.run(ask())
    questions = [parse_questions(said.text, 2) or [] for said in lists]
    askable = [{wording.format(key=key) for key, _ in each for wording in text.QUESTIONS} for each in facts]
    assert sum(len(asked) == 2 and set(asked) <= known for asked, known in zip(questions, askable)) >= 18
    right = [said.text == text.answer(*facts[i][i % 3]) for i, said in enumerate(answers)]
    assert sum(right) >= 18
