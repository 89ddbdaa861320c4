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


def start(job: Job, folder: Path) -> subprocess.Popen[str]:
    for program in ("pdsh", "mpirun", "srun", "ompi_info", "sinfo"):
        (folder / program).write_text(STAND_IN)
        (folder / program).chmod(0o755)
    write_files(job)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "UCX", "MLFLOW", "NCCL", "MV2"))}
    from megatron.launch.exports import launcher_environment

    env = launcher_environment({**kept, **SECRET, **job.environment})
    env["PATH"] = f"{folder}:{env['PATH']}"
    return subprocess.Popen(job.command, cwd=ROOT, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, str]]:
    """All cases at once: each costs the import of DeepSpeed."""
    if os.path.exists(SYSTEM_HOSTFILE):
        pytest.skip("this machine has a host file of its own")
    running = {}
    for name, options in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        chosen = LaunchOptions(hostfile="h", master_addr="10.0.0.1", **options)
        environ = {"PATH": "/venv/bin:/bin", "MY_FLAG": "a b;%h", **SECRET}
        given: dict[str, Any] = {"pool": {"n1": 2, "n2": 2}, "environ": environ, "scratch": str(folder / "launch")}
        words = ["a.yml", "--set", 'name="a b"', "--set", 'x=[["y"]]', "a;$(b)`c`|%h", 'a $b \\ "c" %n', "a\nb\t c", ""]
        job = plan_job(chosen, CPU, "train.py", words, port=29500, **given)
        running[name] = (job, start(job, folder))
    return {name: (job, process.communicate(timeout=120)[0]) for name, (job, process) in running.items()}


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
