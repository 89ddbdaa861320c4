"""Signals through the real commands: what `deepy.py` is sent reaches the ranks, and their exit code comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.checkpoint.layout import complete_steps
from megatron.launch.runners import children
from tests.commands import run_here
from tests.parallel.rank_server import free_port
from tests.tiny_run import write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A tiny run without an end."""
    return write_run(
        tmp_path,
        train_iters=100_000,
        eval_interval=50,
        eval_iters=2,
        master_port=free_port(),
        run_dir=str(tmp_path / "run"),
        save=str(tmp_path / "save"),
        load=str(tmp_path / "save"),
    )


def _rows(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


def start(config: Path, *more: str) -> subprocess.Popen[str]:
    """`deepy.py train.py` in the background, once its first steps are logged."""
    command = [sys.executable, "deepy.py", "train.py", str(config), *more]
    metrics, deadline = config.parent / "run" / "metrics.jsonl", time.monotonic() + 120
    before = _rows(metrics)
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while _rows(metrics) < before + 4:
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return child


def end(child: subprocess.Popen[str]) -> str:
    text, _ = child.communicate(timeout=90)
    assert child.returncode == 75, (child.returncode, text)
    assert "Traceback" not in text, text
    return text


@pytest.mark.slow
def test_one_process(config: Path) -> None:
    child = start(config)
    child.send_signal(signal.SIGUSR1)
    text = end(child)
    assert "stopped: SIGUSR1 at iteration" in text
    first = max(complete_steps(config.parent / "save"))
    child = start(config, "--set", f"train_iters={first + 100_000}")
    child.send_signal(signal.SIGTERM)
    end(child)
    assert max(complete_steps(config.parent / "save")) > first


@pytest.mark.slow
def test_two_ranks_through_the_launcher(config: Path) -> None:
    """As a terminal's Ctrl-C does it; what the starter makes of SIGHUP and SIGTERM is in `tests/launch/test_launch_node.py`."""
    child = start(config, "--set", "model_parallel_size=2")
    child.send_signal(signal.SIGINT)
    text = end(child)
    assert "stopped: SIGINT at iteration" in text
    assert "its work is saved" in text
    assert complete_steps(config.parent / "save")


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_both(config: Path) -> None:
    child = start(config, "--set", "pipe_parallel_size=2")
    ranks = children(child.pid)[0]
    os.kill(children(ranks)[1], signal.SIGUSR1)
    assert "stopped: SIGUSR1 at iteration" in end(child)


@pytest.mark.slow
def test_a_time_limit(config: Path) -> None:
    done = run_here("train.py", config, "--set", "time_limit=0.3")
    assert done.returncode == 75 and "Traceback" not in done.stderr, done.stderr
    assert "stopped: time_limit at iteration" in done.stdout


@pytest.mark.parametrize(("key", "value"), [("time_limit", "soon"), ("exit_signals", "[SIGKILL]")])
def test_keys_that_make_no_sense_are_a_message_of_the_config(config: Path, key: str, value: str) -> None:
    done = run_here("train.py", config, "--dry-run", "--set", f"{key}={value}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert key in done.stderr
    assert "Traceback" not in done.stderr
