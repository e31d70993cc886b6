"""Variables of chat templates: which a template reads, and what is refused."""

from __future__ import annotations

import datetime

import pytest

from longpo_ops.data import ChatFormat
from longpo_ops.engines.settings import EngineSettings
from longpo_ops.pretrained.template_kwargs import check_template_kwargs, check_values, template_variables
from longpo_ops.train.run import TrainRun

from ..train.tiny import make_tokenizer

DATED = (
    "{%- if not date is defined -%}{%- set date = 'today' -%}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>' + date -}}"
    "{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content + '<|eot_id|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- m.content -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>' + date -}}{%- endif -%}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer(["In the harbour of the old town there are 42 boats."])
    made.chat_template = DATED
    return made


def test_what_a_template_reads_is_found_with_its_defaults_and_its_own_tags(tokenizer):
    assert template_variables(tokenizer) == {"date", "messages", "add_generation_prompt"}
    assert check_template_kwargs(tokenizer, {"date": "Monday"}) == {"date": "Monday"}
    assert check_template_kwargs(tokenizer, None) == check_template_kwargs(tokenizer, {}) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dat": "Monday"}, "does not read dat, so it would change nothing; expected some of date; did you mean date?"),
        ({"enable_thinking": False}, "does not read enable_thinking, so it would change nothing"),
        ({"add_generation_prompt": True}, "add_generation_prompt is set by longpo_ops"),
        ({"messages": []}, "messages is set by longpo_ops"),
        (
            {"date": datetime.date(2024, 7, 26)},
            r"date=datetime.date\(2024, 7, 26\): expected a JSON value \(text in qu",
        ),
        ({"date": float("nan")}, "template_kwargs: date=nan: expected a JSON value"),
        ({"date": [{"a": {1: 2}}]}, "template_kwargs: date=.*: expected a JSON value"),
        ({1: 2}, "expected names that are text"),
        (["date"], "template_kwargs: expected names and values, or none, got list"),
    ],
)
def test_what_would_change_nothing_or_is_no_json_is_refused_wherever_a_chat_is_formatted(given, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        ChatFormat(tokenizer, template_kwargs=given)


@pytest.mark.parametrize("make", [TrainRun, EngineSettings])
def test_values_are_checked_before_anything_is_loaded(make):
    more = {"data": "pairs", "output_dir": "out"} if make is TrainRun else {}
    with pytest.raises(ValueError, match=r"template_kwargs.*date.*nan"):
        make(model="model", template_kwargs={"date": float("nan")}, **more)
    values = check_values(given := {"flag": True, "list": [1, 2.5, None, "a"], "inner": {"a": {}}})
    assert values == given and values is not given


def test_a_model_that_is_asked_has_a_template_that_reads_them(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    settings = EngineSettings(
        model=str(tmp_path), engine="server", endpoints=("http://127.0.0.1:9/v1",), template_kwargs={"date": "Monday"}
    )
    assert settings.load_tokenizer().chat_template == DATED
    other = r"does not read thinking, .*--engine-option 'chat_template_kwargs={\"thinking\": false}' sends"
    with pytest.raises(ValueError, match=other):
        EngineSettings(
            model=str(tmp_path),
            engine="server",
            endpoints=("http://127.0.0.1:9/v1",),
            template_kwargs={"thinking": False},
        ).load_tokenizer()
