"""A prompt and answers to it, as DPO's usual data has them: a pair whose context is the prompt, without a short input.

    {"id": "rows.jsonl:7",
     "context": "...text..." or [{"role": "user", "content": "..."}, ...],
     "chosen": "...text..." or [{"role": "assistant", "content": "..."}, ...], "rejected": [as chosen, ...],
     "provenance": {...}, "ref_chosen_logp": -41.5, "ref_rejected_logps": [-63.25]}

`longpo pairs convert` (convert.py) writes them. Tokens are those that TRL 1.16 trains on, T the tokenizer, G the generation
prompt:

    texts       T(context), T(context + answer + eos), as the tokenizer adds its special tokens; eos where the answer lacks it
    messages    T(template(context) + G), T(template(context + answer)), as the chat template writes them
    labels      all that follows the tokens which the first has in common with the others: end of turn, what a template writes
                behind it or in front of an answer (Qwen3's empty thinking block), further messages of an answer

So a context is never cut, and its tokens have no label and, with nll_tokens="contents", no part in an NLL term. Not covered:
tools, pictures, Parquet (columns have one type there).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pretrained import render_chat
from .pairs import Pair, Turn, _get, _logps, _provenance, _refuse_unknown, check_logps
from .records import BadRecord, DataReport, came, check_text
from .records import record_id as name_of
from .tokenized import IGNORE, TokenizedPair, TokenSequence, tokenizer_fingerprint

if TYPE_CHECKING:
    from .chat import ChatFormat

FIELDS = {"id", "context", "chosen", "rejected", "provenance", "ref_chosen_logp", "ref_rejected_logps"}
MESSAGE = {"role", "content"}

Said = str | tuple[dict[str, str], ...]  # a text, or messages


@dataclass(frozen=True)
class ContextPair:
    """One record: a prompt, a chosen answer and one or more rejected ones, all texts or all messages."""

    id: str
    context: Said
    chosen: Said
    rejected: tuple[Said, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    ref_chosen_logp: float | None = None
    ref_rejected_logps: tuple[float, ...] | None = None

    def __post_init__(self):
        kinds = Counter(type(said) for said in (self.context, self.chosen, *self.rejected))
        if len(kinds) != 1 or not kinds.keys() <= {str, tuple} or not self.rejected:
            raise ValueError(
                f"ContextPair: {', '.join(kind.__name__ for kind in kinds)} came in context, chosen and {len(self.rejected)} "
                "rejected; expected texts alone, or tuples of messages alone, and one rejected at least"
            )
        check_logps(self)

    @classmethod
    def from_record(cls, record: dict, where: str = "record", allow_equal: bool = False) -> ContextPair:
        """Check a record, whose fields are not None, and make a ContextPair of it. Raises BadRecord as Pair.from_record, and
        where some of context and answers are texts and others messages."""
        name = name_of(record, where)
        _refuse_unknown(name, "record", record, FIELDS, "keep further data under 'provenance'")
        rejected = record.get("rejected")
        if isinstance(rejected, str) or (rejected and isinstance(rejected, list) and isinstance(rejected[0], dict)):
            rejected = [rejected]
        rejected = _get(name, record | {"rejected": rejected}, "rejected", list, "rejected")
        if not rejected:
            raise BadRecord(name, "rejected", "empty field", "[] came; expected at least one rejected answer")
        said = {"context": record.get("context"), "chosen": record.get("chosen")}
        said |= {f"rejected[{j}]": each for j, each in enumerate(rejected)}
        said = {key: check_said(name, key, value) for key, value in said.items()}
        texts = [key for key, value in said.items() if isinstance(value, str)]
        if 0 < len(texts) < len(said):
            others = [key for key in said if key not in texts]
            advice = f"{', '.join(texts)} came as text, {', '.join(others)} as messages; expected one kind"
            raise BadRecord(name, texts[0], "texts and messages", advice)
        context, chosen, *others = said.values()
        if not allow_equal and chosen in others:
            raise BadRecord(name, "rejected", "chosen equal to rejected", "it is no preference; remove it")
        logps = (_logps(name, record, "ref_chosen_logp", None), _logps(name, record, "ref_rejected_logps", len(others)))
        if (logps[0] is None) != (logps[1] is None):
            raise BadRecord(name, "ref_chosen_logp", "bad log-probs", "one came alone; expected both, or neither")
        return cls(name, context, chosen, tuple(others), _provenance(name, record), *logps)

    def to_record(self) -> dict[str, Any]:
        """The pair as the JSON object described on top of this file."""
        plain = json.loads(json.dumps({name: getattr(self, name) for name in ("context", "chosen", "rejected")}))
        logps = None if self.ref_rejected_logps is None else list(self.ref_rejected_logps)
        record = {"id": self.id, **plain, "provenance": self.provenance}
        return record | {"ref_chosen_logp": self.ref_chosen_logp, "ref_rejected_logps": logps}

    # What tables and pages of pairs show.

    @property
    def document(self) -> str:
        """The context as one text, roles in front of messages."""
        return _as_text(self.context)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The answers, as a turn without question and chunk."""
        return (Turn("", "", _as_text(self.chosen), tuple(map(_as_text, self.rejected))),)


def check_said(record_id: str, name: str, value: Any) -> Said:
    """A text, or a tuple of messages. Raises BadRecord for anything else, and for what holds no words."""
    if isinstance(value, str):
        return check_text(record_id, name, value)
    if value is None:
        raise BadRecord(record_id, name, "missing field", "nothing came; expected text, or a list of messages")
    if not isinstance(value, list | tuple):
        raise BadRecord(record_id, name, "wrong type", f"{came(value)}; expected text, or a list of messages")
    if not value:
        raise BadRecord(record_id, name, "empty field", "[] came; expected a list of at least one message")
    messages = tuple(_message(record_id, f"{name}[{i}]", message) for i, message in enumerate(value))
    if not messages[-1]["content"].strip():
        raise BadRecord(
            record_id, f"{name}[{len(messages) - 1}].content", "empty field", "expected text in the last message"
        )
    return messages


def _message(record_id: str, name: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRecord(record_id, name, "wrong type", f"{came(message)}; expected an object with role and content")
    _refuse_unknown(record_id, name, message, MESSAGE, "a message has a role and a content, which is text")
    checked = {}
    for key in ("role", "content"):
        checked[key] = text = _get(record_id, message, key, str, f"{name}.{key}")
        if key == "role" or text.strip():
            check_text(record_id, f"{name}.{key}", text)
    return checked


def _as_text(said: Said) -> str:
    return said if isinstance(said, str) else "\n\n".join(f"{each['role']}: {each['content']}" for each in said)


class TextFormat:
    """In the place of a ChatFormat, for a tokenizer without a chat template: contexts and answers that are texts need none.
    Pairs and messages are refused with a ValueError. max_length: as ChatFormat's."""

    system: str | None = None

    def __init__(self, tokenizer, max_length: int | None = None):
        self.tokenizer, self.max_length, self.template_kwargs = tokenizer, max_length, {}
        self.fingerprint = tokenizer_fingerprint(tokenizer)

    def tokenize(self, pair: Pair | ContextPair, report: DataReport | None = None) -> TokenizedPair:
        """Raises ValueError: what is no text needs a template."""
        raise no_template(self.tokenizer)


def no_template(tokenizer) -> ValueError:
    """Of a tokenizer that is to lay out messages."""
    return ValueError(
        f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model's tokenizer, or set "
        "tokenizer.chat_template"
    )


# -- tokens ----------------------------------------------------------------------------------------------------------


def tokenize_context(pair: ContextPair, chat: ChatFormat | TextFormat, report: DataReport) -> TokenizedPair:
    """The sequences of a pair, without short inputs. chat: of the run; its tokenizer, template_kwargs and max_length are used.

    Raises BadRecord for what the template refuses, where the answers begin before any token of the context, for an answer
    without tokens, beyond max_length, and messages where the run has a system prompt of its own.
    """
    answers = (pair.chosen, *pair.rejected)
    prompt, *whole = _texts_of(pair, chat, answers) if isinstance(pair.context, str) else _rendered(pair, chat, answers)
    shared = min(_common(prompt, ids) for ids in whole)
    if shared == 0:
        advice = (
            "its tokens and those of context and answer together have no beginning in common; expected a longer one"
        )
        raise BadRecord(pair.id, "context", "no context", advice)
    report.merged_contexts += shared < len(prompt)
    names = ("chosen", *(f"rejected[{j}]" for j in range(len(pair.rejected))))
    chosen, *rejected = (
        _sequence(pair.id, name, ids, shared, chat.max_length) for name, ids in zip(names, whole, strict=True)
    )
    given = {"ref_chosen_logp": pair.ref_chosen_logp, "ref_rejected_logps": pair.ref_rejected_logps}
    return TokenizedPair(pair.id, chosen, tuple(rejected), **given)


def _texts_of(pair: ContextPair, chat: ChatFormat | TextFormat, answers: Sequence[Said]) -> list[list[int]]:
    eos = chat.tokenizer.eos_token
    if not eos:
        raise ValueError(
            f"the tokenizer {chat.tokenizer.name_or_path!r} has no eos_token, which ends an answer; set it"
        )
    ended = [answer if answer.endswith(eos) else answer + eos for answer in answers]
    texts = [pair.context, *(pair.context + answer for answer in ended)]
    return [chat.tokenizer(text, verbose=False)["input_ids"] for text in texts]


def _rendered(pair: ContextPair, chat: ChatFormat | TextFormat, answers: Sequence[Said]) -> list[list[int]]:
    if chat.system is not None:
        advice = "the run has a system prompt of its own (system); leave it out, or write it into the contexts"
        raise BadRecord(pair.id, "context", "messages beside a system prompt", advice)
    if not chat.tokenizer.chat_template:
        raise no_template(chat.tokenizer)
    conversations = [(pair.context, True), *((pair.context + answer, False) for answer in answers)]
    try:
        texts = [
            render_chat(chat.tokenizer, [dict(m) for m in messages], more, **chat.template_kwargs)
            for messages, more in conversations
        ]
    except ValueError as error:
        raise BadRecord(pair.id, "context", "the chat template refuses the contents", str(error)) from error
    return [chat.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]


def _common(a: list[int], b: list[int]) -> int:
    """Tokens at the beginning that are the same in both."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if len(differs) else n


def _sequence(record_id: str, name: str, ids: list[int], shared: int, max_length: int | None) -> TokenSequence:
    if len(ids) == shared:
        raise BadRecord(record_id, name, "an answer tokenises to nothing", "expected a token behind the context's")
    if max_length is not None and len(ids) > max_length:
        advice = f"{len(ids)} tokens came, max_length is {max_length}; raise it, or shorten the record: a context is never cut"
        raise BadRecord(record_id, name, "longer than max_length", advice)
    tokens = np.array(ids, dtype=np.int64)
    labels = tokens.copy()
    labels[:shared] = IGNORE
    return TokenSequence(tokens, labels, labels)
