"""The starter of one node: environment, signals, the code that it gives back; and a real training over two of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.launch.node import job_exit_code, rank_environment
from tests.commands import run_here
from tests.launch.tiny_run import write_run
from tests.parallel.rank_server import free_port
from tests.tiny_run import losses

ROOT = Path(__file__).resolve().parents[2]

# A rank: says who it is, waits for a signal or its time, and ends as its number says.
RANK = """
import os, signal, sys, time
def leave(number, frame):
    os.write(1, f"rank {os.environ['RANK']} heard {number}\\n".encode())
    time.sleep(0.5)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
os.write(1, (" ".join([*(os.environ[name] for name in names), *sys.argv[1:]]) + "\\n").encode())  # at once
mine = sys.argv[1 + int(os.environ["LOCAL_RANK"])]
if mine == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(float(sys.argv[3]))
sys.exit(int(mine))
"""


def start(folder: Path, *words: str, node: int = 0) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "megatron.launch.node", "--nodes=2", "--slots=2", f"--node={node}", "--address=host"]
    return subprocess.Popen(
        [*command, "--port=5", str(folder / "rank.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_ranks_know_their_place(tmp_path: Path) -> None:
    process = start(tmp_path, "0", "0", "0", node=1)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert sorted(said.splitlines()) == ["2 0 4 2 host 5 0 0 0", "3 1 4 2 host 5 0 0 0"]
    assert rank_environment(1, 2, 4, 1, "h", 7)["RANK"] == "5"


@pytest.mark.parametrize(("codes", "code"), [(("2", "2"), 2), (("kill", "22"), 22), (("kill", "0"), 137), (("0", "21"), 21)])
def test_the_code_is_that_of_the_ranks(codes: tuple[str, str], code: int, tmp_path: Path) -> None:
    process = start(tmp_path, *codes, "0.3")
    process.communicate(timeout=30)
    assert process.returncode == code


def test_job_exit_code() -> None:
    assert [job_exit_code(codes) for codes in ([], [0, 0], [-9, 22], [22, 3], [0, -15], [-11, -9])] == [0, 0, 22, 22, 143, 139]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_every_rank_and_is_waited_for(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, "0", "0", "60")
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(2)]
    process.send_signal(number)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert sorted(rest.splitlines()) == ["rank 0 heard 15", "rank 1 heard 15"]


@pytest.mark.slow
def test_a_rank_that_outlives_a_failed_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    script = "import sys, megatron.launch.node as n; n.GRACE_S = 1.0; sys.exit(n.main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "--slots=2", str(tmp_path / "rank.py"), "kill", "0", "60"]
    begin = time.monotonic()
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=30, check=False)
    assert done.returncode == 137 and time.monotonic() - begin < 15


def test_ranks_end_with_a_starter_that_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "0", "0", "60")
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    process.kill()
    process.wait(timeout=10)
    assert process.stdout.read() == "", "the pipe of the ranks is closed: they are gone"


@pytest.mark.slow
def test_two_nodes_train_to_the_losses_of_one_process(tmp_path: Path) -> None:
    config = write_run(tmp_path / "data")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    assert run_here("train.py", config, "--set", f"run_dir={tmp_path}/one").returncode == 0
    node = [sys.executable, "-m", "megatron.launch.node", "--nodes=2", f"--port={free_port()}"]
    job = ["train.py", str(config), "--set", f"run_dir={tmp_path}/two", "--set", "model_parallel_size=2"]
    both = [
        subprocess.Popen([*node, f"--node={i}", *job], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for i in (0, 1)
    ]
    said = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    bad = subprocess.run(
        [*node[:3], "--slots=2", *job, "--set", "train_iters=nonsense"], cwd=ROOT, env=env, capture_output=True, check=False
    )
    assert bad.returncode == 2, "a mistake in the configuration is told apart from a lost rank"
