"""Tokenised columns: the official ones as they are, ours and back, and data made with another tokenizer."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from longpo_ops.data import (
    BadRecord,
    ChatFormat,
    DataReport,
    Pair,
    TokenizedPair,
    TokenSequence,
    Turn,
    pack,
    packed_length,
    read_tokenized,
    tokenizer_fingerprint,
    write_tokenized,
)

X = -100


def official() -> dict:
    """One long pair and two turns of short inputs, the second one padded as the official sets are."""
    return {
        "chosen_input_ids": [1, 5, 6, 7, 2, 8, 9, 2],
        "chosen_attention_mask": [1] * 8,
        "chosen_labels": [X, X, X, 7, 2, X, 9, 2],
        "chosen_lm_labels": [X, 5, 6, 7, 2, 8, 9, 2],
        "rejected_input_ids": [1, 5, 6, 4, 2, 8, 3, 2],
        "rejected_attention_mask": [1] * 8,
        "rejected_labels": [X, X, X, 4, 2, X, 3, 2],
        "rejected_lm_labels": [X, 5, 6, 4, 2, 8, 3, 2],
        "ref_chosen_input_ids": [[1, 5, 6, 7, 2], [1, 8, 9, 2, 0]],
        "ref_chosen_attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
        "ref_chosen_labels": [[X, X, X, 7, 2], [X, X, 9, 2, X]],
        "ref_rejected_input_ids": [[1, 5, 6, 4, 2], [0, 1, 8, 3, 2]],
        "ref_rejected_attention_mask": [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]],
        "ref_rejected_labels": [[X, X, X, 4, 2], [X, X, X, 3, 2]],
    }


def flat(pair: TokenizedPair) -> list:
    sequences = [pair.chosen, *pair.rejected, *pair.ref_chosen, *(s for turns in pair.ref_rejected for s in turns)]
    arrays = [(s.ids, s.labels, s.nll_labels) for s in sequences]
    return [[None if a is None else a.tolist() for a in row] for row in arrays]


def test_official_columns_load_as_they_are(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(official()))
    (pair,) = read_tokenized(tmp_path, vocab_size=10)
    assert pair.id == "a.jsonl:1" and pair.length == 8
    assert pair.chosen.ids.tolist() == official()["chosen_input_ids"]
    assert pair.chosen.nll_labels.tolist() == official()["chosen_lm_labels"]
    assert pair.rejected[0].labels.tolist() == official()["rejected_labels"]
    assert [s.ids.tolist() for s in pair.ref_chosen] == [[1, 5, 6, 7, 2], [1, 8, 9, 2]]
    assert [s.ids.tolist() for s in pair.ref_rejected[0]] == [[1, 5, 6, 4, 2], [1, 8, 3, 2]]
    assert pair.ref_rejected[0][1].labels.tolist() == [X, X, 3, 2]
    assert pair.ref_chosen[0].nll_labels is None
    nested = official() | {name: [value] for name, value in official().items() if not name.startswith("ref_")}
    assert flat(TokenizedPair.from_record(nested)) == flat(pair)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("rejected", [1, 3])
def test_our_own_tokenised_pairs_come_back(suffix, rejected, make_tokenizer, pair, tmp_path):

    tokenizer = make_tokenizer("llama3")
    turns = tuple(replace(t, rejected=tuple(f"No {i}." for i in range(rejected))) for t in pair.turns)
    pair = replace(pair, turns=turns, ref_chosen_logp=-1.5, ref_rejected_logps=(-2.0,) * rejected)
    before = ChatFormat(tokenizer).tokenize(pair)
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert write_tokenized([before], tmp_path / f"t{suffix}", fingerprint) == 1
    (after,) = read_tokenized(tmp_path, len(tokenizer), fingerprint)
    assert flat(after)[: 1 + rejected] == flat(before)[: 1 + rejected]
    assert [row[:2] for row in flat(after)] == [row[:2] for row in flat(before)]
    assert len(after.ref_rejected) == rejected and len(after.ref_rejected[0]) == 2
    assert (after.id, after.ref_chosen_logp, after.ref_rejected_logps) == ("boats", -1.5, (-2.0,) * rejected)


def change(**columns):
    return official() | columns


BAD = [
    (change(chosen_labels=[X, X, X, 7, 2, X, 9]), "chosen_input_ids: ids and labels differ in length"),
    (change(chosen_attention_mask=[1] * 9), "chosen_input_ids: ids and labels differ in length"),
    (change(chosen_labels=[X, X, X, 2, X, 9, 2, X]), "chosen_labels: labels are not ids"),
    (change(chosen_lm_labels=[5, 6, 7, 2, 8, 9, 2, X]), "chosen_lm_labels: labels are not ids"),
    (change(chosen_labels=[X] * 8), "chosen_labels: no answer tokens"),
    (change(chosen_labels=[1] + [X] * 7), "chosen_labels: no answer tokens"),
    (change(rejected_input_ids=["a"] * 8), "rejected_input_ids: wrong type"),
    (change(rejected_input_ids=[0.5] * 8), "rejected_input_ids: wrong type"),
    (change(rejected_input_ids=[[1], None]), "rejected_input_ids: wrong type"),
    (change(rejected_input_ids=3), "rejected_input_ids: wrong type"),
    (change(rejected_labels=None), "rejected_labels: missing field"),
    (change(chosen_lm_labels=None), "chosen_lm_labels: missing field"),
    (change(chosen_attention_mask=[1, 1, 0, 1, 1, 1, 1, 1]), "chosen_attention_mask: bad mask"),
    (change(chosen_attention_mask=[0] * 8), "chosen_attention_mask: bad mask"),
    (change(chosen_input_ids=[]), "chosen_input_ids: ids and labels differ in length"),
    (change(ref_rejected_input_ids=None), "ref_rejected_input_ids: missing field"),
    (change(ref_chosen_labels=[[X, X, X, 7, 2]]), "ref_chosen_input_ids: ids and labels differ in length; 2, 1"),
    (change(chosen_input_ids=[-1, 5, 6, 7, 2, 8, 9, 2]), "another tokenizer"),
    (
        {k: v[:1] if k.startswith("ref_rej") else v for k, v in official().items()},
        "ref_rejected_input_ids: wrong shape; 1 sequences came; expected 2 turns times 1",
    ),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_records_are_named(record, message):
    with pytest.raises(BadRecord, match=f"^record 'r:1', .*{message}"):
        TokenizedPair.from_record(record, "r:1")


IDS = np.arange(5)
SEQUENCE = TokenSequence(IDS, np.where(IDS > 2, IDS, X))
WHOLE = {
    "id": "a",
    "chosen": SEQUENCE,
    "rejected": (SEQUENCE,),
    "ref_chosen": (SEQUENCE,),
    "ref_rejected": ((SEQUENCE,),),
}
TURN = {"instruction": "q", "chunk": "c", "chosen": "y", "rejected": ("n",)}
PAIR = {"id": "a", "document": "d", "turns": (Turn(**TURN),)}
KINDS = [
    (
        TokenSequence,
        {"ids": IDS, "labels": IDS},
        "ids",
        [[1, 2], None, IDS.astype(np.int32), IDS[None], torch.arange(5)],
    ),
    (TokenSequence, {"ids": IDS, "labels": IDS}, "labels", [None, IDS[1:], IDS.astype(float)]),
    (TokenSequence, {"ids": IDS, "labels": IDS}, "nll_labels", [IDS[1:], "x", 0]),
    (TokenizedPair, WHOLE, "id", [None, 5]),
    (TokenizedPair, WHOLE, "chosen", [None, IDS, (SEQUENCE,), TokenSequence]),
    (TokenizedPair, WHOLE, "rejected", [None, SEQUENCE, (IDS,), "x"]),
    (TokenizedPair, WHOLE, "ref_rejected", [None, (SEQUENCE,), ((),), ((SEQUENCE,) * 2,)]),
    (TokenizedPair, WHOLE, "ref_chosen_logp", [math.nan, -math.inf, "x", True, torch.tensor(-1.0)]),
    (TokenizedPair, WHOLE, "ref_rejected_logps", [-1.0, (math.nan,), ("x",), torch.zeros(1)]),
    (Turn, TURN, "chosen", [None, 5, b"y", ("y",)]),
    (Turn, TURN, "rejected", ["n", None, (5,), {"n"}]),
    (Pair, PAIR, "document", [None, 5, ["d"]]),
    (Pair, PAIR, "turns", [Turn(**TURN), (), ("x",), None]),
    (Pair, PAIR, "provenance", [None, "x", []]),
    (Pair, PAIR, "ref_chosen_logp", [math.inf, "x", [-1.0]]),
    (
        pack,
        {"pairs": [TokenizedPair(**WHOLE)]},
        "pairs",
        [None, "x", 5, [WHOLE], TokenizedPair(**WHOLE), torch.ones(2)],
    ),
    (pack, {"pairs": [TokenizedPair(**WHOLE)]}, "seed", [None, -1, 1.5, 2**70, "x"]),
    (pack, {"pairs": [TokenizedPair(**WHOLE)]}, "target_length", [0, 64.0, "x", True]),
    (packed_length, {"pair": TokenizedPair(**WHOLE)}, "pair", [None, WHOLE, TokenizedPair]),
    (read_tokenized, {"path": "no.jsonl"}, "path", [None, 5, [], torch.ones(2)]),
]


@pytest.mark.parametrize(("make", "valid", "name", "values"), KINDS, ids=[f"{k[0].__name__} {k[2]}" for k in KINDS])
def test_arguments_of_other_kinds_are_named(make, valid, name, values):
    """None of them was looked at before: text for answers became an answer per letter, log-probs that are NaN were packed."""
    for value in values:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            result = make(**valid | {name: value})
            list(result)  # what reads does so when asked for the first record


def test_log_probs_of_another_number_than_rejected_answers_are_not_packed():
    pair = TokenizedPair(**WHOLE, ref_chosen_logp=np.float32(-1), ref_rejected_logps=[-2, -3])
    assert pair.ref_chosen_logp == -1.0 and type(pair.ref_chosen_logp) is float
    with pytest.raises(ValueError, match="record 'a': ref_rejected_logps has 2 log-probs, expected 1, one each"):
        pack([pair])


def test_equal_sequences_are_bad_unless_allowed():
    record = official() | {name.replace("chosen", "rejected"): v for name, v in official().items() if name[0] == "c"}
    with pytest.raises(BadRecord, match="chosen equal to rejected"):
        TokenizedPair.from_record(record)
    assert TokenizedPair.from_record(record, allow_equal=True).rejected[0].ids[3] == 7


def test_data_of_another_tokenizer_is_refused(make_tokenizer, tmp_path):
    fingerprints = {family: tokenizer_fingerprint(make_tokenizer(family)) for family in ("llama3", "qwen2_5", "gemma")}
    assert len(set(fingerprints.values())) == 3
    assert fingerprints["llama3"] == tokenizer_fingerprint(make_tokenizer("llama3", "{{ 'another template' }}"))
    write_tokenized([TokenizedPair.from_record(official(), "a")], tmp_path / "a.jsonl", fingerprints["llama3"])
    assert len(list(read_tokenized(tmp_path, 10, fingerprints["llama3"]))) == 1
    with pytest.raises(BadRecord, match="'a', tokenizer: another tokenizer"):
        list(read_tokenized(tmp_path, 10, fingerprints["gemma"]))
    report = DataReport()
    with pytest.raises(ValueError, match="no usable record"):
        list(read_tokenized(tmp_path, 9, on_bad_record="skip", report=report))
    assert report.skipped == {"another tokenizer": 1}


def test_short_pairs_hold_every_short_input_once():
    pair = TokenizedPair.from_record(official())
    shorts = pair.short_pairs()
    assert [short.chosen.ids.tolist() for short in shorts] == [[1, 5, 6, 7, 2], [1, 8, 9, 2]]
    assert shorts[1].chosen is pair.ref_chosen[1] and shorts[1].rejected[0] is pair.ref_rejected[0][1]
