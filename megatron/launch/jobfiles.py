"""The job as a file for a cluster: `sbatch` of Slurm, a JobSet of Kubernetes, a task of SkyPilot.

The same processes, mesh and arguments as `deepy.py` would start by itself. Ranks find each other through the variables that the
cluster sets; secrets are named, never written. Exit codes 21, 22 and 75 (docs/reliability.md) mean "start me again". No value
of a configuration reaches a shell or a file's syntax unquoted.
"""

from __future__ import annotations

import re
import shlex

from megatron.errors import ConfigError
from megatron.launch.containers import kubernetes, skypilot
from megatron.launch.job_shape import AGAIN, Shape, Site
from megatron.launch.options import LaunchOptions
from megatron.launch.shell_safety import launcher_words
from megatron.reliability.signals import seconds_of

KINDS = ("slurm", "kubernetes", "skypilot")
_MARGIN_S = 600  # between a run's own time limit and the cluster's: start-up, and the signal five minutes before the end


def job_file(kind: str, options: LaunchOptions, shape: Shape, site: Site | None = None) -> str:
    """Text of the file.

    Raises:
        ConfigError: a value cannot stand in it.
    """
    site = site or Site()
    if kind == "slurm":
        return _slurm(options, shape, site)
    return kubernetes(shape, site) if kind == "kubernetes" else skypilot(shape, site)


def _directive(key: str, value: object) -> str:
    """One option of sbatch, whose parser knows double quotes and backslashes.

    Raises:
        ConfigError: the value has a line end or another control sign.
    """
    text = str(value)
    if not text.isprintable():
        raise ConfigError(f"{key} {text!r} cannot stand in a job file", why="it has a line end or another control sign")
    quoted = re.sub(r'(["\\])', r"\\\1", text)
    return f"#SBATCH --{key}={text}\n" if re.fullmatch(r"[\w%+=:,./@-]+", text) else f'#SBATCH --{key}="{quoted}"\n'


def _time(shape: Shape, site: Site) -> str | None:
    """Slurm's time limit: as asked, else of the run's own limit with room to end by itself."""
    if site.time is not None:
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", site.time):
            hint = "minutes, 3:50:00, or 1-06:00:00 with days first"
            raise ConfigError(f"--time {site.time!r} is not a time of Slurm", hint=hint)
        return site.time
    seconds = seconds_of(shape.time_limit)
    if seconds is None:
        return None
    minutes = -(-int(seconds + _MARGIN_S) // 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    return (f"{days}-" if days else "") + f"{hours:02d}:{minutes % 60:02d}:00"


def _slurm(options: LaunchOptions, shape: Shape, site: Site) -> str:
    logs = f"{shape.run_dir}/logs"
    values: dict[str, object | None] = {
        "job-name": shape.name,
        "nodes": shape.nodes,
        "ntasks-per-node": shape.slots,
        "cpus-per-task": site.cores(shape.gpus),
        "gpus-per-node": shape.slots if shape.gpus else None,
        "time": _time(shape, site),
        "partition": site.partition,
        "account": options.account,
        "comment": options.comment,
        # USR1 five minutes before the time limit: all ranks save and leave with 75, and the job queues itself again
        "signal": "USR1@300",
        "open-mode": "append",
        "output": logs.replace("%", "%%") + "/slurm-%j.txt",
    }
    head = "".join(_directive(key, value) for key, value in values.items() if value not in (None, ""))
    again = "|".join(map(str, AGAIN))
    variables = {"DS_ACCELERATOR": "cpu", **shape.variables} if not shape.gpus else dict(shape.variables)
    lines = [f'export PATH={shlex.quote(site.python.rpartition("/")[0])}:"$PATH"'] if site.python else []
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    extra = "".join(f" {shlex.quote(word)}" for word in launcher_words(options.launcher_args, "srun"))
    newline = "\n"
    return f"""#!/bin/bash
# Written by deepy.py --print-job slurm. Submit: mkdir -p {shlex.quote(logs)} && sbatch THIS_FILE
{head}#SBATCH --requeue

set -uo pipefail
cd "${{SLURM_SUBMIT_DIR:-.}}"
{newline.join([*lines, ""])}export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-1}}"
# srun takes the cores of a process from its own option only
srun --kill-on-bad-exit=1 --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}"{extra} python -u {shlex.join(shape.command)}
code=$?
case $code in {again}) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit $code
"""
