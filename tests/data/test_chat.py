"""Chat formatting: rendered text, answer and NLL labels in five documented formats, and every refusal."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from longpo_ops.data import BadRecord, ChatFormat, DataReport, Pair, Turn, tokenized_pairs
from longpo_ops.data.tokenized import IGNORE

FAMILIES = ["mistral", "llama3", "qwen2_5", "qwen3", "gemma"]
DOC = "In the harbour there are 42 boats.\n\nThe captain keeps a log."
# The documented formats, written out: what precedes the first user message, then each turn around its two contents.
LONG = {
    "mistral": "<s>[INST] {u1} [/INST] {a1}</s>[INST] {u2} [/INST] {a2}</s>",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{u1}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{a1}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{u2}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{a2}<|eot_id|>",
    "qwen2_5": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{u1}<|im_end|>\n"
    "<|im_start|>assistant\n{a1}<|im_end|>\n<|im_start|>user\n{u2}<|im_end|>\n<|im_start|>assistant\n{a2}<|im_end|>\n",
    "qwen3": "<|im_start|>user\n{u1}<|im_end|>\n<|im_start|>assistant\n{a1}<|im_end|>\n"
    "<|im_start|>user\n{u2}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{a2}<|im_end|>\n",
    "gemma": "<bos><start_of_turn>user\n{u1}<end_of_turn>\n<start_of_turn>model\n{a1}<end_of_turn>\n"
    "<start_of_turn>user\n{u2}<end_of_turn>\n<start_of_turn>model\n{a2}<end_of_turn>\n",
}
SHORT = {
    "mistral": "<s>[INST] {u} [/INST] {a}</s>",
    "qwen3": "<|im_start|>user\n{u}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{a}<|im_end|>\n",
}
END = {
    "mistral": "</s>",
    "llama3": "<|eot_id|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "gemma": "<end_of_turn>",
}
CHATML = "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
ROLES = ("user", "assistant")
PROMPT = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def labelled(tokenizer, sequence, labels) -> list[str]:
    """The decoded text of each run of labelled tokens, in order."""
    borders = np.flatnonzero(np.diff(labels != IGNORE, prepend=False, append=False))
    return [decode(tokenizer, sequence.ids[a:b]) for a, b in zip(borders[::2], borders[1::2])]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_documented_format_comes_back(family, make_tokenizer, pair):
    tokenizer = make_tokenizer(family)
    result = ChatFormat(tokenizer).tokenize(replace(pair, document=DOC))
    user = f"{DOC}\n\nHow many boats?"
    chosen, rejected = [(turn.chosen, turn.rejected[0]) for turn in pair.turns], result.rejected[0]
    for sequence, j in ((result.chosen, 0), (rejected, 1)):
        text = LONG[family].format(u1=user, u2="Who keeps a log?", a1=chosen[0][j], a2=chosen[1][j])
        assert decode(tokenizer, sequence.ids).removeprefix(" ") == text
        assert sequence.ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
        answers = labelled(tokenizer, sequence, sequence.labels)
        assert [answer.lstrip() for answer in answers] == [chosen[i][j] + END[family] for i in (0, 1)]
        counted = labelled(tokenizer, sequence, sequence.nll_labels)
        contents = [user, chosen[0][j] + END[family], "Who keeps a log?", chosen[1][j] + END[family]]
        assert [text.lstrip() for text in counted] == contents
        for labels in (sequence.labels, sequence.nll_labels):
            assert np.all((labels == IGNORE) | (labels == sequence.ids))
    assert len(result.ref_chosen) == len(result.ref_rejected[0]) == 2
    for i, turn in enumerate(pair.turns):
        for long, short in ((result.chosen, result.ref_chosen[i]), (rejected, result.ref_rejected[0][i])):
            of_turn = np.split(long.answer_ids, np.cumsum([len(s.answer_ids) for s in _shorts(result, long)])[:-1])[i]
            assert short.answer_ids.tolist() == of_turn.tolist()
        if family in SHORT:
            text = SHORT[family].format(u=f"{turn.chunk}\n\n{turn.instruction}", a=turn.chosen)
            assert decode(tokenizer, result.ref_chosen[i].ids).removeprefix(" ") == text


def _shorts(result, long):
    return result.ref_chosen if long is result.chosen else result.ref_rejected[0]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r<"), min_size=1, max_size=30)


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_tokens_are_the_same_in_long_and_short_inputs(family, make_tokenizer):
    tokenizer = make_tokenizer(family)
    chat, report = ChatFormat(tokenizer), DataReport()
    trims = family in ("llama3", "gemma", "qwen3")

    @settings(max_examples=60)
    @given(*[texts.filter(str.strip)] * 8)
    def check(document, question, chunk, chosen, rejected, question2, chosen2, rejected2):
        turns = (Turn(question, chunk, chosen, (rejected,)), Turn(question2, chunk, chosen2, (rejected2,)))
        result = chat.tokenize(Pair("r", document, turns), report)
        for long, shorts in ((result.chosen, result.ref_chosen), (result.rejected[0], result.ref_rejected[0])):
            assert long.answer_ids.tolist() == np.concatenate([short.answer_ids for short in shorts]).tolist()
        for sequence, answer in ((result.ref_chosen[0], chosen), (result.ref_rejected[0][1], rejected2)):
            expected = (answer.strip() if trims else answer) + END[family]
            came = decode(tokenizer, sequence.answer_ids)
            # Sentencepiece decoding cannot tell a space from its own mark for one.
            came, expected = came.replace("▁", " "), expected.replace("▁", " ")
            assert came.lstrip() == expected.lstrip()

    check()
    assert report.piecewise_pairs == 0 and (report.trimmed_contents > 0) == trims


def test_where_the_template_changes_answer_tokens_answers_are_tokenised_alone(make_tokenizer):
    """Text before an answer that merges with it, and is another before the last answer than before others."""
    template = (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role }}{{ '\n\n' if m.role == 'user' else '\nTh' if loop.last "
        "else '\n' }}{{ m.content + '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\nTh' }}{%- endif -%}"
    )
    tokenizer, report = make_tokenizer("qwen3", template), DataReport()
    pair = Pair("r", DOC, (Turn("Q?", "C", "e fox", ("e dog",)), Turn("R?", "D", "e dog", ("e log",))))
    result = ChatFormat(tokenizer).tokenize(pair, report)
    assert report.piecewise_pairs == 1
    alone = [tokenizer(text, add_special_tokens=False).input_ids for text in ("e fox<|im_end|>", "e dog<|im_end|>")]
    assert result.chosen.answer_ids.tolist() == alone[0] + alone[1]
    assert [short.answer_ids.tolist() for short in result.ref_chosen] == alone
    assert decode(tokenizer, result.chosen.ids) == tokenizer.apply_chat_template(
        [
            {"role": "user", "content": f"{DOC}\n\nQ?"},
            {"role": "assistant", "content": "e fox"},
            {"role": "user", "content": "R?"},
            {"role": "assistant", "content": "e dog"},
        ],
        tokenize=False,
    )
    for labels in (result.chosen.labels, result.chosen.nll_labels):
        assert decode(tokenizer, labels[labels != IGNORE]).endswith("e dog<|im_end|>")


def test_several_rejected_answers_form_several_conversations(make_tokenizer, pair):
    tokenizer = make_tokenizer("qwen2_5")
    turns = tuple(replace(turn, rejected=(turn.rejected[0], f"No {i}.")) for i, turn in enumerate(pair.turns))
    result = ChatFormat(tokenizer).tokenize(replace(pair, turns=turns))
    assert len(result.rejected) == 2 and [len(shorts) for shorts in result.ref_rejected] == [2, 2]
    assert labelled(tokenizer, result.rejected[1], result.rejected[1].labels) == ["No 0.<|im_end|>", "No 1.<|im_end|>"]
    shorts = result.short_pairs()
    assert [short.id for short in shorts] == ["boats#0", "boats#1"]
    assert shorts[1].rejected == (result.ref_rejected[0][1], result.ref_rejected[1][1])


def test_the_system_prompt_is_written_and_never_labelled(make_tokenizer, pair):
    tokenizer = make_tokenizer("qwen2_5")
    result = ChatFormat(tokenizer, system="Answer in a word.").tokenize(pair)
    assert decode(tokenizer, result.chosen.ids).startswith("<|im_start|>system\nAnswer in a word.<|im_end|>\n")
    counted = labelled(tokenizer, result.chosen, result.chosen.nll_labels)
    assert counted[0].startswith("In the harbour") and len(counted) == 4
    assert decode(tokenizer, result.ref_chosen[1].ids).count("Answer in a word.") == 1


def test_template_variables_reach_the_template(make_tokenizer, pair):
    tokenizer = make_tokenizer("qwen3")
    prompts = [
        "<|im_start|>assistant\n<think>\n\n</think>\n\nThere are 42 boats.",
        "<think>\n\n</think>\n\nThe captain",
    ]
    result = ChatFormat(tokenizer, template_kwargs={"enable_thinking": False}).tokenize(pair)
    assert prompts[0] in decode(tokenizer, result.ref_chosen[0].ids)
    assert prompts[1] in decode(tokenizer, result.chosen.ids)
    made, report = replace(pair, provenance={"template_kwargs": {"enable_thinking": False}}), DataReport()
    ChatFormat(tokenizer, template_kwargs={"enable_thinking": False}).tokenize(made, report)
    assert report.other_variables == 0
    ChatFormat(tokenizer).tokenize(made, report)
    assert "1 pairs were generated with other template_kwargs" in str(report)
    plain, report = replace(pair, provenance={"engine": "vllm"}), DataReport()
    ChatFormat(tokenizer).tokenize(plain, report)
    assert report.other_variables == 0
    ChatFormat(tokenizer, template_kwargs={"enable_thinking": False}).tokenize(plain, report)
    assert report.other_variables == 1


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_labels_survive_offsets_without_whitespace(trim_offsets, make_tokenizer, pair):
    """Some tokenizers report ' boats' as 'boats' and a token of spaces as nothing."""
    from tokenizers import processors

    tokenizer = make_tokenizer("qwen2_5")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    pair = replace(pair, turns=(replace(pair.turns[0], chosen="  There are\n\n 42  boats."),))
    result = ChatFormat(tokenizer).tokenize(pair)
    assert decode(tokenizer, result.chosen.answer_ids) == "  There are\n\n 42  boats.<|im_end|>"
    counted = "".join(labelled(tokenizer, result.chosen, result.chosen.nll_labels))
    assert counted == f"{pair.document}\n\nHow many boats?  There are\n\n 42  boats.<|im_end|>"


def test_a_template_without_end_of_turn_gets_the_end_of_sequence(make_tokenizer, pair):
    template = (
        "{%- for m in messages -%}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content + '\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'A: ' }}{%- endif -%}"
    )
    tokenizer = make_tokenizer("qwen3", template)
    result = ChatFormat(tokenizer).tokenize(pair)
    answers = [text.lstrip() for text in labelled(tokenizer, result.chosen, result.chosen.labels)]
    assert answers == ["There are 42 boats.<|im_end|>", "The captain does.<|im_end|>"]
    tokenizer = make_tokenizer("qwen3", template, eos_token=None)
    with pytest.raises(ValueError, match="no eos_token"):
        ChatFormat(tokenizer)


# refusals


MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("strips", [("rstrip",), ("lstrip",), ("lstrip", "rstrip")])
@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_white_space_that_a_token_of_the_template_swallows_is_in_no_answer(
    family, strips, special, make_tokenizer, pair
):
    """Phi-3's role markers take the white space behind them, others that before them; they stay template text."""
    tokenizer = make_tokenizer(family, MARKED)
    tokens = [AddedToken(f"<|{name}|>", special=special, **dict.fromkeys(strips, True)) for name in (*ROLES, "end")]
    tokenizer.add_tokens(tokens, special_tokens=special)
    chat = ChatFormat(tokenizer)

    def kept(content: str) -> str:
        content = content.lstrip() if "rstrip" in strips else content
        return content.rstrip() if "lstrip" in strips else content

    for answer in ("yes", " yes", "\n  yes", "yes ", " yes \n"):
        turn = Turn(" How many? ", "There are 42.", answer, ("There are many.",))
        contents, report = [f"{DOC}\n\n How many? ", answer, " How many? ", answer], DataReport()
        result = chat.tokenize(replace(pair, document=DOC, turns=(turn, turn)), report)
        text = "".join(f"<|{name}|>{each}<|end|>" for name, each in zip(ROLES * 2, contents, strict=True))
        assert result.chosen.ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
        answers = labelled(tokenizer, result.chosen, result.chosen.labels)
        assert answers == [kept(answer) + "<|end|>"] * 2
        counted = labelled(tokenizer, result.chosen, result.chosen.nll_labels)
        assert counted == [kept(each) + end for each, end in zip(contents, ("", "<|end|>") * 2, strict=True)]
        assert "1 pairs lose outer whitespace" in str(report)


def test_a_template_must_have_a_generation_prompt(make_tokenizer):
    with pytest.raises(ValueError, match="no generation prompt"):
        ChatFormat(make_tokenizer("qwen3", CHATML))
    other = PROMPT.replace("assistant\n", "assistant\n<think>\n")
    with pytest.raises(ValueError, match="no generation prompt that fits"):
        ChatFormat(make_tokenizer("qwen3", CHATML + other))
    ChatFormat(make_tokenizer("qwen3", CHATML + PROMPT))


@pytest.mark.parametrize(
    "change", ["m.content | upper", "m.content | e", "m.content[:20]", "m.content | replace('\n', ' ')"]
)
def test_a_template_that_changes_contents_is_refused(change, make_tokenizer):
    with pytest.raises(ValueError, match=r"chat template (changes contents|writes)"):
        ChatFormat(make_tokenizer("qwen3", CHATML.replace("m.content", f"({change})") + PROMPT))


@pytest.mark.parametrize("written", ["m.content + m.content", "''"])
def test_contents_written_twice_or_never_are_refused(written, make_tokenizer):
    with pytest.raises(ValueError, match=r"writes a \w+ content [02] times"):
        ChatFormat(make_tokenizer("qwen3", CHATML.replace("m.content", f"({written})") + PROMPT))


def test_a_template_that_changes_this_record_is_refused_with_its_id(make_tokenizer, pair):
    answer = "</think>\n\nThere are 42 boats."
    pair = replace(pair, turns=(replace(pair.turns[0], chosen=answer), pair.turns[1]))
    with pytest.raises(BadRecord, match=r"'boats'.*changes the contents"):
        ChatFormat(make_tokenizer("qwen3")).tokenize(pair)


def test_trimmed_whitespace_is_counted(make_tokenizer, pair):
    report = DataReport()
    ChatFormat(make_tokenizer("gemma")).tokenize(pair, report)
    assert report.trimmed_contents == 1  # the document ends in a newline


def test_other_unusable_tokenizers(make_tokenizer):
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ChatFormat(tokenizer)
    with pytest.raises(ValueError, match=r"system role not supported.*leave the system prompt out"):
        ChatFormat(make_tokenizer("gemma"), system="Be brief.")
    with pytest.raises(ValueError, match="fast tokenizer"):
        ChatFormat(object())
    with pytest.raises(ValueError, match="cut_document needs max_length"):
        ChatFormat(make_tokenizer("gemma"), cut_document=True)
    with pytest.raises(ValueError, match="max_length=0"):
        ChatFormat(make_tokenizer("gemma"), max_length=0)
    different_end = (
        "{%- for m in messages -%}{{ m.content }}"
        "{{ ' A: ' if m.role == 'user' else '<|im_end|>' if loop.last else ';' }}{%- endfor -%}"
    )
    with pytest.raises(ValueError, match="same end of turn"):
        ChatFormat(make_tokenizer("qwen3", different_end))


def test_an_answer_that_tokenises_to_nothing_or_holds_control_tokens(make_tokenizer, pair):
    from tokenizers import normalizers

    tokenizer = make_tokenizer("qwen2_5")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    chat = ChatFormat(tokenizer)
    turn = replace(pair.turns[1], rejected=("\u200b\u200b",))
    with pytest.raises(BadRecord, match=r"'boats', turns\[1\]\.rejected\[0\]: an answer tokenises to nothing"):
        chat.tokenize(replace(pair, turns=(pair.turns[0], turn)))
    turn = replace(pair.turns[0], chosen="One.<|im_end|>\n<|im_start|>user")
    with pytest.raises(BadRecord, match=r"turns\[0\]\.chosen: .* special token; <\|im_"):
        chat.tokenize(replace(pair, turns=(turn, pair.turns[1])))


# length


def test_long_documents_are_refused_or_cut_and_never_questions_or_answers(make_tokenizer, pair):
    tokenizer = make_tokenizer("qwen2_5")
    pair = replace(pair, document=" ".join(["In the harbour there are 42 boats: 🚢🚢."] * 40))
    whole = ChatFormat(tokenizer).tokenize(pair)
    fits = ChatFormat(tokenizer, max_length=whole.length).tokenize(pair)
    assert fits.chosen.ids.tolist() == whole.chosen.ids.tolist()
    with pytest.raises(BadRecord, match=rf"'boats', document: longer than max_length; {whole.length} tokens came"):
        ChatFormat(tokenizer, max_length=whole.length - 1).tokenize(pair)
    for max_length in (whole.length - 1, whole.length // 2, 200):
        report = DataReport()
        cut = ChatFormat(tokenizer, max_length=max_length, cut_document=True).tokenize(pair, report)
        assert max_length - 8 <= cut.length <= max_length
        assert (report.cut_documents, report.cut_tokens) == (1, whole.length - cut.length)
        assert cut.chosen.answer_ids.tolist() == whole.chosen.answer_ids.tolist()
        question = re.search(r"user\n(.*)\n\nHow many boats\?<\|im_end\|>", decode(tokenizer, cut.chosen.ids))
        assert question and pair.document.startswith(question[1])
    with pytest.raises(BadRecord, match="without its document it still exceeds 60"):
        ChatFormat(tokenizer, max_length=60, cut_document=True).tokenize(pair)
    chunk = replace(pair.turns[0], chunk=pair.document)
    with pytest.raises(BadRecord, match=r"turns\[0\].chunk: longer than max_length"):
        ChatFormat(tokenizer, max_length=200).tokenize(replace(pair, document="Short.", turns=(chunk,)))


# files


def test_files_of_text_and_of_tokens_give_the_same_pairs(make_tokenizer, pair, tmp_path):
    from longpo_ops.data import write_pairs, write_tokenized

    chat, report = ChatFormat(make_tokenizer("llama3"), max_length=4096), DataReport()
    write_pairs([pair], tmp_path / "text.jsonl")
    from_text = list(tokenized_pairs(tmp_path / "text.jsonl", chat))
    write_tokenized(from_text, tmp_path / "tokens.parquet", chat.fingerprint)
    from_tokens = list(tokenized_pairs(tmp_path, chat, report=report))
    assert len(from_tokens) == 2 and report.kept == 2
    for each in from_tokens:
        assert each.chosen.nll_labels.tolist() == from_text[0].chosen.nll_labels.tolist()
    other = ChatFormat(make_tokenizer("gemma"))
    with pytest.raises(BadRecord, match="another tokenizer"):
        list(tokenized_pairs(tmp_path / "tokens.parquet", other))
    short = ChatFormat(make_tokenizer("llama3"), max_length=20)
    with pytest.raises(BadRecord, match="tokenised data is never cut"):
        list(tokenized_pairs(tmp_path / "tokens.parquet", short))


def test_every_token_may_count_in_the_nll_of_text_and_of_tokens(make_tokenizer, pair, tmp_path):
    from longpo_ops.data import write_pairs, write_tokenized

    chat = ChatFormat(make_tokenizer("llama3"), system="Be brief.")
    write_pairs([pair], tmp_path / "text.jsonl")
    contents = list(tokenized_pairs(tmp_path / "text.jsonl", chat))
    write_tokenized(contents, tmp_path / "tokens.parquet", chat.fingerprint)
    for sequence in (contents[0].chosen, *contents[0].rejected):
        assert (sequence.nll_labels == IGNORE).any()
    every = list(tokenized_pairs(tmp_path, chat, nll_tokens="all"))
    assert len(every) == 2 and every[0].digest != contents[0].digest
    for each in every:
        for sequence, before in zip((each.chosen, *each.rejected), (contents[0].chosen, *contents[0].rejected)):
            assert sequence.nll_labels.tolist() == sequence.ids.tolist() == before.ids.tolist()
            assert sequence.labels.tolist() == before.labels.tolist()
    for refused in ("content", None, 1):
        with pytest.raises(ValueError, match=r"nll_tokens.*expected one of contents, all"):
            list(tokenized_pairs(tmp_path, chat, nll_tokens=refused))


def test_skipping_counts_reasons(make_tokenizer, pair, tmp_path):
    chat, report = ChatFormat(make_tokenizer("llama3"), max_length=120), DataReport()
    records = [pair.to_record(), pair.to_record() | {"id": "long", "document": "boats " * 200}, {"id": "empty"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    kept = list(tokenized_pairs(tmp_path, chat, on_bad_record="skip", report=report))
    assert [each.id for each in kept] == ["boats"]
    assert report.skipped == {"longer than max_length": 1, "missing field": 1}
    assert str(report).startswith("1 of 3 records kept")
