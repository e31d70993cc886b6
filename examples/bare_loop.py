"""Preference training in a bare PyTorch loop: a small random Llama learns which of two continuations is wanted.

    python examples/bare_loop.py [--steps 20]

Chosen and rejected sequences of a pair go through the model together; the loss is computed inside its forward, from
hidden states, so no logits (2B, T, V) ever exist. The reference's log-probs are computed once, before the first step.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longpo_ops import LongPO, attach, linear_logprobs

VOCAB, PROMPT, ANSWER, PAIRS = 512, 48, 8, 4


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return attach(LlamaForCausalLM(config))


def make_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """-> ids and answer labels, (2 * PAIRS, T): chosen sequences first, then the rejected ones of the same prompts."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(VOCAB, (PAIRS, PROMPT), generator=generator).repeat(2, 1)
    answers = torch.randint(VOCAB, (2 * PAIRS, ANSWER), generator=generator)
    ids = torch.cat([prompts, answers], dim=1)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return ids, labels


def reference_logps(model, ids, labels) -> torch.Tensor:
    """(2 * PAIRS,) summed answer log-probs. Here the reference reads the same input; LongPO's reads a short one."""

    def summed(hidden, head):
        logps = head(hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), loss=linear_logprobs)
        return logps.view(len(ids), -1).sum(1)

    with torch.no_grad():
        return model(ids, use_cache=False, compute=summed)


def main(steps: int) -> list[float]:
    model, (ids, labels) = make_model(), make_pairs()
    reference = reference_logps(model, ids, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def preference(hidden, head):
        return head(
            (hidden[:PAIRS], hidden[PAIRS:]),
            (labels[:PAIRS], labels[PAIRS:]),
            ref_chosen_logps=reference[:PAIRS],
            ref_rejected_logps=reference[PAIRS:],
            nll_labels=ids[:PAIRS],
            objective=LongPO(beta=0.1, preference_weight=1.0),
        )

    losses = []
    for step in range(steps):
        out = model(ids, use_cache=False, compute=preference)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        margin = (out.chosen_rewards - out.rejected_rewards).mean()
        losses.append(float(out.loss.detach()))
        print(f"step {step:2d}  loss {losses[-1]:.4f}  nll {out.nll_loss:.4f}  margin {margin:+.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
