"""The launch keys of a configuration, under GPT-NeoX's names, and the launching machine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron.launch.environment import DEFAULT_PORT

# Launchers of DeepSpeed's runner, which need hosts; then our own two.
RUNNERS = ("pdsh", "openmpi", "mpich", "slurm")
LAUNCHERS = (*RUNNERS, "torchrun", "none")
SUPERVISOR = str(Path(__file__).with_name("supervisor.py"))
ADDRESS = "ADDRESS_OF_RANK_0"  # stands for the address until the host has been asked for it


@dataclass(frozen=True)
class LaunchOptions:
    """How processes are started, and the mesh that they must hold; `num_nodes` -1 is all hosts of the host file."""

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
    context_parallel_size: int = 1

    @classmethod
    def from_sections(cls, *sections: Any) -> LaunchOptions:
        """Collect the fields from objects that have them as attributes (`run.launch`, `run.parallel`)."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            for section in sections:
                if hasattr(section, field.name):
                    values[field.name] = getattr(section, field.name)
        # NeoX writes 0 for "no pipeline".
        values["pipe_parallel_size"] = max(1, values.get("pipe_parallel_size", 1))
        values["model_parallel_size"] = max(1, values.get("model_parallel_size", 1))
        return cls(**values)

    @property
    def model_processes(self) -> int:
        """Processes that a batch needs: one replica of the model for each shard of its sequences."""
        return self.pipe_parallel_size * self.context_parallel_size * self.model_parallel_size

    @property
    def mesh_text(self) -> str:
        """`pipe_parallel_size 2 x model_parallel_size 4`; with context parallelism its key too."""
        context = f"context_parallel_size {self.context_parallel_size} x " if self.context_parallel_size > 1 else ""
        return f"pipe_parallel_size {self.pipe_parallel_size} x {context}model_parallel_size {self.model_parallel_size}"

    @property
    def runner(self) -> str:
        """The launcher in force: `deepspeed_slurm` and `deepspeed_mpi` choose when `launcher` is left at its default."""
        if self.launcher == "pdsh" and self.deepspeed_slurm:
            return "slurm"
        return "openmpi" if self.launcher == "pdsh" and self.deepspeed_mpi else self.launcher


@dataclass(frozen=True)
class Machine:
    """The launching machine.

    Attributes:
        devices: ids of the visible accelerators.
        cores: CPU cores of this process.
        python: path of the interpreter.
        hostname: its name.
    """

    devices: tuple[str, ...]
    cores: int
    python: str
    hostname: str = "localhost"

    @property
    def accelerators(self) -> int:
        """Number of accelerators."""
        return len(self.devices)
