"""Who am I: the rank of this process, from whatever started it (torchrun, DeepSpeed, mpirun, srun, or nothing).

Reading needs no torch. `init_process_group` then connects the processes and makes one timeout hold for every group.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from megatron.errors import LaunchError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class RankEnvironment:
    """This process's place; `source` says which starter's variables were found (torch, openmpi, mpich, slurm or none)."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    source: str = "none"

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes logs and files."""
        return self.rank == 0


def read_rank_environment(environ: Mapping[str, str] | None = None) -> RankEnvironment:
    """Find rank and world size in the environment.

    `RANK`/`WORLD_SIZE` (torchrun, DeepSpeed) win over OpenMPI's variables, those over MPICH's and Slurm's. A Slurm allocation
    without `srun` is one process: only a job step has a step id.

    Raises:
        LaunchError: a variable is not a number, or rank and world size contradict each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        found = _make(env, "torch", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    elif "OMPI_COMM_WORLD_RANK" in env:
        prefix = "OMPI_COMM_WORLD_"
        found = _make(env, "openmpi", *(prefix + name for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")))
    elif "PMI_RANK" in env and "PMI_SIZE" in env and "SLURM_STEP_ID" not in env:  # MPICH's mpirun; some sruns set them too
        found = _make(env, "mpich", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS")
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        found = _make(env, "slurm", "SLURM_PROCID", "SLURM_LOCALID", total, "SLURM_STEP_TASKS_PER_NODE")
    else:
        return RankEnvironment()
    if not 0 <= found.rank < found.world_size:
        raise LaunchError(
            f"rank {found.rank} of {found.world_size} processes is impossible",
            where=f"environment of the {found.source} launcher",
        )
    return found


def _make(env: Mapping[str, str], source: str, rank: str, local: str, size: str, local_size: str) -> RankEnvironment:
    world = _integer(env, size, 1)
    port = _integer(env, "MASTER_PORT", _slurm_port(env) if source == "slurm" else DEFAULT_PORT)
    return RankEnvironment(
        rank=_integer(env, rank, 0),
        local_rank=_integer(env, local, 0),
        world_size=world,
        local_world_size=_integer(env, local_size, world),
        master_addr=env.get("MASTER_ADDR") or (_slurm_first_host(env) if source == "slurm" else ""),
        master_port=port,
        source=source,
    )


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    if not text:
        return default
    match = re.match(r"\d+", text)  # Slurm writes `4(x2)` for four tasks on each of two nodes
    if not match:
        raise LaunchError(f"environment variable {name} is '{text}', a number was expected")
    return int(match.group())


def _slurm_first_host(env: Mapping[str, str]) -> str:
    """First host of `node[01-04,7],other`; the rest of Slurm's grammar is not needed for the first."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    return (match.group(1) + (match.group(2) or "")) if match else "127.0.0.1"


def _slurm_port(env: Mapping[str, str]) -> int:
    """A port that two jobs on one node do not share."""
    return 15000 + _integer(env, "SLURM_JOB_ID", 0) % 20000


def _mpi_master(env: RankEnvironment) -> str:
    """Address of rank 0 under mpirun, which sets none: known on one host, asked through MPI on several."""
    if env.world_size == env.local_world_size:
        return "127.0.0.1"
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(
            "mpirun over several hosts needs the address of rank 0",
            why=f"mpi4py is not usable ({error})",
            hint="pip install -r requirements/requirements-mpi.txt, or export MASTER_ADDR with mpirun -x",
        ) from error
    import socket

    own = socket.gethostbyname(socket.gethostname())
    return str(MPI.COMM_WORLD.bcast(own, root=0))


def choose_backend(wanted: str | None, has_accelerator: bool) -> str:
    """`nccl` on accelerators and `gloo` on CPUs; NeoX's default `nccl` on a CPU machine means gloo."""
    if not has_accelerator:
        return "gloo"
    return wanted or "nccl"


def init_process_group(env: RankEnvironment, backend: str | None = None, timeout_s: float = 1800.0) -> None:
    """Connect all processes; nothing to do for one. Sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_* for libraries that read them.

    Args:
        backend: nccl | gloo | None (what the machine has). timeout_s: of every collective in every group.

    Raises:
        LaunchError: the processes do not find each other in time.
    """
    import torch
    import torch.distributed as dist

    from megatron.parallel.mesh import set_default_timeout

    set_default_timeout(timeout_s)
    if env.world_size == 1 or dist.is_initialized():
        return
    address = env.master_addr or _mpi_master(env)
    place = {"RANK": env.rank, "LOCAL_RANK": env.local_rank, "WORLD_SIZE": env.world_size}
    place |= {"LOCAL_WORLD_SIZE": env.local_world_size, "MASTER_PORT": env.master_port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": address})
    if torch.cuda.is_available():
        torch.cuda.set_device(env.local_rank)
    try:
        dist.init_process_group(choose_backend(backend, torch.cuda.is_available()), timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"{env.world_size} processes did not connect",
            where=f"rank {env.rank}, {address}:{env.master_port}",
            why=str(error).splitlines()[0],
            hint="another job may use the port (master_port), or a process ended before it connected: see its log",
        ) from error


def close_process_group() -> None:
    """End the connection, so that no warning is printed at exit; harmless without one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
