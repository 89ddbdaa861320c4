"""Plans a job from launch options and a machine: processes, environment, command line, files. Pure; starts nothing.

There are four routes. `python`: one process, no launcher. `local`: several processes on this machine with DeepSpeed's per-node
launcher. `torchrun`: PyTorch's launcher, started by the same command on every host. `hosts`: DeepSpeed's runner with pdsh,
openmpi, mpich or slurm (`multinode.py`). The script gets the config arguments of `deepy.py` unchanged.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron.errors import ConfigError
from megatron.launch.hosts import Hosts, choose_hosts
from megatron.launch.multinode import plan_hosts
from megatron.launch.options import ADDRESS, LAUNCHERS, SUPERVISOR, LaunchOptions, Machine
from megatron.launch.shell_safety import check_address

# DeepSpeed's runner reads it by default, and so do we: its presence alone means several hosts.
SYSTEM_HOSTFILE = "/job/hostfile"
# OpenMP's threads wait by spinning. 1,000 spins instead of 10^8 cost nothing on an idle machine (0.42 s a step of the
# quickstart either way) and shorten a step when another program uses the cores (1.85 -> 1.40 s, worst 5.6 -> 1.5 s).
_CPU_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "GOMP_SPINCOUNT": "1000"}


@dataclass(frozen=True)
class Job:
    """What will be started.

    Attributes:
        route: python, local, torchrun or hosts.
        command: the command line.
        environment: additions to the launching shell's.
        processes: number of ranks.
        hosts: host -> slots.
        files: path -> text, to be written before the start.
        launcher: name of the launcher; empty for `python`.
        address_from: the host whose first address replaces `ADDRESS` in command and files.
    """

    route: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    processes: int
    hosts: Hosts = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    launcher: str = ""
    address_from: str | None = None

    def with_address(self, address: str) -> Job:
        """The job with the address of rank 0's host filled in."""
        command = tuple(word.replace(ADDRESS, address) for word in self.command)
        files = {path: text.replace(ADDRESS, address) for path, text in self.files.items()}
        return replace(self, command=command, files=files, address_from=None)


def local_processes(options: LaunchOptions, machine: Machine) -> int:
    """Processes on one machine: `num_gpus`, else all accelerators, else the size of one model replica.

    Raises:
        ConfigError: more processes than accelerators.
    """
    count = options.num_gpus or machine.accelerators or options.model_processes
    if 0 < machine.accelerators < count:
        raise ConfigError(
            f"num_gpus {count} is more than the {machine.accelerators} accelerators of this machine",
            hint="lower num_gpus, or give a hostfile for several machines",
        )
    return count


def _check_mesh(count: int, options: LaunchOptions) -> None:
    if count % options.model_processes:
        raise ConfigError(
            f"{count} processes cannot hold {options.mesh_text}",
            why="the number of processes must be a multiple of their product",
            hint=f"set num_gpus, num_nodes or the hosts to a multiple of {options.model_processes}",
        )


def resolve_hosts(options: LaunchOptions, machine: Machine, pool: Mapping[str, int] | None) -> Hosts:
    """Host -> slots. Without a host file: this machine, or under Slurm and torchrun `num_nodes` placeholder hosts.

    Raises:
        ConfigError: filters or counts contradict the hosts.
    """
    slots = local_processes(options, machine) if pool is None and options.runner not in ("slurm", "torchrun") else 0
    if pool is None and options.runner in ("slurm", "torchrun"):
        nodes = max(1, options.num_nodes)
        slots = options.num_gpus or machine.accelerators or -(-options.model_processes // nodes)
        names = [f"node-{i}" for i in range(1, nodes + 1)] if options.runner == "slurm" or nodes > 1 else ["localhost"]
        return {name: tuple(range(slots)) for name in names}
    if pool is None:
        if options.num_nodes > 1:
            raise ConfigError(
                f"num_nodes {options.num_nodes} needs the names of the hosts",
                hint="hostfile: a file of `host slots=N` lines, or slurm",
            )
        filtered = options.include or options.exclude
        pool = {"localhost": machine.accelerators or slots} if filtered else {"localhost": slots}
    return choose_hosts(
        pool, include=options.include, exclude=options.exclude, num_nodes=options.num_nodes, num_gpus=options.num_gpus
    )


def plan_job(
    options: LaunchOptions,
    machine: Machine,
    script: str,
    script_args: Sequence[str],
    *,
    port: int,
    pool: Mapping[str, int] | None = None,
    environ: Mapping[str, str] | None = None,
    scratch: str = "launch",
    alone: bool = False,
) -> Job:
    """Choose the route and build the command.

    Args:
        options: launch keys.
        machine: the launching machine.
        script: path of the user script.
        script_args: passed to it unchanged.
        port: rendezvous port.
        pool: host -> number of slots, from the host file; None without one.
        environ: variables that may be exported (`exports.py`).
        scratch: folder of the files that the launcher reads.
        alone: the script only plans (`--dry-run`): one process whatever the mesh.

    Raises:
        ConfigError: options contradict each other or the machine.
        LaunchError: a variable or path cannot be sent to the hosts.
    """
    if options.runner not in LAUNCHERS:
        raise ConfigError(f"unknown launcher '{options.runner}'", hint="one of " + ", ".join(LAUNCHERS))
    check_address(options.master_addr)
    environment = {} if machine.accelerators else dict(_CPU_ENVIRONMENT)
    single = Job("python", (machine.python, "-u", script, *script_args), environment, 1)
    if alone or options.runner == "none":
        if not alone:
            _check_mesh(1, options)
        return single
    hosts = resolve_hosts(options, machine, pool)
    count = sum(map(len, hosts.values()))
    _check_mesh(count, options)
    if options.runner == "torchrun":
        return _torchrun_job(options, machine, hosts, [script, *script_args], port, environment)
    if len(hosts) == 1 and not options.force_multi and options.runner not in ("slurm", "mpich", "openmpi"):
        (host, slots) = next(iter(hosts.items()))
        if host in ("localhost", "127.0.0.1", machine.hostname):
            return single if count == 1 else _local_job(options, machine, slots, [script, *script_args], port, environment)
    plan = plan_hosts(
        options,
        machine,
        hosts,
        [script, *script_args],
        port=port,
        environ=environ or {},
        scratch=scratch,
        threads=_threads(machine, hosts),
    )
    return Job("hosts", plan.command, plan.environment, count, hosts, plan.files, options.runner, plan.address_from)


def _threads(machine: Machine, hosts: Hosts) -> str:
    """OMP_NUM_THREADS; without it each process starts one thread per core."""
    return str(max(1, machine.cores // max(map(len, hosts.values()))))


def _local_job(
    options: LaunchOptions, machine: Machine, slots: tuple[int, ...], words: list[str], port: int, environment: dict[str, str]
) -> Job:
    environment["OMP_NUM_THREADS"] = _threads(machine, {"localhost": slots})
    # The launcher overwrites CUDA_VISIBLE_DEVICES with these ids, so they must be those that the user's value allows.
    names = [machine.devices[slot] if machine.devices else str(slot) for slot in slots]
    world = encode_world({"localhost": [int(name) if name.isdecimal() else name for name in names]})
    command: tuple[str, ...] = (machine.python, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}")
    command += (f"--master_addr={options.master_addr or '127.0.0.1'}", f"--master_port={port}", "--no_local_rank")
    command += ("--no_python", "--log_level=critical", machine.python, "-SE", SUPERVISOR, "--watch-stdin", *words)
    return Job("local", command, environment, len(slots), {"localhost": slots}, launcher="deepspeed")


def _torchrun_job(
    options: LaunchOptions, machine: Machine, hosts: Hosts, words: list[str], port: int, environment: dict[str, str]
) -> Job:
    counts = {len(slots) for slots in hosts.values()}
    if len(counts) > 1 or any(slots != tuple(range(len(slots))) for slots in hosts.values()):
        raise ConfigError("torchrun needs the same slots, starting at 0, on every host", hint="use pdsh for uneven hosts")
    environment["OMP_NUM_THREADS"] = _threads(machine, hosts)
    command: tuple[str, ...] = (
        machine.python,
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(hosts)}",
        f"--nproc_per_node={counts.pop()}",
    )
    if len(hosts) == 1:
        command += (f"--master_addr={options.master_addr or '127.0.0.1'}", f"--master_port={port}")
    else:
        first = options.master_addr or (None if "node-1" in hosts else next(iter(hosts)))
        if first is None:
            raise ConfigError(
                "torchrun on several hosts needs master_addr", hint="the address of the first host, or a hostfile"
            )
        command += ("--rdzv_backend=c10d", f"--rdzv_endpoint={first}:{port}", f"--rdzv_id={port}")
    return Job("torchrun", (*command, *words), environment, sum(map(len, hosts.values())), hosts, launcher="torchrun")


def encode_world(hosts: Mapping[str, Sequence[int | str]]) -> str:
    """Hosts and slots in the format of DeepSpeed's per-node launcher (base64 of JSON)."""
    return base64.urlsafe_b64encode(json.dumps({h: list(s) for h, s in hosts.items()}).encode()).decode()
