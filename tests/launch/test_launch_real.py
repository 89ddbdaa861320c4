"""The true starters, plain python and DeepSpeed's launcher, and what happens when one rank fails.

torchrun starts a whole training in `tests/test_main_job.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.rank_server import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("launched_script.py"))
CONFIG = ["-d", "configs", "metala-quickstart"]


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    return json.loads(line)


def deepy(*more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    port = f"master_port={free_port()}"
    return start("deepy.py", SCRIPT, *CONFIG, "--set", port, *more, **environment)


def test_one_process_needs_no_launcher() -> None:
    done = deepy("--set", "num_gpus=1")
    got = report(done)
    assert got["world"] == 1
    assert got["args"][:3] == CONFIG
    assert not done.stderr


def test_deepy_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys; sys.argv = ['deepy.py']; import deepy; "
        f"deepy.main([{SCRIPT!r}, '-d', 'configs', 'metala-quickstart', '--print-launch', '--set', 'num_gpus=4']); "
        "bad = {'torch', 'deepspeed', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    done = start("-c", code)
    assert done.returncode == 0, done.stderr
    assert "deepspeed.launcher.launch" in done.stdout


def test_help_and_a_missing_script() -> None:
    asked, bare = start("deepy.py", "--help"), start("deepy.py")
    assert asked.returncode == 0 and "--launcher" in asked.stdout
    assert bare.returncode == 5 and "deepy.py train.py configs/" in bare.stderr and "Traceback" not in bare.stderr


def test_a_bad_config_starts_nothing() -> None:
    done = deepy("--set", "num_gpuss=2")
    assert done.returncode == 2
    assert "num_gpus" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_through_deepspeed() -> None:
    done = deepy("--set", "num_gpus=2")
    got = report(done)
    assert (got["sum"], got["world"]) == (3.0, 2)
    assert got["args"][:3] == CONFIG
    assert "INFO" not in done.stdout + done.stderr, "the launcher's chatter is held back"


@pytest.mark.slow
def test_a_failed_rank_ends_the_job_with_its_code_and_message() -> None:
    begin = time.monotonic()
    done = deepy("--set", "num_gpus=2", FAIL_RANK="1")
    assert done.returncode == 2
    assert "error (rank 1): this rank was told to fail" in done.stderr
    assert "exit code 2" in done.stderr
    assert time.monotonic() - begin < 50, "the rank that sleeps is stopped"
