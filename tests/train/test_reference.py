"""The reference says the same on the fly, precomputed and on separate inputs; its cache is never trusted blindly."""

import hashlib
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from longpo_ops.runs import journal
from longpo_ops.train import LongPOConfig, ReferenceStore
from longpo_ops.train.reference import model_digest, on_device, precompute
from tests.processes import run

from ..attention.dense import TrueFloat64
from .test_trainer import close
from .tiny import logits, make_model, make_pair, make_trainer, plain, reference_logps, turn_logps

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [make_pair(1), make_pair(2, turns=1), make_pair(3, turns=3, rejected=2)]


def said(trainer, name="logps"):
    return [getattr(trainer.reference, name)(pair) for pair in PAIRS]


def flat(logps) -> torch.Tensor:
    return torch.tensor([value for chosen, rejected in logps for value in (chosen, *rejected)], dtype=torch.float64)


@pytest.mark.parametrize("name, reading", [("longpo", "short"), ("dpo", "long")])
def test_precomputed_is_online_is_a_plain_forward(tmp_path, name, reading):
    truth_model = plain(make_model(1))
    with TrueFloat64():
        online = make_trainer(tmp_path, name, PAIRS, make_model(), make_model(1), reference="online")
        stored = make_trainer(tmp_path, name, PAIRS, make_model(), make_model(1), reference="precompute")
        truth = [reference_logps(truth_model, pair, reading) for pair in PAIRS]
        assert isinstance(stored.reference, ReferenceStore) and not isinstance(online.reference, ReferenceStore)
        assert said(stored) == said(online)
        close(flat(said(online)), flat(truth))


def test_of_both_inputs_there_is_a_number_for_each_sequence(tmp_path):
    truth_model = plain(make_model(1))
    with TrueFloat64():
        online = make_trainer(tmp_path, "solopo", PAIRS, make_model(), make_model(1), reference="online")
        stored = make_trainer(tmp_path, "solopo", PAIRS, make_model(), make_model(1), reference="precompute")
        assert said(stored) == said(online)
        with torch.no_grad():
            turns = [turn for pair in PAIRS for turn in turn_logps(truth_model, pair)]
        truth = [logp for chosen, rejected, anchor in turns for logp, _ in (chosen, *rejected, anchor)]
        close(flat(said(online)), torch.stack(truth))


def test_hidden_states_and_head_of_the_constraint_give_the_references_logits(tmp_path):
    truth_model = plain(make_model(1))
    with TrueFloat64():
        stored = make_trainer(tmp_path, "sft_constraint", PAIRS, make_model(), make_model(1), reference="precompute")
        for pair in PAIRS:
            truth = torch.cat([logits(truth_model, s)[:-1][s.labels[1:] != -100] for s in pair.ref_chosen])
            close(stored.reference.hidden(pair) @ stored.reference.head().T, truth.detach())


@pytest.mark.parametrize("reference", ["online", "precompute"])
def test_the_base_of_a_peft_policy_is_the_reference_with_its_own_rope(tmp_path, reference):
    base = make_model(1)
    own, truth_model = make_model(1).config, plain(base)
    longer = make_model(1, rope_theta=1e6)
    policy = get_peft_model(longer, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    policy.double()
    with TrueFloat64():
        trainer = make_trainer(tmp_path, "longpo", PAIRS, policy, reference=reference, extra={"reference_config": own})
        truth = flat([reference_logps(truth_model, pair, "short") for pair in PAIRS])
        close(flat(said(trainer)), truth)
        wrong_rope = flat([reference_logps(plain(make_model(1, rope_theta=1e6)), pair, "short") for pair in PAIRS])
    assert float((wrong_rope - truth).abs().max()) > 1e-3  # or the test could not tell
    assert longer.config.rope_parameters["rope_theta"] == 1e6
    kept = make_model(1, rope_theta=1e6).model.rotary_emb.inv_freq
    assert torch.equal(longer.model.rotary_emb.inv_freq, kept) and not torch.equal(base.model.rotary_emb.inv_freq, kept)


def counted(model) -> list:
    """Grows by one with each forward pass over a pack; attach looks at a model without one."""
    calls = []

    def count(module, args, kwargs, output):
        calls.extend([1] if kwargs.get("shared_prefix_layout") is not None else [])

    model.model.layers[0].register_forward_hook(count, with_kwargs=True)
    return calls


def moved(monkeypatch, model, calls=()) -> list[tuple[str, int]]:
    """Where the model was asked to go, after how many forward passes; it stays on the host."""
    asked = []
    monkeypatch.setattr(type(model), "to", lambda self, where: asked.append((str(where), len(calls))) or self)
    return asked


def test_a_peft_policy_answers_on_the_runs_device_and_is_placed_from_the_host(tmp_path, monkeypatch):
    base = make_model()
    calls = counted(base)
    policy = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).double()
    asked = moved(monkeypatch, policy, calls)
    monkeypatch.setattr(LongPOConfig, "device", property(lambda self: self._setup_devices and torch.device("cuda")))
    trainer = make_trainer(tmp_path, "longpo", PAIRS, policy, reference="precompute")
    assert trainer.args.device.type == "cuda" and len(calls) == SHORT_INPUTS
    assert asked == [("cuda", 0), ("cpu", SHORT_INPUTS), ("cuda", SHORT_INPUTS)]  # the last by Trainer


@pytest.mark.parametrize("device, elsewhere", [("cpu", ""), ("cuda", "model"), ("cuda", "lm_head")])
def test_a_model_is_moved_only_from_the_host_and_whole(monkeypatch, device, elsewhere):
    model = make_model()
    if elsewhere:
        getattr(model, elsewhere).to("meta")
    asked = moved(monkeypatch, model)
    with on_device(model, torch.device(device)) as given:
        assert given is model
    assert asked == []


def start(folder, reference, pairs=PAIRS, name="longpo"):
    """-> forward passes of the reference, and what it said."""
    calls = counted(reference)
    trainer = make_trainer(folder, name, pairs, make_model(), reference, reference="precompute")
    return len(calls), trainer.reference


SHORT_INPUTS = 1 + 2 + 3


def test_a_second_start_reads_the_cache(tmp_path):
    first, store = start(tmp_path, make_model(1))
    assert first == SHORT_INPUTS
    again, reread = start(tmp_path, make_model(1))
    assert again == 0 and all(reread.logps(pair) == store.logps(pair) for pair in PAIRS)


def test_what_changed_is_computed_again(tmp_path):
    start(tmp_path, make_model(1))
    other = replace(PAIRS[0], ref_chosen=make_pair(9).ref_chosen, ref_rejected=make_pair(9).ref_rejected)
    assert start(tmp_path, make_model(1), [other, *PAIRS[1:]])[0] == 2  # the pair that changed has two turns
    assert start(tmp_path, make_model(2))[0] == SHORT_INPUTS
    assert start(tmp_path, make_model(1, rope_theta=5e5))[0] == SHORT_INPUTS
    assert start(tmp_path, make_model(1), name="dpo")[0] == len(PAIRS)
    changed = make_model(1)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-9
    assert start(tmp_path, changed)[0] == SHORT_INPUTS
    assert start(tmp_path, make_model(1))[0] == 0  # and the first one is still there


def cut(data: bytes) -> bytes:
    return data[:-7]


def flip(data: bytes) -> bytes:
    middle = data.rindex(b".") + 2  # a digit of a number
    return data[:middle] + (b"3" if data[middle : middle + 1] != b"3" else b"4") + data[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"not json\n" + data, lambda data: data + b"\x00\xff\n"])
def test_damaged_lines_are_found_and_computed_again(tmp_path, damage):
    _, store = start(tmp_path, make_model(1))
    (file,) = store.folder.glob("logps-*.jsonl")
    file.write_bytes(damage(file.read_bytes()))
    calls, again = start(tmp_path, make_model(1))
    assert calls == (3 if damage in (cut, flip) else 0)  # the last pair's turns, or nothing
    assert [again.logps(pair) for pair in PAIRS] == [store.logps(pair) for pair in PAIRS]
    assert start(tmp_path, make_model(1))[0] == 0
    assert all(json.loads(line) for line in file.read_text().splitlines())


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_hidden_states_are_found_and_computed_again(tmp_path, damage):
    first, store = start(tmp_path, make_model(1), name="sft_constraint")
    file = store._hidden_path(PAIRS[2])
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-5] if damage == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(ValueError, match=r"'pair-3'.* is damaged; start again"):
        store.hidden(PAIRS[2])
    calls, again = start(tmp_path, make_model(1), name="sft_constraint")
    assert (first, calls) == (SHORT_INPUTS, 3)
    assert file.read_bytes() == data
    head = again.folder / "head.safetensors"
    whole = head.read_bytes()
    head.write_bytes(whole[:-100])
    start(tmp_path, make_model(1), name="sft_constraint")
    assert head.read_bytes() == whole


KILLED = """
import os, signal, sys
from longpo_ops.train import reference as module
from tests.train.test_reference import PAIRS, make_model, start

real, lines = module.ReferenceStore.add_logps, []
def torn(self, pair, chosen, rejected):
    if len(lines) == 2:
        with open(self._own, "ab") as file:
            file.write(module._line("0" * 32, chosen, rejected)[:25])
        os.kill(os.getpid(), signal.SIGKILL)
    lines.append(1)
    real(self, pair, chosen, rejected)
module.ReferenceStore.add_logps = torn
start(sys.argv[1], make_model(1))
"""


def test_a_killed_precomputation_goes_on(tmp_path):
    done = run(KILLED, tmp_path / "run")
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    calls, store = start(tmp_path / "run", make_model(1))
    assert calls == 3  # the two pairs before the kill were kept, the third had three turns
    _, truth = start(tmp_path / "whole", make_model(1))
    assert [store.logps(pair) for pair in PAIRS] == [truth.logps(pair) for pair in PAIRS]


def test_processes_share_the_work_and_read_each_others(tmp_path):
    reference = make_trainer(tmp_path, "longpo", PAIRS, make_model(), make_model(1)).reference
    key = model_digest(reference.model)
    stores = [ReferenceStore(tmp_path, key, "short", rank) for rank in range(2)]
    for rank, store in enumerate(stores):
        precompute(store, PAIRS, reference, False, rank, 2)
    assert not stores[0].has_logps(PAIRS[1]) and not stores[1].has_logps(PAIRS[0])
    for store in stores:
        store.reload()
        assert all(store.logps(pair) == reference.logps(pair) for pair in PAIRS)


def test_the_first_process_alone_adds_the_head(tmp_path):
    reference = make_trainer(tmp_path, "sft_constraint", PAIRS, make_model(), make_model(1)).reference
    stores = [ReferenceStore(tmp_path, "key", "short", rank) for rank in range(2)]
    precompute(stores[1], PAIRS, reference, True, 1, 2)
    assert stores[1].head() is None and stores[1].has_hidden(PAIRS[1])
    precompute(stores[0], PAIRS, reference, True, 0, 2)
    assert torch.equal(stores[1].head(), reference.head())


def test_two_machines_with_one_process_id_may_write_a_file_at_once(tmp_path, monkeypatch):
    """The second writes all of it while the first waits for its own bytes to be on the disk."""
    stores, sync = [ReferenceStore(tmp_path, "key", "short", rank) for rank in range(2)], journal.sync

    def meanwhile(path):
        monkeypatch.setattr(journal, "sync", sync)
        stores[1].add_head(torch.ones(2, 3))
        sync(path)

    monkeypatch.setattr(journal, "sync", meanwhile)
    stores[0].add_head(torch.ones(2, 3))
    assert torch.equal(stores[1].head(), torch.ones(2, 3))
    assert [path.name for path in stores[0].folder.iterdir()] == ["head.safetensors"]


def test_log_probs_that_are_no_numbers_are_refused_and_not_believed(tmp_path):
    online = make_trainer(tmp_path, "longpo", PAIRS, make_model(), make_model(1), reference="online").reference
    online.model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(
        ValueError, match=f"record '{PAIRS[0].id}': the reference's log-probs are nan, nan; expected finite"
    ):
        online.logps(PAIRS[0])
    _, store = start(tmp_path, make_model(1))
    (file,) = store.folder.glob("logps-*.jsonl")
    digest, *_ = json.loads(json.loads(file.read_bytes().splitlines()[0])[0])
    body = f"[{json.dumps(digest)}, NaN, [-1.0]]"
    line = json.dumps([body, hashlib.sha256(body.encode()).hexdigest()[:16]])
    file.write_text("\n".join([line, *file.read_text().splitlines()[1:], ""]))
    calls, again = start(tmp_path, make_model(1))
    assert calls == 2 and [again.logps(pair) for pair in PAIRS] == [store.logps(pair) for pair in PAIRS]


def test_data_may_hold_the_log_probs(tmp_path):
    pairs = [replace(p, ref_chosen_logp=-3.0, ref_rejected_logps=(-4.0,) * len(p.rejected)) for p in PAIRS]
    trainer = make_trainer(tmp_path, "longpo", pairs, make_model(), reference="data")
    assert [trainer.reference.logps(pair) for pair in pairs] == [(-3.0, (-4.0,)), (-3.0, (-4.0,)), (-3.0, (-4.0, -4.0))]
