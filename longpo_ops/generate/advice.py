"""Which setting helps where much is lost to one reason.

    lost to a reason / (what is left + what was lost to any)  > a tenth  ->  a line with the setting, and what it is now

Turns are lost to the reasons of steps.py, documents to those of documents/. NEEDS_NONE names the reasons that no setting
helps: each is what it says.

Tests: tests/generate/test_advice.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

MUCH = 0.1
REASONING = "raise --reasoning-tokens (now {reasoning_tokens}), or ask without reasoning, as with --template-kwargs"
WORDING = "give a wording of your own that the model follows (--prompts), or another --temperature (now {temperature})"
TURNS = {
    "questions: cut off": "raise --question-tokens (now {question_tokens})",
    "questions: cut off inside the reasoning": REASONING,
    "questions: none": WORDING,
    "questions: too few": WORDING,
    "unparsable question list": WORDING + "; --recipe default reads more forms of lists",
    "cut off inside the reasoning": REASONING,
    "chosen: cut off": "raise --answer-tokens (now {answer_tokens}), or ask for short answers (--prompts with lead_ins.txt)",
    "chosen: near-empty": "lower --min-words (now {min_words})",
    "rejected: near-empty": "lower --min-words (now {min_words})",
    "chosen: repetitive": "raise --max-repeated (now {max_repeated})",
    "rejected: repetitive": "raise --max-repeated-rejected (now {max_repeated_rejected})",
    "chosen: refusal": "see which phrases it has (--prompts with refusals.txt)",
    "rejected: refusal": "see which phrases it has (--prompts with refusals.txt)",
    "chosen equal or nearly equal to rejected": "raise --max-overlap (now {max_overlap}), or --length (now {length}): the "
    "model answers as well from the whole",
    "unfaithful": "lower --min-faithfulness (now {min_faithfulness})",
    "unjudged": "take a judge that keeps to the form of judge.txt (--judge, --judge-model)",
    "the engine failed": "raise --timeout (now {timeout}), or lower --concurrency (now {concurrency})",
    "the engine refused": "see the last failed request; a server must read {reading_length} tokens (--max-model-len)",
}
DOCUMENTS = {
    "longer than the target": "raise --length (now {length})",
    "shorter than wanted": "join those of one folder (--join short), or lower --min-document (now {min_document}) or --length "
    "(now {length})",
    "rest of a cut document": "join it with others of its folder (--join short), or lower --min-document (now {min_document})",
    "shorter than one chunk": "lower --min-chunk (now {min_chunk})",
    "no text in column": "name the column of the texts with --column (now {column})",
}
NEEDS_NONE = {
    "blank line in the question",
    "chosen: empty",
    "rejected: empty",
    "rejected: cut off",
    "the answer is no text",
    "the answer ended with",
    "no reference log-probs",
    "no log-probs",
    "an answer holds a special token",
    "an answer tokenises to nothing",
    "the chat template refuses the contents",
    "the chat template changes the contents",
    "longer than max_length",
    "a token without an embedding",
    "duplicate",
    "unreadable",
    "binary file",
    "empty",
    "not UTF-8",
    "PDF without text",
    "broken text encoding",
    "no valid JSON",
    "no JSON object",
    # These say themselves what to do.
    "DOCX or EPUB without a reader",
    "HTML in an unknown encoding",
    "HTML nested too deep",
    "PostScript",
    "RTF",
    "encrypted PDF",
    "office file of another format",
    "packed twice",
    "roff source",
    "packed file of more than 512 MiB",
    "zip archive that unpacks to more than 512 MiB or 20",
}


def advice(kind: str, left: int, lost: Mapping[str, int], now: Mapping[str, object]) -> Iterator[str]:
    """A line for each reason that took more than a tenth of all. kind: "turns" or "documents". left: how many of them were
    left over. lost: how many by reason. now: the settings by name.
    """
    table = TURNS if kind == "turns" else DOCUMENTS
    whole = left + sum(lost.values())
    for reason, count in lost.items():
        if count <= MUCH * whole or (found := helps(reason, table)) is None:
            continue
        told = re.sub(r"\{(\w+)\}", lambda name: str(now[name[1]]), found)
        yield f'{count:,} of {whole:,} {kind} were lost to "{reason}": {told}'


def helps(reason: str, table: Mapping[str, str]) -> str | None:
    """What a table says of a reason, which may go on with details (the name of a column)."""
    return next((told for begun, told in table.items() if reason == begun or reason.startswith(f"{begun} ")), None)
