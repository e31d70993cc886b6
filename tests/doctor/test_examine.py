"""`longpo doctor`: models that train and models that do not, by the run's own check; no part hides another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, TorchAoConfig
from typer.testing import CliRunner

from longpo_ops.cli import app
from longpo_ops.data import ChatFormat, Pair, packed_length
from longpo_ops.doctor.pair import sized_record

from ..train.tiny import run_tiny, write_home


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments), "--set", "use_cpu=true"])


def ask(model: Path, *more) -> tuple[int, dict]:
    done = invoke("doctor", "--model", model, "--json", *more)
    told = json.loads(done.stdout)
    told["parts"] = {part["name"]: (part["takes"], part["told"]) for part in told["parts"]}
    return done.exit_code, told


def dry_run(home: Path, model: Path, output: Path, *more) -> int:
    given = ("--model", model, "--data", home / "pairs.jsonl", "--output-dir", output, *more)
    return invoke("train", *given, "--dry-run").exit_code


def change(model: Path, **fields) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def remote_code(model: Path) -> None:
    classes = {"AutoConfig": "house.HouseConfig", "AutoModelForCausalLM": "house.HouseForCausalLM"}
    change(model, model_type="house", architectures=["HouseForCausalLM"], auto_map=classes)
    lines = ["from transformers import LlamaConfig, LlamaForCausalLM", "", "class HouseConfig(LlamaConfig):"]
    lines += [
        '    model_type = "house"',
        "",
        "class HouseForCausalLM(LlamaForCausalLM):",
        "    config_class = HouseConfig",
    ]
    (model / "house.py").write_text("\n".join(lines) + "\n")


def encoder(model: Path) -> None:
    vocab_size = len(AutoTokenizer.from_pretrained(model))
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertLMHeadModel(BertConfig(vocab_size=vocab_size, **sizes)).save_pretrained(model)


def no_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()


def quantised_head(model: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True, modules_to_not_convert=[])
    AutoModelForCausalLM.from_pretrained(model, quantization_config=config).save_pretrained(model)


def more_layers_than_there_are(model: Path) -> None:
    change(model, num_hidden_layers=4)


def fewer_layers_than_there_are(model: Path) -> None:
    change(model, num_hidden_layers=1)


REFUSED = {  # the part that says so, and its words: what came, and what to do
    remote_code: ("config", "custom code", "trust_remote_code"),
    encoder: ("head", "BertLMHeadModel is an encoder", "expected a causal LM"),
    no_template: ("chat template", "has no chat template", "use an instruction-tuned model's tokenizer"),
    quantised_head: ("head", "stored quantised (lm_head", "leave lm_head|left out of quantisation"),
    more_layers_than_there_are: ("weights", "18 weights are missing (model.layers.2.", "mend its config"),
    fewer_layers_than_there_are: ("weights", "9 weights are unknown to its config (model.layers.1.", "mend its config"),
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_is_refused_is_one_line_by_name_and_hides_nothing_else(home, tmp_path, spoil):
    shutil.copytree(home / "model", model := tmp_path / "model")
    spoil(model)
    more = ("--lora-rank", 4) if spoil is quantised_head else ()  # without adapters nothing would train, either
    code, told = ask(model, *more)
    name, came, advice = REFUSED[spoil]
    takes, why = told["parts"][name]
    assert takes is False and came in why and any(word in why for word in advice.split("|")) and "\n" not in why
    assert (code, told["starts"], told["command"]) == (1, False, None)
    verdict = told["parts"]["training"]
    assert verdict[0] is False and came in verdict[1] and verdict[1].startswith(("model '", "the tokenizer '"))
    assert "'None'" not in verdict[1]
    good = ["machine", *(["tokenizer", "chat template"] if name in ("head", "weights") else [])]
    good += ["weights", "shared prefix", "offload"] if name == "chat template" else []
    assert all(told["parts"][part][0] for part in good), told
    assert dry_run(home, model, tmp_path / "run", *more) == 1


def test_what_trains_is_told_by_the_same_check(home, tmp_path):
    code, told = ask(home / "model")
    assert (code, told["starts"]) == (0, True) and told["plan"] is None
    assert {takes for takes, _ in told["parts"].values()} == {True}
    assert "[[It hangs on the hook beside the door.<|eot_id|>]]" in told["parts"]["chat template"][1]
    assert "torch.float32 on cpu" in told["parts"]["attention kernels"][1]
    assert dry_run(home, home / "model", tmp_path / "run") == 0
    page = invoke("doctor", "--model", home / "model")
    assert page.exit_code == 0 and max(map(len, page.stdout.splitlines()[1:-1])) <= 118
    assert page.stdout.splitlines()[-1].startswith("next: longpo train --model ")
    run_tiny(home, tmp_path / "trained", max_steps=1)  # and it does


@pytest.mark.parametrize("memory", ["enough", "little"])
def test_a_length_asks_for_the_plan(home, tmp_path, memory):
    few = [] if memory == "enough" else ["--set", "host_bytes=1000000", "--set", "fit=auto"]
    code, told = ask(home / "model", "--length", 600, *few)
    assert code == dry_run(home, home / "model", tmp_path / "run", "--fit", "auto", *few) == (memory == "little")
    if memory == "little":
        assert "nothing fits" in told["parts"]["training"][1]
        return
    assert told["command"].endswith("--fit auto") and 500 < told["plan"]["length"] <= 600 and told["plan"]["fits"]


def test_adapters_and_a_family_that_is_not_known(home, tmp_path):
    _, told = ask(home / "model", "--lora-rank", 2)
    assert told["starts"] and "in adapters train" in told["parts"]["weights"][1]
    assert "--lora-rank 2" in told["command"]
    shutil.copytree(home / "model", model := tmp_path / "model")
    remote_code(model)
    code, told = ask(model, "--set", "trust_remote_code=true")
    assert code == dry_run(home, model, tmp_path / "run", "--set", "trust_remote_code=true") == 0
    if not told["parts"]["shared prefix"][0]:
        assert "separate sequences" in told["parts"]["training"][1]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (("--length", "0"), "length=0: expected"),
        (("--set", "data=pairs.jsonl"), "as a pair is made here"),
        (("--set", "objective=none"), "objective"),
        (("--set", "no_such_setting=1"), "no_such_setting"),
    ],
)
def test_wrong_usage(home, wrong, words):
    done = invoke("doctor", "--model", home / "model", *wrong)
    assert done.exit_code == 2 and words in " ".join(done.output.split()), done.output


@pytest.mark.parametrize("length", [None, 200, 1000])
def test_a_pair_of_a_length(home, length):
    chat = ChatFormat(AutoTokenizer.from_pretrained(home / "model"))
    tokens = packed_length(chat.tokenize(Pair.from_record(sized_record(chat, length))))
    assert tokens < 200 if length is None else length - 40 < tokens <= length
    with pytest.raises(ValueError, match="length=5: the shortest pair has"):
        sized_record(chat, 5)


def test_numbers_are_what_is_not_looked_at(home, tmp_path):
    """As in a dry run: the verdict is of headers, and the run itself refuses NaN."""
    shutil.copytree(home / "model", model := tmp_path / "model")
    network = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        network.lm_head.weight.fill_(float("nan"))
    network.save_pretrained(model)
    assert ask(model)[0] == 0 == dry_run(home, model, tmp_path / "run")
