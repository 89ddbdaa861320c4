"""From launch options and a machine to one job: processes, environment, command line, files. Pure; starts nothing.

Four routes. `python`: one process, no launcher. `local`: several processes on this machine through DeepSpeed's per-node
launcher. `torchrun`: PyTorch's launcher, started by the same command on every host. `hosts`: DeepSpeed's runner with pdsh,
openmpi, mpich or slurm. The script gets the same config arguments that `deepy.py` was given; nothing is encoded.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron.errors import ConfigError, LaunchError
from megatron.launch.exports import check_own_exports, environment_file, exported
from megatron.launch.hosts import Hosts, choose_hosts, hostfile_text
from megatron.launch.options import LAUNCHERS, RUNNERS, LaunchOptions, Machine
from megatron.launch.shell_safety import check_address, check_place, for_pdsh, launcher_words

# Read unasked by DeepSpeed's runner and so by us: its presence alone means several hosts.
SYSTEM_HOSTFILE = "/job/hostfile"
SUPERVISOR = str(Path(__file__).with_name("supervisor.py"))
# OpenMP's threads wait by spinning; 1,000 turns instead of 10^8 costs nothing on a quiet machine (0.42 s a step of the
# quickstart either way) and halves a step when another program wants the cores (1.85 -> 1.40 s, worst 5.6 -> 1.5 s).
_CPU_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "GOMP_SPINCOUNT": "1000"}
# A host that is switched off or cut off ends its ssh connection after 15 seconds instead of never.
SSH_OPTIONS = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
_PLAIN = re.compile(
    r"[\w@%+=:,./-]*"
)  # values that DeepSpeed's mpirun runners do not put quotes around (no shell removes them)


@dataclass(frozen=True)
class Job:
    """What will be started.

    environment: additions to the launching shell's. processes: all ranks. hosts: where they run, by slot. files: path ->
    text, to be written before the start. address_from: the host whose first address takes the place of `ADDRESS` in command
    and files.
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


ADDRESS = "ADDRESS_OF_RANK_0"


def local_processes(options: LaunchOptions, machine: Machine) -> int:
    """Processes on one machine: `num_gpus`, else all accelerators, else what one copy of the model needs.

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
            f"{count} processes cannot hold pipe_parallel_size {options.pipe_parallel_size} x "
            f"model_parallel_size {options.model_parallel_size}",
            why="the number of processes must be a multiple of their product",
            hint=f"set num_gpus, num_nodes or the hosts to a multiple of {options.model_processes}",
        )


def resolve_hosts(options: LaunchOptions, machine: Machine, pool: Mapping[str, int] | None) -> Hosts:
    """Host -> slots. Without a host file: this machine, or under Slurm and torchrun `num_nodes` hosts that are yet to be named.

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
                f"num_nodes {options.num_nodes} needs to know the hosts",
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
    """Decide the route and write the command.

    Args:
        script: path of the user script. script_args: handed to it as they are. port: rendezvous port to use.
        pool: hosts and slots of the host file. environ: variables that may be exported (`exports.py`). scratch: folder of the
            files that the launcher reads. alone: the script only plans (`--dry-run`): one process whatever the mesh.

    Raises:
        ConfigError: options contradict each other or the machine. LaunchError: something that cannot be sent to hosts.
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
    return _hosts_job(options, machine, hosts, [script, *script_args], port, dict(environ or {}), scratch)


def _threads(machine: Machine, hosts: Hosts) -> str:
    """OMP_NUM_THREADS: each process would otherwise start one thread per core."""
    return str(max(1, machine.cores // max(map(len, hosts.values()))))


def _local_job(
    options: LaunchOptions, machine: Machine, slots: tuple[int, ...], words: list[str], port: int, environment: dict[str, str]
) -> Job:
    environment["OMP_NUM_THREADS"] = _threads(machine, {"localhost": slots})
    # The launcher writes these ids into CUDA_VISIBLE_DEVICES, over what the user had put there.
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
        raise ConfigError("torchrun needs the same slots, from 0 on, on every host", hint="use pdsh for uneven hosts")
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


def _hosts_job(
    options: LaunchOptions, machine: Machine, hosts: Hosts, words: list[str], port: int, environ: dict[str, str], scratch: str
) -> Job:
    """DeepSpeed's runner with the resolved hosts and the variables that may travel, both in files of the run folder."""
    launcher = options.runner
    assert launcher in RUNNERS
    whole = all(slots == tuple(range(len(slots))) for slots in hosts.values())
    if launcher != "pdsh" and (not whole or (launcher != "openmpi" and len({len(s) for s in hosts.values()}) > 1)):
        raise ConfigError(
            f"{launcher} cannot choose single slots or uneven hosts", why="it places processes by number", hint="use pdsh"
        )
    first = next(iter(hosts))
    address = options.master_addr or (ADDRESS if launcher != "slurm" else first)
    send = {"OMP_NUM_THREADS": _threads(machine, hosts)} | ({} if machine.accelerators else {"GOMP_SPINCOUNT": "1000"})
    send |= exported(environ, options.export_env) if launcher != "slurm" else {}  # srun hands its own environment on
    if launcher in ("openmpi", "slurm"):  # DeepSpeed's runners of these tell the ranks neither
        send |= {"MASTER_PORT": str(port)}
        send |= {"MASTER_ADDR": address} if launcher == "openmpi" or options.master_addr else {}
    if launcher in ("openmpi", "mpich"):
        for name in options.export_env:
            if name in send and not _PLAIN.fullmatch(send[name]):
                raise LaunchError(
                    f"export_env: {launcher} cannot carry the value of {name}", why="it has blanks or special signs"
                )
        send = {n: v for n, v in send.items() if _PLAIN.fullmatch(v)}
    files = {f"{scratch}/hostfile": hostfile_text({h: tuple(range(max(s) + 1)) for h, s in hosts.items()})}
    files[f"{scratch}/environment"] = environment_file(send, launcher == "pdsh") if launcher != "slurm" else ""
    arguments = [f"--hostfile={scratch}/hostfile", f"--master_addr={address}", f"--master_port={port}", "--no_ssh_check"]
    if not whole:
        arguments.append("--include=" + "@".join(f"{h}:{','.join(map(str, s))}" for h, s in hosts.items()))
    if extra := _launcher_args(options, machine, hosts):
        arguments.append(f"--launcher_args={shlex.join(extra)}")
    arguments += [f"--launcher={launcher}", "--force_multi", "--no_local_rank"]
    if launcher == "pdsh":
        check_own_exports(environ)
        check_place(machine.python, "the interpreter")
        check_place(os.path.abspath("."), "the working folder")
        words = [machine.python, "-SE", *for_pdsh([SUPERVISOR, "--watch-stdin", *words])]
        arguments.append("--no_python")
    environment = {"DS_ENV_FILE": f"{scratch}/environment"} | ({} if machine.accelerators else {"DS_ACCELERATOR": "cpu"})
    if launcher == "pdsh":
        environment["PDSH_SSH_ARGS_APPEND"] = SSH_OPTIONS
    if launcher == "slurm":
        environment |= send
    command = (machine.python, "-m", "deepspeed.launcher.runner", *arguments, "--log_level=critical", *words)
    total = sum(map(len, hosts.values()))
    return Job("hosts", command, environment, total, hosts, files, launcher, first if address == ADDRESS else None)


def _launcher_args(options: LaunchOptions, machine: Machine, hosts: Hosts) -> list[str]:
    """Arguments for mpirun or srun: ours that keep a job together, then the user's."""
    ours: list[str] = []
    if options.runner == "openmpi":
        ours = ["--bind-to", "none"]  # else two ranks of several threads share a core each
    if options.runner == "slurm":
        slots = len(next(iter(hosts.values())))
        ours = [f"--nodes={len(hosts)}", f"--ntasks-per-node={slots}", "--kill-on-bad-exit=1"]
        ours += [f"--gpus-per-node={slots}"] if machine.accelerators else []
        ours += [f"--nodelist={','.join(hosts)}"] if options.hostfile else []
        ours += [f"--{name}={value}" for name in ("comment", "account") if (value := getattr(options, name))]
    return ours + launcher_words(options.launcher_args, options.runner)


def encode_world(hosts: Mapping[str, Sequence[int | str]]) -> str:
    """DeepSpeed's own form of hosts and slots for its per-node launcher (base64 of JSON)."""
    return base64.urlsafe_b64encode(json.dumps({h: list(s) for h, s in hosts.items()}).encode()).decode()
