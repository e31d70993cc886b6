"""Our losses equal TRL's DPOTrainer on the same batch and the same tiny model, by its own loss method."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longpo_ops import DPO, IPO, Hinge, fused_preference_loss

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


def trainer(kind, folder):
    words = lambda *n: " ".join(f"w{i}" for i in n)  # noqa: E731
    rows = [
        dict(prompt=words(1, 2, 3), chosen=" " + words(4, 5), rejected=" " + words(6, 7, 8)),
        dict(prompt=words(9), chosen=" " + words(10, 11, 12, 13), rejected=" " + words(14)),
        dict(prompt=words(20, 21), chosen=" " + words(22), rejected=" " + words(23, 24)),
    ]
    arguments = trl.DPOConfig(
        output_dir=str(folder), loss_type=[kind], beta=0.3, per_device_train_batch_size=3, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True,
    )  # fmt: skip
    return trl.DPOTrainer(
        model(0),
        ref_model=model(1),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize(
    "kind, objective", [("sigmoid", DPO(beta=0.3)), ("hinge", Hinge(beta=0.3)), ("ipo", IPO(beta=0.3, average=True))]
)
def test_equals_the_trainers_own_loss(kind, objective, tmp_path):
    theirs = trainer(kind, tmp_path)
    policy = theirs.model
    batch = next(iter(theirs.get_train_dataloader()))
    truth = theirs.compute_loss(policy, batch)
    truth.backward()
    true_gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()

    ids, mask = batch["input_ids"], batch["attention_mask"]
    half = len(ids) // 2
    labels = torch.where((batch["completion_mask"] * mask).bool(), ids, -100)

    def hidden(model):
        return model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state

    def loss(model, **references):
        h = hidden(model)
        return fused_preference_loss(
            h[:half], h[half:], model.lm_head.weight, labels[:half], labels[half:], **references,
        )  # fmt: skip

    with torch.no_grad():
        free = loss(theirs.ref_model, objective="simpo")
    ours = loss(policy, objective=objective, ref_chosen_logps=free.chosen_logps, ref_rejected_logps=free.rejected_logps)
    torch.testing.assert_close(ours.loss, truth.detach(), rtol=1e-5, atol=1e-6)
    ours.loss.backward()
    for name, p in policy.named_parameters():
        torch.testing.assert_close(
            p.grad, true_gradients[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
