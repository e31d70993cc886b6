"""What a thinking model writes before its answer, told apart from the answer.

    <think> .. </think> answer         and the other pairs of MARKS, at the beginning of a text
           .. </think> answer          where the chat template, or whoever begins the answer, has opened it
    <|channel|>analysis<|message|> .. <|channel|>final<|message|> answer       gpt-oss, its special tokens read or dropped
    Completion.reasoning, answer       where a server tells the two apart

A text that is opened and never closed is reasoning alone: there is no answer, as the model was cut off inside or ended
there. A server may keep the reasoning to itself: its text that only the template has opened, and that ended by itself, is the
answer. A mark anywhere else is a part of the text: an answer may speak of <think>. Without a template that opens it, a lone
closing mark counts where it stands on a line of its own, unless it is as plain a tag as an answer may hold (PLAIN). Not
covered: servers that drop special tokens, as vLLM's without a reasoning parser do by default (skip_special_tokens): where
[THINK] is one, reasoning and answer come as one text, and what is cut off inside gpt-oss's reasoning comes as an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ..pretrained import render_chat
from . import Completion

MARKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
PLAIN = ("<thinking>", "<thought>", "<reasoning>")
CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")  # of gpt-oss
ALONE = "|".join(re.escape(end) for mark, end in MARKS.items() if mark not in PLAIN)
LONE = re.compile(rf"^[^\S\n]*(?:{ALONE})[^\S\n]*$", re.MULTILINE)
CHANNEL = re.compile(r"<\|channel\|>(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
DROPPED = re.compile(r"\A\s*analysis(.*?)assistantfinal", re.DOTALL)  # the same without its special tokens
ENDS = re.compile(r"<\|(?:end|return|call)\|>.*", re.DOTALL)


class Parts(NamedTuple):
    """Of a text; answer is None where the model did not come to one."""

    answer: str | None
    reasoning: str


def part(text: str, opened: str = "", reasoning: str = "", finish: str = "stop", whole: bool = True) -> Parts:
    """opened: the mark that precedes the text, if one does (opens_reasoning). reasoning: what came apart. finish: of
    Completion. whole: of Engine, whether all that the model wrote is here."""
    if reasoning:
        if not text.strip() and finish == "length":
            return Parts(None, reasoning)
        rest = part(text, finish=finish)
        return Parts(rest.answer, reasoning + rest.reasoning)
    if text.lstrip().startswith(CHANNELS[:2]):
        return _of_channels(text)
    if dropped := DROPPED.match(text):
        return Parts(text[dropped.end() :], dropped[1])
    thoughts, rest = "", text
    while (mark := next((mark for mark in MARKS if rest.lstrip().startswith(mark)), "")) or opened:
        begun = rest.lstrip().removeprefix(mark) if mark else rest
        thought, end, behind = begun.partition(MARKS[mark or opened])
        if not (end or mark or whole) and finish == "stop":
            break
        if not end:
            return Parts(None, thoughts + begun)
        thoughts, rest, opened = thoughts + thought, behind.lstrip(), ""
    lone = None if thoughts or rest != text else LONE.search(text)
    if lone and not any(mark in text[: lone.start()] for mark in MARKS):
        return Parts(text[lone.end() :].lstrip(), text[: lone.start()])
    return Parts(rest, thoughts)


def part_completion(completion: Completion, opened: str, whole: bool) -> Parts:
    """The parts of what an engine gave for a message."""
    return part(completion.text, opened, completion.reasoning, completion.finish, whole)


def _of_channels(text: str) -> Parts:
    """Of gpt-oss: the final channel is the answer; what stands before the first channel is of the one that was begun."""
    answer, thoughts = None, ""
    for here, following in zip(found := [*CHANNEL.finditer(text)], [*found[1:], None]):
        said = ENDS.sub("", text[here.end() : following.start() if following else len(text)])
        answer, thoughts = (said, thoughts) if here[1] == "final" else (answer, thoughts + said)
    return Parts(answer, thoughts)


def opens_reasoning(tokenizer, template_kwargs: dict) -> str:
    """The opening one of MARKS with which the chat template's prompt ends, so that an answer begins inside; "" without."""
    prompt = render_chat(tokenizer, [{"role": "user", "content": "a"}], True, **template_kwargs)
    return next((mark for mark in MARKS if prompt.rstrip().endswith(mark)), "")


def thinks(tokenizer, template_kwargs: dict) -> bool:
    """Whether the model may reason before its answer: its chat template knows of reasoning and does not close it itself, as
    templates do that are asked for none (enable_thinking=false).
    """
    known = str(tokenizer.chat_template)
    if not any(mark in known for mark in (*MARKS.values(), CHANNELS[1])):
        return False
    prompt = render_chat(tokenizer, [{"role": "user", "content": "a"}], True, **template_kwargs)
    return not prompt.rstrip().endswith(tuple(MARKS.values()))


def with_marks(tokenizer, ids: Sequence[int], text: str) -> str:
    """The text of ids, decoded without special tokens; anew with those that tell reasoning from answer, where there are any."""
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = {*MARKS, *MARKS.values()} & {special.get(id) for id in ids}
    kept |= {*CHANNELS} if any(special.get(id) == "<|channel|>" for id in ids) else set()
    if not kept:
        return text
    ids = [id for id in ids if id not in special or special[id] in kept]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
