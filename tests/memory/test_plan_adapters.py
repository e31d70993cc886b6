"""Plans of adapters on a frozen base, in full precision or quantised: what is counted, and what is real."""

import json

import pytest
import torch

from longpo_ops.memory.adapters import Adapters, scheme_of
from longpo_ops.memory.mesh import Mesh
from longpo_ops.memory.plan import ERROR, Settings, Work, predict, weights_of

from .models import small
from .test_commands import run
from .test_plan import GIB, ROWS, machine, measured


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_peak_of_a_step_of_adapters(quantization):
    adapters = Adapters(8, quantization=quantization)
    work = Work(small(), ROWS, dtype=torch.float32, workspace_bytes=8 << 20, adapters=adapters)
    predicted = predict(work, Settings(), machine(GIB)).peak.total
    real = measured(work, Settings())
    assert abs(predicted / real - 1) < ERROR, (predicted, real)


def test_frozen_weights_have_no_gradients_master_or_states():
    config, adapters = small(), Adapters(8)
    base, work = weights_of(config), Work(config, 512, accumulation=1, adapters=adapters)
    trained = 4 * 8 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 384))
    assert work.weights.trained == trained and work.weights.total == base.total
    parts = predict(work, Settings(), machine(GIB)).phases[-1].parts
    assert parts["weights"] == 2 * base.total + 4 * trained
    assert (parts["gradients"], parts["optimizer states"], parts["master"]) == (4 * trained, 8 * trained, 0)
    some = Work(config, 512, adapters=Adapters(8, ("q_proj",)))
    assert some.weights.trained == 4 * 8 * (128 + 128)


def test_a_quantised_base_takes_its_bits():
    config = small()
    linear = 4 * (128 * (128 + 2 * 64 + 128) + 3 * 128 * 384)

    def weights(scheme: str) -> int:
        work = Work(config, 512, adapters=Adapters(8, quantization=scheme))
        return predict(work, Settings(), machine(GIB)).peak.parts["weights"]

    assert weights("none") - weights("int8") == linear
    assert weights("int8") - weights("nf4") == linear // 2 - linear // 64 - linear // 4096
    for told, scheme in (
        ({"quant_method": "torchao"}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
    ):
        config.quantization_config = told
        assert scheme_of(config) == scheme
        with pytest.raises(ValueError, match=r"quantised, which steps of full fine-tuning cannot move; give lora_rank"):
            Work(config, 512)
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match=r"quantised .gptq., and the planner knows bitsandbytes and torchao"):
        scheme_of(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adapters(0), "lora_rank=0: expected an int >= 1"),
        (lambda: Adapters(8, ()), r"lora_target_modules=.*: expected all-linear"),
        (lambda: Adapters(8, quantization="int7"), "quantization='int7': expected one of"),
        (lambda: Work(small(), 64, adapters=Adapters(8), mesh=Mesh(2)), "expected one card, as adapters"),
    ],
)
def test_what_is_no_plan_of_adapters_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_command_plans_adapters(tmp_path):
    small().save_pretrained(tmp_path)
    given = ("--model", str(tmp_path), "--length", "512", "--device-gib", "8")
    told = json.loads(run(*given, "--lora-rank", "8", "--quantization", "nf4", "--json").output)
    assert told["adapters"]["rank"] == 8 and told["trained"] < told["weights"]
    assert told["peak"]["optimizer states"] == 8 * told["trained"]
    assert "frozen weights (nf4 but for the head)" in run(*given, "--lora-rank", "8", "--quantization", "nf4").output
    alone = run(*given, "--quantization", "nf4")
    assert alone.exit_code == 2 and "quantization: of adapters" in " ".join(alone.output.split())
