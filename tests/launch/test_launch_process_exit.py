"""How a process ends: its code beats threads that still run in C++, and ranks end with whatever started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Whoever takes the interpreter down finds `Late`; gloo's workers would meet their end there.
BODY = """
import atexit, sys
from megatron.errors import ConfigError, exit_on_error
from megatron.launch.process_exit import leaving
atexit.register(lambda: print("registered", flush=True))
class Late:
    def __del__(self):
        print("taken down", flush=True)
sys.late = Late()
with leaving(), exit_on_error():
    print("body")
    {body}
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BODY.format(body=body)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit(None)", 0, ""),
        ("sys.exit('a word')", 1, "a word\n"),
        ("raise ConfigError('wrong')", 2, "error: wrong\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_the_code_comes_through_and_the_interpreter_is_left_standing(body: str, code: int, said: str) -> None:
    done = run(body)
    assert (done.returncode, done.stdout) == (code, "body\nregistered\n")
    assert done.stderr.endswith(said) and (said or not done.stderr)
    assert ("Traceback" in done.stderr) == ("/" in body)


def test_what_is_registered_for_the_end_cannot_keep_the_process() -> None:
    done = run(
        "import time, megatron.launch.process_exit as e; e.AT_EXIT_S = 0.2; atexit.register(time.sleep, 60); sys.exit(3)"
    )
    assert done.returncode == 3


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether the process ends within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


# Starts its last argument as a rank in an own session (as torchrun does), says its number, and waits.
LAUNCHER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-u", *sys.argv[1:]], stdin=subprocess.DEVNULL, start_new_session=True)
time.sleep(60)
"""
RANK = """
import os, sys, time
from megatron.launch.process_exit import leaving
with leaving():
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(60)
"""


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "CROSS_RANK"])
def test_a_rank_dies_with_its_launcher(variable: str) -> None:
    env = {**os.environ, variable: "0"}
    command = [sys.executable, "-c", LAUNCHER, "-c", RANK]
    launcher = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    launcher.kill()
    assert gone(rank)
    launcher.wait()


def test_a_rank_that_nobody_launched_outlives_the_shell_that_started_it() -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("TORCHELASTIC_RUN_ID", "CROSS_RANK")}
    command = [sys.executable, "-c", LAUNCHER, "-c", RANK]
    shell = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None
    rank = int(shell.stdout.readline())
    shell.kill()
    shell.wait()
    assert not gone(rank, 0.3)
    os.kill(rank, signal.SIGKILL)


# deepy.py with jobs of its own: `python -c DEEPY ROUTE LAUNCHER COMMAND...`.
DEEPY = """
import sys
from megatron.launch.job import Job
from megatron.launch.runners import run_job
route, launcher, *command = sys.argv[1:]
sys.exit(run_job(Job(route, (sys.executable, *command), {}, 1, launcher=launcher))[0])
"""
# A runner as DeepSpeed's: what it starts knows nothing of it, as pdsh does not.
RUNNER = """
import subprocess, sys
sys.exit(subprocess.call(["sh", "-c", 'echo $$; exec sleep 60'], stdin=subprocess.DEVNULL))
"""
# A per-node launcher as DeepSpeed's, with a rank below a supervisor.
NODE = """
import subprocess, sys
from megatron.launch.job import SUPERVISOR
rank = "import os, time; os.write(1, (str(os.getpid()) + chr(10)).encode()); time.sleep(60)"
sys.exit(subprocess.call([sys.executable, "-SE", SUPERVISOR, "--watch-stdin", "-c", rank]))
"""


@pytest.mark.parametrize(
    ("route", "launcher", "code"),
    [("local", "deepspeed", NODE), ("hosts", "pdsh", RUNNER), ("hosts", "openmpi", RUNNER), ("hosts", "slurm", RUNNER)],
)
def test_a_killed_command_takes_all_that_it_started_along(route: str, launcher: str, code: str) -> None:
    command = [sys.executable, "-c", DEEPY, route, launcher, "-c", code]
    deepy = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert deepy.stdout is not None
    last = int(deepy.stdout.readline())
    deepy.kill()
    begin = time.monotonic()
    assert gone(last), f"{launcher}: still there"
    assert time.monotonic() - begin < 3, "ranks that train on would meet the next start of the run"
    deepy.wait()


def test_a_killed_launcher_below_the_command_takes_its_ranks_along_and_the_code_says_so() -> None:
    command = [sys.executable, "-c", DEEPY, "local", "deepspeed", "-c", NODE]
    deepy = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert deepy.stdout is not None
    rank = int(deepy.stdout.readline())
    below: Callable[[int], int] = lambda pid: int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])  # noqa: E731
    os.kill(below(deepy.pid), signal.SIGKILL)
    assert gone(rank) and deepy.wait(timeout=10) == 137
