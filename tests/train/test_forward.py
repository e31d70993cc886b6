"""Separate sequences: every method's loss and gradients, with checkpointing and offload, whatever came before; refusals."""

import copy
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longpo_ops.attention import use_shared_prefix
from longpo_ops.data import pack
from longpo_ops.memory.offload import offload_activations
from longpo_ops.memory.tiling import tile_layers
from longpo_ops.ops.head import attach
from longpo_ops.train.checks import _tell_once
from longpo_ops.train.forward import run
from longpo_ops.train.packed import parts_of

from ..attention.dense import TrueFloat64, true_float64
from .test_trainer import PAIRS, close, for_method
from .tiny import VOCAB, gradients, make_model, make_trainer, naive_loss, plain

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["longpo", "dpo", "kto_pair", "sft_constraint", "orpo", "solopo"])
def test_loss_and_gradients_are_those_of_separate_sequences(tmp_path, name):
    policy, reference = make_model(0, rope_theta=1e6), make_model(1)
    pairs, truth_model = for_method(name, PAIRS), plain(policy)
    trainer = make_trainer(tmp_path, name, pairs, policy, reference, pack_tokens=400, separate=True)
    (pack_of_three,) = trainer.train_dataset
    lengths = [end - start for span in pack_of_three.batch.layout.pairs for start, end in [(span.start, span.end)]]
    parts = [part for pair in pairs for part in parts_of(trainer.method, pair)]
    read = [p.chosen for p in parts] + [r for p in parts for r in p.rejected]
    assert lengths == [len(sequence) for sequence in read][: len(lengths)] and trainer.separate
    policy.train()
    with TrueFloat64():
        truth = naive_loss(name, truth_model, plain(reference), pairs)
        truth.backward()
        loss = trainer.compute_loss(policy, {"pack": pack_of_three})
        loss.backward()
    close(loss, truth)
    ours, theirs = gradients(policy), gradients(truth_model)
    assert ours.keys() == theirs.keys()
    for parameter in theirs:
        close(ours[parameter], theirs[parameter])


def sums(model, batch):
    """The sum of squared hidden states, each row with a weight of its own, by one run."""
    weights = torch.linspace(-1, 1, batch.layout.length, dtype=torch.float64)[:, None]
    return run(model, batch, lambda hidden, head: (weights * hidden.double() ** 2).sum(), CPU)[0]


@pytest.mark.parametrize("how", ["checkpointing", "offload", "tiles"])
def test_recomputed_layers_give_the_same_gradients(how):
    model, batch = attach(make_model()).train(), pack(PAIRS, separate=True)
    with true_float64():
        sums(model, batch).backward()
        truth = gradients(model)
        model.zero_grad()
        if how == "checkpointing":
            model.gradient_checkpointing_enable()
            sums(model, batch).backward()
        elif how == "offload":
            with offload_activations(model, host_bytes=1 << 26, page_bytes=4096) as handle:
                sums(model, batch).backward()
            left = [move for move in handle.moves if move.what == "out"]
            assert len(left) == 2 * len(batch.layout.pairs)  # of each layer, for each sequence
        else:
            with tile_layers(model, 7):
                sums(model, batch).backward()
    assert gradients(model).keys() == truth.keys()
    for name, gradient in gradients(model).items():
        close(gradient, truth[name], 1e-8)


def test_a_sequence_does_not_go_by_those_before_it(tmp_path):
    """`dynamic` frequencies are those of the longest call so far, beyond the context: 40 tokens after 64 are not 40 alone."""
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
    config = make_model().config
    config.rope_parameters, config.max_position_embeddings = rope, 16
    policy = AutoModelForCausalLM.from_config(config).double()
    untouched = copy.deepcopy(policy)
    trainer = make_trainer(tmp_path, "simpo", PAIRS, policy, pack_tokens=400, separate=True)
    (three,) = trainer.train_dataset
    with torch.no_grad():
        hidden = run(policy, three.batch, lambda hidden, head: hidden, CPU)[0]
        for spans in three.batch.layout.pairs:
            alone = (
                copy.deepcopy(untouched).model(three.batch.input_ids[:, spans.start : spans.end]).last_hidden_state[0]
            )
            close(hidden[spans.start : spans.end], alone, 1e-6)
        long, short = three.batch.input_ids[:, :60], three.batch.input_ids[:, :30]
        before, _, after = (untouched.model(ids)[0] for ids in (short, long, short))
        assert not torch.allclose(before, after, rtol=1e-3)  # as it would have gone by them


def test_what_reads_one_by_one_takes_no_shared_prefix():
    model = attach(make_model())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM reads sequences one by one.*separate=True"):
        sums(model, pack(PAIRS))
    with use_shared_prefix(model):
        close(sums(model, pack(PAIRS[:1])), sums(model, pack(PAIRS[:1])))


OTHERS = {"gpt2": dict(n_embd=16, n_layer=2, n_head=4, n_positions=64)}


def make_other(kind, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=VOCAB, **OTHERS[kind] | more))


def test_policy_and_reference_decide_for_themselves_and_it_is_told_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, "longpo_ops.train")
    _tell_once.cache_clear()
    trainer = make_trainer(tmp_path, "longpo", PAIRS, make_other("gpt2"), make_model(1, torch.float32), pack_tokens=200)
    assert trainer.separate and not trainer.reference.digest().endswith("-separate")
    told = [record.message for record in caplog.records if "separate" in record.message]
    assert len(told) == 1 and "GPT2LMHeadModel is given separate sequences" in told[0] and "drops out 0.1" in told[0]
    (dropout,) = (record.message for record in caplog.records if "a reference does not" in record.message)
    assert "resid_dropout=0.1" in dropout or "dropout=0.1" in dropout
    both = make_trainer(tmp_path, "longpo", PAIRS, make_model(), make_model(1), separate=True)
    assert both.separate and both.reference.digest().endswith("-separate")
    close(both._loss(both.model, both.train_dataset[0], 1.0)[0], packed_loss(tmp_path))


def packed_loss(folder):
    trainer = make_trainer(folder, "longpo", PAIRS, make_model(), make_model(1))
    return trainer._loss(trainer.model, trainer.train_dataset[0], 1.0)[0]


REFUSED = {
    "positions": ({"separate": True, "target_length": 100}, "target_length=100: LlamaForCausalLM is given separate"),
    "logo": ({"separate": True, "objective": "logo"}, "target_length=256: .*set target_length to 0"),
    "reentrant": (
        {"separate": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "use_reentrant=True, and LlamaForCausalLM is given separate",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_do_not_go_with_it_are_refused(tmp_path, what):
    settings, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, settings.pop("objective", "simpo"), PAIRS, make_model(), **settings)
