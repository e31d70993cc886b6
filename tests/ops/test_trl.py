"""Our losses equal TRL's own on the same batch and the same tiny model, by its trainers' loss methods."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longpo_ops import (
    AOT,
    CPO,
    DPO,
    IPO,
    KTO,
    ORPO,
    APODown,
    APOZero,
    BCOPair,
    DiscoPOP,
    EXOPair,
    Hinge,
    NCAPair,
    Robust,
    SimPO,
    SPPOHard,
    fused_preference_loss,
    packed_objective_loss,
)
from longpo_ops.ops.objective import Answers

trl = pytest.importorskip("trl")
tokenizers = pytest.importorskip("tokenizers")

WORDS = 40


def tokenizer():
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS + 2, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def words(*numbers):
    return " ".join(f"w{i}" for i in numbers)


def trainer(folder):
    rows = [
        dict(prompt=words(1, 2, 3), chosen=" " + words(4, 5), rejected=" " + words(6, 7, 8)),
        dict(prompt=words(9), chosen=" " + words(10, 11, 12, 13), rejected=" " + words(14)),
        dict(prompt=words(20, 21), chosen=" " + words(22), rejected=" " + words(23, 24)),
    ]
    arguments = trl.DPOConfig(
        output_dir=str(folder), loss_type=["sigmoid"], beta=0.3, label_smoothing=0.1, per_device_train_batch_size=3,
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True,
    )  # fmt: skip
    return trl.DPOTrainer(
        model(0),
        ref_model=model(1),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return trainer(tmp_path_factory.mktemp("trl"))


EPS = {"beta": 0.3, "label_smoothing": 0.1}
KINDS = {
    "sigmoid": DPO(beta=0.3),
    "sigmoid_norm": DPO(beta=0.3, average=True),
    "hinge": Hinge(beta=0.3),
    "ipo": IPO(beta=0.3, average=True),
    "exo_pair": EXOPair(**EPS),
    "nca_pair": NCAPair(beta=0.3),
    "robust": Robust(**EPS),
    "bco_pair": BCOPair(beta=0.3),
    "sppo_hard": SPPOHard(beta=0.3),
    "aot": AOT(**EPS),
    "aot_unpaired": AOT(**EPS, paired=False),
    "apo_zero": APOZero(beta=0.3),
    "apo_down": APODown(beta=0.3),
    "discopop": DiscoPOP(beta=0.3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_trainers_own_loss(kind, theirs):
    theirs.loss_types, policy = [kind], theirs.model
    policy.zero_grad()
    torch.manual_seed(0)
    batch = next(iter(theirs.get_train_dataloader()))
    truth = theirs.compute_loss(policy, batch)
    truth.backward()
    true_gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()

    ids, mask = batch["input_ids"], batch["attention_mask"]
    half = len(ids) // 2
    labels = torch.where((batch["completion_mask"] * mask).bool(), ids, -100)

    def loss(model, **references):
        h = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        return fused_preference_loss(
            h[:half], h[half:], model.lm_head.weight, labels[:half], labels[half:], **references,
        )  # fmt: skip

    with torch.no_grad():
        free = loss(theirs.ref_model, objective="simpo")
    refs = dict(ref_chosen_logps=free.chosen_logps, ref_rejected_logps=free.rejected_logps)
    ours = loss(policy, objective=KINDS[kind], **refs)
    assert_equal(ours.loss, truth, policy, true_gradients)


def assert_equal(ours, truth, policy, true_gradients):
    torch.testing.assert_close(ours, truth.detach(), rtol=1e-5, atol=1e-6)
    ours.backward()
    for name, p in policy.named_parameters():
        torch.testing.assert_close(
            p.grad, true_gradients[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_answers_alone_equal_the_kto_trainers_loss(tmp_path):
    kinds = [(words(1, 2), (4, 5), True), (words(9), (10, 11, 12), False), (words(20, 21), (22,), True)]
    rows = [
        dict(prompt=p, completion=" " + words(*c), label=good) for p, c, good in [*kinds, (words(7), (8, 3), False)]
    ]
    arguments = trl.KTOConfig(
        output_dir=str(tmp_path), beta=0.3, per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, desirable_weight=1.5, undesirable_weight=0.5,
    )  # fmt: skip
    theirs = trl.KTOTrainer(
        model(0),
        ref_model=model(1),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    policy, batch = theirs.model, next(iter(theirs.get_train_dataloader()))
    truth = theirs.compute_loss(policy, batch)
    truth.backward()
    true_gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    (kl,) = {float(value) for value in theirs._metrics["train"]["kl"]}

    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = torch.where(batch["completion_mask"].bool(), ids, -100)[:, 1:].reshape(-1)
    sequences = torch.where(labels == -100, -1, torch.arange(4).repeat_interleave(ids.shape[1] - 1))
    roles = 1 - torch.as_tensor(batch["label"]).long()

    def loss(model, objective, **more):
        hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        weight, groups = model.lm_head.weight, torch.arange(4)
        return packed_objective_loss(
            hidden, weight, labels, sequences, groups=groups, roles=roles, num_groups=4, objective=objective, **more
        )

    with torch.no_grad():
        refs = loss(theirs.ref_model, KTO(), ref_logps=torch.zeros(4)).logps
    ours = loss(policy, KTO(beta=0.3, kl=kl, desirable_weight=1.5, undesirable_weight=0.5), ref_logps=refs)
    assert_equal(ours.loss, truth, policy, true_gradients)


@pytest.mark.parametrize("kind", ["cpo", "simpo", "orpo"])
def test_reference_free_losses_equal_those_of_their_trainers(kind):
    logps, lengths = -9 + 3 * torch.randn(8, dtype=torch.float64), torch.randint(2, 7, (8,)).double()
    answers = Answers.of(logps, lengths, None, torch.arange(4).repeat(2), torch.arange(2).repeat_interleave(4), 4)
    their = SimpleNamespace(
        beta=0.4, alpha=0.0, loss_type="simpo" if kind == "simpo" else "sigmoid", simpo_gamma=0.6, label_smoothing=0.1,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    means = logps / lengths
    if kind == "orpo":
        trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
        wanted = -trainer.odds_ratio_loss(their, means[:4], means[4:])[0]  # in float32
        ours = ORPO(lam=0.4, nll_weight=0.0)
    else:
        trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
        given = means if kind == "simpo" else logps  # SimPO's are means
        wanted = trainer.cpo_loss(their, given[:4], given[4:])[0]
        eps = {"beta": 0.4, "label_smoothing": 0.1}
        ours = SimPO(gamma=0.6, **eps) if kind == "simpo" else CPO(nll_weight=0.0, **eps)
    torch.testing.assert_close(ours.losses(answers), wanted.double(), rtol=1e-5, atol=1e-7)
