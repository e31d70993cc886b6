"""A pair of plain English that fills so many tokens: what a model is looked at with before there are data.

    p(n) = a + n b tokens of a pack whose document has n sentences      n = 1 + floor((N - p(1)) / b), b = p(2) - p(1)

All sentences are alike but for where the answer stands, so b is one sentence's tokens, and p(n) <= N.

Tests: tests/doctor/test_examine.py.
"""

from __future__ import annotations

from ..data import ChatFormat, Pair, packed_length

FILLER = "The gardener waters the roses in the morning and rests in the shade at noon. "
FACT = "The key to the shed hangs on the hook beside the door."
QUESTION = "Where does the key to the shed hang?"
ANSWERS = ("It hangs on the hook beside the door.", "It lies under the mat.")


def make_record(sentences: int = 1) -> dict:
    """A record as data files have it, log-probs of a reference among it, for methods that read them from there."""
    turn = {"instruction": QUESTION, "chunk": FACT, "chosen": ANSWERS[0], "rejected": [ANSWERS[1]]}
    document = FILLER * sentences + FACT
    return {
        "id": "doctor",
        "document": document,
        "turns": [turn],
        "ref_chosen_logp": -9.0,
        "ref_rejected_logps": [-9.0],
    }


def sized_record(chat: ChatFormat, length: int | None) -> dict:
    """The longest whose pack has no more than `length` tokens; the shortest for None. Raises ValueError where even that one
    has more."""
    if length is None:
        return make_record()
    one, two = (packed_length(chat.tokenize(Pair.from_record(make_record(n)))) for n in (1, 2))
    if length < one:
        raise ValueError(f"length={length}: the shortest pair has {one} tokens in this chat format; expected as many")
    return make_record(1 + (length - one) // (two - one))
