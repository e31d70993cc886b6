"""What LongPOConfig makes of processes that share packs, as far as one process can ask (the rest: tests/parallel)."""

from dataclasses import dataclass

import numpy as np
import pytest
from accelerate import ParallelismConfig
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed

from longpo_ops.train import LongPOConfig
from longpo_ops.train.checks import check_pairs
from longpo_ops.train.run import TrainRun

from .tiny import make_model, make_pair


def test_one_process_has_its_packs_alone(tmp_path):
    config = LongPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (config.sequence_parallel, config.data_ranks, config.is_sharded) == (1, 1, False)
    assert config.parallelism_config is None and not config.fsdp


@pytest.mark.parametrize("value", [0, -2, 1.5, "2"])
def test_it_is_a_whole_number(tmp_path, value):
    with pytest.raises(ValueError, match=f"sequence_parallel={value!r}: expected a whole number of at least 1"):
        LongPOConfig(output_dir=str(tmp_path), use_cpu=True, sequence_parallel=value)


def test_a_single_process_shares_with_none(tmp_path):
    with pytest.raises(
        ValueError, match=r"sequence_parallel=2 with 1 process \(WORLD_SIZE\).*torchrun --nproc-per-node 2"
    ):
        LongPOConfig(output_dir=str(tmp_path), use_cpu=True, sequence_parallel=2)


def test_numbers_of_numpy_and_flags_as_numbers_are_taken(tmp_path):
    given = dict(max_steps=np.int64(5), learning_rate=np.float32(1e-5), pack_tokens=np.int32(64))
    config = LongPOConfig(output_dir=str(tmp_path), use_cpu=1, bf16=0, gradient_checkpointing=0, tf32=0, **given)
    taken = [getattr(config, name) for name in given]
    assert taken == [5, float(np.float32(1e-5)), 64] and list(map(type, taken)) == [int, float, int]
    assert [config.use_cpu, config.gradient_checkpointing, config.tf32] == [True, False, False]
    assert config.gradient_checkpointing is False and type(config.max_grad_norm) is float
    with pytest.raises(ValueError, match="gradient_checkpointing=2: expected bool"):
        LongPOConfig(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=2)
    with pytest.raises(ValueError, match="max_grad_norm=nan: expected a finite number"):
        LongPOConfig(output_dir=str(tmp_path), use_cpu=True, max_grad_norm=np.float32("nan"))


@dataclass
class OwnConfig(LongPOConfig):
    """With a field of its own."""

    margin: float = 0.5


def test_fields_of_a_subclass_are_settings_too(tmp_path):
    assert OwnConfig(output_dir=str(tmp_path), use_cpu=True, margin=2).margin == 2
    with pytest.raises(ValueError, match="margin='wide': expected float"):
        OwnConfig(output_dir=str(tmp_path), use_cpu=True, margin="wide")


def test_a_launchers_file_of_deepspeed_shares_no_packs(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match='deepspeed="of the launcher\'s file" with sequence_parallel=2'):
        LongPOConfig(output_dir=str(tmp_path), sequence_parallel=2)


def test_a_pack_shorter_than_the_processes_that_share_it_is_refused_by_its_record(tmp_path):
    config, pair = LongPOConfig(output_dir=str(tmp_path), objective="simpo", use_cpu=True), make_pair(3)
    config.sequence_parallel = 64
    check_pairs([make_pair(4, document=80)], config, None)
    with pytest.raises(ValueError, match=r"record 'pair-3': \d\d tokens in its pack, fewer than the 64 processes"):
        check_pairs([make_pair(4, document=80), pair], config, None)


def test_sequences_of_a_recipes_step_are_those_of_groups_that_share_packs(monkeypatch):
    run = TrainRun("m", "d", "o", recipe="official", training={"sequence_parallel": 4})
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert run.settings()["gradient_accumulation_steps"] == 4


def test_a_mesh_of_ones_own_is_looked_at_too(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    given = dict(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="sequence_parallel=2, and parallelism_config has cp_size=4"):
        LongPOConfig(sequence_parallel=2, parallelism_config=ParallelismConfig(cp_size=4), **given)
    with pytest.raises(ValueError, match="parallelism_config_tp_size=4: tensor parallelism is not supported"):
        LongPOConfig(parallelism_config=ParallelismConfig(tp_size=4), **given)


class ZeRO3:
    """What transformers asks of the settings of DeepSpeed."""

    def is_zero3(self):
        return True


def test_models_are_made_whole_beside_settings_of_zero3(tmp_path):
    """Which TrainingArguments leave to transformers, for all models to be made."""
    deepspeed.set_hf_deepspeed_config(settings := ZeRO3())
    LongPOConfig(output_dir=str(tmp_path), use_cpu=True)
    model = make_model()
    made = AutoModelForCausalLM.from_config(model.config)
    assert settings.is_zero3() and {p.shape for p in made.parameters()} == {p.shape for p in model.parameters()}
