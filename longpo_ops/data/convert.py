"""Preference data of other libraries as pairs whose context is the prompt: `longpo pairs convert`.

    trl             prompt, chosen, rejected: texts or messages; without prompt, chosen and rejected begin alike and that is it
    ultrafeedback   chosen and rejected whole conversations beside `prompt`, the text they begin with (ultrafeedback_binarized);
                    or instruction and completions with an overall_score each: the best is chosen, the worst rejected
    messages        messages (conversations) that end in a question, and answers: chosen and rejected; preferred_output and
                    non_preferred_output; the last message and rejected_response; texts, messages, or from/value

A row becomes a ContextPair (context.py), or is refused with its line: nothing is repaired, guessed or left out that a model
would read. Other columns are kept as provenance. An answer beside messages that is a text is one of the assistant's. Contents
in parts are joined where all of them are text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..kinds import check_choice
from .context import ContextPair, check_said
from .foreign import Cells, check_cells, read_rows
from .records import BadRecord, DataReport, came, keep_good, parse_record
from .records import record_id as name_of

KINDS = ("trl", "ultrafeedback", "messages")
COMMAND = "`longpo pairs convert FILE --from {} --out pairs.jsonl` makes pairs of it"
OTHER = (
    "image",
    "images",
    "videos",
    "audio",
    "tools",
    "chat_template_kwargs",
)  # what a model would read, and a pair does not hold
ROLES = {"human": "user", "gpt": "assistant"}  # of from/value


def read_converted(
    path: Path, kind: str, on_bad_record: str = "raise", report: DataReport | None = None, allow_equal: bool = False
) -> Iterator[ContextPair]:
    """Stream the pairs of a file or folder in one of KINDS. Raises BadRecord, and ValueError as read_rows and keep_good."""
    check_choice("kind", kind, KINDS)
    check_choice("on_bad_record", on_bad_record, ("raise", "skip"))

    def make(row, where: str) -> ContextPair:
        record = check_cells(row, where) if isinstance(row, Cells) else row
        return convert(parse_record(record, where), where, kind, allow_equal)

    return keep_good(read_rows(path), make, on_bad_record, report)


def convert(record: dict, where: str, kind: str, allow_equal: bool = False) -> ContextPair:
    """One row, whose fields are not None, as a pair. Raises BadRecord."""
    name = name_of(record, where)
    if there := [column for column in OTHER if record.get(column)]:
        advice = f"{', '.join(there)} came, which the model would read and a pair does not hold; take the row out"
        raise BadRecord(name, there[0], "more than text", advice)
    parts, used = {"trl": _trl, "ultrafeedback": _ultrafeedback, "messages": _messages}[kind](record, name)
    context, chosen, rejected = (_said(name, *part) for part in parts)
    if not isinstance(context, str):
        chosen, rejected = (_answer(said) for said in (chosen, rejected))
    provenance = {key: value for key, value in record.items() if key not in used | {"id"}}
    made = {"id": name, "context": context, "chosen": chosen, "rejected": [rejected], "provenance": provenance}
    return ContextPair.from_record(made, where, allow_equal)


def advice_for(record: dict) -> str | None:
    """What to do with a record that is in the columns of another library; None for others."""
    if record.keys() & {"document", "turns", "short_prompts", "questions", "chosen_input_ids"}:
        return None
    kind = None
    if record.keys() & {"messages", "conversations", "preferred_output"}:
        kind = "messages"
    elif {"instruction", "completions"} <= record.keys() or (
        isinstance(record.get("prompt"), str) and isinstance(record.get("chosen"), list)
    ):
        kind = "ultrafeedback"
    elif {"chosen", "rejected"} <= record.keys():
        kind = "trl"
    return kind and f"{', '.join(sorted(map(str, record))[:8])} came; {COMMAND.format(kind)}"


# -- the kinds -------------------------------------------------------------------------------------------------------

Part = tuple[str, Any]  # a column and what it holds


def _trl(record: dict, name: str) -> tuple[list[Part], set[str]]:
    chosen, rejected = (_given(record, name, side) for side in ("chosen", "rejected"))
    if record.get("prompt") is None:
        prompt, chosen, rejected = _without_prompt(name, chosen, rejected)
    else:
        prompt = record["prompt"]
        if type(prompt) is not type(chosen) or type(chosen) is not type(rejected):
            kinds = ", ".join(
                f"{side}: {came(said)}"
                for side, said in zip(("prompt", "chosen", "rejected"), (prompt, chosen, rejected))
            )
            other = "ultrafeedback" if isinstance(prompt, str) else "messages"
            advice = (
                f"{kinds}; expected texts alone, or lists of messages alone; see `longpo pairs convert --from {other}`"
            )
            raise BadRecord(name, "prompt", "texts and messages", advice)
    return [("prompt", prompt), ("chosen", chosen), ("rejected", rejected)], {"prompt", "chosen", "rejected"}


def _without_prompt(name: str, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Where two answers begin alike, that is the prompt: whole messages of conversations; of texts all characters but a space
    at the end. The last message or character of the shorter one is never the prompt's."""
    if type(chosen) is not type(rejected):
        raise BadRecord(
            name, "chosen", "texts and messages", f"{came(chosen)}, {came(rejected)}; expected two of one kind"
        )
    shorter = min(len(chosen), len(rejected))
    differs = (i for i in range(shorter) if chosen[i] != rejected[i])
    shared = next(differs, shorter - 1)
    if isinstance(chosen, str) and shared > 0 and chosen[shared] != rejected[shared] and chosen[shared - 1] == " ":
        shared -= 1
    if shared < 1:
        advice = (
            "chosen and rejected do not begin alike, and there is no prompt; expected a prompt, or whole conversations"
        )
        raise BadRecord(name, "prompt", "no prompt", advice)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _ultrafeedback(record: dict, name: str) -> tuple[list[Part], set[str]]:
    if "completions" in record:
        best, worst = _best_and_worst(record, name)
        instruction = _given(record, name, "instruction")
        prompt = [{"role": "user", "content": instruction}]
        answers = [[{"role": "assistant", "content": answer}] for answer in (best, worst)]
        return [("instruction", prompt), *zip(("completions", "completions"), answers)], {"instruction", "completions"}
    sides = {side: _given(record, name, side) for side in ("chosen", "rejected")}
    for side, said in sides.items():
        if not isinstance(said, list):
            advice = (
                f"{came(said)}; expected whole conversations, as in ultrafeedback_binarized; see --from trl for texts"
            )
            raise BadRecord(name, side, "wrong type", advice)
    context, chosen, rejected = _without_prompt(name, *sides.values())
    asked = next((m.get("content") for m in context if isinstance(m, dict) and m.get("role") == "user"), None)
    prompt = record.get("prompt")
    if prompt is not None and prompt != asked:
        advice = f"{came(prompt)}; expected what the conversations begin with, {came(asked)}"
        raise BadRecord(name, "prompt", "another prompt", advice)
    used = {"prompt", "chosen", "rejected"} | ({"messages"} if record.get("messages") == sides["chosen"] else set())
    return [("chosen", context), ("chosen", chosen), ("rejected", rejected)], used


def _best_and_worst(record: dict, name: str) -> tuple[str, str]:
    completions = _given(record, name, "completions")
    if not isinstance(completions, list) or not all(isinstance(each, dict) for each in completions):
        raise BadRecord(name, "completions", "wrong type", f"{came(completions)}; expected a list of objects")
    scored = [(each.get("overall_score"), each.get("response")) for each in completions]
    for i, (score, _) in enumerate(scored):
        if type(score) not in (int, float) or score != score:
            advice = f"{came(score)}; expected a number: leave the row out, or choose among its answers yourself"
            raise BadRecord(name, f"completions[{i}].overall_score", "no score", advice)
    ordered = sorted(scored, key=lambda each: -each[0])  # of equals the first
    if len(ordered) < 2 or ordered[0][0] == ordered[-1][0]:
        advice = f"{len(scored)} answers with the scores {[score for score, _ in scored]}: no preference; remove it"
        raise BadRecord(name, "completions", "no preference", advice)
    worst = next(answer for score, answer in scored if score == ordered[-1][0])
    return ordered[0][1], worst


def _messages(record: dict, name: str) -> tuple[list[Part], set[str]]:
    given = record
    if isinstance(record.get("input"), dict):
        given = record | {key: value for key, value in record["input"].items() if value is not None}
        if given.get("tools"):
            raise BadRecord(
                name, "input.tools", "more than text", "tools came, which a pair does not hold; take the row out"
            )
    column = next((column for column in ("messages", "conversations", "prompt") if column in given), "messages")
    said = _given(given, name, column)
    used = {column, "input", "parallel_tool_calls"}
    if "rejected_response" in record:
        if not isinstance(said, list) or len(said) < 2:
            raise BadRecord(name, column, "wrong type", f"{came(said)}; expected a question and an answer at least")
        return [(column, said[:-1]), (column, said[-1:]), ("rejected_response", record["rejected_response"])], used | {
            "rejected_response"
        }
    openai = "preferred_output" in record
    sides = ("preferred_output", "non_preferred_output") if openai else ("chosen", "rejected")
    answers = [(side, _given(record, name, side)) for side in sides]
    return [(column, said), *answers], used | set(sides)


def _given(record: dict, name: str, column: str) -> Any:
    if record.get(column) is None:
        others = ", ".join(sorted(map(str, record)))
        raise BadRecord(
            name, column, "missing field", f"nothing came beside {others}; see `longpo pairs convert --help`"
        )
    return record[column]


# -- messages --------------------------------------------------------------------------------------------------------


def _said(name: str, column: str, value: Any) -> Any:
    """A text as it is; messages with role and content alone."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        value = [_message(name, f"{column}[{i}]", each) for i, each in enumerate(value)]
    return check_said(name, column, value)


def _answer(said: Any) -> Any:
    return [{"role": "assistant", "content": said}] if isinstance(said, str) else list(said)


def _message(name: str, where: str, message: Any) -> Any:
    if not isinstance(message, dict):
        return message  # which check_said refuses
    there = {key: value for key, value in message.items() if value is not None and value != []}
    if "from" in there and "value" in there and "role" not in there:
        role = there.pop("from")
        there = {"role": ROLES.get(role, role), "content": there.pop("value"), **there}
    if isinstance(there.get("content"), list):
        parts = there["content"]
        if not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in parts
        ):
            advice = f"{came(parts)}; expected text, or parts that are all text"
            raise BadRecord(name, f"{where}.content", "more than text", advice)
        there["content"] = "".join(part["text"] for part in parts)
    return there
