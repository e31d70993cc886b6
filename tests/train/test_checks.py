"""What a run would refuse, its dry run refuses with the same words, before anything is tokenised or loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from longpo_ops.cli import app
from longpo_ops.pretrained import load_model, read_config
from longpo_ops.train import LongPOConfig
from longpo_ops.train.checks import count_steps, kept_memory, prepare_model
from longpo_ops.train.run import TrainRun, prepare, train

from ..pretrained.tiny import CHATML, WITH_PICTURES, save
from .tiny import make_model, make_pair, make_trainer, write_home


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


def settings(home: Path, output: Path, **more) -> dict:
    base = {"model": str(home / "model"), "data": str(home / "pairs.jsonl"), "output_dir": str(output)}
    return base | {"use_cpu": True, "disable_tqdm": True, "max_steps": 1} | more


def as_options(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]


def with_tokenizer(home: Path, folder: Path) -> str:
    """The tokenizer of home beside the model of a folder."""
    AutoTokenizer.from_pretrained(home / "model").save_pretrained(folder)
    return str(folder)


def other_family(home: Path, folder: Path, kind: str, **more) -> str:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=1024)
    sizes |= dict(num_key_value_heads=2, pad_token_id=None, max_position_embeddings=4096)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | more)).save_pretrained(folder)
    return with_tokenizer(home, folder)


def qwen(home: Path, folder: Path) -> str:
    save(folder, WITH_PICTURES["qwen3_vl"]())
    return with_tokenizer(home, folder)


def changed_model(home: Path, folder: Path, weights=None, tokenizer=None) -> str:
    shutil.copytree(home / "model", folder)
    if weights is not None:
        save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    if tokenizer is not None:
        changed = AutoTokenizer.from_pretrained(folder)
        tokenizer(changed)
        changed.save_pretrained(folder)
    return str(folder)


def add_chatml(tokenizer) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML


def adapters(home: Path, folder: Path) -> str:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(home / "model")
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(folder)
    return with_tokenizer(home, folder)


UNWEIGHED = {"num_local_experts": 2, "num_experts_per_tok": 1, "router_aux_loss_coef": None}


def lose(weights):
    return {name: weight for name, weight in weights.items() if "layers.1.self_attn.q_proj" not in name}


REFUSED = {
    "positions of Falcon": (
        lambda home, at: {"model": other_family(home, at, "falcon"), "target_length": 9000},
        "target_length=9000: FalconForCausalLM is given separate sequences",
    ),
    "loss of JetMoE": (
        lambda home, at: {"model": other_family(home, at, "granitemoe", output_router_logits=True, **UNWEIGHED)},
        "GraniteMoeForCausalLM has no router_aux_loss_coef to weigh its auxiliary loss by",
    ),
    "Qwen3-VL": (
        lambda home, at: {"model": qwen(home, at)},
        r"\(qwen3_vl\) has other parts .* is not there; --text-only",
    ),
    "RoPE of GPT-2": (
        lambda home, at: {"model": other_family(home, at, "gpt2", n_embd=32, n_layer=1, n_head=4), "rope_theta": 5e4},
        "rope_theta: GPT2LMHeadModel has no RoPE that it would change; leave it out",
    ),
    "adapters as model": (lambda home, at: {"model": adapters(home, at)}, "PEFT adapters of .* expected a whole model"),
    "no such layers": (
        lambda home, _: {"lora_rank": 4, "lora_target_modules": "query"},
        "no layer is named .query.; expected all-linear",
    ),
    "adapters on the head": (
        lambda home, _: {"lora_rank": 4, "lora_target_modules": "lm_head"},
        "is the head or an embedding",
    ),
    "weights": (lambda home, at: {"model": changed_model(home, at, weights=lose)}, "1 weights are missing"),
    "reference's weights": (
        lambda home, at: {"reference_model": changed_model(home, at, weights=lose)},
        "1 weights are missing",
    ),
    "tokenizer": (lambda home, at: {"model": changed_model(home, at, tokenizer=add_chatml)}, "tokens, its embedding"),
    "reference's rows": (
        lambda home, at: {"reference_model": other_family(home, at, "llama", vocab_size=8)},
        "tokens, its embedding 8 rows",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_dry_run_refuses_what_the_run_refuses_before_anything_is_tokenised(home, tmp_path, kind):
    change, message = REFUSED[kind]
    more = settings(home, tmp_path / "out", **change(home, tmp_path / "model"))
    done = CliRunner().invoke(app, ["train", *as_options(more), "--dry-run"])
    assert done.exit_code == 1 and isinstance(done.exception, ValueError), done.output
    with pytest.raises(ValueError, match=f"(?s){message}") as refused:
        train(TrainRun.from_settings(more))
    assert str(refused.value) == str(done.exception)
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} <= {"lock"}


def test_a_text_beyond_a_table_of_positions_is_refused_before_weights_are_read(home, tmp_path):
    gpt2 = other_family(home, tmp_path / "model", "gpt2", n_embd=32, n_layer=1, n_head=4, max_position_embeddings=64)
    with pytest.raises(ValueError, match=r"tokens, and transformer\.wpe of GPT2LMHeadModel holds 64 positions"):
        prepare(TrainRun.from_settings(settings(home, tmp_path / "out", model=gpt2)))


def test_a_record_that_does_not_fit_is_refused_before_weights_are_read(home, tmp_path, monkeypatch):
    monkeypatch.setattr("longpo_ops.train.run.load_model", lambda *_: pytest.fail("weights were read"))
    for more, message in (
        ({"target_length": 20}, "tokens, target_length is 20"),
        ({"reference": "data"}, "ref_chosen_logp"),
    ):
        run = TrainRun.from_settings(settings(home, tmp_path, **more))
        with pytest.raises(ValueError, match=message):
            train(run)
        with pytest.raises(ValueError, match=message):
            prepare(run)


def test_a_dry_run_prints_the_plan_that_the_run_takes(home, tmp_path, monkeypatch):
    more = settings(home, tmp_path, fit="auto")
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", *as_options(more), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "derived, not measured" in done.output and "optimizer states" in done.output
    assert not (tmp_path / "memory.json").exists()
    memory = train(TrainRun.from_settings(more)).memory
    assert (f"tiles of {memory.tile_rows} rows" if memory.tile_rows else "no tiling") in done.output
    assert f"AdamW with {memory.states} states" in done.output
    monkeypatch.setattr(
        "longpo_ops.train.checks.machine_here", lambda *_, **__: __import__("longpo_ops").memory.plan.Machine(1)
    )
    done = CliRunner().invoke(app, ["train", *as_options(settings(home, tmp_path / "new", fit="auto")), "--dry-run"])
    assert done.exit_code == 1 and "nothing fits" in str(done.exception)


def test_kept_memory_settings_count_only_beside_a_checkpoint_and_as_lossy_as_allowed(tmp_path):
    file, config = tmp_path / "memory.json", LongPOConfig(output_dir=str(tmp_path), fit="auto", use_cpu=True)
    lossy = LongPOConfig(output_dir=str(tmp_path), fit="auto", allow_lossy="states", use_cpu=True)
    file.write_text('{"states": "8bit"}')
    assert kept_memory(config) is None
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match=r"memory\.json.*states='8bit'.*allow_lossy='nothing' does not .* to 'states'"):
        kept_memory(config)
    assert kept_memory(lossy).states == "8bit"
    file.write_text('{"states": "float32", "offload": true, "store": "int8"}')
    with pytest.raises(ValueError, match=r"memory\.json.*store='int8'.*allow_lossy='states' does not .* to 'all'"):
        kept_memory(lossy)
    for damaged in ('{"states', "null", "[]", "{}", '{"states": "4bit"}', '{"states": "8bit", "tiles": 3}'):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=r"memory\.json is damaged .*; remove it"):
            kept_memory(lossy)


def test_a_start_that_was_refused_leaves_no_plan_for_the_next(home, tmp_path):
    more = settings(home, tmp_path, fit="auto", learning_rate=1e-3, save_strategy="no")
    (tmp_path / "memory.json").write_text('{"states": "8bit", "tile_rows": 5}')
    dry = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", *as_options(more), "--dry-run"])
    assert dry.exit_code == 0 and "AdamW with float32 states" in dry.output
    assert train(TrainRun.from_settings(more)).memory.states == "float32"


@pytest.mark.parametrize(
    ("packs", "more"),
    [
        (5, {}),
        (5, {"num_train_epochs": 2.5}),
        (5, {"num_train_epochs": 0.1}),
        (4, {"gradient_accumulation_steps": 8}),
        (5, {"dataloader_drop_last": True}),
        (5, {"max_steps": 7}),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(tmp_path, packs, more):
    pairs = [make_pair(seed) for seed in range(packs)]
    more = {"gradient_accumulation_steps": 2} | more
    trainer = make_trainer(tmp_path, "sft_chosen", pairs, make_model(), **more)
    theirs = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    assert count_steps(packs, trainer.args) == theirs


@pytest.mark.parametrize(
    "more",
    [{"warmup_steps": 5}, {"max_steps": -1, "pack_tokens": 10**6, "warmup_steps": 1, "lr_scheduler_type": "linear"}],
)
def test_a_schedule_of_zeros_is_refused_before_the_reference_is_computed(home, tmp_path, more):
    more = settings(home, tmp_path / "out", **more)
    done = CliRunner().invoke(app, ["train", *as_options(more), "--dry-run"])
    assert done.exit_code == 1 and "gives each of the run's 1 steps a rate of 0" in str(done.exception)
    with pytest.raises(ValueError, match="steps a rate of 0"):
        train(TrainRun.from_settings(more))
    assert not (tmp_path / "out" / "reference").exists()


def test_a_dry_run_refuses_a_folder_that_holds_another_run_or_a_damaged_checkpoint(home, tmp_path):
    more = settings(home, tmp_path, objective="sft_chosen", learning_rate=1e-3, save_steps=1, max_steps=2)
    train(TrainRun.from_settings(more))

    def dry(**changed) -> str:
        done = CliRunner().invoke(app, ["train", *as_options(more | changed), "--dry-run"])
        return str(done.exception) if done.exit_code else "passes"

    file = tmp_path / "run.json"
    before = file.read_bytes()
    assert "its checkpoint-2 is of another run" in dry(objective="simpo")
    with pytest.raises(ValueError) as refused:
        train(TrainRun.from_settings(more | {"objective": "simpo"}))
    assert str(refused.value) == dry(objective="simpo")
    assert dry(max_steps=3) == "passes"
    assert "the finished model" in dry(max_steps=1)
    assert file.read_bytes() == before

    file.write_text(json.dumps({n: value for n, value in json.loads(before).items() if n != "finished"}))
    assert "checkpoint-2 is beyond the 1 steps that this run has" in dry(max_steps=1)
    file.write_bytes(before)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    assert dry() == "passes"  # it has ended, and is not gone on from
    assert "optimizer.pt is missing" in dry(max_steps=3)


def test_a_dry_run_refuses_a_checkpoint_without_an_optimizer(home, tmp_path):
    more = settings(home, tmp_path, objective="sft_chosen", learning_rate=1e-3, save_only_model=True)
    train(TrainRun.from_settings(more))
    done = CliRunner().invoke(app, ["train", *as_options(more | {"max_steps": 2}), "--dry-run"])
    assert done.exit_code == 1 and "checkpoint-1 holds a model and no optimizer" in str(done.exception)


def test_a_text_that_names_a_token_without_a_row_is_a_bad_record(home, tmp_path, caplog):
    model = changed_model(home, tmp_path / "model", tokenizer=lambda t: t.add_tokens(["<image>"], special_tokens=True))
    records = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    records[2]["document"] += " <image>"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    more = {"model": model, "data": str(tmp_path / "pairs.jsonl")}
    with pytest.raises(ValueError, match=r"record 'passage-2'.*a token without an embedding"):
        prepare(TrainRun.from_settings(settings(home, tmp_path / "out", **more)))
    with caplog.at_level("INFO"):
        pairs = prepare(TrainRun.from_settings(settings(home, tmp_path / "out", on_bad_record="skip", **more))).pairs
    assert len(pairs) == 7 and "7 of 8 records kept" in caplog.text


def test_gemma_3_with_pictures_is_trained_as_a_text_model_and_goes_on(home, tmp_path):
    config = WITH_PICTURES["gemma3"]()
    config.text_config.vocab_size = 1024
    save(tmp_path / "model", config)
    model = with_tokenizer(home, tmp_path / "model")
    more = settings(
        home, tmp_path / "out", model=model, save_steps=1, learning_rate=1e-3, gradient_accumulation_steps=1
    )
    done = CliRunner().invoke(app, ["train", *as_options(more)])
    assert done.exit_code == 1 and "training inside of it is not there; --text-only" in str(done.exception)
    assert not (tmp_path / "out").exists()
    more["text_only"] = True
    train(TrainRun.from_settings(more))
    train(TrainRun.from_settings(more | {"max_steps": 2}))
    trained = str(tmp_path / "out")
    before, after = (load_model(name, read_config(name)) for name in (model, trained))
    assert (
        type(after).__name__ == "Gemma3ForCausalLM"
        and json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma3_text"
    )
    weights = dict(before.named_parameters())
    assert any(not torch.equal(p, weights[name]) for name, p in after.named_parameters())


def test_a_fault_of_the_program_is_not_blamed_on_the_model(home, monkeypatch):
    def broken(_):
        raise AttributeError("ours")

    monkeypatch.setattr("longpo_ops.train.checks.use_shared_prefix", broken)
    with pytest.raises(AttributeError, match="ours"):
        prepare_model(AutoModelForCausalLM.from_pretrained(home / "model"))
