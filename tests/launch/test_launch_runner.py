"""What `--print-launch` says of DeepSpeed's runner is what it does: the true runner meets stand-ins for pdsh, mpirun, srun.

A stand-in prints its arguments as JSON. Environment variables that DeepSpeed adds by itself are part of what is compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.launch.job import SYSTEM_HOSTFILE, Job, plan_job
from megatron.launch.options import LaunchOptions, Machine
from megatron.launch.preview import runner_command
from megatron.launch.runners import write_files

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CPU = Machine(devices=(), cores=4, python=sys.executable)
STAND_IN = f"#!{sys.executable}\nimport json, os, sys\nprint('ARGV' + json.dumps(sys.argv))\n"
SECRET = {"WANDB_API_KEY": "do-not-show", "MLFLOW_TRACKING_TOKEN": "do-not-show", "PYTHON_KEYRING_TOKEN": "do-not-show"}
CASES: dict[str, dict[str, Any]] = {
    "pdsh": {"export_env": ("MY_FLAG",), "include": "n1:1@n2"},
    "openmpi": {"launcher": "openmpi", "launcher_args": "--mca btl_tcp_if_include ib0"},
    "mpich": {"launcher": "mpich"},
    "slurm": {"launcher": "slurm", "account": "me", "comment": "big run"},
}


RUNNERS = """
import json, os, runpy, sys
import deepspeed.launcher.runner as runner  # takes seconds; the runs below are forked from here
for arguments, environment, log in json.load(sys.stdin):
    if os.fork():
        continue
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [runner.__file__, *arguments]
    del sys.modules["deepspeed.launcher.runner"]
    runpy.run_module("deepspeed.launcher.runner", run_name="__main__")
    sys.exit()
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


def prepared(job: Job, folder: Path) -> tuple[list[str], dict[str, str], str]:
    """Arguments and environment of DeepSpeed's runner, which finds stand-ins in `folder`, and a file for its output."""
    assert job.command[1:3] == ("-m", "deepspeed.launcher.runner")
    for program in ("pdsh", "mpirun", "srun", "ompi_info", "sinfo"):
        (folder / program).write_text(STAND_IN)
        (folder / program).chmod(0o755)
    write_files(job)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "UCX", "MLFLOW", "NCCL", "MV2"))}
    from megatron.launch.exports import launcher_environment

    env = launcher_environment({**kept, **SECRET, **job.environment})
    env["PATH"] = f"{folder}:{env['PATH']}"
    return list(job.command[3:]), env, str(folder / "output")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, str]]:
    """Every case's job, and what its run printed."""
    if os.path.exists(SYSTEM_HOSTFILE):
        pytest.skip("this machine has a host file of its own")
    jobs, runs = {}, {}
    for name, options in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        chosen = LaunchOptions(hostfile="h", master_addr="10.0.0.1", **options)
        environ = {"PATH": "/venv/bin:/bin", "MY_FLAG": "a b;%h", **SECRET}
        given: dict[str, Any] = {"pool": {"n1": 2, "n2": 2}, "environ": environ, "scratch": str(folder / "launch")}
        words = ["a.yml", "--set", 'name="a b"', "--set", 'x=[["y"]]', "a;$(b)`c`|%h", 'a $b \\ "c" %n', "a\nb\t c", ""]
        job = plan_job(chosen, CPU, "train.py", words, port=29500, **given)
        jobs[name], runs[name] = job, prepared(job, folder)
    command = [sys.executable, "-c", RUNNERS]
    subprocess.run(command, cwd=ROOT, input=json.dumps(list(runs.values())), text=True, timeout=120, check=True)
    return {name: (job, Path(runs[name][2]).read_text()) for name, job in jobs.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_printed_command_is_the_one_that_runs(name: str, started: dict[str, tuple[Job, str]]) -> None:
    job, output = started[name]
    line = next((line for line in output.splitlines() if line.startswith("ARGV")), None)
    assert line is not None, output
    found = [os.path.basename(word) if i == 0 else word for i, word in enumerate(json.loads(line[4:]))]
    told = list(runner_command(job))
    if name.startswith("pdsh"):
        found, told = [w for w in found if w.strip()], [w for w in told if w.strip()]
    helper = "launcher_helper.py"
    found = [f"<deepspeed>/launcher/{helper}" if word.endswith(helper) else word for word in found]
    # The runner adds PYTHONPATH, and UCX_TLS under openmpi, to what it exports.
    assert _without_own(found) == _without_own(told)
    assert "do-not-show" not in output


def _without_own(words: list[str]) -> list[str]:
    own = ("PYTHONPATH=", "UCX_TLS=")
    kept: list[str] = []
    for word in words:
        if word.startswith("export "):
            parts = [part for part in word.split("; ") if part and not part.startswith(tuple(f"export {o}" for o in own))]
            kept.append("; ".join(parts).strip())
        elif word.startswith(own):
            kept.pop()  # the -x or -genv before it
        elif word.startswith("--export=ALL"):
            kept.append("--export=ALL")
        else:
            kept.append(word)
    return kept
