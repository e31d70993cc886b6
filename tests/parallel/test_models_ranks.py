"""Loss, metrics and every gradient of packs whose rows lie on 2 or 4 ranks equal those of one process, in float64.

The trainer computes both, with the ranks that share a pack's rows and with none. Models are plain, in DDP, or in FSDP2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from longpo_ops.train.checks import prepare_model
from longpo_ops.train.methods import resolve_method

from ..attention.dense import true_float64
from ..train.tiny import VOCAB, make_model, make_pair, make_trainer
from .ranks import gpus_of_cpus, run_ranks

SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15, bos_token_id=None, eos_token_id=None,
    pad_token_id=None, tie_word_embeddings=False,
)  # fmt: skip
LOCAL = dict(sliding_window=9, layer_types=["sliding_attention", "full_attention"])
SHAPES = {
    "llama": dict(model_type="llama"),
    "qwen2, tied": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3"),
    "mistral, window": dict(model_type="mistral", sliding_window=9),
    "gemma2, window and soft-caps": dict(
        model_type="gemma2", query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=4.0, **LOCAL
    ),
    "gemma3, window": dict(model_type="gemma3_text", query_pre_attn_scalar=8, **LOCAL),
    "qwen3_moe": dict(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "gpt_oss, window and sinks": dict(model_type="gpt_oss", num_local_experts=4, num_experts_per_tok=2, **LOCAL),
    "deepseek_v3, narrow values": dict(
        model_type="deepseek_v3",
        head_dim=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=2,
        n_shared_experts=1,
        num_key_value_heads=4,
        moe_intermediate_size=16,
    ),
    "one kv head": dict(model_type="llama", num_key_value_heads=1),
    "3 heads on 1": dict(model_type="llama", num_attention_heads=3, num_key_value_heads=1, hidden_size=24),
    "6 heads on 2": dict(model_type="llama", num_attention_heads=6, num_key_value_heads=2, hidden_size=48),
}
METHODS = ("longpo", "dpo", "simpo", "orpo", "kto_pair", "logo", "sft_chosen", "sft_constraint")
PACKS = {
    "one pair": [make_pair(1)],
    "answers in the last shard": [make_pair(3, turns=1, document=60)],
    "several pairs": [make_pair(1), make_pair(5, turns=1, document=31), make_pair(6, document=12)],
    "several rejected": [make_pair(2, rejected=2), make_pair(7, rejected=3, turns=1, document=9)],
}


@dataclass(frozen=True)
class Case:
    """A model's shape, a method, a pack for each group of ranks, how the model is wrapped, and how many share a pack."""

    shape: str
    method: str
    packs: tuple[str, ...] = ("several rejected",)
    wrapper: str = "plain"
    sharing: int = 2

    def __str__(self):
        return ", ".join((self.shape, self.method, *self.packs, self.wrapper))


FAMILIES = list(SHAPES)[:5]  # with every method
ON_TWO = [Case(shape, method) for shape in FAMILIES for method in METHODS]
ON_TWO += [Case("llama", method, (pack,)) for pack in PACKS if pack != "several rejected" for method in METHODS]
ON_TWO += [Case(shape, "longpo") for shape in SHAPES if shape not in FAMILIES]
ON_TWO += [Case("llama", "solopo"), Case("mistral, window", "solopo_simpo", ("several pairs",))]
ON_TWO += [
    Case(shape, method, (pack,), wrapper)
    for wrapper in ("DDP", "FSDP2", "FSDP2, checkpoints")
    for shape, method, pack in (
        ("llama", "dpo", "answers in the last shard"),
        ("qwen2, tied", "longpo", "several rejected"),
        ("gemma2, window and soft-caps", "kto_pair", "several pairs"),
        ("qwen3", "sft_constraint", "one pair"),
    )
]
SPREAD = [shape for shape in SHAPES if shape != "3 heads on 1"]  # over four ranks
ON_FOUR = [Case(shape, "longpo", wrapper=w, sharing=4) for shape in SPREAD for w in ("plain", "FSDP2, checkpoints")]
ON_FOUR += [
    Case(shape, method, ("several pairs", "answers in the last shard"), wrapper)
    for wrapper in ("DDP", "FSDP2")
    for shape, method in (("llama", "longpo"), ("3 heads on 1", "orpo"), ("mistral, window", "sft_constraint"))
]


# -- on the ranks ------------------------------------------------------------------------------------------------------


class Trainers:
    """One for each method; models and packs are given to their _loss."""

    def __init__(self, folder):
        self.folder, self.made = folder, {}

    def of(self, method: str):
        if method not in self.made:
            pairs = [pair for name in PACKS for pair in pairs_of(name, method)]
            reference = make_model(1) if resolve_method(method).reference else None
            settings = dict(sequence_parallel=2, reference="precompute", pack_tokens=400)
            self.made[method] = make_trainer(self.folder / method, method, pairs, make_model(), reference, **settings)
        return self.made[method]


def pairs_of(pack: str, method: str):
    first = lambda pair: replace(pair, rejected=pair.rejected[:1], ref_rejected=pair.ref_rejected[:1])  # noqa: E731
    return [first(pair) for pair in PACKS[pack]] if method == "kto_pair" else PACKS[pack]


def model_of(shape: str, checkpoints: bool = False):
    torch.manual_seed(0)
    sizes = SIZES | SHAPES[shape]
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    config._experts_implementation = "eager"  # grouped products of experts know no float64
    model = AutoModelForCausalLM.from_config(config).double().train()
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prepare_model(model)
    return model


def wrapped(model, wrapper: str):
    """-> what is called, and how many gradients it averages."""
    if wrapper == "plain":
        return model, 1
    if wrapper == "DDP":
        return DistributedDataParallel(model), dist.get_world_size()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if not model.config.tie_word_embeddings:
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh), dist.get_world_size()


def gradients(model, wrapper: str):
    result = {name: getattr(p.grad, "full_tensor", p.grad.clone)() for name, p in model.named_parameters()}
    if wrapper == "plain":
        for gradient in result.values():
            dist.all_reduce(gradient)
    return result


def computed(trainer, model, caller, pack: str, num_pairs: float, factor: float):
    """-> loss and metrics of a pack; gradients are added to the model's."""
    packed = trainer._packs(pairs_of(pack, trainer.method.name), trainer.args)
    assert len(packed) == 1
    loss, metrics = trainer._loss(caller, packed[0], num_pairs)
    (loss * factor).backward()
    return {"loss": loss.detach()} | metrics, packed[0].batch.layout.length


def errors(trainer, case: Case, group) -> dict:
    """The largest relative difference from one process, in numbers and in gradients, and the rows of the packs."""
    turn = dist.get_rank() // case.sharing
    num_pairs = float(sum(len(PACKS[pack]) for pack in case.packs))
    model_of(case.shape)  # proved, and remembered, while float32 is still itself
    with true_float64():
        trainer.__dict__["sequence_group"] = None
        whole = model_of(case.shape)
        truths = [computed(trainer, whole, whole, pack, num_pairs, 1.0) for pack in case.packs]
        trainer.__dict__["sequence_group"] = group
        model = model_of(case.shape, "checkpoints" in case.wrapper)
        caller, factor = wrapped(model, case.wrapper)
        numbers, _ = computed(trainer, model, caller, case.packs[turn], num_pairs, factor)
        ours = gradients(model, case.wrapper)
    theirs = truths[turn][0] | {name: p.grad for name, p in whole.named_parameters()}
    ours |= numbers
    assert ours.keys() == theirs.keys() and all(bool(p.grad.any()) for p in whole.parameters())
    off = {name: difference(ours[name], theirs[name]) for name in theirs}
    return {"off": off, "rows": [rows for _, rows in truths]}


def difference(ours, theirs) -> float:
    """Relative, by norm; of metrics that are 0 on both sides none."""
    return 0.0 if torch.equal(ours, theirs) else float((ours - theirs).norm() / theirs.norm())


def on_ranks(cases: list[Case], folder) -> dict[Case, dict]:
    trainers = Trainers(folder)
    pairs_of_ranks = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "cp"))["cp"]
    groups = {2: pairs_of_ranks.get_group(), dist.get_world_size(): dist.group.WORLD}
    return {case: errors(trainers.of(case.method), case, groups[case.sharing]) for case in cases}


# -- here --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(on_ranks, 2, ON_TWO, tmp_path_factory.mktemp("two"), prelude=gpus_of_cpus)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_ranks(on_ranks, 4, ON_FOUR, tmp_path_factory.mktemp("four"), prelude=gpus_of_cpus)


def check(seen: list[dict], case: Case) -> None:
    for rank, of_rank in enumerate(seen):
        wrong = {name: error for name, error in of_rank[case]["off"].items() if not error <= 1e-12}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize("case", ON_TWO, ids=str)
def test_two_ranks_equal_one_process(two, case):
    check(two, case)


@pytest.mark.parametrize("case", ON_FOUR, ids=str)
def test_four_ranks_equal_one_process(four, case):
    check(four, case)


def test_odd_and_even_rows_were_shared(two):
    rows = {n % 2 for of_case in two[0].values() for n in of_case["rows"]}
    assert rows == {0, 1}
