"""Every method's loss and gradients are those of separate sequences; steps are normalised by pairs; what is logged."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from longpo_ops.data import pack as pack_of
from longpo_ops.train import METHODS, LongPOConfig
from longpo_ops.train.checkpoints import check_checkpoint
from longpo_ops.train.packed import PackedPairs

from ..attention.dense import TrueFloat64
from ..parallel.ranks import run_ranks
from .tiny import (
    answer_logp,
    gradients,
    logits,
    make_model,
    make_pair,
    make_trainer,
    naive_loss,
    plain,
    reference_logps,
    turn_logps,
)

PAIRS = [make_pair(1), make_pair(2, turns=1, document=9), make_pair(3, rejected=2, answer=6)]
ONE_STEP = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.5,
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
}


def token_accuracy(model, pairs) -> float:
    """Of the tokens of chosen answers, as TRL's mean_token_accuracy, by plain logits."""
    with torch.no_grad():
        best = torch.cat([logits(model, pair.chosen)[:-1].argmax(-1) for pair in pairs])
    labels = torch.cat([torch.from_numpy(pair.chosen.labels)[1:] for pair in pairs])
    return float((best == labels)[labels != -100].double().mean())


def close(ours, truth, relative: float = 1e-11):
    """float64 against float64, summed in another order."""
    error, largest = (float((x.detach().double()).abs().max()) for x in (ours - truth, truth))
    assert error <= relative * largest + 1e-15, f"{error:.3e} off, the largest is {largest:.3e}"


def for_method(name: str, pairs):
    return (
        [replace(p, rejected=p.rejected[:1], ref_rejected=p.ref_rejected[:1]) for p in pairs]
        if name == "kto_pair"
        else pairs
    )


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_rows_loss_and_gradients_are_those_of_separate_sequences(tmp_path, name, count):
    policy, reference = make_model(0, rope_theta=1e6), make_model(1)
    pairs = for_method(name, PAIRS)[-count:]
    truth_model = plain(policy)
    positions = None
    needed = reference if METHODS[name].reference else None
    trainer = make_trainer(tmp_path, name, pairs, policy, needed, pack_tokens=400)
    assert len(trainer.train_dataset) == 1
    pack = trainer.train_dataset[0]
    if name == "logo":  # its own positions: of the longest sequence of each pair, read off the pack
        assert int(pack.batch.position_ids.max()) == 255
        positions = {pair.id: _positions(pack.batch, b) for b, pair in enumerate(pairs)}
    policy.train()
    with TrueFloat64():
        truth = naive_loss(name, truth_model, plain(reference), pairs, positions)
        truth.backward()
        loss = trainer.compute_loss(policy, {"pack": pack})
        loss.backward()
    close(loss, truth)
    ours, theirs = gradients(policy), gradients(truth_model)
    assert ours.keys() == theirs.keys()
    for parameter in theirs:
        close(ours[parameter], theirs[parameter])


UNEVEN = [make_pair(6, turns=3, answer=[1, 12, 4]), make_pair(7, turns=2, answer=[9, 2]), make_pair(8, turns=1)]


@pytest.mark.parametrize("settings", [{}, {"constraint_weight": 0.5}])
@pytest.mark.parametrize("name", ["sft_constraint", "sft_constraint_official"])
def test_turns_of_different_lengths_weigh_as_the_method_says(tmp_path, name, settings):
    """The official one counts a turn's mean once however long it is, and of the NLL the answers alone."""
    policy, reference = make_model(0, rope_theta=1e6), make_model(1)
    truth_model = plain(policy)
    trainer = make_trainer(tmp_path, name, UNEVEN, policy, reference, pack_tokens=400, **settings)
    policy.train()
    with TrueFloat64():
        truth = naive_loss(name, truth_model, plain(reference), UNEVEN, **settings)
        truth.backward()
        loss = trainer.compute_loss(policy, {"pack": trainer.train_dataset[0]})
        loss.backward()
    close(loss, truth)
    ours, theirs = gradients(policy), gradients(truth_model)
    for parameter in theirs:
        close(ours[parameter], theirs[parameter])


def _positions(batch, b: int) -> np.ndarray:
    """Position ids of pair b's longest sequence."""
    spans, ids = batch.layout.pairs[b], batch.position_ids[0].numpy()
    tails = [
        np.concatenate([ids[spans.start : spans.prefix_end - (j > 0)], ids[slice(*t)]])
        for j, t in enumerate(spans.tails)
    ]
    return max(tails, key=len)


def test_options_of_an_objective_reach_the_loss(tmp_path):
    policy = make_model()
    options = {"beta": 1.5, "gamma": 0.25}
    trainer = make_trainer(tmp_path, "simpo", PAIRS[:1], policy, objective_options=options)
    truth_model = plain(policy)
    with TrueFloat64():
        (s_w, n_w), (s_l, n_l) = (answer_logp(truth_model, s) for s in (PAIRS[0].chosen, PAIRS[0].rejected[0]))
        truth = -torch.nn.functional.logsigmoid(1.5 * (s_w / n_w - s_l / n_l) - 0.25)
        close(trainer.compute_loss(policy, {"pack": trainer.train_dataset[0]}), truth)


def five_pairs(name):
    return for_method(name, [*PAIRS, make_pair(4, answer=9), make_pair(5, turns=1)])


def step(folder, name, evaluate_packs_of=0, **settings):
    """Parameters after one step of plain gradient descent over five pairs, what was logged and evaluated, and the packs."""
    pairs, policy = five_pairs(name), make_model()
    needed = make_model(1) if METHODS[name].reference else None
    trainer = make_trainer(folder, name, pairs, policy, needed, **ONE_STEP | settings)
    log = {}
    with TrueFloat64():
        trainer.train()
        if evaluate_packs_of:
            log = trainer.evaluate(PackedPairs(pairs, trainer.method, pack_tokens=evaluate_packs_of))
    return dict(policy.named_parameters()), trainer.state.log_history[0] | log, trainer.train_dataset.groups


ALIKE = ("kto_pair", "solopo_simpo", "solopo_orpo")  # a KL that is a mean over a pack; packs like those of solopo


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ALIKE])
def test_accumulated_rows_of_different_sizes_are_one_large_batch(tmp_path, name):
    whole, log, packs = step(tmp_path / "whole", name, gradient_accumulation_steps=1, pack_tokens=1000, target_length=0)
    assert [len(pack) for pack in packs] == [5]
    parts, log_parts, packs = step(
        tmp_path / "parts", name, gradient_accumulation_steps=4, pack_tokens=130, target_length=0
    )
    assert len({len(pack) for pack in packs}) > 1 and len(packs) <= 4
    for parameter in whole:
        close(parts[parameter], whole[parameter])
    assert {"loss"} < {k for k in log if k not in ("tokens_per_second", "peak_memory_gib", "epoch")}
    for metric in log.keys() - {"tokens_per_second", "peak_memory_gib", "epoch", "grad_norm"}:
        assert log_parts[metric] == pytest.approx(log[metric], rel=1e-6), metric


TIMES = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}


def one_of_two(folder, name, rows):
    """On a rank -> parameters after the step, and what was logged and evaluated."""
    settings = dict(gradient_accumulation_steps=1, pack_tokens=rows, target_length=0, save_strategy="steps")
    parameters, log, _ = step(folder, name, evaluate_packs_of=130, reference="precompute", **settings)
    return {each: parameter.detach() for each, parameter in parameters.items()}, log


@pytest.mark.parametrize("name", ["longpo"])
def test_two_processes_are_one(tmp_path, name):
    """Evaluation has three packs, of two, one and two pairs: one is given to both processes, and counts once."""
    assert [len(pack) for pack in PackedPairs(five_pairs(name), METHODS[name], pack_tokens=130).groups] == [2, 1, 2]
    whole, log, _ = step(tmp_path / "whole", name, 130, gradient_accumulation_steps=1, pack_tokens=1000)
    trained, reference = make_model(), plain(make_model(1))
    trained.load_state_dict(whole)
    with TrueFloat64():
        truth = float(naive_loss(name, plain(trained), reference, five_pairs(name)).detach())
    assert log["eval_loss"] == pytest.approx(truth, rel=1e-6)
    rows = 220
    environment = {"ACCELERATE_USE_CPU": "true"}
    (parameters, logged), _ = run_ranks(one_of_two, 2, tmp_path / "two", name, rows, environment=environment)
    for parameter in whole:
        # Their processes compute norms and angles in float32, as transformers does outside TrueFloat64.
        close(parameters[parameter], whole[parameter].detach(), 2.0**-23)
    compared = [n for n in log if n.startswith(("eval_", "rewards/", "logps/")) or n.endswith("loss")]
    for metric in set(compared) - TIMES:
        assert logged[metric] == pytest.approx(log[metric], rel=1e-6, abs=1e-6), metric
    assert len(list((tmp_path / "two" / "reference").glob("*/logps-*.jsonl"))) == 2  # each computed its share
    checkpoint = tmp_path / "two" / "checkpoint-1"  # with the random state of each
    check_checkpoint(checkpoint)
    (checkpoint / "rng_state_1.pth").unlink()
    with pytest.raises(ValueError, match=r"rng_state_1\.pth is missing"):
        check_checkpoint(checkpoint)


def test_the_papers_metrics_are_logged_and_reach_callbacks(tmp_path):
    seen = []

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    policy, reference = make_model(0), make_model(1)
    trainer = make_trainer(
        tmp_path,
        "longpo",
        PAIRS,
        policy,
        reference,
        PAIRS[:1],
        extra={"callbacks": [Recorder()]},
        gradient_accumulation_steps=2,
        logging_steps=2,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=1e-12,
    )
    trainer.train()
    evaluations, logs = [s for s in seen if "eval_loss" in s], [s for s in seen if "loss" in s]
    assert len(evaluations) == 2 and len(logs) == 1
    names = "rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen logps/rejected nll_loss"
    names += " mean_token_accuracy"
    assert {*names.split(), "preference_loss", "tokens_per_second", "peak_memory_gib"} <= logs[0].keys()
    assert {f"eval_{name}" for name in names.split()} <= evaluations[0].keys()

    copy, other = plain(policy), plain(reference)
    s_w, _ = answer_logp(copy, PAIRS[0].chosen)
    r_w, _ = reference_logps(other, PAIRS[0], "short")
    s_w = s_w.detach()
    for row in evaluations:  # of the evaluation pair alone, although training packs came between two logs
        assert row["eval_rewards/chosen"] == pytest.approx(0.1 * float(s_w - r_w), rel=1e-6)
        assert row["eval_logps/chosen"] == pytest.approx(float(s_w), rel=1e-6)
        assert row["eval_mean_token_accuracy"] == pytest.approx(token_accuracy(copy, PAIRS[:1]))
        assert row["eval_loss"] == pytest.approx(float(naive_loss("longpo", copy, other, PAIRS[:1]).detach()), rel=1e-5)
    # two steps, of two pairs and of one: means over pairs, not over steps
    everything = float(naive_loss("longpo", copy, other, PAIRS).detach())
    assert logs[0]["loss"] == pytest.approx(everything, rel=1e-5)
    assert logs[0]["mean_token_accuracy"] == pytest.approx(token_accuracy(copy, PAIRS)) != 0
    assert next(s for s in seen if "train_loss" in s)["train_loss"] == pytest.approx(everything, rel=1e-5)
    assert logs[0]["loss"] == pytest.approx(0.01 * logs[0]["preference_loss"] + logs[0]["nll_loss"], rel=1e-6)
    assert logs[0]["tokens_per_second"] > 0 and logs[0]["peak_memory_gib"] > 0


@pytest.mark.parametrize("separate", [False, True])
def test_solopo_tells_what_it_reads_and_logs_the_distance_of_rewards(tmp_path, caplog, separate):
    """A turn is a pair, whatever record and pack it is in."""
    policy, reference = make_model(0), make_model(1)
    settings = {"max_steps": 1, "gradient_accumulation_steps": 3, "separate": separate, "learning_rate": 1e-12}
    with caplog.at_level("INFO"):
        trainer = make_trainer(tmp_path, "solopo", PAIRS, policy, reference, **settings)
    long, short = (sum(len(s) for pair in PAIRS for s in of(pair)) for of in (_long, _short))
    if separate:
        chosen = sum(len(pair.chosen) for pair in PAIRS)
        assert f"solopo reads {chosen + short} tokens a pass over the data" in caplog.text
        assert f"would be {long} as separate sequences" in caplog.text
    else:
        rows = [pack.batch.layout.length for pack in trainer.train_dataset]
        both = [pack_of([pair]).layout.length for pair in PAIRS]
        assert (
            f"solopo reads {sum(rows)} tokens" in caplog.text and f"would be {sum(both)} with prefixes" in caplog.text
        )
    trainer.train()
    log = trainer.state.log_history[0]
    with torch.no_grad():
        turns = [list(turn_logps(plain(model), pair)) for pair in PAIRS for model in (policy, reference)]
    ours = [turn for of_pair in turns[::2] for turn in of_pair]
    theirs = [turn for of_pair in turns[1::2] for turn in of_pair]
    chosen, anchors = (
        np.array([0.1 * float(a[i][0] - b[i][0]) for a, b in zip(ours, theirs, strict=True)]) for i in (0, 2)
    )
    assert log["pairs"] == len(chosen) == 5
    assert log["rewards/chosen"] == pytest.approx(chosen.mean(), rel=1e-5)
    assert log["rewards/anchor"] == pytest.approx(anchors.mean(), rel=1e-5)
    assert log["rewards/distances"] == pytest.approx(np.abs(chosen - anchors).mean(), rel=1e-5)
    assert log["loss"] == pytest.approx(
        float(naive_loss("solopo", plain(policy), plain(reference), PAIRS).detach()), rel=1e-5
    )


def _long(pair):
    return (pair.chosen, *pair.rejected)


def _short(pair):
    return [*pair.ref_chosen, *(sequence for turns in pair.ref_rejected for sequence in turns)]


def test_small_steps_move_float32_master_weights_of_a_bf16_model(tmp_path):
    def train(lr):
        policy = make_model(dtype=torch.bfloat16)
        before = policy.lm_head.weight.detach().float().clone()
        trainer = make_trainer(
            tmp_path,
            "sft_chosen",
            PAIRS,
            policy,
            max_steps=4,
            learning_rate=lr,
            warmup_steps=0,
            lr_scheduler_type="constant",
        )
        trainer.train()
        return policy, (policy.lm_head.weight.detach().float() - before).abs(), trainer

    policy, moved, trainer = train(5e-7)
    assert policy.lm_head.weight.dtype == torch.float32 and trainer.args.bf16
    assert float((moved > 0).float().mean()) > 0.9
    assert 1e-7 < float(moved.max()) < 1e-5
    # what a bf16 weight keeps of such a step: nothing, for nearly all
    weight = make_model(dtype=torch.bfloat16).lm_head.weight.detach()
    assert float(((weight + moved.to(torch.bfloat16)) != weight).float().mean()) < 0.1
    policy, moved, trainer = train(1e-2)
    assert policy.lm_head.weight.dtype == torch.bfloat16 and not trainer.args.bf16
    assert math.isfinite(trainer.state.log_history[0]["loss"]) and float(moved.max()) > 0


# -- runs that would train nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "steps", "warmup"),
    [
        (0.1, 1, 0),
        (0.1, 9, 0),
        (0.1, 10, 1),
        (0.1, 15, 2),
        (0.1, 1000, 100),
        (0.5, 1, 0),
        (3, 1, 3),
        (3, 100, 3),
        (0, 9, 0),
    ],
)
def test_a_part_of_all_steps_that_is_less_than_one_is_no_warm_up(tmp_path, given, steps, warmup):
    assert LongPOConfig(output_dir=str(tmp_path), warmup_steps=given).get_warmup_steps(steps) == warmup


def test_a_single_step_with_the_default_settings_trains(tmp_path):
    policy = make_model()
    before = plain(policy)
    trainer = make_trainer(tmp_path, "longpo", PAIRS, policy, make_model(1))
    trainer.train()
    assert [row["learning_rate"] for row in trainer.state.log_history if "loss" in row] == [5e-7]
    assert not torch.equal(policy.lm_head.weight, before.lm_head.weight)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup"])
def test_a_schedule_of_nothing_but_zeros_is_refused(tmp_path, caplog, kind):
    def train(steps):
        settings = dict(max_steps=steps, warmup_steps=1, lr_scheduler_type=kind, learning_rate=1e-3)
        make_trainer(tmp_path, "sft_chosen", PAIRS, make_model(), **settings).train()

    with pytest.raises(ValueError, match=f"{kind} with warmup_steps=1 gives each of the run's 1 steps a rate of 0"):
        train(1)
    train(2)
    assert "learning_rate is never reached" not in caplog.text


def test_a_warm_up_as_long_as_the_run_is_told(tmp_path, caplog):
    settings = dict(max_steps=2, warmup_steps=5, learning_rate=1e-3)
    make_trainer(tmp_path, "sft_chosen", PAIRS, make_model(), **settings).train()
    assert "warm-up takes 5 steps and the run has 2: learning_rate is never reached" in caplog.text


def test_a_model_without_a_trained_parameter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        make_trainer(tmp_path, "sft_chosen", PAIRS, make_model().requires_grad_(False))


def test_weights_that_have_not_moved_are_an_error(tmp_path):
    settings = dict(max_steps=2, learning_rate=1e-30)
    trainer = make_trainer(tmp_path, "sft_chosen", PAIRS, make_model(dtype=torch.float32), **settings)
    with pytest.raises(
        ValueError, match="no weight has moved in 2 steps of learning_rate=1e-30: they are lost in rounding"
    ):
        trainer.train()


def test_two_hundred_pairs_are_learnt(tmp_path):
    pairs = [make_pair(1000 + i, turns=1, document=16, answer=4) for i in range(200)]
    policy = make_model(0, torch.float32, hidden_size=64, intermediate_size=128)
    trainer = make_trainer(
        tmp_path,
        "longpo",
        pairs,
        policy,
        plain(make_model(0, torch.float32, hidden_size=64, intermediate_size=128)),
        objective_options={"preference_weight": 1.0},
        reference="precompute",
        pack_tokens=800,
        gradient_checkpointing=False,
        gradient_accumulation_steps=1,
        num_train_epochs=6,
        learning_rate=6e-3,
        warmup_steps=5,
        logging_steps=4,
    )
    trainer.train()
    log = [row for row in trainer.state.log_history if "rewards/margins" in row]
    margins = [row["rewards/margins"] for row in log]
    print([row["rewards/accuracies"] for row in log], margins)
    assert log[-1]["rewards/accuracies"] == 1.0
    thirds = np.array_split(margins, 3)
    assert thirds[0].mean() < thirds[1].mean() < thirds[2].mean() and margins[-1] > 1.0


BAD_SETTINGS = [
    ({"objective": "ppo"}, "objective='ppo': expected one of longpo"),
    ({"objective_options": {"gamma": 1}}, r"\['gamma'\] came; 'longpo' has"),
    ({"objective": "sft_chosen", "objective_options": {"beta": 1}}, "has no preference term"),
    ({"reference": "none"}, "expected one of precompute, online, data"),
    ({"reference": "data", "objective": "dpo"}, "log-probs of the long inputs"),
    ({"reference": "data", "objective": "sft_constraint"}, "hidden states"),
    ({"reference": "data", "objective": "solopo"}, "log-probs of the long inputs"),
    ({"target_length": 64, "objective": "solopo_orpo"}, "target_length=64: solopo_orpo compares"),
    ({"per_device_train_batch_size": 4}, "use pack_tokens"),
    ({"pack_tokens": 0}, "pack_tokens=0: expected a whole number"),
    ({"constraint_weight": 0.0}, "expected > 0"),
    ({"remove_unused_columns": True}, "a pack has no columns"),
    ({"bf16_full_eval": True}, "evaluation computes as training"),
]


@pytest.mark.parametrize("settings, message", BAD_SETTINGS)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        LongPOConfig(output_dir=str(tmp_path), **settings)


SHORT_OF_ANOTHER = {"ref_chosen": PAIRS[1].ref_chosen, "ref_rejected": PAIRS[1].ref_rejected}
BAD_PAIRS = [
    ("longpo", {"ref_chosen": (), "ref_rejected": ()}, {}, "'pair-1': no short inputs"),
    ("longpo", {}, {"reference": "data"}, "'pair-1': no reference log-probs"),
    ("sft_chosen", {"chosen": replace(PAIRS[0].chosen, nll_labels=None)}, {}, "'pair-1': no NLL labels"),
    ("simpo", {"rejected": ()}, {}, "'pair-1': no rejected answer"),
    ("sft_constraint", SHORT_OF_ANOTHER, {}, "'pair-1': .* answer tokens in the long input"),
    ("solopo", SHORT_OF_ANOTHER, {}, "'pair-1': .* answer tokens in the long input"),
    ("solopo_simpo", {"ref_chosen": (), "ref_rejected": ()}, {}, "'pair-1': no short inputs with both answers"),
    ("solopo_simpo", {}, {"pack_tokens": 60}, "'pair-1' packs into"),
    ("logo", {}, {"target_length": 30}, "'pair-1'.*target_length is 30"),
    ("longpo", {}, {"pack_tokens": 30}, "'pair-1' packs into"),
]


@pytest.mark.parametrize("name, change, settings, message", BAD_PAIRS)
def test_records_that_lack_what_a_method_reads_are_named_before_training(tmp_path, name, change, settings, message):
    pairs = [replace(PAIRS[0], **change)]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, name, pairs, make_model(), make_model(1), **settings)


def test_a_missing_reference_and_the_policy_itself_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected reference_model, a PEFT policy"):
        make_trainer(tmp_path, "longpo", PAIRS, make_model())
    model = make_model()
    with pytest.raises(ValueError, match="is the policy itself"):
        make_trainer(tmp_path, "longpo", PAIRS, model, model)
