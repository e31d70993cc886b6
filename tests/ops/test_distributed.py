"""Accumulation steps, DDP, FSDP2 and ZeRO-3 with `num_pairs` equal one process on the whole batch (two gloo processes).

DeepSpeed is no dependency of the tests: where it is not installed, as in CI, ZeRO-3 is skipped. README.md says what was
seen by hand.
"""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from longpo_ops import LongPO, attach

from ..parallel.ranks import run_ranks

PAIRS, T, V = 5, 14, 53
STEPS = [(slice(0, 2), slice(2, 3)), (slice(3, 4), slice(4, 5))]  # of each rank


def plain(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def model(tied=False):
    return attach(plain(tied))


def pairs(which: slice):
    """-> ids (2 n, T), chosen first, and what to compute on their hidden states; sequences differ in answer lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (2, PAIRS, T), generator=generator)
    answers = ids.clone()
    for pair in range(PAIRS):
        answers[0, pair, : 6 + pair] = answers[1, pair, : 9 - pair] = -100
    nll = ids[0].clone()
    nll[1::2, :5] = -100
    refs = -20 + torch.randn(2, PAIRS, generator=generator)
    ids, answers, nll, refs = ids[:, which], answers[:, which], nll[which], refs[:, which]
    n = ids.shape[1]

    def compute(hidden, head):
        return head(
            (hidden[:n], hidden[n:]), (answers[0], answers[1]), nll_labels=nll, num_pairs=PAIRS,
            ref_chosen_logps=refs[0], ref_rejected_logps=refs[1], objective=LongPO(preference_weight=0.5),
        )  # fmt: skip

    return ids.flatten(0, 1), compute


def step(model, which: slice, factor=1.0):
    ids, compute = pairs(which)
    loss = model(ids, use_cache=False, compute=compute).loss
    (loss * factor).backward()
    return loss.detach()


def whole_batch(tied=False):
    one = model(tied)
    loss = step(one, slice(0, PAIRS))
    return loss, {name: p.grad for name, p in one.named_parameters()}


def compare(gradients, truth):
    assert gradients.keys() == truth.keys()
    for name, grad in truth.items():
        torch.testing.assert_close(gradients[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("cuts", [(1, 2, 3), (4,)])
def test_accumulation_steps_add_up_to_the_whole_batch(cuts):
    truth, true_gradients = whole_batch()
    one, edges = model(), (0, *cuts, PAIRS)
    total = sum(step(one, slice(*edge)) for edge in pairwise(edges))
    torch.testing.assert_close(total, truth)
    compare({name: p.grad for name, p in one.named_parameters()}, true_gradients)


VARIANTS = [(wrapper, tied) for wrapper in ("ddp", "fsdp2", "fsdp2, then attach") for tied in (False, True)]
ZERO3 = [(order, tied) for order in ("zero3", "zero3, then attach", "zero3 from birth") for tied in (False, True)]


def test_two_processes_equal_one():
    compare_two_processes("VARIANTS")


@pytest.mark.slow
def test_two_processes_of_zero3_equal_one():
    pytest.importorskip("deepspeed")
    compare_two_processes("ZERO3")


def compare_two_processes(variants: str):
    """All variants in one pair of processes: starting them costs more than what they do."""
    results, _ = run_ranks(worker, 2, variants, environment={"DS_ACCELERATOR": "cpu"})
    assert list(results) == globals()[variants]
    for (wrapper, tied), (loss, gradients) in results.items():
        truth, true_gradients = whole_batch(tied)
        torch.testing.assert_close(loss, truth, msg=lambda m, wrapper=wrapper: f"{wrapper}: {m}")
        compare(gradients, true_gradients)


def worker(variants: str) -> dict:
    """One of two ranks: two accumulation steps, three pairs on rank 0 and two on rank 1."""
    train_as = train_zero3 if variants == "ZERO3" else train
    return {variant: train_as(dist.get_rank(), *variant) for variant in globals()[variants]}


def train(rank: int, wrapper: str, tied: bool):
    one = plain(tied) if "then attach" in wrapper else model(tied)
    wrapped = torch.nn.parallel.DistributedDataParallel(one) if wrapper == "ddp" else shard(one, tied)
    if "then attach" in wrapper:
        attach(wrapped)  # sharded weights: measured at the first call
    total = torch.zeros(())
    for which in STEPS[rank]:
        total += step(wrapped, which, factor=2.0)  # both wrappers average over ranks: multiply by their number
    dist.all_reduce(total)
    full = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
    return total, {name: full(p.grad) for name, p in one.named_parameters()}


def shard(one, tied: bool):
    mesh = init_device_mesh("cpu", (2,))
    for layer in one.model.layers:
        fully_shard(layer, mesh=mesh)
    if not tied:
        fully_shard(one.lm_head, mesh=mesh)  # a unit of its own: gathered by its own forward
    return fully_shard(one, mesh=mesh)


def train_zero3(rank: int, order: str, tied: bool):
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile this one for minutes
    deepspeed.init_distributed(dist_backend="gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # 0: the smallest are sharded, too
    }  # fmt: skip
    one = plain(tied)
    if "from birth" in order:
        whole = one.state_dict()
        with deepspeed.zero.Init(config_dict_or_path=config):
            one = plain(tied)
        with deepspeed.zero.GatheredParameters(list(one.parameters()), modifier_rank=0):
            if rank == 0:
                one.load_state_dict(whole)
        assert all(p.numel() == 0 for p in one.parameters())
    if "then attach" not in order:
        attach(one)
    wrapped, *_ = deepspeed.initialize(model=one, optimizer=torch.optim.SGD(one.parameters()), config=config)
    if "then attach" in order:
        attach(one)
    total = torch.zeros(())
    for which in STEPS[rank]:
        ids, compute = pairs(which)
        loss = wrapped(ids, use_cache=False, compute=compute).loss
        wrapped.backward(loss * 4.0)  # it averages over ranks and steps
        total += loss.detach()
        if which is not STEPS[rank][-1]:
            wrapped.step()  # between two accumulation steps this counts, and changes nothing
    dist.all_reduce(total)
    return total, {name: safe_get_full_grad(p).clone() for name, p in one.named_parameters()}
