"""From launch options and a machine to one job: processes, environment, command line. Pure; starts nothing.

Three routes. `python`: one process, no launcher. `local`: several processes on this machine through DeepSpeed's
per-node launcher. `hosts`: a host file, a filter or a cluster launcher, through DeepSpeed's runner (pdsh, openmpi,
mvapich, slurm). The script gets the same config arguments that `deepy.py` was given; nothing is encoded.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron.errors import ConfigError
from megatron.launch.environment import DEFAULT_PORT

# DeepSpeed's runner reads this file unasked, so its presence alone means several hosts.
SYSTEM_HOSTFILE = "/job/hostfile"
# OpenMP's threads wait by spinning; 1,000 turns instead of 10^8 costs nothing on a quiet machine (0.42 s a step of the
# quickstart either way) and halves a step when another program wants the cores (1.85 -> 1.40 s, worst 5.6 -> 1.5 s).
_CPU_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "GOMP_SPINCOUNT": "1000"}
LAUNCHERS = ("pdsh", "openmpi", "mvapich", "slurm")


@dataclass(frozen=True)
class LaunchOptions:
    """The launch keys of a configuration (GPT-NeoX's names) and the mesh that the processes must hold."""

    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    num_nodes: int = -1
    num_gpus: int | None = None
    master_addr: str | None = None
    master_port: int = DEFAULT_PORT
    launcher: str = "pdsh"
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


@dataclass(frozen=True)
class Machine:
    """What the launching machine has: ids of visible accelerators, CPU cores, python, whether the system host file exists."""

    devices: tuple[str, ...]
    cores: int
    python: str
    system_hostfile: bool = False

    @property
    def accelerators(self) -> int:
        """How many accelerators."""
        return len(self.devices)


@dataclass(frozen=True)
class Job:
    """What will be started. processes is None when a host file or a cluster decides; environment holds additions only."""

    route: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    processes: int | None

    def describe(self) -> str:
        """The command as one could type it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join([*settings, shlex.join(self.command)])


def local_processes(options: LaunchOptions, machine: Machine) -> int:
    """Processes on one machine: `num_gpus`, else all accelerators, else what one copy of the model needs.

    Raises:
        ConfigError: more processes than accelerators, or a number that the mesh does not divide.
    """
    count = options.num_gpus or machine.accelerators or options.model_processes
    if 0 < machine.accelerators < count:
        raise ConfigError(
            f"num_gpus {count} is more than the {machine.accelerators} accelerators of this machine",
            hint="lower num_gpus, or give a hostfile for several machines",
        )
    if count % options.model_processes:
        raise ConfigError(
            f"{count} processes cannot hold pipe_parallel_size {options.pipe_parallel_size} x "
            f"model_parallel_size {options.model_parallel_size}",
            why="the number of processes must be a multiple of their product",
            hint=f"set num_gpus to a multiple of {options.model_processes}",
        )
    return count


def uses_hosts(options: LaunchOptions, machine: Machine) -> bool:
    """Whether DeepSpeed's runner must resolve hosts, filters or a cluster launcher."""
    filters = (options.hostfile, options.include, options.exclude)
    cluster = options.deepspeed_mpi or options.deepspeed_slurm or options.force_multi
    return any(filters) or cluster or options.num_nodes > 1 or machine.system_hostfile


def plan_job(
    options: LaunchOptions, machine: Machine, script: str, script_args: Sequence[str], *, port: int, alone: bool = False
) -> Job:
    """Decide the route and write the command.

    Args:
        script: path of the user script. script_args: handed to it as they are. port: rendezvous port to use.
        alone: the script only plans (`--dry-run`) and needs one process whatever the mesh.

    Raises:
        ConfigError: options contradict each other or the machine.
    """
    environment = {} if machine.accelerators else dict(_CPU_ENVIRONMENT)
    if not alone and uses_hosts(options, machine):
        command = (machine.python, "-m", "deepspeed.launcher.runner", *_runner_arguments(options, port), script)
        return Job("hosts", (*command, *script_args), environment, None)
    count = 1 if alone else local_processes(options, machine)
    if count == 1:
        return Job("python", (machine.python, "-u", script, *script_args), environment, 1)
    # Each process would otherwise start one thread per core.
    environment["OMP_NUM_THREADS"] = str(max(1, machine.cores // count))
    # The launcher writes these ids into CUDA_VISIBLE_DEVICES, over what the user had put there.
    slots: list[int | str] = [int(d) if d.isdecimal() else d for d in machine.devices[:count]] or list(range(count))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": slots}).encode()).decode()
    command = (machine.python, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}")
    command += (f"--master_addr={options.master_addr or '127.0.0.1'}", f"--master_port={port}")
    return Job("local", (*command, "--no_local_rank", "--log_level=critical", script, *script_args), environment, count)


def _runner_arguments(options: LaunchOptions, port: int) -> list[str]:
    """Options of `deepspeed.launcher.runner`, only those that differ from its defaults."""
    if options.include and options.exclude:
        raise ConfigError("include and exclude contradict each other", hint="give one of them")
    launcher = "slurm" if options.deepspeed_slurm and options.launcher == "pdsh" else options.launcher
    launcher = "openmpi" if options.deepspeed_mpi and launcher == "pdsh" else launcher
    if launcher not in LAUNCHERS:
        raise ConfigError(f"unknown launcher '{launcher}'", hint="one of " + ", ".join(LAUNCHERS))
    filtered = bool(options.include or options.exclude)
    pairs = [
        ("--hostfile", options.hostfile),
        ("--include", options.include),
        ("--exclude", options.exclude),
        # DeepSpeed refuses counts beside a filter; the filter is the more exact of the two.
        ("--num_nodes", str(options.num_nodes) if options.num_nodes > 0 and not filtered else None),
        ("--num_gpus", str(options.num_gpus) if options.num_gpus and not filtered else None),
        ("--master_addr", options.master_addr),
        ("--master_port", str(port)),
        ("--launcher", launcher if launcher != "pdsh" else None),
    ]
    arguments = [f"{name}={value}" for name, value in pairs if value]
    # The runner has these two as launcher arguments of Slurm.
    extra = [f"--{name}={value}" for name in ("comment", "account") if (value := getattr(options, name))]
    if extra:
        arguments.append(f"--launcher_args={shlex.join(extra)}")
    if options.force_multi or options.deepspeed_mpi or options.deepspeed_slurm:
        arguments.append("--force_multi")
    if options.no_ssh_check:
        arguments.append("--no_ssh_check")
    return [*arguments, "--no_local_rank"]
