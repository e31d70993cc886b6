"""A chat template under limits: rendered once in a forked child, which is ended when it takes too much.

Templates are programs. The sandbox that transformers runs them in bounds one range; ranges in ranges, a text times 10^10, a
macro that calls itself twice or 9 ** (9 ** 9) take a processor for years or the memory of the machine. No limit inside a
process ends all of these, as one operation may be the whole of it; the operating system ends a process. The child takes
milliseconds.

Not covered: templates that run away on other conversations than CONVERSATIONS or with variables of their own. Nothing is
known, and the template taken, where there is no fork or no process to spare, where SIGCHLD is ignored, and where the child
waits (for a lock that another thread held at the fork) or is ended by others.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .loading import BrokenModel, explain, is_out_of_memory

SECONDS = 2  # of processor time, so that a busy machine changes nothing
BYTES = 1 << 30  # beside what the process has
WAIT = 15  # seconds of the clock, after which nothing is known
NO_MEMORY = 3  # what the child ends with
CONVERSATIONS = tuple(
    ([{"role": role, "content": "a"} for role in roles], more)
    for roles, more in ((("user", "assistant"), False), (("user", "assistant", "user"), True))
)
_seen: set[str] = set()  # templates that end


def check_template(name: str, tokenizer) -> None:
    """Raises BrokenModel for a chat template that takes more than SECONDS or BYTES on a few words. Where it refuses them it is
    taken, as not every run has conversations."""
    template = repr(getattr(tokenizer, "chat_template", None))
    if template in _seen or not hasattr(os, "fork"):
        return
    if took := _runs_away(lambda: [render(tokenizer, turns, more) for turns, more in CONVERSATIONS]):
        raise BrokenModel(
            f"model {name!r}: its chat template takes {took} to write a conversation of three words; expected "
            "milliseconds: mend the template (chat_template.jinja, or chat_template in tokenizer_config.json)"
        )
    _seen.add(template)


def render(tokenizer, messages: list[dict[str, str]], generation_prompt: bool, **variables: Any) -> str:
    """The text of a conversation in the tokenizer's chat template. Raises ValueError for whatever the template raises, and
    where it writes nothing."""
    name = getattr(tokenizer, "name_or_path", "")
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, **variables
        )
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, ImportError):
            raise
        raise ValueError(f"model {name!r}: the chat template refuses a conversation: {explain(error)}") from error
    if not text:
        raise ValueError(
            f"model {name!r}: the chat template writes nothing of a conversation of {len(messages)} messages"
        )
    return text


def _runs_away(work: Callable[[], Any]) -> str | None:
    """What a child took too much of. None where it ended within its limits, in whatever way, or where that is not known."""
    try:
        child = os.fork()
        if child == 0:
            _work(work)
        _, status, used = os.wait4(child, 0)
    except OSError:
        return None
    if os.WIFEXITED(status):
        return f"more than {BYTES >> 30} GiB of memory" if os.WEXITSTATUS(status) == NO_MEMORY else None
    ended = os.WTERMSIG(status)  # the system follows SIGXCPU with SIGKILL, which others send too
    ran_out = ended == signal.SIGKILL and used.ru_utime + used.ru_stime >= SECONDS
    return f"more than {SECONDS} s" if ended == signal.SIGXCPU or ran_out else None


def _work(work: Callable[[], Any]) -> None:
    """In the child, which ends here."""
    code = 0
    try:
        for number in (signal.SIGXCPU, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(WAIT)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        pages = Path("/proc/self/statm")
        if pages.exists():
            limit = int(pages.read_text().split()[0]) * resource.getpagesize() + BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        work()
    except MemoryError:
        code = NO_MEMORY
    except BaseException:  # said where a conversation is wanted
        pass
    finally:
        os._exit(code)
