"""`--print-launch`: a job as a command line, with the command that DeepSpeed's runner starts for it.

`runner_command` restates `deepspeed/launcher/multinode_runner.py` (0.19.8); a test runs the real runner against stand-ins for
pdsh, mpirun and srun and compares word for word.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

from megatron.launch.hosts import parse_hostfile
from megatron.launch.job import Job, encode_world
from megatron.launch.options import ADDRESS

_NODE_LAUNCH = ("-u", "-m", "deepspeed.launcher.launch")
_HELPER = "launcher_helper.py"


def describe(job: Job) -> str:
    """Comments with hosts and files, then the command; a shell can run the text as it is."""
    rows = [f"# {job.processes} {'process' if job.processes == 1 else 'processes'}, route {job.route}"]
    if job.launcher:
        rows[0] += f", launcher {job.launcher}"
    rows += [f"# host {host}: slots {', '.join(map(str, slots))}" for host, slots in job.hosts.items()]
    for path, text in job.files.items():
        body = [f"#   {line}" for line in text.splitlines()] or ["#   (empty)"]
        rows += [f"# file {path}:", *body]
    if job.address_from:
        rows.append(f"# {ADDRESS}: the first that `ssh {job.address_from} hostname -I` prints")
    started = runner_command(job) if job.route == "hosts" else ()
    if started:
        rows.append(f"# DeepSpeed's runner then starts:\n#   {shlex.join(started)}")
    settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(job.environment.items())]
    return "\n".join([*rows, " ".join([*settings, shlex.join(job.command)])])


def _options(job: Job) -> tuple[dict[str, str], tuple[str, ...]]:
    """(options of the runner, user script and its arguments)."""
    words = job.command[3:]
    options: dict[str, str] = {}
    for index, word in enumerate(words):
        if not word.startswith("--"):
            return options, words[index:]
        name, _, value = word[2:].partition("=")
        options[name] = value
    return options, ()


def _exports(job: Job, quote: bool) -> dict[str, str]:
    """Name -> value as the runner writes it, with its quotes; without the variables that it adds itself (UCX, PYTHONPATH)."""
    text = next(text for path, text in job.files.items() if path.endswith("/environment"))
    pairs = [line.split("=", 1) for line in text.splitlines()]
    plain = set("%@+=:,./-_")
    return {n: f'"{v}"' if quote and any(not c.isalnum() and c not in plain for c in v) else v for n, v in pairs}


def runner_command(job: Job, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The command that DeepSpeed's runner starts for this job.

    Args:
        job: of the route `hosts`.
        environ: of the runner; it also sends its PYTHON*, UCX* ... variables.
    """
    options, script = _options(job)
    python = job.command[0]
    exports = _exports(job, quote=True)
    extra = shlex.split(options.get("launcher_args", ""))
    if job.launcher == "pdsh":
        world = encode_world(job.hosts)
        sets = "".join(f"export {name}={value}; " for name, value in exports.items())
        node: tuple[str, ...] = (
            sets,
            f"cd {os.path.abspath('.')};",
            python,
            *_NODE_LAUNCH,
            f"--world_info={world}",
            "--node_rank=%n",
        )
        node += (f"--master_addr={options['master_addr']}", f"--master_port={options['master_port']}")
        node += ("--no_python", "--no_local_rank", "--enable_each_rank_log=None")
        words = tuple('"{}"'.format(word.replace('"', '\\"')) if " " in word else word for word in script[1:])
        return ("pdsh", "-S", "-f", "1024", "-w", ",".join(job.hosts), *extra, *node, script[0], *words)
    hosts = parse_hostfile(next(text for path, text in job.files.items() if path.endswith("/hostfile")), "hostfile")
    each = str(next(iter(hosts.values())))
    if job.launcher == "openmpi":
        tcp = () if "btl_tcp_if_include" in extra else ("--mca", "btl_tcp_if_include", "eth0")
        head = ("mpirun", "-n", str(job.processes), "-hostfile", options["hostfile"], "--mca", "btl", "^openib", *tcp, *extra)
        sets_x = tuple(word for name, value in exports.items() for word in ("-x", f"{name}={value}"))
        return (*head, *sets_x, python, "-u", *script)
    if job.launcher == "mpich":
        sets_x = tuple(word for name, value in exports.items() for word in ("-genv", f"{name}={value}"))
        place: tuple[str, ...] = (
            "-genv",
            "MASTER_ADDR",
            options["master_addr"],
            "-genv",
            "MASTER_PORT",
            options["master_port"],
        )
        place += ("-genv", "WORLD_SIZE", str(job.processes), "-genv", "LOCAL_SIZE", each, "-hosts", ",".join(hosts))
        helper = (python, "-u", f"<deepspeed>/launcher/{_HELPER}", "--launcher", "mpich")
        return ("mpirun", "-n", str(job.processes), "-ppn", each, *extra, *sets_x, *place, *helper, *script)
    return ("srun", "-n", str(job.processes), *extra, "--export=ALL", python, "-u", *script)
