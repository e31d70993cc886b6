"""`template_kwargs`: variables of a chat template that a user sets, such as enable_thinking=False for Qwen3.

A template takes any name and leaves those that it does not read unheard, so a misspelt one would change nothing and say
nothing. Which names it reads is known from its text (jinja2.meta).
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
from typing import Any

from ..kinds import check_object, refusal

OF_TEMPLATES = ("tools", "documents")  # named by apply_chat_template, but no more than variables of the template


def check_values(given: dict[str, Any] | None) -> dict[str, Any]:
    """-> a copy, {} of None. Raises ValueError unless it is a dict of names and JSON values."""
    check_object("template_kwargs", given, dict | None, "names and values, or none")
    for name, value in (given or {}).items():
        if not isinstance(name, str):
            raise refusal("template_kwargs", given, "names that are text")
        if not _is_json(value):
            raise refusal(
                f"template_kwargs: {name}", value, "a JSON value (text in quotes, a number, true, a list, ...)"
            )
    return dict(given or {})


def check_template_kwargs(tokenizer, given: dict[str, Any] | None, otherwise: str = "") -> dict[str, Any]:
    """-> a copy, {} of None. Raises ValueError for values that are not JSON's, for names that the tokenizer's chat template
    does not read, and for those that the library sets itself. otherwise: what else to do with an unread name; {} stands for
    name and value."""
    checked = check_values(given)
    own = _own(tokenizer) if checked else set()
    if taken := sorted(own & set(checked)):
        raise ValueError(
            f"template_kwargs: {', '.join(taken)} is set by longpo_ops; expected variables of the chat template"
        )
    read = template_variables(tokenizer) - own if checked else set()
    for name in sorted(set(checked) - read):
        near = difflib.get_close_matches(name, read, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        meant += f"; {otherwise.replace('{}', json.dumps({name: checked[name]}))}" if otherwise else ""
        raise ValueError(
            f"template_kwargs: the chat template of {tokenizer.name_or_path!r} does not read {name}, so it would change "
            f"nothing; expected some of {', '.join(sorted(read)) or 'none, as it reads no variable'}{meant}"
        )
    return checked


def template_variables(tokenizer) -> set[str]:
    """Names that the chat template reads and does not set itself. Raises ValueError for a template that is none."""
    from jinja2 import TemplateError, meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        template = tokenizer.get_chat_template()
        environment = _compile_jinja_template(
            template
        ).environment  # with the tags and functions that templates may use
        return meta.find_undeclared_variables(environment.parse(template))
    except TemplateError as error:
        raise ValueError(f"the chat template of {tokenizer.name_or_path!r} is none: {error}; use another") from error


def _own(tokenizer) -> set[str]:
    """Names that mean something else to apply_chat_template."""
    return {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} - {*OF_TEMPLATES, "kwargs"}


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) for name in value) and all(map(_is_json, value.values()))
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
