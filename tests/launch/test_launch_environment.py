"""The rank is found whatever started the process."""

from __future__ import annotations

import pytest

from megatron.errors import LaunchError
from megatron.launch.environment import RankEnvironment, choose_backend, read_rank_environment

TORCH = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "7",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[07-08],other",
    "SLURM_JOB_ID": "21234",
}


def test_nothing_set_is_one_process() -> None:
    assert read_rank_environment({}) == RankEnvironment()
    assert read_rank_environment({}).is_main


def test_torchrun_and_deepspeed() -> None:
    assert read_rank_environment(TORCH) == RankEnvironment(3, 1, 4, 2, "a", 7, "torch")


def test_openmpi_leaves_the_address_open() -> None:
    env = read_rank_environment(OPENMPI)
    assert (env.rank, env.local_rank, env.world_size, env.source) == (1, 1, 2, "openmpi")
    assert env.master_addr == ""


def test_mpich_and_a_slurm_step_that_sets_the_same_names() -> None:
    env = read_rank_environment(MPICH)
    assert (env.rank, env.local_rank, env.world_size, env.local_world_size, env.source) == (2, 0, 4, 2, "mpich")
    assert read_rank_environment({**SLURM, **MPICH}).source == "slurm"


def test_slurm_step_takes_first_host_and_a_port_of_the_job() -> None:
    env = read_rank_environment(SLURM)
    assert (env.rank, env.local_rank, env.world_size, env.local_world_size) == (5, 1, 8, 4)
    assert (env.master_addr, env.master_port) == ("node07", 15000 + 1234)


def test_slurm_allocation_without_srun_is_one_process() -> None:
    env = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}
    assert read_rank_environment(env).world_size == 1


@pytest.mark.parametrize("change", [{"RANK": "4"}, {"WORLD_SIZE": "x"}])
def test_nonsense_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(LaunchError):
        read_rank_environment({**TORCH, **change})


def test_backend() -> None:
    assert choose_backend("nccl", False) == "gloo"
    assert choose_backend(None, True) == "nccl"
    assert choose_backend("gloo", True) == "gloo"
