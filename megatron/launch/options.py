"""The launch keys of a configuration, in GPT-NeoX's names, and what the launching machine is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from megatron.launch.environment import DEFAULT_PORT

# Those of DeepSpeed's runner that need hosts, then our own two.
RUNNERS = ("pdsh", "openmpi", "mpich", "slurm")
LAUNCHERS = (*RUNNERS, "torchrun", "none")


@dataclass(frozen=True)
class LaunchOptions:
    """How processes are started, and the mesh that they must hold. num_nodes -1: all hosts of the host file."""

    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    num_nodes: int = -1
    num_gpus: int | None = None
    master_addr: str | None = None
    master_port: int = DEFAULT_PORT
    launcher: str = "pdsh"
    launcher_args: str = ""
    export_env: tuple[str, ...] = ()
    deepspeed_mpi: bool = False
    deepspeed_slurm: bool = False
    force_multi: bool = False
    no_ssh_check: bool = False
    comment: str | None = None
    account: str | None = None
    pipe_parallel_size: int = 1
    model_parallel_size: int = 1

    @classmethod
    def from_sections(cls, *sections: Any) -> LaunchOptions:
        """Collect the fields from objects that have them as attributes (`run.launch`, `run.parallel`)."""
        found: dict[str, Any] = {}
        for field in fields(cls):
            for section in sections:
                if hasattr(section, field.name):
                    found[field.name] = getattr(section, field.name)
        # NeoX writes 0 for "no pipeline".
        found["pipe_parallel_size"] = max(1, found.get("pipe_parallel_size", 1))
        found["model_parallel_size"] = max(1, found.get("model_parallel_size", 1))
        return cls(**found)

    @property
    def model_processes(self) -> int:
        """Processes that one copy of the model needs."""
        return self.pipe_parallel_size * self.model_parallel_size

    @property
    def runner(self) -> str:
        """The launcher in force: `deepspeed_slurm` and `deepspeed_mpi` choose when `launcher` is left at its default."""
        if self.launcher == "pdsh" and self.deepspeed_slurm:
            return "slurm"
        return "openmpi" if self.launcher == "pdsh" and self.deepspeed_mpi else self.launcher


@dataclass(frozen=True)
class Machine:
    """What the launching machine has: ids of visible accelerators, CPU cores, python, its name."""

    devices: tuple[str, ...]
    cores: int
    python: str
    hostname: str = "localhost"

    @property
    def accelerators(self) -> int:
        """How many accelerators."""
        return len(self.devices)
