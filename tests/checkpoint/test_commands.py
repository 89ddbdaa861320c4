"""Through the commands of a user: a background save has the bytes of a foreground one; damage sends a run one checkpoint back,
also on another mesh; an explicit step does not.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron.checkpoint.report import diff
from tests.commands import run_here
from tests.tiny_run import losses, write_run

ROOT = Path(__file__).resolve().parents[2]


def write_config(folder: Path) -> Path:
    """A tiny run that saves after steps 10 and 20."""
    llama = {"norm": "simplermsnorm", "activation": "silu", "mlp_type": "llama", "intermediate_size": 64}
    llama |= {"use_bias_in_mlp": False, "make_vocab_size_divisible_by": 64}
    return write_run(folder, train_micro_batch_size_per_gpu=4, train_iters=20, checkpoint_factor=10, **llama)


def train(config: Path, name: str, *overrides: str, code: int = 0) -> str:
    """Run the training command; its output."""
    folder = config.parent / name
    values = [f"run_dir={folder}", f"save={folder}/checkpoints", f"load={folder}/checkpoints", *overrides]
    words = ["deepy.py", "train.py", str(config), *(word for value in values for word in ("--set", value))]
    if any("parallel" in value for value in values):  # ranks are started
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    else:
        done = run_here(*words)
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    return text


@pytest.mark.slow
def test_behind_damaged_and_on_another_mesh(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    train(config, "a")
    assert "is whole" in train(config, "b", "async_save=true")
    first, second = tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints"
    for step in ("global_step10", "global_step20"):
        assert list(diff(first / step, second / step)) == []
    whole = losses(tmp_path / "a")
    file = second / "global_step20" / "layer_02-model_00.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    said = train(config, "b", "iteration=20", code=4)
    assert "layer_02-model_00.safetensors" in said and "SHA-256" in said and "Traceback" not in said
    said = train(config, "b", "model_parallel_size=2")
    assert "skipped: global_step20" in said and "reshard at load" in said
    again = losses(tmp_path / "b")
    assert all(abs(again[step] - whole[step]) <= 1e-5 * whole[step] for step in range(11, 21))
