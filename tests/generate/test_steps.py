"""Thinking models make pairs: of their answers without the reasoning."""

from __future__ import annotations

from transformers import AutoTokenizer

from benchmarks.loop.openai_server import OpenAIServer, Reply, Seen, answer
from longpo_ops.data import read_pairs
from longpo_ops.generate import generate

THOUGHT = "1. Is it the wind?\n2. Or the boats?\n"  # what looks like questions is not among them


def thinking(seen: Seen, begin: str, end: str, **message) -> Reply:
    """A good answer behind a thought."""
    body = answer(seen)
    said = body["choices"][0]["message"]
    said["content"] = begin + (THOUGHT if begin else "") + end + said["content"]
    said |= message
    return Reply(body=body)


def test_pairs_of_a_thinking_model_are_those_of_its_answers(settings, tmp_path):
    with OpenAIServer() as server:
        generate(settings(endpoints=(server.url,), out=str(tmp_path / "plain")))
    ways = [("<think>\n", "</think>\n\n", {}), ("[THINK]", "[/THINK]", {}), ("", "", {"reasoning_content": THOUGHT})]
    with OpenAIServer(lambda number, seen: thinking(seen, *ways[number % 3][:2], **ways[number % 3][2])) as server:
        result = generate(settings(endpoints=(server.url,), out=str(tmp_path / "thinking")))
    plain, made = (list(read_pairs(tmp_path / name)) for name in ("plain", "thinking"))
    assert [pair.turns for pair in made] == [pair.turns for pair in plain] and result.made == 4


def test_a_template_may_open_the_reasoning_itself(settings, tokenizer, tmp_path):
    own = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    role, prompt = "<|{{ message['role'] }}|>", "{% if add_generation_prompt %}<|assistant|>"
    assert role in own.chat_template and prompt in own.chat_template
    empty = "{% if message['role'] == 'assistant' %}<think>\n</think>{% endif %}"
    own.chat_template = own.chat_template.replace(role, role + empty).replace(prompt, prompt + "<think>")
    own.save_pretrained(tmp_path / "model")
    given = dict(model=str(tmp_path / "model"), prompts=None, max_documents=1)
    made = {}
    for name, begin, end in (("plain", "", "</think>"), ("thinking", THOUGHT, "</think>"), ("kept", "", "")):
        with OpenAIServer(lambda number, seen, begin=begin, end=end: thinking(seen, "", begin + end)) as server:
            generate(settings(endpoints=(server.url,), out=str(tmp_path / name), **given))
        made[name] = [pair.turns for pair in read_pairs(tmp_path / name)]
    assert made["plain"] == made["thinking"] == made["kept"]  # the last: by a server that leaves the reasoning out
    assert len(made["plain"][0]) == 4
    assert not any("think" in turn.chosen + turn.rejected[0] for turn in made["plain"][0])


def test_what_is_cut_off_inside_the_reasoning_is_a_failed_turn_that_is_counted(settings, tmp_path):
    def behave(number, seen):
        if seen.body["max_tokens"] == 80:
            return None
        whole = answer(seen)["choices"][0]["message"]["content"]
        cut = {"message": {"content": f"<think>\n{whole}"}, "finish_reason": "length"}
        apart = {"message": {"content": None, "reasoning": whole}, "finish_reason": "length"}
        return [None, Reply(body={"choices": [cut]}), Reply(body={"choices": [apart]})][number % 3]

    with OpenAIServer(behave) as server:
        result = generate(settings(endpoints=(server.url,), concurrency=1))
    counts = [outcome["counts"].get("cut off inside the reasoning", 0) for outcome in result.outcomes]
    assert sum(counts) > 0 and "raise reasoning_tokens" in result.tally.last_failure
    turns = sum(len(pair.turns) for pair in read_pairs(tmp_path / "pairs")) if result.made else 0
    assert turns + sum(counts) == 16  # nothing else was left out
