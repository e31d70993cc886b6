"""Groups of sampled answers to several questions about one document: a policy-gradient step on a tree, in a bare loop.

    python examples/answer_groups.py [--steps 20]

A small random Llama learns to answer in even tokens. Each step samples ANSWERS answers to each question and packs them all into
one row, [document][q1][a1 .. ][q2][a1 .. ], in which the document and each question are computed once. An answer's advantage is
its reward less the mean of its group, over their spread (GRPO, arXiv 2402.03300); the loss comes from hidden states, without
logits.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longpo_ops import attach, fused_policy_loss
from longpo_ops.attention import use_shared_prefix
from longpo_ops.data import TokenSequence, pack_tree

VOCAB, DOCUMENT, QUESTION, ANSWER = 256, 96, 8, 6  # tokens
QUESTIONS, ANSWERS = 3, 8


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
    model = attach(LlamaForCausalLM(config))
    use_shared_prefix(model)  # ValueError, with the reason, for a model that cannot share a prefix
    return model


@torch.no_grad()
def sample(model, prompts: torch.Tensor) -> torch.Tensor:
    """(Q, T) prompts -> (Q, ANSWERS, T + ANSWER). In earnest an engine does this."""
    ids = prompts.repeat_interleave(ANSWERS, 0)
    for _ in range(ANSWER):
        last = model(ids, use_cache=False).last_hidden_state[:, -1]
        ids = torch.cat([ids, torch.multinomial(model.lm_head(last).softmax(-1), 1)], 1)
    return ids.view(len(prompts), ANSWERS, -1)


def main(steps: int) -> list[float]:
    model, start = make_model(), DOCUMENT + QUESTION
    document = torch.randint(VOCAB, (1, DOCUMENT)).expand(QUESTIONS, -1)
    prompts = torch.cat([document, torch.randint(VOCAB, (QUESTIONS, QUESTION))], 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rewards = []
    for step in range(steps):
        groups = sample(model, prompts)
        reward = (groups[..., start:] % 2 == 0).float().mean(-1)
        advantages = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).flatten()
        labels = groups.clone()
        labels[..., :start] = -100
        tree = pack_tree(
            [
                TokenSequence(*pair)
                for pair in zip(groups.flatten(0, 1).numpy(), labels.flatten(0, 1).numpy(), strict=True)
            ]
        )

        def objective(hidden, head, tree=tree, advantages=advantages):
            of_row = advantages[tree.segments.clamp(min=0)]  # rows that predict no answer token have no label
            return head(hidden[0], tree.labels, loss=fused_policy_loss, advantages=of_row).loss

        loss = model(
            tree.input_ids,
            position_ids=tree.position_ids,
            shared_prefix_layout=tree.layout,
            use_cache=False,
            compute=objective,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(float(reward.mean()))
        print(f"step {step:2d}  reward {rewards[-1]:.3f}  rows {tree.layout.length} of {groups.numel()}")
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
