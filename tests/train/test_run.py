"""Whole runs on real text with a small model: every method, full and LoRA; stopped ones go on; bad input is named."""

import importlib
import json
import linecache
import logging
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longpo_ops.train import METHODS, LongPOConfig, last_checkpoint
from longpo_ops.train.run import TrainRun, prepare

from .tiny import run_settings as settings
from .tiny import run_tiny as run
from .tiny import text_pairs, write_home, write_lines


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


ADAPTED = ("longpo", "dpo", "simpo", "sft_chosen", "sft_constraint")  # each reading of the reference, and none


WHOLE = [name for name in METHODS if name not in ("solopo_simpo", "solopo_orpo")]  # which have the packs of solopo


@pytest.mark.parametrize(("name", "lora_rank"), [*((name, 0) for name in WHOLE), *((name, 4) for name in ADAPTED)])
def test_every_method_from_text_to_a_saved_model(home, tmp_path, name, lora_rank):
    data = str(home / ("kto_pairs.jsonl" if name == "kto_pair" else "pairs.jsonl"))
    trainer = run(
        home, tmp_path, objective=name, data=data, lora_rank=lora_rank, max_steps=2, rope_theta=1e6, learning_rate=1e-3
    )
    log = trainer.state.log_history[0]
    expected = {"nll_loss"} if METHODS[name].nll else set()
    expected |= {"kl"} if METHODS[name].constraint else set()
    expected |= {"preference_loss", "rewards/margins"} if METHODS[name].objective else set()
    assert expected <= log.keys()
    assert all(torch.isfinite(torch.tensor(log[metric])) for metric in [*expected, "loss", "grad_norm"])
    weights = load_file(tmp_path / ("adapter_model.safetensors" if lora_rank else "model.safetensors"))
    assert weights and not list(tmp_path.rglob("*model*.bin"))
    if not lora_rank:
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 1e6
        before = load_file(home / "model" / "model.safetensors")
        assert not torch.equal(weights["lm_head.weight"], before["lm_head.weight"])
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "README.md").read_text()
    assert f"| method | {name} |" in card and "| steps | 2 |" in card and "training.png" in card
    assert "| recipe | default |" in card
    AutoTokenizer.from_pretrained(tmp_path)


MINE = """
from dataclasses import dataclass
from torch.nn.functional import logsigmoid
from longpo_ops import Objective

@dataclass(frozen=True, kw_only=True)
class Mine(Objective):
    beta: float = 0.1

    def losses(self, answers):
        chosen, rejected = answers.pairs(self.beta * answers.log_ratios)
        return answers.mean_over_rejected(-logsigmoid(chosen - rejected))
"""


def test_an_objective_of_ones_own_from_a_file(home, tmp_path, monkeypatch):
    """It is DPO's, so its numbers are; other code under its name is another run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_objective.py").write_text(MINE)
    runs = {
        name: run(home, tmp_path / str(n), objective=name, objective_options={"beta": 0.2}, max_steps=1).state
        for n, name in enumerate(("own_objective:Mine", "dpo"))
    }
    mine, dpo = (state.log_history[0] for state in runs.values())
    assert all(mine[name] == dpo[name] for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins"))
    (tmp_path / "own_objective.py").write_text(MINE.replace("logsigmoid(chosen - rejected)", "(chosen - rejected)"))
    linecache.checkcache()
    importlib.reload(sys.modules["own_objective"])
    with pytest.raises(ValueError, match="other code of objective own_objective:Mine"):
        run(home, tmp_path / "0", objective="own_objective:Mine", objective_options={"beta": 0.2}, max_steps=2)


def test_every_objective_of_pairs_is_a_method(home, tmp_path):
    log = run(home, tmp_path, objective="robust", max_steps=2, learning_rate=1e-3).state.log_history[1]
    assert log["loss"] == pytest.approx(log["preference_loss"]) and log["rewards/margins"] != 0


def first_rewards(home, tmp_path, **more) -> float:
    folder = tmp_path / "-".join(f"{name}-{value}" for name, value in more.items())
    return run(home, folder, max_steps=1, **more).state.log_history[0]["rewards/chosen"]


def test_the_reference_keeps_its_rope_while_the_policy_has_another(home, tmp_path):
    rewards = partial(first_rewards, home, tmp_path)
    assert rewards(max_length=100000) != rewards(rope_theta=1e7)
    assert rewards(rope_theta=1e7, lora_rank=2) == pytest.approx(rewards(rope_theta=1e7), rel=1e-3)


@pytest.fixture(scope="module")
def attentive(tmp_path_factory) -> Path:
    return write_home(tmp_path_factory.mktemp("attentive"), attentive=True)


OF_LONG = ({"objective": "dpo"}, {"objective": "dpo", "lora_rank": 2}, {"objective": "solopo"})


@pytest.mark.parametrize("more", OF_LONG, ids=str)
def test_a_reference_that_reads_the_long_input_is_the_policy_as_it_begins(attentive, tmp_path, more):
    """Its RoPE, too, unless it is given: a distance to a worse reader's rewards would unlearn long contexts."""
    rewards = partial(first_rewards, attentive, tmp_path, rope_theta=10.0, **more)
    given = rewards(reference_model=str(attentive / "model"))
    assert abs(given) > 1e-3 and rewards() == pytest.approx(0, abs=1e-5)


def test_a_run_whose_reference_had_another_rope_is_another_run(home, tmp_path):
    given = dict(objective="dpo", rope_theta=10.0, max_steps=1)
    run(home, tmp_path, **given)
    file = tmp_path / "run.json"
    kept = json.loads(file.read_text())
    assert kept["contents"]["reference_model"].pop("RoPE")
    file.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"other RoPE of reference_model"):
        run(home, tmp_path, **given | {"max_steps": 2})


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_sequences_beyond_what_the_model_reads_are_told(home, tmp_path, caplog, lora_rank):
    for number, (positions, times) in enumerate(((None, 0), (256, 1), (256, 1))):  # once in every run
        caplog.clear()
        run(home, tmp_path / str(number), max_steps=1, max_position_embeddings=positions, lora_rank=lora_rank)
        assert caplog.text.count("the model's config reads 256: set rope_theta and max_position_embeddings") == times


def test_adapters_are_drawn_from_the_runs_own_seed(home, tmp_path):
    made = []
    for name in "ab":
        run(home, tmp_path / name, max_steps=1, lora_rank=2)
        made.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_a_bf16_model_trains_in_float32_and_is_saved_in_its_own_dtype(tmp_path):
    home = write_home(tmp_path / "home", torch.bfloat16)
    trainer = run(home, tmp_path / "out", max_steps=2)
    assert trainer.args.bf16
    kept = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    final = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.float32} and {t.dtype for t in final.values()} == {torch.bfloat16}


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_steps_that_the_saved_dtype_loses_are_an_error_also_when_started_again(tmp_path, save_strategy):
    home = write_home(tmp_path / "home", torch.bfloat16)
    more = {"max_steps": 2, "learning_rate": 1e-12, "objective": "sft_chosen", "save_strategy": save_strategy}
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"no weight has moved in 2 steps .* lost in rounding to torch\.bfloat16, in"
        ):
            run(home, tmp_path / "out", **more)
    assert not list((tmp_path / "out").glob("*.safetensors")) and not (tmp_path / "out" / "README.md").exists()


# -- recipes ---------------------------------------------------------------------------------------------------------


def official(**more) -> TrainRun:
    return TrainRun.from_settings(
        {"model": "m", "data": "d", "output_dir": "o", "use_cpu": True, "recipe": "official"} | more
    )


def test_what_is_not_set_is_the_published_recipes(caplog):
    run = official()
    config = run.config()
    assert (config.optim, config.learning_rate, config.warmup_steps, config.seed) == ("rmsprop", 5e-7, 0.1, 42)
    assert (config.gradient_accumulation_steps, config.num_train_epochs, config.max_grad_norm) == (8, 1, 1.0)
    assert config.objective_options == {"beta": 0.01, "preference_weight": 0.01}
    assert run.all_settings()["nll_tokens"] == "all" and run.all_settings()["recipe"] == run.title == "official"
    assert official(objective_options={"beta": 0.1}, optim="adamw_torch", nll_tokens="all").title == "official"
    assert official(learning_rate=5e-7, max_steps=-1, target_length=0, objective_options=None).title == "official"
    assert official(recipe="default").all_settings()["nll_tokens"] == "contents"
    assert caplog.text == ""


CHANGES = [
    ({"learning_rate": 1e-3}, "learning_rate", "learning_rate is 5e-07 in the recipe, 0.001 came"),
    ({"nll_tokens": "contents"}, "nll_tokens", "nll_tokens is 'all' in the recipe, 'contents' came"),
    ({"objective": "dpo"}, "objective", "objective is 'longpo' in the recipe, 'dpo' came"),
    ({"objective": "dpo", "objective_options": {"beta": 0.3}}, "objective", "'dpo' came"),
    ({"objective_options": {"label_smoothing": 0.1}}, "objective_options", "'label_smoothing': 0.1"),
    ({"cut_document": True, "adam_beta2": 0.95}, "adam_beta2, cut_document", "adam_beta2 is 0.999 in the recipe, 0.95"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps", "is 8 in the recipe, 4 came"),
    ({"lora_rank": 8, "max_steps": 3, "pack_tokens": 99}, "lora_rank, max_steps, pack_tokens", "lora_rank is 0"),
]


@pytest.mark.parametrize(("more", "names", "told"), CHANGES)
def test_what_contradicts_the_recipe_is_told_and_named(caplog, more, names, told):
    run = official(**more)
    assert run.title == f"official with changes ({names})"
    assert told in caplog.text and run.title in caplog.text
    for name, value in run.config().to_dict().items():
        if name in more and name != "objective_options":
            assert value == more[name]
    if "dpo" in more.values():
        assert run.config().objective_options == more.get("objective_options")


def test_a_copy_of_a_run_is_filled_in_as_one_made_with_its_settings():
    run = official()
    other = replace(run, training=run.training | {"objective": "simpo", "learning_rate": 1e-3})
    assert (
        other.title == "official with changes (learning_rate, objective)" and other.config().objective_options is None
    )
    assert replace(other, training=run.training) == run and replace(run).title == "official"
    assert replace(other, recipe="default").config().optim == LongPOConfig(output_dir="o", use_cpu=True).optim
    assert replace(run, nll_tokens="contents").title == "official with changes (nll_tokens)"
    assert TrainRun("m", "d", "o", recipe="official", training={"use_cpu": True}).config() == run.config()


def test_eight_sequences_are_those_of_all_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert official().settings()["gradient_accumulation_steps"] == 2
    assert official(gradient_accumulation_steps=2).title == "official"
    assert official(gradient_accumulation_steps=8).title == "official with changes (gradient_accumulation_steps)"
    assert official(gradient_accumulation_steps=8).settings()["gradient_accumulation_steps"] == 8
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"has 8 sequences a step, which 3 processes .* cannot share evenly"):
        official()
    assert official(gradient_accumulation_steps=3).settings()["gradient_accumulation_steps"] == 3


def test_a_run_is_known_by_the_recipe_it_followed(home, tmp_path, caplog):
    """It trains on a record of equal answers, too, which the default recipe refuses."""
    write_lines(tmp_path / "pairs.jsonl", broken_pairs(BAD_RECORDS["equal answers"][0]))
    more = {"data": str(tmp_path / "pairs.jsonl"), "seed": 42, "gradient_accumulation_steps": 8}
    with caplog.at_level(logging.WARNING):
        trainer = run(home, tmp_path, recipe="official", learning_rate=1e-3, **more)
    assert len(trainer.train_dataset) == 8
    title = "official with changes (learning_rate)"
    told = json.loads((tmp_path / "run.json").read_text())
    assert (told["recipe"], told["nll_tokens"], told["optim"]) == (title, "all", "rmsprop")
    assert f"| recipe | {title} |" in (tmp_path / "README.md").read_text() and title in caplog.text


# -- bad input -------------------------------------------------------------------------------------------------------


def broken_pairs(change) -> list[dict]:
    pairs = text_pairs()
    change(pairs[3])
    return pairs


def _tokens(pair):
    """The record as tokenised columns of some other tokenizer."""
    long, short = [1, 2, 3, 4], [2, 3, 4]
    columns = {"chosen_": long, "rejected_": [1, 2, 3, 5], "ref_chosen_": [short], "ref_rejected_": [[2, 3, 5]]}
    pair.clear()
    pair["id"], pair["tokenizer"] = "passage-3", "other"
    for prefix, ids in columns.items():
        nested = isinstance(ids[0], list)
        pair[f"{prefix}input_ids"] = ids
        pair[f"{prefix}labels"] = [[-100, *r[1:]] for r in ids] if nested else [-100, *ids[1:]]
        pair[f"{prefix}lm_labels"] = ids


def _lengths(pair):
    _tokens(pair)
    pair["tokenizer"] = None
    pair["chosen_labels"] = pair["chosen_labels"][:-1]


def _large_ids(pair):
    _tokens(pair)
    pair["tokenizer"] = None
    pair["chosen_input_ids"] = [1, 2, 3, 99999]
    pair["chosen_labels"] = [-100, 2, 3, 99999]


TURN = "turns"
BAD_RECORDS = {
    "empty record": (dict.clear, "empty record"),
    "no document": (lambda p: p.pop("document"), "missing field"),
    "empty document": (lambda p: p.update(document=" "), "empty field"),
    "no turns": (lambda p: p.update(turns=[]), "empty field"),
    "no chunk": (lambda p: p[TURN][0].pop("chunk"), "missing field"),
    "wrong type": (lambda p: p[TURN][0].update(chosen=5), "wrong type"),
    "empty answer": (lambda p: p[TURN][0].update(chosen=""), "empty field"),
    "equal answers": (lambda p: p[TURN][0].update(rejected=[p[TURN][0]["chosen"]]), "chosen equal to rejected"),
    "special token": (lambda p: p[TURN][0].update(chosen="yes<|eot_id|>"), "special token"),
    "other tokenizer": (_tokens, "another tokenizer"),
    "ids too large": (_large_ids, "another tokenizer"),
    "labels and ids of different lengths": (_lengths, "differ in length"),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_bad_records_are_named_before_training_or_skipped_and_counted(home, tmp_path, kind, caplog):
    change, message = BAD_RECORDS[kind]
    write_lines(tmp_path / "pairs.jsonl", broken_pairs(change))
    where = "pairs.jsonl:4" if kind == "empty record" else "passage-3"
    with pytest.raises(ValueError, match=f"(?s){where}.*{message}"):
        run(home, tmp_path / "out", data=str(tmp_path / "pairs.jsonl"))
    assert last_checkpoint(tmp_path / "out") is None
    for _ in range(2):  # the second time nothing is tokenised, and the report is told again
        caplog.clear()
        with caplog.at_level("INFO"):
            more = {"data": str(tmp_path / "pairs.jsonl"), "on_bad_record": "skip"}
            pairs = prepare(TrainRun.from_settings(settings(home, tmp_path / "out", **more))).pairs
        assert len(pairs) == 7
        assert "7 of 8 records kept" in caplog.text and message in caplog.text


def test_a_malformed_line_names_file_and_line(home, tmp_path):
    lines = (home / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join([*lines[:2], '{"id": "half\n', *lines[3:]]))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:3.*no valid JSON"):
        run(home, tmp_path / "out", data=str(tmp_path / "pairs.jsonl"))


def altered_model(home: Path, folder: Path, **changes) -> str:
    shutil.copytree(home / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    return str(folder)


MESSAGES = "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content }}"
NO_END = MESSAGES + "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
NO_PROMPT = MESSAGES + "<|eot_id|>{% endfor %}"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chat_template": None}, "has no chat template"),
        ({"chat_template": NO_PROMPT}, "generation prompt"),
        ({"chat_template": NO_END, "eos_token": None}, "end-of-sequence|eos"),
    ],
)
def test_tokenizers_that_cannot_be_used_say_why(home, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(home, tmp_path / "out", model=altered_model(home, tmp_path / "model", **changes))


def test_pickled_weights_are_refused_and_cut_safetensors_named(home, tmp_path):
    pickled = Path(altered_model(home, tmp_path / "pickled", chat_template=_template(home)))
    (pickled / "model.safetensors").unlink()
    torch.save(load_file(home / "model" / "model.safetensors"), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled' cannot be loaded: .*safetensors"):
        run(home, tmp_path / "out", model=str(pickled))
    cut = Path(altered_model(home, tmp_path / "cut", chat_template=_template(home)))
    os.truncate(cut / "model.safetensors", 5000)
    with pytest.raises(ValueError, match="its safetensors cannot be read"):
        run(home, tmp_path / "out", model=str(cut))


def _template(home: Path) -> str:
    return (home / "model" / "chat_template.jinja").read_text()


def test_remote_code_runs_only_when_asked_for(home, tmp_path):
    remote = Path(altered_model(home, tmp_path / "remote", chat_template=_template(home)))
    config = json.loads((remote / "config.json").read_text())
    names = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (remote / "config.json").write_text(json.dumps(config | {"model_type": "theirs", "auto_map": names}))
    (remote / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        run(home, tmp_path / "out", model=str(remote))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        ({"foo": 1}, "setting 'foo' is none of TrainRun"),
        ({1: 2}, "setting '1' is none of TrainRun"),
        ({"model": None}, "model missing"),
        ({"lora_rank": "abc"}, "lora_rank='abc': expected int"),
        ({"max_steps": "abc"}, "max_steps='abc': expected int"),
        ({"lora_rank": -1}, "expected 0 for full fine-tuning"),
        ({"on_bad_record": "drop"}, "expected one of raise, skip"),
        ({"dtype": "int8"}, "expected one of auto, float32"),
        ({"recipe": "offical"}, "recipe is 'offical'; expected one of default, official"),
        ({"recipe": 3}, "recipe=3: expected str"),
        ({"nll_tokens": "every"}, "nll_tokens='every': expected one of contents, all"),
        ({"rope_theta": -5.0}, r"rope_theta=-5\.0: expected more than 0"),
        ({"max_length": 0}, "max_length=0: expected more than 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: expected a whole number of at least 1"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0: expected a finite number above 0"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0: expected a finite number above 0"),
        ({"max_steps": 0}, "max_steps=0: expected a number of steps, or -1"),
        ({"max_steps": -5}, "max_steps=-5: expected a number of steps, or -1"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0: expected more than 0"),
        ({"max_steps": -1, "num_train_epochs": -2.0}, r"num_train_epochs=-2\.0: expected more than 0"),
        ({"max_steps": None}, "max_steps=None: expected int"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan: expected a finite number"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm=-1\.0: expected a number from 0"),
        ({"warmup_steps": float("inf")}, "warmup_steps=inf: expected a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan: expected a finite number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf: expected a finite number"),
        ({"objective_options": {"beta": float("nan")}}, "objective_options={'beta': nan}: expected finite numbers"),
        ({"save_strategy": False}, "save_strategy=False: expected one of no, steps, epoch, best"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type='cosin': expected one of linear, cosine"),
        ({"resume_from_checkpoint": "x"}, "goes on from the last checkpoint in output_dir"),
        ({"learning_rte": 1e-3}, "did you mean learning_rate"),
    ],
)
def test_settings_of_another_kind_are_refused(home, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        TrainRun.from_settings(settings(home, tmp_path) | more).config()


def test_a_config_of_code_is_checked_as_that_of_a_file(tmp_path):
    for name, value in (("max_grad_norm", float("nan")), ("num_train_epochs", 0), ("adam_beta2", "0.9"), ("bf16", 2)):
        with pytest.raises(ValueError, match=f"^{name}={value!r}: expected "):
            LongPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    config = LongPOConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=3, num_train_epochs=0)  # steps decide
    assert replace(config, seed=2).seed == 2  # what it makes of its values may be given again


@pytest.mark.parametrize("name", ["model", "reference_model"])
def test_a_run_does_not_write_over_the_models_it_reads(home, name):
    folder = home / "model"
    with pytest.raises(ValueError, match=f"holds the {name}, which would be overwritten"):
        TrainRun.from_settings(settings(home, folder / ".." / "model") | {"model": "other", name: str(folder)})


def test_a_file_is_no_output_folder(home, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: expected a folder"):
        TrainRun.from_settings(settings(home, tmp_path / "file"))


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (1, {"save_steps": 1}),
        (1, {"save_steps": 1, "logging_steps": 5}),
        (2, {"save_strategy": "no", "logging_steps": 5}),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint(home, tmp_path, step, more):
    with pytest.raises(ValueError, match=rf"the loss is (inf|nan) at step {step}, .*lower learning_rate"):
        run(home, tmp_path, max_steps=2, objective_options={"preference_weight": 1e308}, **more)
    assert last_checkpoint(tmp_path) is None and not (tmp_path / "model.safetensors").exists()


# -- models that share no prefix -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(home) -> str:
    """A folder; its layers know neither RoPE nor shared prefixes."""
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    shape = dict(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=2048)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape)).save_pretrained(home / "gpt2")
    tokenizer.save_pretrained(home / "gpt2")
    return str(home / "gpt2")


def test_a_model_that_shares_no_prefix_is_trained_and_goes_on(home, gpt2, tmp_path):
    more = dict(model=gpt2, gradient_accumulation_steps=1, save_steps=1, save_strategy="steps", learning_rate=1e-3)
    whole = run(home, tmp_path / "whole", max_steps=2, **more)
    assert whole.separate and json.loads((tmp_path / "whole" / "run.json").read_text())["separate"] is True
    shutil.copytree(
        tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("checkpoint-2", "*.safetensors")
    )
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "cut" / "checkpoint-1", dirs_exist_ok=True)
    again = run(home, tmp_path / "cut", max_steps=2, separate=True, **more)
    for (name, weight), (_, other) in zip(again.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_its_adapters_begin_as_the_base_that_is_their_reference(home, gpt2, tmp_path):
    trainer = run(home, tmp_path, model=gpt2, lora_rank=2, objective="dpo", max_steps=1, reference="online")
    log = trainer.evaluate(trainer.train_dataset)  # in evaluation nothing drops out
    assert trainer.separate and abs(log["eval_rewards/margins"]) < 1e-4 < abs(log["eval_logps/chosen"])
