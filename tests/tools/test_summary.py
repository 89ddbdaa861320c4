"""`tools/summary.py`: its words, the plot it makes up for; and a run that is told to leave, which does not draw one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import run_here
from tests.tiny_run import write_run

ROOT = Path(__file__).resolve().parents[2]


def summary(run: Path) -> subprocess.CompletedProcess[str]:
    return run_here("tools/summary.py", run)


def test_words_and_places(tmp_path: Path) -> None:
    rows = [{"iteration": i, "train/lm_loss": 4.0 / i, "validation/lm_loss": 8.0 / i} for i in (1, 2, 4)]
    lines = [json.dumps(row) for row in rows] + ['{"iteration": 5, "trai']  # torn by a kill
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "samples.jsonl").write_text(json.dumps({"context": "a", "text": "b\nc"}) + "\n")
    done = summary(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "validation loss   8.000 -> 2.000 after 4 steps (25.0% of its first value)" in done.stdout
    assert "a sample          ab\n                  c" in done.stdout
    assert f"plot              {tmp_path}/loss.png" in done.stdout and "from_pretrained" not in done.stdout


def test_the_plot_is_drawn_when_the_metrics_are_newer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    metrics, plot = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    metrics.write_text('{"iteration": 1, "train/lm_loss": 2.0}\n')
    summary(tmp_path)
    plot.write_bytes(b"kept")
    summary(tmp_path)
    assert plot.read_bytes() == b"kept", "it shows all there is"
    os.utime(metrics, (plot.stat().st_mtime + 5, plot.stat().st_mtime + 5))
    summary(tmp_path)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_no_run_and_bad_samples_are_no_traceback(tmp_path: Path) -> None:
    done = summary(tmp_path)
    assert done.returncode == 1 and "there is no run here" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "metrics.jsonl").write_text("")
    for text in ("", "no json", "[1]", "{}", '{"context": 1, "text": "x"}'):
        (tmp_path / "samples.jsonl").write_text(text)
        done = summary(tmp_path)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert "no training loss was logged" in done.stderr


@pytest.mark.slow
def test_a_run_that_is_told_to_leave_does_not_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    settings = {"run_dir": str(run), "save": str(run / "checkpoints"), "train_iters": 100_000}
    config = write_run(tmp_path / "tiny", train_batch_size=2, **settings)
    command = [sys.executable, "train.py", str(config)]
    training = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 120
        while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        training.send_signal(signal.SIGTERM)
        said, _ = training.communicate(timeout=60)
    finally:
        training.kill()
    assert training.returncode == 75, said
    assert not (run / "loss.png").exists() and f"tools/summary.py {run} draws it" in said
    assert summary(run).returncode == 0
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
