"""A tree of sequences through whole models in float64: loss and every gradient are those of separate sequences."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models import gpt_oss, llama4

from longpo_ops import LongPO, attach, packed_preference_loss
from longpo_ops.attention import use_shared_prefix
from longpo_ops.attention.shared_prefix import plan_segments
from longpo_ops.data import TokenSequence, pack_tree
from longpo_ops.memory import offload_activations, tile_layers

from .dense import TrueFloat64, true_float64
from .test_registration import FAMILIES, LOCAL, SIZES

SMALL = SIZES | dict(hidden_size=32, head_dim=8)
MODELS = {
    "llama": FAMILIES["llama"],
    "gpt_oss, a window and sinks": lambda: gpt_oss.GptOssConfig(
        **SMALL, num_local_experts=2, num_experts_per_tok=2, **LOCAL
    ),
    "llama4, chunks": lambda: llama4.Llama4TextConfig(
        **SMALL, num_local_experts=2, attention_chunk_size=8, intermediate_size_mlp=48, interleave_moe_layer_step=2
    ),
}
# Two questions about a document, that begin alike, each with answers of 1 to 4 tokens: in mixed order, chosen ones first.
DOCUMENT, QUESTIONS = list(range(20, 37)), ([40, 41, 42], [40, 43])
ANSWERS = [(0, [1, 2, 3]), (1, [1, 4]), (0, [1, 2, 5]), (0, [6]), (1, [1, 7, 8, 9]), (1, [1, 4]), (0, [1, 5, 5])]
PAIR = [0, 1, 0, 0, 1, 1, 0]  # of each sequence
OBJECTIVE = LongPO(beta=0.5, preference_weight=1.0)


def make(prompt: list[int], answer: list[int], nll: bool = False) -> TokenSequence:
    ids = torch.tensor(prompt + answer).numpy()
    labels = torch.tensor([-100] * len(prompt) + answer).numpy()
    return TokenSequence(ids, labels, ids if nll else None)


def make_sequences() -> list[TokenSequence]:
    return [make(DOCUMENT + QUESTIONS[q], answer, number < 2) for number, (q, answer) in enumerate(ANSWERS)]


def make_model(family: str, attention: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = MODELS[family]()
    config._experts_implementation = "eager"  # grouped products of experts know no float64
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().train()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach()} | found


def separate(model: nn.Module) -> dict[str, torch.Tensor]:
    """LongPO's loss of plain log-softmaxes, each sequence by itself through the model's own attention."""
    sums, nll = [], 0.0
    for number, sequence in enumerate(make_sequences()):
        ids, labels = torch.from_numpy(sequence.ids), torch.from_numpy(sequence.labels)
        logps = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        sums.append((logps * (labels[1:] != -100)).sum())
        nll = nll - (logps.mean() if number < 2 else 0.0)
    margins = [sums[pair] - sums[k] for k, pair in enumerate(PAIR) if k > 1]
    losses = [-nn.functional.logsigmoid(0.5 * m) for m in margins]
    means = [
        sum(x for x, pair in zip(losses, PAIR[2:], strict=True) if pair == b) / PAIR[2:].count(b) for b in range(2)
    ]
    return gradients(model, (sum(means) + nll) / 2)


def packed(model: nn.Module, batch) -> dict[str, torch.Tensor]:
    def compute(hidden, head):
        return head(
            hidden[0],
            (batch.labels, batch.segments),
            loss=packed_preference_loss,
            num_chosen=2,
            rejected_pair=torch.tensor(PAIR[2:]),
            nll_weights=batch.nll_weights,
            ref_chosen_logps=torch.zeros(2, dtype=torch.float64),
            ref_rejected_logps=torch.zeros(5, dtype=torch.float64),
            objective=OBJECTIVE,
        )

    inputs = dict(position_ids=batch.position_ids, shared_prefix_layout=batch.layout, use_cache=False)
    return gradients(model, model(batch.input_ids, **inputs, compute=compute).loss)


@pytest.mark.parametrize("family", MODELS)
def test_loss_and_gradients_are_those_of_separate_sequences(family):
    batch = pack_tree(make_sequences())
    assert batch.layout.length < 0.5 * sum(map(len, make_sequences()))
    with TrueFloat64():
        truth, model = separate(make_model(family)), attach(make_model(family))
        use_shared_prefix(model)
        ours = packed(model, batch)
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        off = float((ours[name] - expected).abs().max())
        assert off <= 1e-12 * float(expected.abs().max()), f"{name}: {off}"


def test_offload_and_tiles_change_nothing_of_a_tree():
    batch = pack_tree(make_sequences())
    results = []
    for offload in (False, True):
        model = attach(make_model("llama"))
        use_shared_prefix(model)
        if offload:
            model.gradient_checkpointing_enable()
            tile_layers(model, 8)
            offload_activations(model, host_bytes=1 << 24, page_bytes=4096, save_attention=True)
        with true_float64():
            results.append(packed(model, batch))
    for name, plain in results[0].items():
        torch.testing.assert_close(results[1][name], plain, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


def test_neighbours_that_see_the_same_rows_are_one_call():
    """Questions and answers in any number: a call for the document's rows, and one for each question's."""
    prompts = [[*DOCUMENT, 60 + q, 61 + q] for q in range(4)]
    tree = pack_tree([make(prompt, [1, a]) for prompt in prompts for a in range(16)])
    own, shared = plan_segments(tree.layout)
    assert (len(own), len(shared)) == (64, 5)
    assert [(s.end - s.start, s.keys.end - s.keys.start) for s in shared][:1] == [(15 * 3, len(DOCUMENT) + 1)]
    own, shared = plan_segments(tree.layout, window=6)  # each branch by its own positions
    assert len(own) == 64 and len(shared) > 63
