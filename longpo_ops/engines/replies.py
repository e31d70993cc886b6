"""What servers answer, made the same: texts and log-probs, and the errors that some send under status 200.

    content       text, or a list of typed parts           -> Completion.text; thinking parts -> Completion.reasoning
    finish_reason stop, eos_token, MAX_TOKENS, ..          -> "stop" or "length" (as_finish)
    error         {"code", "message"}, a text, a list      -> its code as a status, its own words

Nothing that is no text becomes one: a part that holds none is a failed request. Log-probs are checked by Engine.
"""

from __future__ import annotations

import json
from typing import Any

from . import Completion, RequestFailed, as_finish

THINKING = ("thinking", "reasoning", "reasoning_content")  # types of parts, and names of fields
TEXTS = ("text", "output_text", "refusal")  # types of parts
CODES = {  # in the codes and types of errors that are no numbers
    **{
        "rate_limit": 429,
        "too_many": 429,
        "quota": 429,
        "exhausted": 429,
        "overloaded": 503,
        "unavailable": 503,
        "timeout": 408,
    },
    **{
        "api_key": 401,
        "authentication": 401,
        "unauthorized": 401,
        "permission": 403,
        "forbidden": 403,
        "not_found": 404,
    },
    **{"invalid": 400, "bad_request": 400, "badrequest": 400, "context_length": 400, "unsupported": 400},
}


class NoAnswer(ValueError):
    """An answer that is none, in words; another one may be better."""


def as_completion(answer: Any, limit: int) -> Completion:
    """The completion in a reply of either endpoint; limit: tokens that were allowed.

    Raises NoAnswer for a reply without a text, RequestFailed for one that ended otherwise or holds something else.
    """
    try:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        raw = "message" not in choice and "text" in choice  # of the completions endpoint
        message = {"content": choice["text"]} if raw else choice["message"]
        text, reasoning = _texts(message.get("content") or message.get("refusal"))
        reasoning += next((told for name in THINKING if (told := _thought(message.get(name)))), "")
        logprobs = choice.get("logprobs") or {}
        values = (
            logprobs.get("token_logprobs") if raw else [each.get("logprob") for each in logprobs.get("content") or ()]
        )
        ids, tokens = choice.get("token_ids"), int(usage.get("completion_tokens") or 0)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Completion(
            text=text,
            finish=as_finish(choice.get("finish_reason"), tokens, limit),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            tokens=tokens,
            cached_tokens=int(cached),
            token_ids=None if ids is None else tuple(ids),
            logprobs=tuple(values) if values else None,
            reasoning=reasoning,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise NoAnswer("an answer without a text") from None


def _texts(content: Any) -> tuple[str, str]:
    """Text and reasoning of a content: a text, nothing, or a list of parts. Raises RequestFailed for a part without text."""
    if content is None or isinstance(content, str):
        return content or "", ""
    if not isinstance(content, list):
        raise TypeError
    text = reasoning = ""
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if isinstance(part, str):
            text += part
        elif kind in THINKING:
            reasoning += _thought(part)
        elif isinstance(told := part.get("text", part.get("refusal")), str):
            text += told
        elif told is None and kind in TEXTS:
            continue
        elif kind != "redacted_thinking":
            raise RequestFailed(
                "the answer is no text", f"a part of type {kind} came; expected parts of text and thinking"
            )
    return text, reasoning


def _thought(told: Any) -> str:
    """The words of a reasoning; none where its field holds something else, such as a switch or what is encrypted."""
    if isinstance(told, list):
        return "".join(map(_thought, told))
    if isinstance(told, dict):
        return next((words for name in (*THINKING, "text") if (words := _thought(told.get(name)))), "")
    return told if isinstance(told, str) else ""


def echoed_logps(answer: Any, count: int) -> Any:
    """What stands for the log-probs of tokens 1 .. count - 1 in a reply with echo; None where there is nothing."""
    try:
        return answer["choices"][0]["logprobs"]["token_logprobs"][1:count]
    except (KeyError, IndexError, TypeError):
        return None


def find_error(answer: Any) -> tuple[int | None, str] | None:
    """(status, words) of a reply that is an error, whatever status it came under; None for one that is none.

    status: the error's code, or what its words for it stand for; None where it has none.
    """
    if isinstance(answer, list) and answer:
        answer = answer[0]
    if not isinstance(answer, dict):
        return None
    found = (answer if answer.get("object") == "error" else None, answer.get("error"), _error_of_choice(answer))
    error = next((each for each in found if _says_something(each)), None)
    if error is None:
        return None
    if not isinstance(error, dict):
        return None, _words(error)
    names = [error.get(name) for name in ("code", "status", "type")]
    told = [str(each) for each in names if each not in (None, "")]
    words = _words(error.get("message") or error.get("detail") or error)
    return _status(told), f"{told[0]}: {words}" if told else words


def _says_something(error: Any) -> bool:
    return any(error.values()) if isinstance(error, dict) else bool(error)


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _error_of_choice(answer: dict) -> Any:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first.get("error") if isinstance(first, dict) else None


def _status(codes: list[str]) -> int | None:
    for code in codes:
        if code.isdecimal() and 400 <= int(code) < 600:
            return int(code)
    words = " ".join(codes).lower()
    return next((status for word, status in CODES.items() if word in words), None)
