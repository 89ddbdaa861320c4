"""Jobs of several hosts: DeepSpeed's runner with pdsh, openmpi, mpich or slurm, one small class for each.

DeepSpeed's runner builds the command of the launcher. The classes hold what differs between the launchers: how variables
reach the ranks, what must be quoted, and which hosts they can use.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.errors import ConfigError, LaunchError
from megatron.launch.exports import check_own_exports, environment_file, exported
from megatron.launch.hosts import Hosts, hostfile_text
from megatron.launch.options import ADDRESS, SUPERVISOR, LaunchOptions, Machine
from megatron.launch.shell_safety import check_place, for_pdsh, launcher_words

# A host that is switched off or cut off ends its ssh connection after 15 seconds instead of never.
SSH_OPTIONS = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
# DeepSpeed's mpirun runners put quotes around all other values, and no shell removes those.
_UNQUOTED = re.compile(r"[\w@%+=:,./-]*")


@dataclass(frozen=True)
class HostsPlan:
    """How DeepSpeed's runner is started.

    Attributes:
        command: of the runner, with the user's script.
        environment: additions to the launching shell's.
        files: path -> text, to be written before the start.
        address_from: the host whose first address replaces `ADDRESS`; None if the address is known.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    files: dict[str, str]
    address_from: str | None


class Launcher:
    """A launcher of several hosts; the methods' defaults suit most of them.

    Attributes:
        uneven_hosts: hosts may have different numbers of slots.
        picks_slots: single slots of a host can be chosen.
    """

    uneven_hosts = False
    picks_slots = False

    def __init__(self, options: LaunchOptions, machine: Machine, hosts: Hosts) -> None:
        self.options, self.machine, self.hosts = options, machine, hosts

    def address(self) -> str:
        """Address of rank 0, or `ADDRESS` if it must be looked up first."""
        return self.options.master_addr or ADDRESS

    def variables(self, environ: Mapping[str, str], port: int) -> dict[str, str]:
        """Variables for the ranks, besides the thread settings."""
        return exported(environ, self.options.export_env)

    def transportable(self, variables: dict[str, str]) -> dict[str, str]:
        """The variables that the launcher can carry; a LaunchError if it cannot carry one of `export_env`."""
        return variables

    def environment_text(self, variables: dict[str, str]) -> str:
        """Content of the file from which DeepSpeed's runner exports variables."""
        return environment_file(variables, False)

    def launcher_args(self) -> list[str]:
        """Arguments of the launcher that keep a job together."""
        return []

    def script(self, words: list[str], environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """(further arguments of the runner, the script and its arguments as the launcher needs them)."""
        return [], words

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        """Additions to the launching shell's environment."""
        return {}


class Pdsh(Launcher):
    """ssh to every host; the launcher joins words into a shell command, so that they are quoted here."""

    uneven_hosts = picks_slots = True

    def environment_text(self, variables: dict[str, str]) -> str:
        """Quoted: the values pass a shell."""
        return environment_file(variables, True)

    def script(self, words: list[str], environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Each rank below a supervisor, which ends it when the ssh connection ends."""
        check_own_exports(environ)
        check_place(self.machine.python, "the interpreter")
        check_place(os.path.abspath("."), "the working folder")
        return ["--no_python"], [self.machine.python, "-SE", *for_pdsh([SUPERVISOR, "--watch-stdin", *words])]

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        """Keep-alive options of ssh."""
        return {"PDSH_SSH_ARGS_APPEND": SSH_OPTIONS}


class Mpich(Launcher):
    """MPICH's mpirun."""

    def transportable(self, variables: dict[str, str]) -> dict[str, str]:
        """Values without blanks and special signs."""
        for name in self.options.export_env:
            if name in variables and not _UNQUOTED.fullmatch(variables[name]):
                raise LaunchError(
                    f"export_env: {self.options.runner} cannot carry the value of {name}", why="it has blanks or special signs"
                )
        return {name: value for name, value in variables.items() if _UNQUOTED.fullmatch(value)}


class OpenMPI(Mpich):
    """Open MPI's mpirun. DeepSpeed's runner does not tell its ranks the rendezvous address and port."""

    uneven_hosts = True

    def variables(self, environ: Mapping[str, str], port: int) -> dict[str, str]:
        """With the rendezvous."""
        return super().variables(environ, port) | {"MASTER_PORT": str(port), "MASTER_ADDR": self.address()}

    def launcher_args(self) -> list[str]:
        """No binding: with it two ranks of several threads would share a core each."""
        return ["--bind-to", "none"]


class Slurm(Launcher):
    """srun, which passes its own environment on to the ranks."""

    def address(self) -> str:
        """The first host: Slurm names its nodes."""
        return self.options.master_addr or next(iter(self.hosts))

    def variables(self, environ: Mapping[str, str], port: int) -> dict[str, str]:
        """The rendezvous, which DeepSpeed's runner does not tell the ranks."""
        address = {"MASTER_ADDR": self.options.master_addr} if self.options.master_addr else {}
        return {"MASTER_PORT": str(port), **address}

    def environment_text(self, variables: dict[str, str]) -> str:
        """Nothing: the variables are in the launching shell's environment."""
        return ""

    def launcher_args(self) -> list[str]:
        """The shape of the job, and what the configuration says about accounting."""
        slots = len(next(iter(self.hosts.values())))
        words = [f"--nodes={len(self.hosts)}", f"--ntasks-per-node={slots}", "--kill-on-bad-exit=1"]
        words += [f"--gpus-per-node={slots}"] if self.machine.accelerators else []
        words += [f"--nodelist={','.join(self.hosts)}"] if self.options.hostfile else []
        return words + [f"--{name}={value}" for name in ("comment", "account") if (value := getattr(self.options, name))]

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        """All variables."""
        return variables


_LAUNCHERS: dict[str, type[Launcher]] = {"pdsh": Pdsh, "openmpi": OpenMPI, "mpich": Mpich, "slurm": Slurm}


def plan_hosts(
    options: LaunchOptions,
    machine: Machine,
    hosts: Hosts,
    words: list[str],
    *,
    port: int,
    environ: Mapping[str, str],
    scratch: str,
    threads: str,
) -> HostsPlan:
    """DeepSpeed's runner with the resolved hosts and the variables that may travel, both in files of the run folder.

    Args:
        options: launch keys; `options.runner` is one of `RUNNERS`.
        machine: the launching machine.
        hosts: host -> slots.
        words: the script and its arguments.
        port: rendezvous port.
        environ: variables that may be exported.
        scratch: folder of the files that the runner reads.
        threads: OMP_NUM_THREADS of each rank.

    Raises:
        ConfigError: the launcher cannot use these hosts.
        LaunchError: a variable or path cannot be sent to the hosts.
    """
    launcher = _LAUNCHERS[options.runner](options, machine, hosts)
    all_slots = all(slots == tuple(range(len(slots))) for slots in hosts.values())
    even = len({len(slots) for slots in hosts.values()}) == 1
    if not (launcher.picks_slots or all_slots) or not (launcher.uneven_hosts or even):
        raise ConfigError(
            f"{options.runner} cannot choose single slots or uneven hosts", why="it places processes by number", hint="use pdsh"
        )
    address = launcher.address()
    variables = {"OMP_NUM_THREADS": threads} | ({} if machine.accelerators else {"GOMP_SPINCOUNT": "1000"})
    variables = launcher.transportable(variables | launcher.variables(environ, port))
    files = {
        f"{scratch}/hostfile": hostfile_text({host: tuple(range(max(slots) + 1)) for host, slots in hosts.items()}),
        f"{scratch}/environment": launcher.environment_text(variables),
    }
    arguments = [f"--hostfile={scratch}/hostfile", f"--master_addr={address}", f"--master_port={port}", "--no_ssh_check"]
    if not all_slots:
        arguments.append("--include=" + "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in hosts.items()))
    if extra := launcher.launcher_args() + launcher_words(options.launcher_args, options.runner):
        arguments.append(f"--launcher_args={shlex.join(extra)}")
    flags, script = launcher.script(words, environ)
    arguments += [f"--launcher={options.runner}", "--force_multi", "--no_local_rank", *flags, "--log_level=critical"]
    environment = {"DS_ENV_FILE": f"{scratch}/environment"} | ({} if machine.accelerators else {"DS_ACCELERATOR": "cpu"})
    environment |= launcher.environment(variables)
    command = (machine.python, "-m", "deepspeed.launcher.runner", *arguments, *script)
    return HostsPlan(command, environment, files, next(iter(hosts)) if address == ADDRESS else None)
