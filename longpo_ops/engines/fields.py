"""Fields of a request's body, as servers take different ones: added, renamed, replaced or left out by options.

    max_tokens=max_completion_tokens   a text for a field that requests have: its name there
    temperature=null                   leaves it out
    temperature=1                      a number, or logprobs=true: its value in every request
    top_k=40                           any other field: added to every request; of stream and n only false and 1

Tests: tests/engines/test_server.py.
"""

from __future__ import annotations

import json
from typing import Any

OWN = ("max_tokens", "temperature", "top_p", "seed", "logprobs", "echo")  # fields that an option may rename or remove
SWITCHES = ("logprobs", "echo")
SET = {"stream": False, "n": 1}  # what every request means, which may be said
FIXED = ("model", "messages", "prompt", "stream", "n")  # without which no answer can be read


def check_fields(options: dict[str, Any], flag: str = "--engine-option") -> None:
    """Raises ValueError for options that take from a request what it needs, or give a field of its own no sense."""
    for name, value in options.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(f"{flag} {name}={value!r}: expected what JSON has, without NaN and infinities") from None
        if name in SET:
            if type(value) is not type(SET[name]) or value != SET[name]:
                came, only = json.dumps(value), json.dumps(SET[name])
                raise ValueError(
                    f"{flag} {name}={came}: one whole answer is read per request; expected {only}, or none"
                )
            continue
        if name in FIXED:
            raise ValueError(f"{flag} {name}: every request has its own; expected another field")
        if name == "chat_template_kwargs" and not isinstance(value, dict | None):
            raise ValueError(f'{flag} {name}={value!r}: expected variables of the chat template, such as {{"a": 1}}')
        kinds = (int, float, bool) if name in SWITCHES else (int, float)
        right = value is None or type(value) in kinds or (isinstance(value, str) and value not in ("", *OWN, *FIXED))
        if name in OWN and not right:
            raise ValueError(
                f"{flag} {name}={value!r}: expected null, which leaves it out, another name for it such as "
                f"max_completion_tokens, or a number{' or true or false' if name in SWITCHES else ''}"
            )


def change_fields(body: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A request's body with fields of its own left out, renamed or replaced, and others added."""
    body = dict(body)
    for name, value in options.items():
        if name not in OWN or not (value is None or isinstance(value, str)):
            body[name] = value
        elif name in body:
            told = body.pop(name)
            body |= {} if value is None else {value: told}
    return body


def changed(options: dict[str, Any]) -> dict[str, Any]:
    """What options change of a request's own fields, such as its temperature: another answer comes of it. Names do not
    matter."""
    return {name: value for name, value in options.items() if name in OWN and not isinstance(value, str)}
