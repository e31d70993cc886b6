"""Tokenizers that lose text are refused or told of; ids without an embedding are refused where they would be written."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longpo_ops.pretrained import check_ids, load_tokenizer
from longpo_ops.pretrained.tokenizer import NEEDED, REPORTED, check_round_trip

from .tiny import CHATML

TINY = Path(__file__).parents[2] / "examples" / "tiny" / "model"
ROWS = len(AutoTokenizer.from_pretrained(TINY))


def altered(folder: Path, **changes) -> str:
    """The tiny model's tokenizer with other entries in tokenizer.json (normalizer) or tokenizer_config.json (the rest)."""
    folder.mkdir()
    for name, own in (("tokenizer.json", {"normalizer"}), ("tokenizer_config.json", changes.keys() - {"normalizer"})):
        told = json.loads((TINY / name).read_text()) | {key: changes[key] for key in own & changes.keys()}
        (folder / name).write_text(json.dumps(told))
    shutil.copy(TINY / "config.json", folder)
    return str(folder)


def replaced(pattern: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def test_the_tiny_models_tokenizer_gives_everything_back():
    assert check_round_trip("tiny", load_tokenizer(str(TINY), vocab_size=ROWS)) == []


def test_a_llama_tokenizer_over_byte_level_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"LlamaTokenizer\) does not give its own text back: .*'Thequickbrownfox"):
        load_tokenizer(altered(tmp_path / "model", tokenizer_class="LlamaTokenizer"))


@pytest.mark.parametrize("pattern", [" ", "[0-9]", "[Qq]", "[aeiou]"])
def test_lost_spaces_digits_and_letters_are_refused(tmp_path, pattern):
    with pytest.raises(ValueError, match="expected letters, digits and spaces to stay"):
        load_tokenizer(altered(tmp_path / "model", normalizer=replaced(pattern, "")))


@pytest.mark.parametrize(
    "normalizer, lost, kept",
    [
        ({"type": "NFC"}, {"combining characters"}, {"accents", "compatibility forms", "emoji"}),
        ({"type": "NFKC"}, {"combining characters", "compatibility forms"}, {"accents", "Chinese", "code"}),
        ({"type": "Lowercase"}, {"upper case", "Greek", "Cyrillic"}, {"accents", "line breaks", "Chinese"}),
        ({"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}, {"accents"}, {"Chinese"}),
        (replaced(r"\s+", " "), {"runs of spaces", "line breaks", "tabs", "code"}, {"accents", "punctuation"}),
        (replaced(r"[\\{}]", ""), {"code"}, {"punctuation", "tabs"}),
    ],
)
def test_lossy_normalisation_is_told_with_what_it_loses(tmp_path, caplog, normalizer, lost, kept):
    with caplog.at_level(logging.WARNING, "longpo_ops.pretrained"):
        for _ in range(2):
            load_tokenizer(altered(tmp_path / f"{len(caplog.records)}", normalizer=normalizer))
    first, _ = (record.getMessage() for record in caplog.records)
    assert all(f"{kind} (" in first for kind in lost) and not any(f"{kind} (" in first for kind in kept)
    caplog.clear()
    load_tokenizer(str(tmp_path / "0"))
    assert not caplog.records  # a run loads it more than once


def test_scripts_without_a_token_are_told():
    tokens = {token: i for i, token in enumerate(["<unk>", *sorted(set("".join([NEEDED, *REPORTED["accents"]])))])}
    tokenizer = Tokenizer(models.BPE(tokens, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    told = " ".join(check_round_trip("model", fast))
    assert all(f"{kind} (" in told for kind in ("Greek", "Thai", "emoji", "tabs")) and "<unk>" in told
    assert "accents (" not in told and "runs of spaces (" not in told


def test_tokens_that_every_conversation_has_need_a_row(tmp_path):
    """Two special tokens and a ChatML template were added to the tokenizer, the embedding was not resized."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    check_ids("model", tokenizer, ROWS)  # the template that is there writes neither
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=rf"tokenizer has {ROWS + 2} tokens, its embedding {ROWS} rows; '<\|im_start"):
        check_ids("model", tokenizer, ROWS)
    check_ids("model", tokenizer, ROWS + 2)
    check_ids("model", tokenizer, ROWS + 64)  # fewer tokens than rows are usual


def test_a_plain_token_and_the_end_of_sequence_need_a_row():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(ValueError, match=f"tokenizer has {ROWS} tokens, its embedding {ROWS - 1} rows"):
        check_ids("model", tokenizer, ROWS - 1)
    tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})  # never read: nothing here is padded
    check_ids("model", tokenizer, ROWS)
    tokenizer.add_special_tokens({"eos_token": "<|new end|>"})
    with pytest.raises(ValueError, match=r"'<\|new end\|>' would have none"):
        check_ids("model", tokenizer, ROWS)


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_a_chat_template_that_lies_with_the_processor_is_taken_where_the_tokenizer_has_none(tmp_path, caplog, file):
    folder = Path(altered(tmp_path / "model"))
    (folder / file).write_text(json.dumps({"chat_template": CHATML}))
    with caplog.at_level(logging.INFO):
        assert load_tokenizer(str(folder)).chat_template == CHATML
    assert "its tokenizer has no chat template, its processor's is taken" in caplog.text
    shutil.copy(TINY / "chat_template.jinja", folder)
    assert load_tokenizer(str(folder)).chat_template == (TINY / "chat_template.jinja").read_text()


def test_a_folder_without_a_tokenizer_is_told_what_to_do(tmp_path):
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"holds no tokenizer: save the one .*AutoTokenizer.from_pretrained\(base\)"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(TINY)).chat_template
