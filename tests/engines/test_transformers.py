"""The transformers engine with a real model: repeatable texts, exact scores, and from documents to a training step."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch

from longpo_ops import detach
from longpo_ops.engines import EngineStopped, Request, RequestFailed, Sampling
from longpo_ops.engines.transformers import TransformersEngine
from tests.engines import tiny
from tests.pretrained.tiny import WITH_PICTURES, change, save


@pytest.fixture(scope="module")
def engine(model):
    torch.set_num_threads(1)
    engine = TransformersEngine(str(model), length=1024)
    asyncio.run(engine.start())
    return engine


def ask(engine, *requests) -> list:
    return asyncio.run(engine.batch(requests))


def question(number: int, **sampling) -> Request:
    text = tiny.document(number) + "\n\n" + tiny.QUESTIONS[number % 4]
    return Request(text, Sampling(**{"max_tokens": 24} | sampling), logprobs=True)


def test_texts_are_repeatable_whatever_runs_beside(engine):
    alone = ask(engine, question(0)) + ask(engine, question(1, temperature=1.5, seed=3))
    torch.manual_seed(99)
    others = [question(2), question(0), question(1, temperature=1.5, seed=4), question(1, temperature=1.5, seed=3)]
    beside = ask(engine, *others)
    assert [beside[1], beside[3]] == alone
    assert beside[2].text != beside[3].text
    assert ask(engine, question(0, max_tokens=2))[0].finish == "length" and alone[0].finish == "stop"


def test_a_model_that_gives_no_numbers_fails_its_requests(engine):
    ids = tuple(engine.tokenizer(tiny.document(0))["input_ids"])
    assert asyncio.run(engine.score(ids)).max() <= 0
    weight = engine.model.get_output_embeddings().weight.data
    kept = weight[7].clone()
    try:
        weight[7] = float("nan")
        for asked in (engine.score(ids), engine.generate(question(0))):
            with pytest.raises(RequestFailed, match=r"no log-probs: number 1 of \d+ is nan"):
                asyncio.run(asked)
    finally:
        weight[7] = kept


def test_log_probs_of_a_text_are_its_scores(engine):
    (answer,) = ask(engine, question(0))
    request = question(0)
    prompt = engine.tokenizer.apply_chat_template(request.messages, add_generation_prompt=True, return_dict=False)
    assert answer.prompt_tokens == len(prompt)
    ids = [*prompt, *answer.token_ids]
    scores = asyncio.run(engine.score(ids))
    with torch.no_grad():
        logits = detach(copy.deepcopy(engine.model))(torch.tensor([ids])).logits[0, :-1].double()
    truth = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    assert scores.shape == (len(ids) - 1,) and abs(scores - truth).max() < 1e-5
    assert abs(scores[-answer.tokens :] - answer.logprobs).max() < 1e-4
    assert ask(engine, question(0))[0] == answer  # a model that scores generates as before


def test_a_begun_answer_and_token_ids_go_on_as_the_whole_answer_did(engine):
    (whole,) = ask(engine, question(0))
    begun = engine.tokenizer.decode(whole.token_ids[:2])
    (rest,) = ask(engine, replace(question(0), prefill=begun))
    assert rest.text == whole.text.removeprefix(begun) and rest.prompt_tokens == whole.prompt_tokens + 2
    prompt = engine.tokenizer.apply_chat_template(question(0).messages, add_generation_prompt=True, return_dict=False)
    (raw,) = ask(engine, replace(question(0), prompt_ids=(*prompt, *whole.token_ids[:2])))
    assert raw == rest
    (turned,) = ask(engine, replace(question(0), prefill="Eve"))
    assert not whole.text.startswith("Eve") and turned.text == " writes the log of the harbour."
    with pytest.raises(ValueError, match="prefill beside prompt_ids"):
        replace(question(0), prefill="x", prompt_ids=(1,))


def test_earlier_messages_are_rendered_before_the_last_and_change_the_answer(engine):
    earlier = (("user", tiny.document(3, 1)), ("assistant", "Eve rings the bell."))
    asked = replace(question(0), earlier=earlier)
    text = "".join(f"<|{role}|>\n{words}<|end|>\n" for role, words in (*earlier, ("user", asked.content)))
    prompt = engine.tokenizer(text + "<|assistant|>\n", add_special_tokens=False)["input_ids"]
    requests = (asked, replace(question(0), prompt_ids=tuple(prompt)), question(0))
    said, raw, without = (ask(engine, each)[0] for each in requests)
    assert said == raw and said.prompt_tokens == len(prompt) > without.prompt_tokens
    assert said.logprobs != without.logprobs


def test_rope_reaches_the_model_and_a_short_context_is_refused(model, engine):
    with pytest.raises(ValueError, match="reads 1024 tokens, 4096 are wanted; give RoPE settings"):
        asyncio.run(TransformersEngine(str(model), length=4096).start())
    wide = TransformersEngine(str(model), length=4096, rope={"rope_theta": 5e4})
    asyncio.run(wide.start())
    assert wide.model.config.max_position_embeddings == 4096
    ids = engine.tokenizer("The wind turned, and Ann went home. " * 8)["input_ids"]
    assert abs(asyncio.run(wide.score(ids)) - asyncio.run(engine.score(ids))).max() > 1e-3


def test_rope_entries_that_make_no_whole_are_refused(model):
    engine = TransformersEngine(str(model), length=4096, rope={"rope_type": "yarn"})
    with pytest.raises(ValueError, match=r"rope: Missing required keys .*factor"):
        asyncio.run(engine.start())


def test_closing_ends_a_text_under_way(model):
    engine = TransformersEngine(str(model), length=1024)

    async def work():
        await engine.start()
        engine.model.generation_config.eos_token_id = None  # it would not end by itself
        task = asyncio.create_task(engine.generate(Request("Tell me.", Sampling(100_000, 5.0, seed=1))))
        await asyncio.sleep(0.3)
        await engine.close()
        await task

    with pytest.raises(EngineStopped, match="closed"):
        asyncio.run(work())


def test_a_model_that_sees_answers_as_its_text_part(tokenizer, tmp_path):
    whole = save(tmp_path, WITH_PICTURES["gemma3"]())
    tokenizer.save_pretrained(tmp_path)
    engine = TransformersEngine(str(tmp_path), length=8192, rope={"full_attention": {"rope_theta": 2e6}})
    asyncio.run(engine.start())
    assert engine.model.config.rope_parameters["full_attention"]["rope_theta"] == 2e6
    assert ask(engine, question(0))[0].tokens
    engine = TransformersEngine(str(tmp_path))
    asyncio.run(engine.start())
    ids = tokenizer(tiny.document(0))["input_ids"]
    scores = asyncio.run(engine.score(ids))
    with torch.no_grad():
        logits = whole(torch.tensor([ids])).logits[0, :-1].double()
    assert abs(scores - logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()).max() < 1e-5


def test_a_text_that_names_a_token_without_a_row_fails_alone(engine):
    rows = engine.model.config.vocab_size
    for asked in (
        engine.score([1, rows]),
        engine.generate(replace(question(0), content="", prompt_ids=(rows + 3,))),
    ):
        with pytest.raises(
            RequestFailed, match=rf"token ({rows}|{rows + 3}) came, the model's embedding has {rows} rows"
        ):
            asyncio.run(asked)
    assert ask(engine, question(0))[0].tokens


def _first_row_zero(weights: dict) -> dict:
    name = "model.embed_tokens.weight"
    rows = weights[name].clone()
    rows[0] = 0
    return weights | {name: rows}


def test_a_model_that_makes_no_numbers_or_no_ends_is_refused_as_it_is_loaded(model, tmp_path):
    def start(weights=None, generation=None) -> None:
        folder = shutil.copytree(model, tmp_path / str(len(list(tmp_path.iterdir()))))
        told = json.loads((folder / "generation_config.json").read_text()) | (generation or {})
        (folder / "generation_config.json").write_text(json.dumps(told))
        asyncio.run(TransformersEngine(change(folder, weights)).start())

    with pytest.raises(
        ValueError,
        match=r"model '.*': config.json or generation_config.json: .* log-prob (-|nan).* equally likely",
    ):
        start(lambda weights: {name: weight * 1e30 for name, weight in weights.items()})
    start(_first_row_zero)  # as that of padding is
    with pytest.raises(ValueError, match=r"eos_token_id=\[1000000\]: no text would end, as the embedding has"):
        start(generation={"eos_token_id": 10**6})
    with pytest.raises(ValueError, match=r"eos_token_id=\['a'\]: expected ids of tokens, which are whole numbers"):
        start(generation={"eos_token_id": ["a"]})
    with pytest.raises(ValueError, match="do not support `num_return_sequences`"):
        start(generation={"num_return_sequences": 3})
    with pytest.raises(ValueError, match=r"generation_config.json: it cannot generate: TypeError: '>' not supported"):
        start(generation={"num_beams": "4"})


def test_a_fault_of_the_program_is_not_blamed_on_the_model(model, monkeypatch):
    def broken(*_):
        raise AttributeError("ours")

    monkeypatch.setattr(TransformersEngine, "_generate", broken)
    with pytest.raises(AttributeError, match="ours"):
        asyncio.run(TransformersEngine(str(model)).start())
