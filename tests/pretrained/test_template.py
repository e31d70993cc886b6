"""Chat templates that run away are ended and refused; those that end, in whatever way, are rendered or say why not."""

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from longpo_ops.pretrained import BrokenModel, render_chat, template
from longpo_ops.pretrained.template import check_template

from .broken import TEMPLATES
from .tiny import CHATML

TINY = Path(__file__).parents[2] / "examples" / "tiny" / "model"
MESSAGES = [{"role": "user", "content": "Who?"}]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize("kind", ["ranges in ranges", "a huge power"])
def test_a_template_that_takes_a_processor_is_ended(tokenizer, kind, monkeypatch):
    monkeypatch.setattr("longpo_ops.pretrained.template.SECONDS", 1)
    tokenizer.chat_template = TEMPLATES[kind]
    with pytest.raises(BrokenModel, match=r"model 'm': its chat template takes more than 1 s to write .* three words"):
        check_template("m", tokenizer)


@pytest.mark.parametrize("kind", ["a repeated text", "a list repeated"])
def test_a_template_that_takes_the_memory_is_ended(tokenizer, kind):
    tokenizer.chat_template = TEMPLATES[kind]
    with pytest.raises(BrokenModel, match="its chat template takes more than 1 GiB of memory"):
        check_template("m", tokenizer)


@pytest.mark.parametrize(
    "kind",
    ["a huge range", "endless recursion", "division by zero", "text and number", "an include", "an unsafe attribute",
     "an unknown filter", "not closed", "it refuses", "nested too deep"],
)  # fmt: skip
def test_a_template_that_fails_says_so_where_a_conversation_is_wanted(tokenizer, kind):
    tokenizer.chat_template = TEMPLATES[kind]
    check_template("m", tokenizer)
    with pytest.raises(ValueError, match=f"model '{TINY}': the chat template refuses a conversation: "):
        render_chat(tokenizer, MESSAGES, True)


def test_where_children_are_not_told_of_or_not_to_be_had_a_template_is_taken(tokenizer, monkeypatch):
    tokenizer.chat_template = CHATML + "{# one #}"
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        check_template("m", tokenizer)
    finally:
        signal.signal(signal.SIGCHLD, before)

    def refuse():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    tokenizer.chat_template = CHATML + "{# two #}"
    check_template("m", tokenizer)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_others_end_says_nothing_of_the_template(number):
    assert template._runs_away(lambda: os.kill(os.getpid(), number)) is None


def test_a_child_that_took_its_time_is_blamed_however_the_system_ends_it(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 1)

    def work():
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        while True:
            pass

    assert template._runs_away(work) == "more than 1 s"


def test_a_child_that_waits_for_a_lock_is_ended_soon():
    lock = threading.Lock()
    with lock, pytest.MonkeyPatch.context() as patch:
        assert template.WAIT <= 15
        patch.setattr(template, "WAIT", 1)
        assert template._runs_away(lock.acquire) is None


def test_a_template_that_writes_nothing_is_refused(tokenizer):
    tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(ValueError, match="the chat template writes nothing of a conversation of 1 messages"):
        render_chat(tokenizer, MESSAGES, True)


def test_a_whole_template_is_rendered(tokenizer):
    tokenizer.chat_template = CHATML
    check_template("m", tokenizer)
    assert render_chat(tokenizer, MESSAGES, True) == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
