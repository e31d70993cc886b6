"""What a launcher's environment says of a run, and which of it is refused by name."""

import pytest

from longpo_ops import launch

CP = "PARALLELISM_CONFIG_CP_SIZE"


@pytest.fixture
def told(monkeypatch):
    """Sets the environment of a launcher; sizes of parallelism_config are on with their first one."""
    for name in ("WORLD_SIZE", "RANK", "FSDP_VERSION", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        monkeypatch.delenv(name, raising=False)

    def tell(**sizes):
        for name, value in sizes.items():
            if name.startswith("PARALLELISM_CONFIG"):
                monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
            monkeypatch.setenv(name, str(value))

    return tell


def test_without_a_launcher_a_process_is_alone(told):
    assert (launch.processes(), launch.rank(), launch.sequence_parallel(None), launch.data_ranks(1)) == (1, 0, 1, 1)
    assert (launch.launched("cp"), launch.launched_fsdp(), launch.is_sharded(), launch.is_deepspeed()) == (
        None, None, False, False
    )  # fmt: skip
    launch.check_processes(1)
    launch.check_group(1)


def test_torchrun_tells_processes_and_the_settings_how_many_share(told):
    told(WORLD_SIZE=8, RANK=3)
    assert (launch.processes(), launch.rank(), launch.sequence_parallel(4), launch.data_ranks(4)) == (8, 3, 4, 2)
    launch.check_processes(4)


def test_the_launchers_file_tells_how_many_share(told):
    told(WORLD_SIZE=8, FSDP_VERSION=2, ACCELERATE_USE_FSDP="true", **{CP: 4, "PARALLELISM_CONFIG_DP_SHARD_SIZE": 2})
    assert launch.sequence_parallel(None) == launch.sequence_parallel(4) == launch.launched("cp") == 4
    assert launch.launched_fsdp() == 2 and launch.is_sharded()
    launch.check_processes(4)


def test_a_file_without_parallelism_is_data_parallel(told):
    told(WORLD_SIZE=8, FSDP_VERSION=2, ACCELERATE_USE_FSDP="true")
    assert launch.sequence_parallel(None) == 1 and launch.sequence_parallel(8) == 8


REFUSED = [
    (2, {CP: 8}, r"sequence_parallel=2, and .* parallelism_config_cp_size 8: expected one of the two"),
    (1, {CP: 8}, r"sequence_parallel=1, and .* parallelism_config_cp_size 8"),
    (3, {}, r"sequence_parallel=3 with 8 processes \(WORLD_SIZE\): expected a divisor"),
    (
        None,
        {CP: 4},
        r"cp_size 4, which make 4 processes; 8 are started: expected parallelism_config_dp_shard_size 2, or",
    ),
    (None, {"PARALLELISM_CONFIG_TP_SIZE": 2}, r"parallelism_config_tp_size=2: tensor parallelism is not supported"),
    (None, {"PARALLELISM_CONFIG_SP_SIZE": 2}, r"parallelism_config_sp_size=2: DeepSpeed's sequence parallelism"),
    (None, {CP: 8, "PARALLELISM_CONFIG_CP_COMM_STRATEGY": "alltoall"}, r"cp_comm_strategy=alltoall: ring attention"),
]


@pytest.mark.parametrize(("given", "sizes", "said"), REFUSED)
def test_what_does_not_go_is_refused_with_its_numbers(told, given, sizes, said):
    told(WORLD_SIZE=8, **sizes)
    with pytest.raises(ValueError, match=said):
        launch.check_processes(launch.sequence_parallel(given))


def test_processes_that_found_no_group_are_refused(told):
    told(WORLD_SIZE=2)
    launch.check_group(2)
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2, but the process group has 1 process.* use_cpu=true"):
        launch.check_group(1)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_nobody_told_of_each_other_are_refused(monkeypatch, name):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "8")
    with pytest.raises(ValueError, match=rf"8 processes were started \({name}\) without WORLD_SIZE.*torchrun"):
        launch.sequence_parallel(None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launch.sequence_parallel(None) == 1
