"""FusedDPOTrainer beside TRL's DPOTrainer: loss, gradients, metrics and weights; what is refused, and by which name."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from longpo_ops import SimPO

trl = pytest.importorskip("trl")

from longpo_ops.integrations import trl_losses, trl_options  # noqa: E402
from longpo_ops.integrations.trl import FusedDPOTrainer  # noqa: E402

WORDS = 40
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "mean_token_accuracy",
    "logps/chosen",
    "logps/rejected",
)


def words(*numbers: int) -> str:
    return " ".join(f"w{i}" for i in numbers)


PLAIN = [
    dict(prompt=words(1, 2, 3), chosen=" " + words(4, 5), rejected=" " + words(4, 7, 8)),
    dict(prompt=words(9), chosen=" " + words(10, 11, 12, 13), rejected=" " + words(14)),
    dict(prompt=words(20, 21, 30, 31, 32), chosen=" " + words(22), rejected=" " + words(23, 24)),
    dict(prompt=words(25, 1), chosen=" " + words(26, 3, 3), rejected=" " + words(27, 28, 29)),
]


def said(role: str, *numbers: int) -> dict[str, str]:
    return {"role": role, "content": words(*numbers)}


CONVERSATIONS = [
    dict(
        prompt=[said("system", 1), said("user", 2, 3), said("assistant", 4), said("user", 5)],
        chosen=[said("assistant", 6, 7)],
        rejected=[said("assistant", 8), said("user", 9), said("assistant", 10)],
    ),
    dict(prompt=[said("user", 11)], chosen=[said("assistant", 12)], rejected=[said("assistant", 13, 14, 15)]),
]
WHOLE = [
    dict(chosen=[said("user", 1, 2), said("assistant", 3)], rejected=[said("user", 1, 2), said("assistant", 4, 5)]),
    dict(chosen=[said("user", 6), said("assistant", 7, 8)], rejected=[said("user", 6), said("assistant", 9)]),
]


def tokenizer() -> PreTrainedTokenizerFast:
    named = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*named, *(f"w{i}" for i in range(WORDS))])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT)
    made.add_special_tokens({"additional_special_tokens": ["<end>"]})
    return made


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS + 6, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Shares no prefix once its attention drops out; with rates of 0 it does as any."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS + 6, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3))


def options(folder, **given) -> trl.DPOConfig:
    defaults = dict(
        output_dir=str(folder), per_device_train_batch_size=2, beta=0.3, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, learning_rate=1e-2, logging_steps=1, save_strategy="no", max_steps=2,
        disable_tqdm=True,
    )  # fmt: skip
    return trl.DPOConfig(**defaults | given)


def trainer(cls, folder, rows=PLAIN, model=llama, reference=llama, more=None, near=False, **given):
    """Of either class, from the same seeds. near: the reference is the policy but for a little."""
    more = dict(more or {})
    if reference is not None:
        more["ref_model"] = reference(0 if near else 1)
        with torch.no_grad():
            for weight in more["ref_model"].parameters() if near else ():
                weight.mul_(0.9)
    return cls(
        model(0),
        args=options(folder, **given),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **more,
    )


def both(tmp_path, **given):
    return [trainer(cls, tmp_path / cls.__name__, **given) for cls in (trl.DPOTrainer, FusedDPOTrainer)]


def first_step(one) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
    """-> loss, gradients and metrics of the first batch."""
    torch.manual_seed(5)
    batch = next(iter(one.get_train_dataloader()))
    one.model.train()
    loss = one.compute_loss(one.model, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in one.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {name: values[-1] for name, values in one._metrics["train"].items()}


def check_equal(theirs, ours) -> None:
    """The first batch's loss, every gradient, and every metric that both have."""
    (true_loss, true_gradients, true_metrics), (loss, gradients, metrics) = first_step(theirs), first_step(ours)
    torch.testing.assert_close(loss, true_loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in true_gradients.items():
        limit = 2e-5 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=limit, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert {*METRICS, "num_tokens"} == set(metrics)
    for name in metrics:
        assert metrics[name] == pytest.approx(true_metrics[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("kind", trl_losses.LOSSES)
def test_every_loss_type_is_trls(kind, tmp_path):
    smoothing = 0.1 if kind in trl_losses.SMOOTHED else 0.0
    theirs, ours = both(tmp_path, loss_type=[kind], label_smoothing=smoothing, beta=0.2)
    assert not ours.data_collator.separate
    check_equal(theirs, ours)


def test_every_loss_type_that_trl_names_is_here():
    """By its own error for a type that it does not know."""
    named = re.search(r"loss_type.*?Possible values are: (.*?)\. If", str(trl.DPOConfig.__doc__), re.DOTALL)
    assert set(re.findall(r"'(\w+)'", named[1])) == set(trl_losses.LOSSES)


@pytest.mark.parametrize(
    "given",
    [
        dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
        dict(loss_type=["aot", "robust"], label_smoothing=0.1),
        dict(loss_type=["hinge", "sigmoid_norm"], loss_weights=[0.5, 2.0], f_divergence_type="js_divergence"),
        *(dict(loss_type=[kind], f_divergence_type="forward_kl") for kind in ("sigmoid", "ipo")),
        dict(loss_type=["sigmoid"], f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7),
        dict(loss_type=["sigmoid"], f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
    ],
)
def test_combinations_and_divergences_are_trls(given, tmp_path):
    check_equal(*both(tmp_path, near=True, **given))


@pytest.mark.parametrize("rows", [CONVERSATIONS, WHOLE], ids=["several messages", "implicit prompts"])
def test_conversations_are_trls(rows, tmp_path):
    check_equal(*both(tmp_path, rows=rows))


def test_long_sequences_are_cut_as_trl_cuts_them(tmp_path):
    theirs, ours = both(tmp_path, max_length=5, per_device_train_batch_size=3)
    assert len(ours.train_dataset) == len(theirs.train_dataset) == 3  # one prompt alone has 5
    check_equal(theirs, ours)


def test_precomputed_references_are_trls(tmp_path):
    theirs, ours = both(tmp_path, precompute_ref_log_probs=True)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        ours_column, theirs_column = (torch.tensor(one.train_dataset[column]) for one in (ours, theirs))
        torch.testing.assert_close(ours_column, theirs_column, rtol=1e-5, atol=1e-5, check_dtype=False)
    ours.ref_model = None  # it is not read again
    check_equal(theirs, ours)


def test_precomputed_references_are_not_taken_from_a_run_of_trl(tmp_path):
    """TRL keeps them beside a data set on disk, under the model's digest."""
    Dataset.from_list(PLAIN).save_to_disk(tmp_path / "rows")
    columns = []
    for cls in (trl.DPOTrainer, FusedDPOTrainer):
        model, made = llama(0), options(tmp_path / cls.__name__, precompute_ref_log_probs=True)
        rows = Dataset.load_from_disk(str(tmp_path / "rows"))
        one = cls(model, llama(1), made, train_dataset=rows, processing_class=tokenizer())
        columns.append({file["filename"] for file in one.train_dataset.cache_files})
    assert columns[0] - columns[1] and columns[1] - columns[0]


LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.2)


def adapted(seed: int):
    torch.manual_seed(seed)
    return get_peft_model(llama(seed), LORA)


@pytest.mark.parametrize("precompute", [False, True])
def test_adapters_without_a_reference_model_are_trls(precompute, tmp_path):
    given = dict(reference=None, more={"peft_config": LORA}, precompute_ref_log_probs=precompute)
    check_equal(*both(tmp_path, **given))


def test_a_trained_adapter_is_its_own_reference(tmp_path):
    theirs, ours = both(tmp_path, model=adapted, reference=None)
    assert "ref" in ours.model.peft_config
    loss, _, metrics = first_step(ours)
    assert float(loss) == pytest.approx(0.6931, abs=1e-4) and metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        for one in (theirs, ours):
            one.model.zero_grad()
            for name, parameter in one.model.named_parameters():
                if ".default." in name:
                    parameter.mul_(1.5)
            one._metrics["train"].clear()
            one._total_train_tokens = 0
    check_equal(theirs, ours)


def test_a_model_that_shares_no_prefix_is_trls(tmp_path, monkeypatch):
    from longpo_ops.train import checks

    def unshared(model):
        raise checks.PrefixNotShared("as if")

    monkeypatch.setattr(checks, "use_shared_prefix", unshared)
    theirs, ours = both(tmp_path)
    assert ours.data_collator.separate
    check_equal(theirs, ours)
    reentrant = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=r"^gradient_checkpointing_kwargs: use_reentrant=True"):
        trainer(FusedDPOTrainer, tmp_path, **reentrant)


def test_gpt2_is_trls(tmp_path):
    check_equal(*both(tmp_path, model=gpt2, reference=gpt2))


def history(one) -> list[dict[str, float]]:
    return [row for row in one.state.log_history if "loss" in row or "eval_loss" in row]


def check_histories(theirs, ours) -> None:
    assert len(history(ours)) == len(history(theirs)) > 0
    for mine, their in zip(history(ours), history(theirs), strict=True):
        part = "eval_" if "eval_loss" in their else ""
        left_out = {part + n for n in ("entropy", "logits/chosen", "logits/rejected")}
        timed = {name for name in their if "runtime" in name or "per_second" in name}
        assert their.keys() - mine.keys() == left_out and mine.keys() <= their.keys()
        for name in mine.keys() - timed:
            assert mine[name] == pytest.approx(their[name], rel=2e-3, abs=2e-3), name


def test_runs_with_accumulation_workers_and_evaluation_are_trls(tmp_path):
    given = dict(
        gradient_accumulation_steps=2, per_device_train_batch_size=1, num_train_epochs=2, max_steps=-1, max_grad_norm=0.5,
        eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=3, dataloader_num_workers=1, learning_rate=1e-3,
        gradient_checkpointing=True, more={"eval_dataset": Dataset.from_list(PLAIN)},
    )  # fmt: skip
    theirs, ours = both(tmp_path, **given)
    for one in (theirs, ours):
        one.train()
    check_histories(theirs, ours)
    weights = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=0, atol=2e-4)


def test_streamed_rows_and_another_evaluation_are_trls(tmp_path):
    theirs, ours = (
        cls(
            llama(0), llama(1), options(tmp_path / cls.__name__, learning_rate=1e-3), processing_class=tokenizer(),
            train_dataset=Dataset.from_list(PLAIN).to_iterable_dataset(),
        )
        for cls in (trl.DPOTrainer, FusedDPOTrainer)
    )  # fmt: skip
    for one in (theirs, ours):
        one.train()
        one.evaluate(Dataset.from_list(CONVERSATIONS))
    check_histories(theirs, ours)


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    given = dict(max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=1)
    whole = trainer(FusedDPOTrainer, tmp_path / "whole", **given)
    whole.train()
    rest = trainer(FusedDPOTrainer, tmp_path / "whole", **given)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert [row["step"] for row in history(rest)] == [1, 2, 3, 4]
    assert [row["loss"] for row in history(rest)] == [row["loss"] for row in history(whole)]
    again = LlamaForCausalLM.from_pretrained(tmp_path / "whole/checkpoint-4")
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))


def test_a_reference_that_follows_the_policy_is_trls(tmp_path):
    given = dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5, learning_rate=1e-3)
    theirs, ours = both(tmp_path, **given)
    for one in (theirs, ours):
        one.train()
    check_histories(theirs, ours)


def test_bfloat16_is_nearer_to_float32_than_trls(tmp_path):
    losses = []
    for bf16 in (False, True):
        losses.append([first_step(one)[0].float() for one in both(tmp_path / str(bf16), bf16=bf16)])
    assert torch.isfinite(losses[1][1]) and abs(losses[1][1] - losses[0][1]) < 0.1


def test_generation_is_the_models_own(tmp_path):
    ours = trainer(FusedDPOTrainer, tmp_path)
    ids = torch.tensor([[7, 8, 9]])
    expected = llama(0).generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(ours.model.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_an_objective_that_trl_lacks(tmp_path):
    ours = trainer(FusedDPOTrainer, tmp_path, beta=0.1, more={"objective": SimPO(beta=2.0, gamma=0.5)})
    ours.train()
    with pytest.raises(ValueError, match=r"^beta=0.3 beside objective=SimPO.*leave one of them out"):
        trainer(FusedDPOTrainer, tmp_path, more={"objective": SimPO()})
    assert all(row["rewards/margins"] != 0 for row in history(ours))
    with pytest.raises(ValueError, match="objective: expected an object of"):
        trainer(FusedDPOTrainer, tmp_path, more={"objective": "simpo"})


# -- what is refused -------------------------------------------------------------------------------------------------

REFUSED_VALUES = {
    "disable_dropout": False, "truncation_mode": "keep_end", "pad_to_multiple_of": 8, "ld_alpha": 0.5,
    "use_weighting": True, "activation_offloading": True, "use_liger_kernel": True,
    "neftune_noise_alpha": 5.0, "torch_compile": True, "parallelism_config": object(), "fsdp": ["full_shard"],
    "deepspeed": "file.json",
}  # fmt: skip


@pytest.mark.parametrize("name", [*(n for n, rule in trl_options.OWN.items() if rule), *trl_options.REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(name, tmp_path):
    args = options(tmp_path)
    setattr(args, name, REFUSED_VALUES[name])
    with pytest.raises(ValueError, match=f"^{name}="):
        FusedDPOTrainer("no/such/model", args=args, train_dataset=Dataset.from_list(PLAIN))


@pytest.mark.parametrize("name, variable", [("fsdp", "ACCELERATE_USE_FSDP"), ("deepspeed", "ACCELERATE_USE_DEEPSPEED")])
def test_what_a_launcher_shards_is_refused(name, variable, tmp_path, monkeypatch):
    args = options(tmp_path)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"^{name} in the launcher's file: it was not tried"):
        FusedDPOTrainer("no/such/model", args=args, train_dataset=Dataset.from_list(PLAIN))


def test_every_option_of_dpo_config_is_decided():
    """A new option of TRL's is in neither list, and is refused where it is set until somebody decides."""
    ours = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    trainers = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {name for name in ours if name not in trainers or name in trl.DPOConfig.__annotations__}
    assert own <= set(trl_options.OWN) <= ours
    assert set(trl_options.REFUSED) <= trainers
    assert ours <= trl_options.known_options()

    @dataclasses.dataclass
    class Newer(trl.DPOConfig):
        swing: float = 0.0

    made = dict(output_dir="x", report_to="none", use_cpu=True, bf16=False)
    trl_options.check_options(Newer(**made))
    with pytest.raises(ValueError, match=r"^swing=0.5: FusedDPOTrainer does not know this option of Newer"):
        trl_options.check_options(Newer(**made, swing=0.5))


def test_another_version_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(trl_options.trl, "__version__", "1.17.0")
    with pytest.raises(ValueError, match=r"^trl 1\.17\.0: FusedDPOTrainer is written for TRL 1\.16"):
        trainer(FusedDPOTrainer, tmp_path)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(loss_type=["no_such"]), "^loss_type='no_such': expected sigmoid, "),
        (dict(loss_type=["sigmoid"], label_smoothing=0.1), "^label_smoothing=0.1: TRL reads it for exo_pair, "),
        (dict(loss_type=["exo_pair"]), r"^EXOPair\(label_smoothing=0.0\): expected 0 < label_smoothing"),
        (dict(f_divergence_type="other"), "^f_divergence_type='other': expected one of reverse_kl, "),
        (
            dict(f_divergence_type="forward_kl", loss_type="nca_pair"),
            "^f_divergence_type='forward_kl': nca_pair does not",
        ),
        (dict(more={"data_collator": list}), "^data_collator: "),
        (dict(more={"compute_metrics": len}), "^compute_metrics: "),
        (dict(more={"peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")}), "^peft_config: "),
    ],
)
def test_other_wrong_arguments_are_refused_by_name(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(FusedDPOTrainer, tmp_path, **given)


def test_models_that_trl_trains_with_more_are_refused(tmp_path):
    from transformers import Gemma3Config, MixtralConfig

    class Given:
        def __init__(self, config):
            self.config = config

    with pytest.raises(ValueError, match=r"^model: Gemma3Config also reads pictures"):
        FusedDPOTrainer(Given(Gemma3Config()), args=options(tmp_path))
    with pytest.raises(ValueError, match=r"^router_aux_loss_coef=0.001: "):
        FusedDPOTrainer(Given(MixtralConfig()), args=options(tmp_path))


@pytest.mark.parametrize(
    "row, message",
    [
        (dict(prompt="", chosen=words(1), rejected=words(2)), "^prompt_ids is empty"),
        (dict(prompt_ids=[7], chosen_ids=[], rejected_ids=[8]), "no token of the answer is left"),
    ],
)
def test_rows_without_tokens_are_refused(row, message, tmp_path):
    ours = trainer(FusedDPOTrainer, tmp_path)
    rows = (
        ours._prepare_dataset(Dataset.from_list([row]), ours.processing_class, ours.args, "x")
        if "prompt" in row
        else [row]
    )
    with pytest.raises(ValueError, match=message):
        ours.data_collator(list(rows))


def test_logits_are_not_there_to_be_given(tmp_path):
    ours = trainer(FusedDPOTrainer, tmp_path)
    with pytest.raises(ValueError, match=r"^return_outputs: logits are not made"):
        ours.compute_loss(ours.model, next(iter(ours.get_train_dataloader())), return_outputs=True)


def test_the_models_are_left_alone_by_a_refusal(tmp_path):
    model = llama(0)
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=r"^ld_alpha"):
        FusedDPOTrainer(model, args=options(tmp_path, ld_alpha=0.5), train_dataset=Dataset.from_list(PLAIN))
    assert model.config.to_dict() == before and "forward" not in vars(model)
