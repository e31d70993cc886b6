"""What an evolution's settings must be, and which stages follow from them."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from longpo_ops.evolve import Evolution, plan
from longpo_ops.evolve.results import recipe_of
from longpo_ops.evolve.run import check

from ..pretrained.tiny import WITH_PICTURES, change

ROOT = Path(__file__).parents[2]
RAISED = {"rope_theta": 3e4, "rope_type": "default"}
SHORT = {"question_tokens": 80, "answer_tokens": 24}
FIRST = {"name": "one", "length": 1024, "documents": "docs", "rope_theta": 2e4, "generate": SHORT}
SETTINGS = {
    "model": "base-model",
    "out": "out",
    "evaluate": {"lengths": [128, 256], "perplexity": ["text"], "perplexity_lengths": [128]},
    "retention": [{"measure": "accuracy", "within": 0.05}],
    "rounds": [FIRST, FIRST | {"name": "two", "generator": "one"}],
}


def changed(**changes) -> dict:
    settings = copy.deepcopy(SETTINGS)
    first = changes.pop("first", {})
    settings["rounds"][0] |= first
    return settings | changes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (changed(colour="red"), "the evolution: colour unknown; expected some of model, out"),
        (changed(rounds=[]), "rounds: none; expected one at least"),
        (changed(launch={"torchrun": 8}), "launch: {'torchrun': 8}; expected the words of a launcher, such as"),
        (changed(launch=["torchrun", ""]), r"launch: \['torchrun', ''\]; expected the words of a launcher"),
        (changed(rounds="one"), "rounds: expected a list, got str"),
        (changed(rounds=["one"]), r"rounds\[0\]: expected names and values, got str"),
        (changed(rounds=[{"name": "one"}]), r"rounds\[0\]: length, documents missing"),
        (changed(first={"start": "generator"}), "start is 'generator', which a reference alone may be"),
        (changed(evaluate={}), "evaluate: lengths missing"),
        (changed(evaluate={"lengths": 128}), "evaluate: lengths is 128; expected a list"),
        (changed(evaluate={"lengths": [128], "engine": "server"}), "engine 'server' has one model"),
        (changed(evaluate={"lengths": [128], "rope": {}}), "rope is set by rope_theta; leave it out"),
        (changed(evaluate={"lengths": [128], "task": []}), "the evolution, evaluate: task unknown; expected some of"),
        (changed(retention=[{"measure": "bleu", "within": 0}]), "measure 'bleu'; expected accuracy, perplexity or"),
        (changed(retention=[{"measure": "accuracy", "within": -1}]), "within is -1; expected a number from 0"),
        (
            changed(retention=[{"measure": "accuracy", "within": float("nan")}]),
            "within is nan; expected a number from 0",
        ),
        (
            changed(retention=[{"measure": "accuracy", "within": float("inf")}]),
            "within is inf; expected a number from 0",
        ),
        (changed(first={"rope_theta": float("nan")}), "rope_theta is nan; expected a number above 0"),
        (
            changed(first={"generate": {"top_p": float("nan")}}),
            "round 'one', generate: top_p=nan: expected a finite number",
        ),
        (changed(retention=[{"measure": "accuracy", "within": 0, "length": 512}]), "accuracy at 512 is not evaluated"),
        (changed(retention=[{"measure": "perplexity", "within": 0, "length": 256}]), "perplexity at 256 is not eval"),
        (changed(retention=[{"measure": "harness:mmlu", "within": 0}]), "add 'mmlu' to evaluate: harness"),
        (
            changed(
                retention=[{"measure": "harness:mmlu:0", "within": 0}], evaluate={"lengths": [8], "short": "official"}
            ),
            "add 'mmlu:0' to evaluate: harness; there is mmlu:5:acc, arc_challenge:25:acc_norm",
        ),
        (
            changed(evaluate={"lengths": [8], "short": "all"}, retention=[{"measure": "harness:mmlu", "within": 0}]),
            "short is 'all'; expected official",
        ),
        (changed(retention=[{"measure": "harness:mmlu", "within": 0, "length": 8}]), "length is 8"),
        (changed(first={"evaluate": {"lengths": [256]}}), "accuracy at 128 is not evaluated for round 'one'"),
        (changed(first={"name": "two"}), "two is there twice"),
        (changed(first={"name": "a/b"}), "as it names a folder"),
        (changed(first={"name": "base"}), "expected another name, as this one means a model"),
        (changed(first={"length": "1K"}), "length is '1K'; expected a number of tokens"),
        (changed(first={"documents": []}), "round 'one': no documents"),
        (changed(first={"documents": 7}), "documents: 7; expected text, or a list of it"),
        (changed(first={"rope_theta": "high"}), "rope_theta is 'high'; expected a number"),
        (changed(first={"colour": "red"}), r"rounds\[0\]: colour unknown; expected some of name, length"),
        (changed(first={"generate": {"question": 4}}), "round 'one', generate: question unknown; .* questions"),
        (changed(first={"generate": {"chunks": "four"}}), "round 'one', generate: chunks='four': expected int"),
        (
            changed(evaluate={"lengths": [128], "samples": "all"}),
            "the evolution, evaluate: samples='all': expected int",
        ),
        (changed(evaluate={"lengths": [128], "perplexity": "text"}), "perplexity='text': expected list or tuple"),
        (changed(first={"train": {"lr": 1e-3}}), "round 'one', train: lr unknown; .* learning_rate"),
        (changed(first={"train": {"rope_theta": 1e6}}), "round 'one', train: rope_theta is set by rope_theta; leave"),
        (changed(first={"generate": []}), "round 'one', generate: expected names and values, got list"),
        (
            changed(first={"generator": "two"}),
            "round 'one': generator 'two' is a later round, .* expected last, base, or",
        ),
        (changed(first={"reference": "one"}), "round 'one': reference 'one' is that round itself"),
        (changed(first={"start": "two"}), "round 'one': start 'two' is a later round, .* expected last, base, or"),
        (changed(first={"start": "one"}), "round 'one': start 'one' is that round itself"),
        (changed(recipe="offical"), "recipe is 'offical'; expected one of default, official"),
        (changed(first={"generate": {"recipe": 3}}), "round 'one', generate: recipe is 3; expected one of default"),
        (changed(first={"train": {"recipe": "own"}}), "round 'one', train: recipe is 'own'; expected one of default"),
        (changed(first={"start": 1}), "round 'one': start is 1; expected the name of a model"),
        (changed(first={"train": {"model": "base"}}), "round 'one', train: model is set by start; leave it out"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Evolution.from_settings(settings)


def test_a_file_is_read_with_its_numbers(tmp_path):
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(changed(first={"train": {"learning_rate": "RATE"}})).replace("RATE", "5e-7")
    )
    evolution = Evolution.from_file(tmp_path / "run.yaml")
    assert evolution == Evolution.from_settings(changed(first={"train": {"learning_rate": 5e-7}}))
    assert evolution.rounds[0].documents == ("docs",) and evolution.evaluate["lengths"] == (128, 256)
    for text, message in (
        (b"- a", "expected names and values, got list"),
        (b"a: [", "no valid YAML"),
        (b"\xff", "run.yaml: no valid YAML: 'utf-8' codec"),
    ):
        (tmp_path / "run.yaml").write_bytes(text)
        with pytest.raises(ValueError, match=message):
            Evolution.from_file(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        Evolution.from_file(tmp_path / "nowhere.yaml")


def test_words_of_a_file_are_flags_where_flags_are_wanted(tmp_path):
    train = "{save_strategy: no, eval_strategy: No, bf16: off, cut_document: yes, memory: {offload: on}}"
    generate = "{template_kwargs: {enable_thinking: off}, reference_logps: yes, column: on}"
    text = yaml.safe_dump(changed(first={"train": "TRAIN", "generate": "GENERATE", "name": "NAME"}))
    text = text.replace("TRAIN", train).replace("GENERATE", generate).replace("NAME", "no")
    (tmp_path / "run.yaml").write_text(text)
    first = Evolution.from_file(tmp_path / "run.yaml").rounds[0]
    assert first.train == {
        "save_strategy": "no", "eval_strategy": "No", "bf16": False, "cut_document": True, "memory": {"offload": True}
    }  # fmt: skip
    assert first.generate == {"template_kwargs": {"enable_thinking": False}, "reference_logps": True, "column": "on"}
    assert first.name == "no"


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="model 'base-model' cannot be loaded"):
        plan(Evolution.from_settings(SETTINGS))


def rounds(evolution: Evolution | dict) -> list[dict]:
    """Per round its stages by kind, `untrained` where it is one; the one before them is the base's."""
    evolution = Evolution.from_settings(evolution) if isinstance(evolution, dict) else evolution
    stages, kinds = plan(evolution), ("pairs", "untrained", "train", "evaluate")
    names = [f"{each.name}/{kind}" for each in evolution.rounds for kind in kinds]
    there = [stage.name for stage in stages]
    assert there == ["base/evaluate", *(name for name in names if name in there or not name.endswith("/untrained"))]
    return [{stage.kind: stage for stage in stages if stage.round is each} for each in evolution.rounds]


def test_who_generates_who_is_the_reference_and_at_which_theta(model):
    names = ("one", "two", "three", "four")
    lengths, thetas = (1024, 2048, 2048, 4096), (2e4, 4e4, None, None)
    settings = changed(model=str(model))
    settings["rounds"] = [
        FIRST | {"name": name, "length": length, "rope_theta": theta}
        for name, length, theta in zip(names, lengths, thetas)
    ]
    settings["rounds"][2] |= {"generator": "one"}
    settings["rounds"][3] |= {"generator": "one", "reference": "base"}
    found = rounds(settings)
    trained = [f"out/{name}/train" for name in names]
    assert [each["train"].run.model for each in found] == [str(model), *trained[:3]]  # the last promoted one
    assert [each["pairs"].run.model for each in found] == [str(model), trained[0], trained[0], trained[0]]
    # None: the model that the policy starts from, with its own RoPE
    assert [each["train"].run.reference_model for each in found] == [None, None, trained[0], str(model)]
    assert [each["train"].run.rope_theta for each in found] == [2e4, 4e4, 4e4, 4e4]
    assert [each["train"].run.max_position_embeddings for each in found] == [1024, 2048, 2048, 4096]
    raised = {"rope_theta": 4e4}
    assert [each["pairs"].run.rope for each in found] == [
        None,
        raised,
        raised,
        raised,
    ]  # those that read too few tokens
    assert ["untrained" in each for each in found] == [
        True,
        True,
        False,
        False,
    ]  # the others' starts were measured before
    assert [each["untrained"].run.model for each in found[:2]] == [str(model), trained[0]]
    assert [each["untrained"].run.rope for each in found[:2]] == [{"rope_theta": 2e4}, raised]
    assert [each["evaluate"].run.model for each in found] == trained
    assert [each["evaluate"].run.rope for each in found] == [None] * 4


def test_a_round_starts_from_any_model(model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 4096, "rope_parameters": RAISED})
    )
    starts = {"one": "base", "two": "one", "three": "one", "four": str(other), "five": "base"}
    settings = changed(model=str(model))
    settings["rounds"] = [FIRST | {"name": name, "start": start} for name, start in starts.items()]
    settings["rounds"][1] |= {"rope_theta": 4e4}
    settings["rounds"][2] |= {"rope_theta": None, "generator": "one", "reference": "one"}
    settings["rounds"][3] |= {"rope_theta": None}
    found = rounds(settings)
    one = "out/one/train"
    assert [each["train"].run.model for each in found] == [str(model), one, one, str(other), str(model)]
    untrained = [each for each in found if "untrained" in each]
    assert [each["untrained"].run.model for each in untrained] == [str(model), one, str(other)]
    assert [each["train"].run.rope_theta for each in found] == [2e4, 4e4, 2e4, 3e4, 2e4]  # that of the start
    assert [each["train"].run.max_position_embeddings for each in found] == [1024, 1024, 1024, 4096, 1024]
    generators = [
        str(model),
        one,
        one,
        "out/three/train",
        "out/four/train",
    ]  # the last ones, whatever they started from
    assert [each["pairs"].run.model for each in found] == generators
    assert [each["train"].run.reference_model for each in found] == [None, None, None, *generators[3:]]
    assert found[4]["train"].model == found[0]["train"].model  # the base, by the same identity
    assert [each["evaluate"].model.origin for each in found] == [str(model)] * 3 + [str(other), str(model)]


@pytest.mark.parametrize(
    ("stored", "train", "message"),
    [
        (False, {"lora_rank": 4, "quantization": "int8"}, "adapters on quantised weights are not merged into a model"),
        (True, {"lora_rank": 4}, "adapters on quantised weights are not merged .*; give the model in full precision"),
        (False, {"quantization": "int8"}, "quantization='int8': of adapters, and lora_rank is 0"),
    ],
)
def test_weights_of_fewer_bits_are_refused_by_the_round_that_would_train_them(model, tmp_path, stored, train, message):
    folder = shutil.copytree(model, tmp_path / "model")
    if stored:
        change(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=f"round 'one': .*{message}"):
        rounds(changed(model=str(folder), first={"train": train}))


def test_of_a_model_that_also_sees_the_rounds_train_its_text_model_where_that_is_wanted(tmp_path):
    WITH_PICTURES["gemma3"]().save_pretrained(tmp_path)
    for more, message in (
        ({}, "has other parts .* --text-only"),
        ({"text_only": True, "lora_rank": 4}, "save the text model"),
    ):
        with pytest.raises(ValueError, match=f"round 'one': .*{message}"):
            rounds(changed(model=str(tmp_path), first={"train": more}))
    settings = changed(model=str(tmp_path))
    for each in settings["rounds"]:
        each["train"] = {"text_only": True}
    one, two = (each["train"].run for each in rounds(settings))
    assert one.text_only and (one.model, one.reference_model) == (str(tmp_path), None)
    assert (two.model, two.reference_model) == ("out/one/train", None)  # a text model by itself


def test_a_start_that_cannot_be_trained_is_refused_before_anything_runs(model, documents, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    settings = changed(model=str(model), out=str(tmp_path / "out"), retention=[])
    settings["evaluate"] |= {"perplexity": [str(documents)], "tasks": []}
    for each in settings["rounds"]:
        each["documents"] = str(documents)
    settings["rounds"][1] |= {"start": str(other), "rope_theta": 3e4}
    assert len(check(Evolution.from_settings(settings))) == 9
    unread = settings | {"evaluate": settings["evaluate"] | {"perplexity": [str(tmp_path / "none")]}}
    unread["rounds"] = [each for each in settings["rounds"] if each["name"] == "one"]
    assert len(check(Evolution.from_settings(unread))) == 5  # a run looks at the base's evaluation as it begins
    with pytest.raises(ValueError, match=r"base/evaluate: .*none"):
        check(Evolution.from_settings(unread), base=True)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1 + config["num_hidden_layers"]}))
    with pytest.raises(ValueError, match=r"two/train: .*other"):
        check(Evolution.from_settings(settings))
    (other / "config.json").write_text(json.dumps(config))
    first = settings["rounds"][0]
    settings["rounds"][0] = first | {"length": 8192, "generate": {"max_chunk": 1020, "chunks": 1}}
    with pytest.raises(ValueError, match=r"one/pairs: .*reads 1024 tokens at its own RoPE.*lower max_chunk"):
        check(Evolution.from_settings(settings))
    settings["rounds"][0] = first
    (other / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"two/untrained: .*has no chat template"):
        check(Evolution.from_settings(settings))
    assert not (tmp_path / "out").exists()


def test_models_are_measured_beyond_what_they_read(model):
    settings = changed(model=str(model), first={"evaluate": {"lengths": [128, 2048]}})
    settings["evaluate"] |= {"lengths": [128, 4096], "judge": "http://h/sk-of-somebody/v1"}
    base, *_ = plan(Evolution.from_settings(settings))
    assert (
        base.run.judge.endswith("/sk-of-somebody/v1") and base.settings["judge"] == "http://h/***f9f788/v1"
    )  # for files
    first = rounds(settings)[0]
    assert base.run.rope == {"rope_theta": 1e4}  # its own: the config's limit alone is raised
    assert first["untrained"].run.rope == first["evaluate"].run.rope == {"rope_theta": 2e4}
    assert first["evaluate"].run.lengths == (128, 2048)


def test_a_server_keeps_its_own_rope(model):
    server = SHORT | {"engine": "server", "endpoints": ["http://host/v1"]}
    first = rounds(changed(model=str(model), first={"length": 4096, "generate": server}))[0]
    assert first["pairs"].run.rope is None and first["pairs"].run.endpoints == ("http://host/v1",)


def test_a_stage_tells_when_anything_before_it_has_changed(model):
    def digests(**first):
        return {
            stage.name: stage.digest for stage in plan(Evolution.from_settings(changed(model=str(model), first=first)))
        }

    before = digests()
    assert digests(train={"save_steps": 5}) == before  # decides nothing
    after = digests(train={"seed": 5})
    assert {name for name in before if before[name] != after[name]} == {
        *("one/train", "one/evaluate"),
        *("two/pairs", "two/train", "two/evaluate"),
    }


@pytest.mark.parametrize("beta", [0.1, 0.01])
@pytest.mark.parametrize("name", ["mistral-7b", "qwen2.5-7b"])
def test_the_ready_configs_are_the_published_ones(model, name, beta):
    evolution = Evolution.from_file(ready(name, beta))
    evolution = replace(evolution, model=str(model))
    found = rounds(evolution)
    out, base = evolution.out, str(model)
    start = {"mistral-7b": [base, f"{out}/128k/train", f"{out}/128k/train"], "qwen2.5-7b": [base]}[name]
    documents = {"mistral-7b": [45000, 16000, 2500], "qwen2.5-7b": [32000]}[name]
    pairs, train = [each["pairs"].run for each in found], [each["train"].run for each in found]
    assert [run.model for run in pairs] == [run.model for run in train] == start
    assert {run.reference_model for run in train} == {None}  # the model that the round starts from, at its own theta
    assert [(run.length, run.max_documents) for run in pairs] == list(zip([131072, 262144, 524288], documents))
    assert [run.max_position_embeddings for run in train] == [run.length + 2 * (1024 + 1024) for run in pairs]
    assert all(
        run.rope == {"rope_theta": 1e7} and run.short_rope is None for run in pairs
    )  # chunks at the model's own theta
    assert {run.rope_theta for run in train} == {1e7}
    assert {run.title for run in [*pairs, *train]} == {"official"}
    for run in train:
        config = run.config()
        objective = config.method.make_objective(config.objective_options)
        assert (objective.beta, objective.preference_weight) == (beta, 0.01)
        assert config.optim == {0.1: "adamw_torch", 0.01: "rmsprop"}[beta]


@pytest.mark.parametrize("name", ["mistral-7b", "qwen2.5-7b"])
def test_the_two_ready_configs_of_a_model_differ_in_beta_and_optimizer_alone(name):
    paper, command = (Evolution.from_file(ready(name, beta)) for beta in (0.1, 0.01))
    for each in command.rounds:
        each.train.update(objective_options={"beta": 0.1}, optim="adamw_torch")
    assert replace(command, out=paper.out) == paper and command.out != paper.out  # so that both can be run


def ready(name: str, beta: float) -> Path:
    return ROOT / f"examples/evolve/{name}{'-command-line' if beta == 0.01 else ''}.yaml"


def test_rounds_follow_the_recipe_of_the_evolution_or_their_own(model, caplog):
    sizes = SHORT | {"min_chunk": 48, "max_chunk": 128, "min_document": 256}
    settings = changed(model=str(model), recipe="official")
    for each, own in zip(settings["rounds"], ({}, {"recipe": "default"})):
        each |= {"generate": sizes | own, "train": {"learning_rate": 1e-4} | own}
    settings["rounds"].append(settings["rounds"][0] | {"name": "three", "train": {"recipe": "default"}})
    found, evolution = rounds(settings), Evolution.from_settings(settings)
    names = "answer_tokens, max_chunk, min_chunk, min_document, question_tokens"
    pairs, training = f"official with changes ({names})", "official with changes (learning_rate, rope_theta)"
    titles = [(pairs, training), ("default", "default"), (pairs, "default")]
    assert [tuple(each[kind].settings["recipe"] for kind in ("pairs", "train")) for each in found] == titles
    told = [recipe_of(each, plan(evolution)) for each in evolution.rounds]
    assert told == [f"pairs {pairs}, training {training}", "default", f"pairs {pairs}, training default"]
    for sentence in (
        "answer_tokens is 1024 in the recipe, 24 came",
        "learning_rate is 5e-07 in the recipe, 0.0001 came",
    ):
        assert caplog.text.count(sentence) == 1  # of all rounds, plans and copies
    first, second = found[0], found[1]
    assert first["pairs"].settings["answer_temperature"] == 1.0 and first["train"].settings["optim"] == "rmsprop"
    assert second["pairs"].settings["answer_temperature"] == 0.0 and "optim" not in second["train"].settings
    room = 2 * (80 + 24)  # in the official recipe `length` bounds the document alone
    assert [each["train"].run.max_position_embeddings for each in found] == [1024 + room] * 3
    assert [each["pairs"].run.short_rope for each in found] == [None] * 3


def test_variables_of_the_chat_template_reach_all_stages_that_name_no_others(model, tmp_path):
    copied = Path(shutil.copytree(model, tmp_path / "model"))
    template = copied / "chat_template.jinja"
    template.write_text("{% if tone is defined %}{{ tone }}{% endif %}" + template.read_text())
    plain = changed(model=str(copied), retention=[])
    assert all("template_kwargs" not in stage.settings for each in rounds(plain) for stage in each.values())
    settings = plain | {"template_kwargs": {"tone": "calm"}}
    settings["rounds"][1] |= {"train": {"template_kwargs": {}}, "evaluate": {"template_kwargs": {"tone": "loud"}}}
    first, second = rounds(settings)
    calm = {"tone": "calm"}
    for stage in (*first.values(), second["pairs"]):
        assert stage.run.template_kwargs == stage.settings["template_kwargs"] == calm
    assert second["train"].run.template_kwargs is None
    assert [second[kind].run.template_kwargs for kind in ("untrained", "evaluate")] == [{"tone": "loud"}] * 2
    with pytest.raises(ValueError, match="template_kwargs: tone=nan: expected a JSON value"):
        Evolution.from_settings(settings | {"template_kwargs": {"tone": float("nan")}})
    settings["rounds"][0]["documents"] = str(tmp_path)
    (tmp_path / "text.txt").write_text("Wind.")
    with pytest.raises(ValueError, match=r"does not read tine, .* did you mean tone\?"):
        check(Evolution.from_settings(settings | {"template_kwargs": {"tine": "calm"}}))


def test_a_launcher_is_a_list_of_words_or_a_line():
    line = "accelerate launch --config_file 'my file.yaml'"
    for given, words in (
        (["torchrun", "--nproc-per-node", 8], ("torchrun", "--nproc-per-node", "8")),
        (line, ("accelerate", "launch", "--config_file", "my file.yaml")),
        ([], ()),
        ("", ()),
    ):
        assert Evolution.from_settings(changed(launch=given)).launch == words
