"""Small models and one training step, shared by the tests of offload and tiling; small configs for the planner's."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, WIDTH, LENGTH = 5, 64, 48
INPUT_BYTES = 2 * LENGTH * WIDTH * 4  # of one layer's input, for a batch of two in float32
PAGE = 4096  # so that an input takes several pages, the last of them in part
PAGES = -(-INPUT_BYTES // PAGE)


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4)
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=256, **sizes, **options)
    return LlamaForCausalLM(config).train()


def make_ids(length=LENGTH, seed=1):
    return torch.randint(50, (2, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, ids=None):
    ids = make_ids() if ids is None else ids
    return model(ids, labels=ids, use_cache=False).loss


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def step(model, ids=None):
    """The loss and all gradients of one forward and backward."""
    model.zero_grad()
    loss = loss_of(model, ids)
    loss.backward()
    return [loss.detach(), *gradients(model)]


def plain_step(model, ids=None):
    """The same under transformers' own checkpointing."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    result = step(model, ids)
    model.gradient_checkpointing_disable()
    return result


def same(ours, theirs):
    """Bitwise."""
    return all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def small(kind="llama", **more):
    from transformers import AutoConfig

    numbers = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, vocab_size=512)
    return AutoConfig.for_model(kind, **numbers | dict(num_key_value_heads=2, head_dim=32) | more)
