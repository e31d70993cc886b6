"""`fit: auto` of adapters, from `longpo train` to its end: the plan is announced, is `longpo plan`s, and is what it took."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from longpo_ops.pretrained import plain_parts
from longpo_ops.train import LongPOTrainer
from longpo_ops.train.run import TrainRun, prepare

from ..memory.models import small
from ..memory.test_commands import run as plan_command
from ..memory.test_plan import ERROR, allocated
from .tiny import run_settings, run_tiny, write_home

CASES = {
    "adapters": {"lora_rank": 8},
    "adapters on 8 bits, short inputs beside": {"lora_rank": 8, "quantization": "int8", "objective": "solopo_simpo"},
}
LEFT_FREE = ("reserve", "error")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = write_home(tmp_path_factory.mktemp("home"))
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    sizes = dict(vocab_size=len(tokenizer), intermediate_size=1024, max_position_embeddings=4096)
    AutoModelForCausalLM.from_config(small(**sizes)).save_pretrained(home / "model")
    (home / "one.jsonl").write_text((home / "kto_pairs.jsonl").read_text().splitlines()[2] + "\n")
    return home


def needed(peak: dict[str, int]) -> dict[str, int]:
    return {name: nbytes for name, nbytes in peak.items() if name not in LEFT_FREE}


@pytest.mark.parametrize("case", CASES)
def test_a_run_takes_what_its_plan_says(home, tmp_path, caplog, monkeypatch, case):
    train, real = LongPOTrainer.train, []

    def measured(self, *args, **kwargs):
        resident = sum(part.nbytes for p in self.model.parameters() for part in plain_parts(p))
        real.append(resident + allocated(lambda: train(self, *args, **kwargs)))

    monkeypatch.setattr(LongPOTrainer, "train", measured)
    more = dict(data=str(home / "one.jsonl"), fit="auto", objective="simpo", workspace_bytes=8 << 20, max_steps=2)
    more |= dict(learning_rate=1e-2, save_strategy="no", gradient_accumulation_steps=1) | CASES[case]
    plan = prepare(TrainRun.from_settings(run_settings(home, tmp_path, **more))).plan
    caplog.set_level("INFO", "longpo_ops.train")
    trainer = run_tiny(home, tmp_path, **more)
    assert f"{plan.work.length} tokens, {plan.peak.total / 2**30:.3g} GiB predicted" in caplog.text
    assert trainer.memory.states == plan.settings.states and trainer.state.global_step == 2
    predicted = sum(needed(plan.peak.parts).values())
    assert abs(predicted / real[0] - 1) < ERROR, (predicted, real, plan.peak)
    words = ["--model", home / "model", "--length", plan.work.length, "--dtype", "float32", "--accumulation", 1]
    words += ["--workspace-gib", 2**-7, "--lora-rank", 8]
    words += ["--quantization", CASES[case].get("quantization", "none"), "--json"]
    told = json.loads(plan_command(*map(str, words)).output)
    assert needed(told["peak"]) == needed(plan.peak.parts) and told["peak_phase"] == plan.peak.name
