"""Pairs whose context is a prompt: their records, and tokens that are those of TRL's own trainer for the same row."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from longpo_ops.data import (
    BadRecord,
    ChatFormat,
    ContextPair,
    DataReport,
    pack,
    read_pairs,
    tokenized_pairs,
    write_pairs,
)
from longpo_ops.data.context import TextFormat, tokenize_context
from longpo_ops.data.convert import convert
from longpo_ops.data.tokenized import IGNORE


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SHORT = [said("user", "What does the fox do?")]
HISTORY = [said("user", "How many boats?"), said("assistant", "42 boats.\n"), said("user", "Who keeps a log?")]
SYSTEM = [said("system", "You are a captain."), *SHORT]
ANSWERS = dict(chosen=[said("assistant", "It jumps over the dog.")], rejected=[said("assistant", "It jumps. ")])
TURNS = dict(
    chosen=[said("assistant", "It jumps."), said("user", "Over what?"), said("assistant", "The dog.")],
    rejected=[said("assistant", "Nothing. é \U0001f98a")],
)
ROWS = {
    "one question": dict(prompt=SHORT, **ANSWERS),
    "several turns": dict(prompt=HISTORY, **ANSWERS),
    "a system message": dict(prompt=SYSTEM, **ANSWERS),
    "answers of several messages": dict(prompt=SHORT, **TURNS),
    "no prompt": dict(chosen=SHORT + ANSWERS["chosen"], rejected=SHORT + ANSWERS["rejected"]),
    "conversations that part late": dict(
        chosen=[*SHORT, *TURNS["chosen"]], rejected=[*SHORT, *TURNS["chosen"][:2], said("assistant", "A boat.")]
    ),
    "texts": dict(prompt="The fox", chosen=" jumps over the dog.", rejected=" jumps"),
    "texts that end in eos": dict(prompt="The fox ", chosen="jumps.{eos}", rejected="does not"),
    "texts that merge": dict(prompt="The quick bro", chosen="wn fox", rejected="ther"),
    "texts without a prompt": dict(chosen="The fox jumps over the dog.", rejected="The fox jumps high."),
}  # fmt: skip


def of_trl(row: dict, tokenizer) -> dict[str, list[int]]:
    """TRL's own preparation of a data set."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    itself = SimpleNamespace(_tokenizer=tokenizer)
    return trl.DPOTrainer._prepare_dataset(itself, Dataset.from_list([row]), tokenizer, args, "x")[0]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("family", ["mistral", "llama3", "qwen2_5", "qwen3", "gemma"])
def test_tokens_and_labels_are_trls(family, kind, make_tokenizer):
    tokenizer = make_tokenizer(family)
    row = json.loads(json.dumps(ROWS[kind]).replace("{eos}", tokenizer.eos_token))
    chat = ChatFormat(tokenizer)
    pair = convert(row, "rows.jsonl:1", "trl")
    again = ContextPair.from_record(
        json.loads(json.dumps({k: v for k, v in pair.to_record().items() if v is not None}))
    )
    assert again == pair
    if kind == "a system message" and family in ("mistral", "gemma"):
        with pytest.raises(BadRecord, match="the chat template refuses the contents"):
            tokenize_context(pair, chat, DataReport())
        return
    truth, made = of_trl(row, tokenizer), tokenize_context(pair, chat, DataReport())
    for side, sequence in (("chosen", made.chosen), ("rejected", made.rejected[0])):
        assert sequence.ids.tolist() == truth["prompt_ids"] + truth[f"{side}_ids"]
        assert sequence.answer_ids.tolist() == truth[f"{side}_ids"]
        assert np.all(sequence.labels[: len(truth["prompt_ids"])] == IGNORE)
        assert np.array_equal(sequence.nll_labels, sequence.labels)
    assert made.ref_chosen == () and made.ref_rejected == ()
    assert pack([made]).layout.pairs[0].prefix_end >= len(truth["prompt_ids"])


def test_variables_of_the_template_reach_it(make_tokenizer):
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template = "{{- mood | default('') -}}" + tokenizer.chat_template
    pair = ContextPair("a", tuple(SHORT), tuple(ANSWERS["chosen"]), (tuple(ANSWERS["rejected"]),))
    made = tokenize_context(pair, ChatFormat(tokenizer, template_kwargs={"mood": "fox"}), DataReport())
    assert "fox" in tokenizer.decode(made.chosen.ids)


def test_several_rejected_answers_share_the_context(make_tokenizer):
    pair = ContextPair("a", "The fox", " jumps", (" does", " keeps a log", " jumps over"), {}, -1.5, (-2.0, -3.0, -4.0))
    made = tokenize_context(pair, ChatFormat(make_tokenizer("llama3")), DataReport())
    assert len(made.rejected) == 3 and made.ref_rejected_logps == (-2.0, -3.0, -4.0)
    assert len(pack([made]).layout.pairs[0].tails) == 4


def test_a_context_that_merges_is_counted(make_tokenizer):
    pair, report = ContextPair("a", "The quick bro", "wn fox", ("wn dog",)), DataReport()
    tokenize_context(pair, ChatFormat(make_tokenizer("qwen2_5")), report)
    assert report.merged_contexts == 1 and "1 contexts end in tokens that are others" in str(report)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(max_length=6), r"chosen: longer than max_length; \d+ tokens came, max_length is 6; raise it"),
        (dict(system="Be brief."), "context: messages beside a system prompt"),
    ],
)
def test_what_a_run_cannot_do_with_a_context_is_refused(given, message, make_tokenizer):
    pair = ContextPair("a", tuple(SHORT), tuple(ANSWERS["chosen"]), (tuple(ANSWERS["rejected"]),))
    with pytest.raises(BadRecord, match=message):
        tokenize_context(pair, ChatFormat(make_tokenizer("qwen2_5"), **given), DataReport())


GOOD = {"context": "Who?", "chosen": "Ann.", "rejected": ["Nobody."]}
TALK = {
    "context": [said("user", "Who?")],
    "chosen": [said("assistant", "Ann.")],
    "rejected": [[said("assistant", "No.")]],
}


@pytest.mark.parametrize(
    "record, message",
    [
        (GOOD | {"context": " "}, "context: empty field"),
        (GOOD | {"context": 3}, "context: wrong type; a number came, 3"),
        (GOOD | {"rejected": []}, r"rejected: empty field"),
        (GOOD | {"rejected": ["No", ""]}, r"rejected\[1\]: empty field"),
        (GOOD | {"rejected": None}, "rejected: missing field"),
        (GOOD | {"chosen": None}, "chosen: missing field"),
        (GOOD | {"rejected": "Ann."}, "chosen equal to rejected"),
        (GOOD | {"chosen": "\ud800"}, "broken text encoding"),
        (GOOD | {"turns": []}, "record: unknown field; turns came"),
        (GOOD | {"ref_chosen_logp": -1.0}, "bad log-probs; one came alone"),
        (GOOD | {"chosen": TALK["chosen"]}, "context: texts and messages; context, rejected.0. came as text, chosen as mess"),
        (TALK | {"context": []}, r"context: empty field; \[\] came"),
        (TALK | {"context": ["Who?"]}, r"context\[0\]: wrong type; text came, 'Who\?'"),
        (TALK | {"context": [{"role": "user"}]}, r"context\[0\].content: missing field"),
        (TALK | {"context": [said("user", "Who?") | {"name": "Ann"}]}, r"context\[0\]: unknown field; name came"),
        (TALK | {"chosen": [said("assistant", " ")]}, r"chosen\[0\].content: empty field"),
        (TALK | {"chosen": [said("", "Ann")]}, r"chosen\[0\].role: empty field"),
    ],
)  # fmt: skip
def test_bad_records_are_named(record, message, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(GOOD | {"id": "good"}) + "\n" + json.dumps(record))
    with pytest.raises(BadRecord, match=rf"^record 'p.jsonl:2', .*{message}"):
        list(read_pairs(tmp_path))


def test_contexts_come_back_from_files_beside_other_pairs(pair, tmp_path):
    contexts = [ContextPair.from_record(GOOD | {"id": "a"}), ContextPair.from_record(TALK | {"id": "b"})]
    scored = dataclasses.replace(
        contexts[0], id="c", ref_chosen_logp=-1.0, ref_rejected_logps=(-2.0,), provenance={"n": 1}
    )
    assert write_pairs([*contexts, pair, scored], tmp_path / "p.jsonl.gz") == 4
    assert list(read_pairs(tmp_path)) == [*contexts, pair, scored]
    with pytest.raises(ValueError, match=r"a Pair; contexts go into a .jsonl or .jsonl.gz file"):
        write_pairs([*contexts], tmp_path / "p.parquet")
    assert not (tmp_path / "p.parquet").exists()


def test_contexts_and_pairs_are_tokenised_from_one_folder(pair, make_tokenizer, tmp_path):
    write_pairs([ContextPair.from_record(TALK | {"id": "b"}), pair], tmp_path / "p.jsonl")
    made = list(tokenized_pairs(tmp_path, ChatFormat(make_tokenizer("qwen3"))))
    assert [len(each.ref_chosen) for each in made] == [0, 2]
    everything = next(tokenized_pairs(tmp_path, ChatFormat(make_tokenizer("qwen3")), nll_tokens="all"))
    assert np.array_equal(everything.chosen.nll_labels, everything.chosen.ids)


def test_a_tokenizer_without_a_template_takes_texts(pair, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("llama3")
    with_template = ChatFormat(tokenizer)
    text = ContextPair("a", "The fox", " jumps", (" does",))
    truth = tokenize_context(text, with_template, DataReport())
    tokenizer.chat_template = None
    write_pairs([text], tmp_path / "p.jsonl")
    (made,) = tokenized_pairs(tmp_path, TextFormat(tokenizer))
    assert made.digest == truth.digest
    for other in (pair, ContextPair.from_record(TALK | {"id": "b"})):
        write_pairs([text, other], tmp_path / "p.jsonl")
        with pytest.raises(ValueError, match="has no chat template"):
            list(tokenized_pairs(tmp_path, TextFormat(tokenizer)))


def test_kinds_are_not_mixed_in_an_object():
    with pytest.raises(ValueError, match="ContextPair: str, tuple came"):
        ContextPair("a", "Who?", "Ann.", ((said("assistant", "No."),),))
    with pytest.raises(ValueError, match="0 rejected"):
        ContextPair("a", "Who?", "Ann.", ())
