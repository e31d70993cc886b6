"""Whole runs of the generator with a real model in the transformers engine: from documents to a training step, and refused.

That one which is killed goes on to the same texts is a test of tests/test_kills.py.
"""

from __future__ import annotations

import shutil

import pytest

from longpo_ops.data import ChatFormat, read_pairs
from longpo_ops.generate import generate


def test_training_takes_the_pairs_as_they_are(model, settings, tmp_path):
    """From documents to a step of LongPO on the stored log-probs, which are the trainer's own reference's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from longpo_ops.attention import use_shared_prefix
    from longpo_ops.ops.head import attach
    from longpo_ops.train.reference import Reference
    from longpo_ops.train.run import TrainRun, train

    generate(settings(model=str(model), reference_logps=True))
    pairs = list(read_pairs(tmp_path / "pairs"))
    assert pairs
    training = dict(model=str(model), data=str(tmp_path / "pairs"), output_dir=str(tmp_path / "run"), reference="data")
    trainer = train(TrainRun.from_settings(training | dict(max_steps=1, gradient_accumulation_steps=1, use_cpu=True)))
    assert trainer.state.global_step == 1 and len(trainer.train_dataset.pairs) == len(pairs)
    frozen = AutoModelForCausalLM.from_pretrained(model)
    use_shared_prefix(frozen)
    reference = Reference(attach(frozen), "short")
    chat = ChatFormat(AutoTokenizer.from_pretrained(model))
    for pair in pairs:
        chosen, rejected = reference.logps(chat.tokenize(pair))
        assert pair.ref_chosen_logp == pytest.approx(chosen, abs=1e-3)
        assert pair.ref_rejected_logps == pytest.approx(rejected, abs=1e-3)


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("model.safetensors", "cut", "model '.*' cannot be loaded: its safetensors cannot be read"),
        ("tokenizer.json", "{", "model '.*' cannot be loaded: tokenizer.json is no JSON: Expecting property name"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "New"}}', "model '.*' cannot be loaded: .*line 1"),
        ("config.json", '{"model_type": "unheard-of"}', "model '.*' cannot be loaded: .*unheard-of"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named(model, settings, tmp_path, file, text, message):
    broken = shutil.copytree(model, tmp_path / "model")
    (broken / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        generate(settings(out=str(tmp_path / "out"), model=str(broken)))
    with pytest.raises(ValueError, match=r"model 'no/where' cannot be loaded: .*no folder of that name"):
        generate(settings(out=str(tmp_path / "out"), model="no/where"))
