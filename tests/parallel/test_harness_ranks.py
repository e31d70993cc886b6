"""The harness itself: results by rank, a failure's own traceback, the stack of a rank that hangs, accelerate's mesh on CPUs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from .ranks import RanksFailed, gpus_of_cpus, run_ranks


def numbers(step):
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return dist.get_rank() * step, total, os.environ["GIVEN"]


def raises_on_one():
    if dist.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def dies_on_one():
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hangs_on_one():
    while dist.get_rank() == 1:
        time.sleep(0.1)  # here it hangs
    dist.barrier()


def mesh_of_accelerate():
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig

    sharded = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    made = Accelerator(cpu=True, fsdp_plugin=sharded, parallelism_config=ParallelismConfig(cp_size=2))
    return made.torch_device_mesh["cp"].size()


def test_results_come_by_rank_with_the_environment():
    got = run_ranks(numbers, 3, 10, environment={"GIVEN": "yes"})
    assert got == [(10 * rank, torch.tensor([3.0]), "yes") for rank in range(3)]


@pytest.mark.parametrize(
    "function, said", [(raises_on_one, "rank 1 has had enough"), (dies_on_one, "exit code 7")], ids=["raises", "dies"]
)
def test_a_failure_is_told_with_its_rank_and_the_others_end(function, said):
    began = time.monotonic()
    with pytest.raises(RanksFailed, match=f"rank 1: (.|\n)*{said}") as failed:
        run_ranks(function, 2)
    assert said in failed.value.told[1]
    assert time.monotonic() - began < 55  # not the group's own timeout


def test_ranks_that_hang_are_told_with_their_stacks():
    with pytest.raises(RanksFailed) as failed:
        run_ranks(hangs_on_one, 2, hang=10)
    assert "still running" in failed.value.told[1] and "in hangs_on_one" in failed.value.told[1]
    assert "imed out" in failed.value.told[0]


def test_accelerate_makes_its_mesh_of_cpus_passed_off_as_gpus():
    assert run_ranks(mesh_of_accelerate, 2, prelude=gpus_of_cpus) == [2, 2]
