"""A run goes on with the content it began with, wherever that lies, and says what has changed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Gemma3Config, Gemma3TextConfig

from longpo_ops.memory.settings import Memory
from longpo_ops.pretrained import read_whole_config
from longpo_ops.train.identity import Identity, Weights, model_identity, tokenizer_digest, weight_files
from longpo_ops.train.run import TrainRun, prepare

from .tiny import run_settings, run_tiny, text_pairs, write_home, write_lines


def identity(home: Path, **more) -> Identity:
    """Of a run of longpo with home/reference, into home/out."""
    given = {"eval_data": str(home / "eval.jsonl"), "reference_model": str(home / "reference"), "max_steps": 4} | more
    run = TrainRun.from_settings(run_settings(home, home / "out", **given))
    return Identity.of(run, prepare(run))


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A home whose run has begun, as far as its identity is asked."""
    home = write_home(tmp_path_factory.mktemp("home"))
    write_lines(home / "pairs.jsonl", text_pairs(4))
    write_lines(home / "eval.jsonl", text_pairs(2))
    shutil.copytree(home / "model", home / "reference")
    identity(home).under_way()
    return home


@pytest.fixture
def home(begun, tmp_path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "home"))


def begin(home: Path, **more) -> int | None:
    return identity(home, **more).begin(str(home / "out" / "checkpoint-1"))


def test_files_may_move_and_be_touched(home):
    moved = home.parent / "elsewhere"
    home.rename(moved)
    for name in ("model", "reference", "pairs.jsonl", "eval.jsonl"):
        (moved / name).rename(moved / f"moved-{name}")
        os.utime(moved / f"moved-{name}")
    os.utime(moved / "moved-model" / "model.safetensors", (0, 0))
    paths = {"data": "moved-pairs.jsonl", "eval_data": "moved-eval.jsonl", "model": "moved-model"}
    paths = {name: str(moved / path) for name, path in (paths | {"reference_model": "moved-reference"}).items()}
    assert begin(moved, **paths) is None


def test_ids_and_the_layout_of_files_train_nothing(home):
    records = text_pairs(4)
    for i, record in enumerate(records):
        record["id"] = f"renamed-{i}"
    (home / "pairs").mkdir()
    write_lines(home / "pairs" / "a.jsonl", records[:1])
    write_lines(home / "pairs" / "b.jsonl", records[1:])
    assert begin(home, data=str(home / "pairs")) is None


def _swap(records):
    records[0], records[2] = records[2], records[0]


def _change(records):
    records[1]["turns"][0]["chosen"] += " indeed"


DATA = {
    "one removed": (lambda r: r.pop(), r"4 records became 3 \(1 gone, 'passage-3' the first\)"),
    "some added": (lambda r: r.extend(text_pairs(6)[4:]), r"4 records became 6 \(2 added, 'passage-4' the first\)"),
    "swapped": (_swap, r"4 records became 4 \(in another order\)"),
    "another answer": (_change, r"4 records became 4 \(1 changed, 'passage-1' the first\)"),
}


@pytest.mark.parametrize("kind", DATA)
def test_changed_data_are_refused_with_what_changed(home, kind):
    change, told = DATA[kind]
    records = text_pairs(4)
    change(records)
    write_lines(home / "pairs.jsonl", records)
    with pytest.raises(
        ValueError, match=rf"its checkpoint-1 is of another run \(data: {told}\); give another output_dir"
    ):
        begin(home)


def test_data_that_changed_are_refused_where_the_pairs_of_then_are_gone(home):
    for file in (home / "out" / "data").glob("pairs-*"):
        file.unlink()
    assert begin(home) is None
    write_lines(home / "pairs.jsonl", text_pairs(3))
    for file in (home / "out" / "data").glob("pairs-*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"of another run \(data: 4 records became 3\)"):
        begin(home)


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
JUDGED = {
    "best model": EVERY_STEP | {"load_best_model_at_end": True},
    "best checkpoints": EVERY_STEP | {"save_strategy": "best", "metric_for_best_model": "loss"},
    "plateau": EVERY_STEP | {"lr_scheduler_type": "reduce_lr_on_plateau"},
}


@pytest.mark.parametrize("kind", JUDGED)
def test_evaluation_data_are_of_the_run_where_they_decide_weights(home, kind):
    identity(home, **JUDGED[kind]).under_way()
    write_lines(home / "eval.jsonl", text_pairs(1))
    with pytest.raises(ValueError, match=r"\(eval_data: 2 records became 1 \(1 gone, 'passage-1' the first\)\)"):
        begin(home, **JUDGED[kind])


def test_evaluation_data_that_decide_nothing_may_change_and_are_told(home, caplog):
    write_lines(home / "eval.jsonl", text_pairs(1))
    assert begin(home, **EVERY_STEP) is None
    assert "eval_data: 2 records became 1 (1 gone, 'passage-1' the first); metrics from here on" in caplog.text
    assert begin(home, eval_data=None) is None
    assert "eval_data: 2 records became none" in caplog.text


@pytest.mark.parametrize(("folder", "setting"), [("model", "model"), ("reference", "reference_model")])
def test_other_weights_and_configs_are_refused(home, folder, setting):
    file = home / folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] += 2.0**-20  # a bit of one of them
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"\(other weights of {setting} \(.*/{folder}\)\)"):
        begin(home)
    config = json.loads((home / folder / "config.json").read_text())
    (home / folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match=rf"other config and weights of {setting}"):
        begin(home)


def test_a_reference_that_is_named_is_the_one_that_was_meant(home):
    shutil.rmtree(home / "out")
    identity(home, reference_model=None).under_way()
    assert begin(home, reference_model=str(home / "reference")) is None  # a copy of the model


def test_another_tokenizer_template_or_system_text_is_refused(home):
    with pytest.raises(ValueError, match=r"system=None became 'Be brief.'; data: 4 records .*\(4 changed"):
        begin(home, system="Be brief.")
    template = home / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|start_header_id|>", "<|start_header_id|> "))
    with pytest.raises(ValueError, match="another chat template; data"):
        begin(home)


def test_other_variables_of_the_template_are_refused(home):
    template = home / "model" / "chat_template.jinja"
    template.write_text("{% if tone is defined %}{{ tone }}{% endif %}" + template.read_text())
    shutil.rmtree(home / "out")
    identity(home, template_kwargs={"tone": "calm"}).under_way()
    assert begin(home, template_kwargs={"tone": "calm"}) is None
    with pytest.raises(ValueError, match=r"template_kwargs=\{'tone': 'calm'\} became None; data: 4 rec.*\(4 changed"):
        begin(home)
    with pytest.raises(ValueError, match=r"does not read tine, so .* expected some of .*tone; did you mean tone\?"):
        begin(home, template_kwargs={"tine": "calm"})


def test_a_tokenizer_is_known_by_more_than_its_vocabulary(home):
    before = AutoTokenizer.from_pretrained(home / "model")
    file = home / "model" / "tokenizer.json"
    whole = json.loads(file.read_text())
    whole["model"]["merges"] = whole["model"]["merges"][:20]  # the same ids, and fewer of them are used
    file.write_text(json.dumps(whole))
    after = AutoTokenizer.from_pretrained(home / "model")
    assert before.get_vocab() == after.get_vocab() and tokenizer_digest(before) != tokenizer_digest(after)
    with pytest.raises(ValueError, match="another tokenizer; data: 4 records"):
        begin(home)
    before("some text", truncation=True, max_length=3)  # leaves its state behind
    assert "max_length" in before.backend_tokenizer.to_str()
    assert tokenizer_digest(before) == tokenizer_digest(AutoTokenizer.from_pretrained(home / "reference"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"objective": "dpo"}, "objective='longpo' became 'dpo'"),
        ({"learning_rate": 1e-6}, "learning_rate=5e-07 became 1e-06"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type='cosine' became 'linear'"),
        ({"gradient_accumulation_steps": 4}, "packs_per_step=2 became 4"),
        ({"weight_decay": 0.1}, r"weight_decay=0\.0 became 0\.1"),
        ({"seed": 8}, "seed=7 became 8"),
        ({"lora_rank": 2}, "lora_rank=0 became 2"),
        ({"nll_tokens": "all"}, r"nll_tokens='contents' became 'all'.*data: 4 records became 4 \(4 changed"),
        ({"recipe": "official"}, r"nll_tokens='contents' became 'all'.*beta.*optim='\w+' became 'rmsprop'"),
        ({"rope_theta": 1e6}, r"rope_theta=None became 1000000\.0"),
        ({"dtype": "bfloat16"}, "dtype='auto' became 'bfloat16'"),
        ({"objective_options": {"beta": 0.2}}, r"objective_options=\{\} became \{'beta': 0\.2\}"),
        ({"memory": {"offload": True, "store": "int8"}}, r"memory=\{'store': 'exact'.* became \{'store': 'int8'"),
        ({"separate": True}, "separate=False became True"),
        ({"memory": {"states": "8bit"}}, r"memory=\{.*'states': None.* became \{.*'states': '8bit'"),
    ],
)
def test_settings_that_decide_the_weights_are_refused(home, more, told):
    with pytest.raises(ValueError, match=told):
        begin(home, **more)


def test_settings_that_decide_nothing_may_change(home, caplog):
    free = {"logging_steps": 3, "save_steps": 7, "workspace_bytes": 2**20, "gradient_checkpointing": False}
    alike = {"reference": "online", "objective_options": {}, "memory": {"tile_rows": 64, "store": "int8"}}
    assert begin(home, **free, **alike, on_bad_record="skip", nll_tokens="contents", constraint_weight=0.1) is None
    assert caplog.text == ""
    assert begin(home, max_steps=8) is None
    assert "max_steps=4 became 8: the learning rate follows the schedule of the new length from here" in caplog.text


def test_a_run_of_an_earlier_version_goes_on(home):
    file = home / "out" / "run.json"
    values = json.loads(file.read_text())
    for name in ("reference_from", "memory", "nll_tokens", "recipe", "template_kwargs", "separate"):
        del values[name]
    file.write_text(json.dumps(values | {"objective_options": None, "reference": "precompute"}))
    assert begin(home) is None


def test_a_method_without_a_reference_compares_with_none(home):
    shutil.rmtree(home / "out")
    identity(home, objective="sft_chosen").under_way()
    assert begin(home, objective="sft_chosen", reference="online", reference_model=None) is None


def test_log_probs_of_the_data_are_another_reference(home):
    records = text_pairs(4)
    for record in records:
        record |= {"ref_chosen_logp": -3.0, "ref_rejected_logps": [-4.0] * len(record["turns"][0]["rejected"])}
    write_lines(home / "pairs.jsonl", records)
    shutil.rmtree(home / "out")
    identity(home, eval_data=None).under_way()
    with pytest.raises(ValueError, match=r"\(reference_from='model' became 'data'\)"):
        begin(home, eval_data=None, reference="data")


def test_what_the_planner_chose_is_kept_in_mind(home):
    shutil.rmtree(home / "out")
    before = identity(home, fit="auto")
    assert before.values["memory"] is None
    before.keep_memory(Memory(states="8bit", master="residue"))
    before.under_way()
    assert begin(home, fit="auto") is None  # no plan is kept beside a checkpoint here: it is asked anew
    with pytest.raises(ValueError, match=r"memory=.*'states': '8bit'.* became .*'states': 'float32'"):
        begin(home, memory={"states": "float32"})


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The snapshot of a model "peers/gemma" in the cache of a hub, of which no weights were fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder, commit = tmp_path / "hub" / "models--peers--gemma", "3" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (snapshot := folder / "snapshots" / commit).mkdir(parents=True)
    return snapshot


@pytest.mark.parametrize("parts", [1, 2])
def test_a_hub_s_model_is_its_commit(hub, home, parts):
    config = Gemma3TextConfig() if parts == 1 else Gemma3Config()
    (hub / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    run = TrainRun.from_settings(run_settings(home, home / "out", model="peers/gemma"))
    assert model_identity(run, "peers/gemma", None) == {"commit": "3" * 40}


def test_a_model_of_unknown_commit_is_its_config(hub, home, monkeypatch):
    (hub / "config.json").write_text(json.dumps(Gemma3TextConfig().to_dict(), default=str))
    run = TrainRun.from_settings(run_settings(home, home / "out", model="peers/gemma"))
    config = read_whole_config("peers/gemma")
    config._commit_hash = None  # as of a config that code from elsewhere makes
    monkeypatch.setattr("longpo_ops.train.identity.read_whole_config", lambda *_: config)
    before = model_identity(run, "peers/gemma", None)
    config.rms_norm_eps = 1e-3
    assert before.keys() == {"config"} and model_identity(run, "peers/gemma", None) != before


def test_what_nobody_can_tell_is_refused(home):
    file, told = (
        home / "out" / "run.json",
        r"run\.json is missing, damaged or of an earlier version.* of which run {} is",
    )
    whole = json.loads(file.read_text())
    without = [{n: v for n, v in whole.items() if n != gone} for gone in ("contents", "processes", "max_steps")]
    parts = [
        {},
        [],
        None,
        whole["contents"] | {"data": {}, "model": "llama"},
        whole["contents"] | {"data": {"records": 4}},
    ]
    ended = [True, {}, {"step": 4}, {"step": "4", "files": {}}, {"step": 4, "files": 3}]
    damaged = [*without, *(whole | {"contents": part} for part in parts), *(whole | {"finished": end} for end in ended)]
    for values in [None, [], 3, "run", {"objective": "longpo"}, *damaged]:
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=told.format("checkpoint-1")):
            begin(home)
    assert identity(home).begin(None) is None  # there is nothing to go on from
    shutil.copy(home / "model" / "model.safetensors", home / "out")
    with pytest.raises(ValueError, match=told.format("model.safetensors")):
        identity(home).begin(None)
    file.unlink()
    with pytest.raises(ValueError, match=told.format("model.safetensors")):
        identity(home).begin(None)


def test_a_finished_model_is_not_written_over_by_another_run(home):
    identity(home).end(4)
    assert identity(home).begin(None) == 4
    with pytest.raises(ValueError, match=r"its finished model is of another run \(objective='longpo' became 'dpo'\)"):
        identity(home, objective="dpo").begin(None)


def test_a_finished_run_is_known_by_the_content_of_its_files(home, caplog):
    file, card = home / "out" / "model.safetensors", home / "out" / "README.md"
    shutil.copy(home / "model" / "model.safetensors", file)
    (home / "out" / "trainer_state.json").write_text("{}")
    card.write_text("a model")
    identity(home).end(4)
    card.write_text("a model, described by hand")
    assert identity(home).begin(None) == 4
    whole, weights = file.read_bytes(), load_file(file)
    weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    assert identity(home).begin(None) is None
    assert "model.safetensors is missing or holds other bytes than the finished run left" in caplog.text
    file.write_bytes(whole[: len(whole) // 2])
    assert identity(home).begin(None) is None
    file.write_bytes(whole)
    assert identity(home).begin(None) == 4
    (home / "out" / "trainer_state.json").write_text("")
    assert identity(home).begin(None) is None


def test_a_finished_run_of_an_earlier_version_is_known_by_names(home):
    file = home / "out" / "run.json"
    (home / "out" / "trainer_state.json").write_text("{}")
    file.write_text(json.dumps(identity(home).values | {"finished": {"step": 4, "files": ["trainer_state.json"]}}))
    assert identity(home).begin(None) == 4
    (home / "out" / "trainer_state.json").unlink()
    assert identity(home).begin(None) is None


def test_a_finished_model_without_checkpoints_is_not_written_over_by_a_longer_run(home):
    identity(home).end(4)
    with pytest.raises(ValueError, match=r"holds the finished model of 4 steps and no checkpoint to go on from"):
        identity(home, max_steps=8).begin(None)
    assert begin(home, max_steps=8) is None  # from checkpoint-1


def test_a_method_without_a_reference_is_told_alone(home):
    with pytest.raises(ValueError, match=r"\(objective='longpo' became 'simpo'\)"):
        begin(home, objective="simpo")


def test_digests_of_pairs_that_are_gone_are_made_again(home):
    for file in (home / "out" / "data").glob("*.digests.json"):
        file.unlink()
    assert begin(home) is None


def test_a_finished_run_is_not_begun_with_fewer_steps_than_it_made(home):
    identity(home).end(4)
    with pytest.raises(
        ValueError, match=r"the finished model in .*out is beyond the 2 steps .*\(4 are made\); raise max_steps"
    ):
        begin(home, max_steps=2)
    assert begin(home) == 4


def test_weights_are_read_again_only_where_size_or_time_has_changed(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    (file,) = weight_files(tmp_path)
    first = Weights(tmp_path / "weights.json").digest(file)
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.sha256", None)  # nothing is digested
        assert Weights(tmp_path / "weights.json").digest(file) == first
    save_file({"a": torch.ones(3)}, file)
    os.utime(file, (1, 1))
    assert Weights(tmp_path / "weights.json").digest(file) != first


def test_the_weights_of_a_folder_are_those_that_are_loaded(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}})
    )
    assert [file.name for file in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


def test_a_run_that_has_other_data_does_not_go_on(tmp_path):
    home = write_home(tmp_path / "home")
    run_tiny(home, tmp_path / "out", max_steps=1, objective="sft_chosen")
    write_lines(home / "pairs.jsonl", text_pairs(7))
    with pytest.raises(ValueError, match=r"checkpoint-1 is of another run \(data: 8 records became 7"):
        run_tiny(home, tmp_path / "out", max_steps=2, objective="sft_chosen")
