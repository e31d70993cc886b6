"""What a launcher has told the processes of a run, in their environment: how many they are, and how they share packs.

    WORLD_SIZE                          torchrun, accelerate launch: processes
    PARALLELISM_CONFIG_CP_SIZE, ...     accelerate launch, from parallelism_config of its file; also its FSDP_* settings

    world = data ranks x sequence_parallel      a pack's rows lie on sequence_parallel processes, each pack on others

The rows of a pack are shared by exchanging heads for rows around attention (Ulysses). Other ways are refused by name: ring
attention cannot say that a rejected tail sees the prefix and not the chosen tail; tensor parallelism moves 8 to 17 times the
bytes and shards no layer inputs; DeepSpeed's sequence parallelism pads rows and averages losses per token.
"""

from __future__ import annotations

import os

INSTEAD = "leave it out and set sequence_parallel (or parallelism_config_cp_size), which exchanges heads for rows"


def processes() -> int:
    """That train together, as launchers tell; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def launched(name: str) -> int | None:
    """A size of accelerate's parallelism_config ("cp", "dp_shard", ...), or None where no launcher gave one."""
    if not _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return None
    return int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", 1))


def launched_fsdp() -> int | None:
    """The version of FSDP in a launcher's file, or None where it names none. (Trainer itself sets ACCELERATE_USE_FSDP.)"""
    version = os.environ.get("FSDP_VERSION")
    return None if version is None else int(version)


def launched_state_dict() -> str | None:
    """How a launcher's file would have FSDP's checkpoints, or None where it does not say."""
    return os.environ.get("FSDP_STATE_DICT_TYPE")


def is_sharded() -> bool:
    """Whether the launcher's file, or a trainer before in this process, has FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def is_deepspeed() -> bool:
    """Whether the launcher's file has DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def sequence_parallel(given: int | None) -> int:
    """Processes that share the rows of a pack: `given`, or what the launcher's file says, or 1.

    Raises ValueError where both say and differ, for a launcher's file that asks for another kind of parallelism, and for
    processes of srun or mpirun that nobody told of each other.
    """
    refuse_others(launched("tp") or 1, launched("sp") or 1)
    _refuse_ring()
    _refuse_untold()
    told = launched("cp")
    if None not in (given, told) and given != told:
        raise ValueError(
            f"sequence_parallel={given}, and the launcher's file has parallelism_config_cp_size {told}: expected one of the "
            "two, or the same number in both"
        )
    return given or told or 1


def refuse_others(tp: int, sp: int) -> None:
    """Raises ValueError where tensor parallelism, or DeepSpeed's sequence parallelism, has more than one process."""
    if tp > 1:
        raise ValueError(f"parallelism_config_tp_size={tp}: tensor parallelism is not supported; {INSTEAD}")
    if sp > 1:
        raise ValueError(
            f"parallelism_config_sp_size={sp}: DeepSpeed's sequence parallelism is not supported; {INSTEAD}"
        )


def data_ranks(shared: int) -> int:
    """Processes, or groups of `shared`, that have packs of their own."""
    return max(1, processes() // shared)


def check_processes(shared: int) -> None:
    """Raises ValueError where the processes cannot be parted into groups of `shared`, or as the launcher's file says."""
    world = processes()
    if world % shared:
        raise ValueError(
            f"sequence_parallel={shared} with {world} {'process' if world == 1 else 'processes'} (WORLD_SIZE): expected a "
            f"divisor of their number; start them with torchrun --nproc-per-node {shared} -m longpo_ops.cli train, or lower "
            "sequence_parallel"
        )
    if launched("cp") is not None:
        _check_total(world)


def check_group(world: int) -> None:
    """Raises ValueError where the launcher started several processes, and each found itself alone: as many solo runs."""
    if processes() > 1 and world == 1:
        raise ValueError(
            f"WORLD_SIZE={processes()}, but the process group has 1 process, so each would train alone and write over the "
            "others: no accelerator was found for it; on CPUs set use_cpu=true, elsewhere look whether torch sees the GPUs"
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _refuse_untold() -> None:
    """srun and mpirun start processes and set nothing that torch reads: each would train alone, in one folder."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        started = int(os.environ.get(name, 1))
        if started > 1 and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"{started} processes were started ({name}) without WORLD_SIZE, so each would train alone; start one "
                "torchrun or accelerate launch on each machine (srun --ntasks-per-node 1 torchrun ...)"
            )


def _refuse_ring() -> None:
    strategy = os.environ.get("PARALLELISM_CONFIG_CP_COMM_STRATEGY", "allgather")
    if (launched("cp") or 1) > 1 and strategy != "allgather":
        raise ValueError(
            f"parallelism_config_cp_comm_strategy={strategy}: ring attention is not supported, as it cannot leave the chosen "
            "tail out of a rejected tail's sight; leave it out: heads are exchanged for rows"
        )


def _check_total(world: int) -> None:
    sizes = {name: launched(name) or 1 for name in ("dp_replicate", "dp_shard", "cp")}
    total = sizes["dp_replicate"] * sizes["dp_shard"] * sizes["cp"]
    if total != world:
        told = ", ".join(f"parallelism_config_{name}_size {size}" for name, size in sizes.items())
        raise ValueError(
            f"the launcher's file has {told}, which make {total} processes; {world} are started: expected "
            f"parallelism_config_dp_shard_size {world // (sizes['dp_replicate'] * sizes['cp'])}, or num_processes {total}"
        )
