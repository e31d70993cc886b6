"""Steps of the trainer by several ranks equal those of one process: rows shared (cp), other packs each (dp), both."""

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from longpo_ops.runs.locks import Lock
from longpo_ops.train import LongPOConfig
from longpo_ops.train.checkpoints import one_run
from longpo_ops.train.ranks import weights_digest

from ..train.tiny import VOCAB, make_model, make_pair, make_trainer
from .ranks import gpus_of_cpus, run_ranks

METHODS = ("longpo", "dpo", "sft_constraint")
PAIRS = [make_pair(i, document=12 + 3 * i, rejected=1 + (i == 2)) for i in range(8)]
EVALUATION = [make_pair(20 + i, document=15 + 2 * i) for i in range(3)]
STEPS = dict(
    max_steps=5, learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0, seed=3, reference="precompute",
    eval_strategy="steps", eval_steps=5, pack_tokens=70,
)  # fmt: skip
PACKS_A_STEP = 2
BF16 = dict(dtype=torch.float32, bf16=True, max_steps=2, eval_steps=2)
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=256, initializer_range=0.15, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
UNLIKE = {"epoch", "tokens_per_second", "peak_memory_gib", "train_runtime"}  # those of time and machine


def policy_of(method: str, lora: bool):
    """For DPO one whose layers see a window, which accelerate would refuse to share."""
    if method == "dpo":
        torch.manual_seed(0)
        return MistralForCausalLM(MistralConfig(sliding_window=9, **SIZES)).double()
    return with_adapters(make_model()) if lora else make_model()


def with_adapters(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).double()


def trained(folder, method: str, ranks_of_data: int = 1, lora: bool = False, dtype=torch.float64, **settings):
    """-> what was logged, and the weights that training moved: (before, after) of each."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # what the trainer before left
    policy = policy_of(method, lora).to(dtype)
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    settings = STEPS | {"gradient_accumulation_steps": PACKS_A_STEP // ranks_of_data} | settings
    trainer = make_trainer(
        folder, method, PAIRS, policy, None if lora else make_model(1, dtype), EVALUATION, **settings
    )
    assert trainer.args.data_ranks == ranks_of_data
    synchronised = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    assert synchronised == dist.is_initialized()  # no rank keeps whole gradients between packs
    trainer.train()
    after = {name: whole(p) for name, p in trainer.model.named_parameters() if p.requires_grad}
    return trainer.state.log_history, {name: (before[name], after[name]) for name in before}


def whole(parameter):
    return getattr(parameter, "full_tensor", lambda: parameter)().detach().clone()


# -- on the ranks ------------------------------------------------------------------------------------------------------


def by_two(folder):
    """cp 2, and dp 2 by FSDP2; then what two ranks refuse."""
    runs = {(m, "cp 2"): trained(folder / f"{m}-cp", m, sequence_parallel=2) for m in METHODS}
    runs["longpo", "lora, cp 2"] = trained(folder / "lora", "longpo", lora=True, sequence_parallel=2)
    runs |= {(m, "dp 2"): trained(folder / f"{m}-dp", m, 2, fsdp=True) for m in METHODS}
    runs["longpo", "bf16"] = trained(folder / "bf16", "longpo", sequence_parallel=2, **BF16)
    return runs, {name: error_of(case, folder / "refused") for name, case in REFUSED.items()}


def by_four(folder):
    return {(m, "cp 2, dp 2"): trained(folder / f"{m}-four", m, 2, sequence_parallel=2) for m in METHODS}


def error_of(case, folder) -> str:
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        case(folder)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def start(folder, policy=None, pairs=PAIRS, evaluation=None, **settings):
    settings = STEPS | {"sequence_parallel": 2, "gradient_accumulation_steps": 1} | settings
    return make_trainer(folder, "longpo", pairs, policy or make_model(), make_model(1), evaluation, **settings)


def other_packs(folder):
    """As if the files of rank 1 had changed since it looked at them."""
    trainer = start(folder, eval_strategy="no")
    trainer.train_dataset.pairs = [PAIRS, [make_pair(30 + i) for i in range(8)]][dist.get_rank()]
    trainer.reference.logps = lambda pair: (-1.0, (-2.0,) * len(pair.rejected))
    trainer.train()


def locked_by_another(folder):
    """Rank 0 sees it alone."""
    args, held = LongPOConfig(output_dir=str(folder), use_cpu=True), contextlib.nullcontext()
    with Lock(folder / "data" / "lock") if dist.get_rank() == 0 else held, one_run(args):
        pass


def mixture():
    experts = dict(num_local_experts=2, num_experts_per_tok=1, output_router_logits=True)
    return MixtralForCausalLM(MixtralConfig(**SIZES, **experts))


REFUSED = {
    "other evaluation": lambda folder: start(folder, evaluation=[EVALUATION, None][dist.get_rank()]),
    "other data": lambda folder: start(folder, pairs=PAIRS[dist.get_rank() :]),
    "other settings": lambda folder: start(folder, learning_rate=1e-3 * (1 + dist.get_rank())),
    "other packs": other_packs,
    "another run": locked_by_another,
    "experts": lambda folder: start(folder, mixture()),
    "one head": lambda folder: start(folder, make_model(num_attention_heads=1, num_key_value_heads=1)),
    "noise": lambda folder: start(folder, neftune_noise_alpha=5.0),
    "uneven": lambda folder: start(folder, accelerator_config={"even_batches": False}),
    "reentrant": lambda folder: start(folder, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "online": lambda folder: start(folder, reference="online"),
    "fsdp 1": lambda folder: start(folder, fsdp_config={"fsdp_version": 1}),
    "no accelerator": lambda folder: start(folder, use_cpu=False, sequence_parallel=1),
    "three": lambda folder: start(folder, sequence_parallel=3),
    "nothing moves": lambda folder: start(folder, learning_rate=1e-300, max_steps=1, eval_strategy="no").train(),
}
SAID = {
    "other evaluation": r"ranks hold different evaluation data \(rank 0: 3 records \w+; rank 1: none\)",
    "other data": r"ranks hold different training data \(rank 0: 8 records \w+; rank 1: 7 records \w+\)",
    "other settings": r"ranks hold different learning_rate \(rank 0: 0.001; rank 1: 0.002\)",
    "other packs": r"ranks hold different packs \(rank 0: \w+ of pair-.*; rank 1: \w+ of pair-",
    "another run": r"another run is at work in .*refused \(process \d+ on ",
    "experts": "sequence_parallel=2: MixtralForCausalLM adds a loss of its experts' load",
    "one head": "sequence_parallel=2: the attention has 1 query",
    "noise": "neftune_noise_alpha=5.0 with sequence_parallel=2",
    "uneven": "even_batches=False with FSDP",
    "reentrant": "use_reentrant=True with FSDP",
    "online": "reference='online': .* expected 'precompute'",
    "fsdp 1": "fsdp_version=1.*: expected 2",
    "no accelerator": r"WORLD_SIZE=2, but the process group has 1 process.*use_cpu=true",
    "three": "sequence_parallel=3 with 2 processes",
    "nothing moves": "no weight has moved in 1 steps",
}


# -- here --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """-> the runs of every rank by method and mesh, and what each of two ranks refused."""
    folder = tmp_path_factory.mktemp("ranks")
    two, refused = zip(*run_ranks(by_two, 2, folder, prelude=gpus_of_cpus), strict=True)
    four = run_ranks(by_four, 4, folder, prelude=gpus_of_cpus)
    return {
        key: [each[key] for runs in (two, four) for each in runs if key in each] for key in (*two[0], *four[0])
    }, refused


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    runs = {method: trained(folder / method, method) for method in METHODS}
    runs["bf16"] = trained(folder / "bf16", "longpo", **BF16)
    return runs | {"lora": trained(folder / "lora", "longpo", lora=True)}


MESHES = [(m, mesh) for m in METHODS for mesh in ("cp 2", "dp 2", "cp 2, dp 2")]
MESHES += [("longpo", "lora, cp 2")]


@pytest.mark.parametrize(("method", "mesh"), MESHES)
def test_five_steps_equal_those_of_one_process(ranks, alone, method, mesh):
    """Every number of every log, on every rank, evaluation's too; Adam's eps allows weights no more than 1e-6 of their move."""
    log, weights = alone["lora" if "lora" in mesh else method]
    for log_of_rank, weights_of_rank in ranks[0][method, mesh]:
        assert len(log_of_rank) == len(log) == 7
        for row, row_of_rank in zip(log, log_of_rank, strict=True):
            compared = {name for name in row if name not in UNLIKE and not name.endswith(("_second", "_runtime"))}
            for name in compared - {"total_flos"}:
                assert row_of_rank[name] == pytest.approx(row[name], rel=1e-9, abs=1e-9), name
        for name, (before, after) in weights.items():
            assert torch.equal(weights_of_rank[name][0], before)
            moved = (after - before).norm()
            assert moved > 0 and (weights_of_rank[name][1] - after).norm() <= 1e-6 * moved, name


def test_what_is_logged_is_not_rounded_to_what_layers_compute_in(ranks, alone):
    """FSDP2 would cast all that the model returns: losses, sums of log-probs, and the counts they are divided by."""
    log = alone["bf16"][0]
    for log_of_rank, _ in ranks[0]["longpo", "bf16"]:
        logged = [(row[name], row_of_rank[name]) for row, row_of_rank in zip(log, log_of_rank, strict=True)
                  for name in ("loss", "eval_loss", "logps/chosen", "nll_loss", "train_loss") if name in row]  # fmt: skip
        assert len(logged) == 8
        assert all(float(torch.tensor(value).bfloat16()) != value for _, value in logged)
        assert [value for _, value in logged] == pytest.approx([value for value, _ in logged], rel=0.05)


def test_evaluation_is_the_same_on_one_two_and_four(ranks, alone):
    losses = [row["eval_loss"] for row in alone["longpo"][0] if "eval_loss" in row]
    for mesh in ("cp 2", "dp 2", "cp 2, dp 2"):
        for log, _ in ranks[0]["longpo", mesh]:
            assert [row["eval_loss"] for row in log if "eval_loss" in row] == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("case", REFUSED)
def test_all_ranks_refuse_alike(ranks, case):
    told = [each[case] for each in ranks[1]]
    assert len(set(told)) == 1
    with pytest.raises(ValueError, match=SAID[case]):
        raise ValueError(told[0])


def test_a_digest_knows_every_bit_that_moves():
    model = make_model(dtype=torch.bfloat16)
    before = weights_digest(model)
    assert len(before) == len(list(model.parameters())) and weights_digest(model) == before
    with torch.no_grad():
        model.lm_head.weight.view(torch.int16)[3, 4] += 1
    assert sum(a != b for a, b in zip(before, weights_digest(model), strict=True)) == 1
