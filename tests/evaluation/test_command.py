"""`eval.py` as a user runs it: an ALiBi model beyond its length, a learned-position model that cannot, mistakes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.commands import run_here
from tests.evaluation.corpus import write_corpus

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the cat sat on the mat and the dog ate the log. " * 3


@pytest.fixture
def config(tmp_path: Path) -> Path:
    prefix = write_corpus(tmp_path / "text_document", [[*f"{i} {TEXT}".encode(), 0] for i in range(40)])
    values = {
        "data_path": prefix,
        "tokenizer_type": "CharLevelTokenizer",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "seq_length": 32,
        "split": "80,20,0",
        "optimizer": {"type": "Adam", "params": {"lr": 0.003}},
        "train_micro_batch_size_per_gpu": 2,
        "train_iters": 4,
        "eval_iters": 1,
        "checkpoint_factor": 4,
        "run_dir": str(tmp_path / "run"),
        "save": str(tmp_path / "run" / "checkpoints"),
    }
    path = tmp_path / "tiny.yml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return run_here(*words)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["alibi", "learned"])
def test_train_then_eval(config: Path, positions: str) -> None:
    trained = command("train.py", config, "--set", f"pos_emb={positions}")
    assert trained.returncode == 0, trained.stderr + trained.stdout
    words = ["--eval_tasks", "perplexity", "--eval_lengths", 16, 32, 64, "--eval_stride", 8, "--set", "eval_limit=500"]
    done = command("eval.py", config, *words)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(next((config.parent / "run").glob("eval_perplexity_valid_*.json")).read_text())
    assert found["tokens"] == 500 and found["bytes"] >= 490 and found["words"] > 50
    rows = found["rows"]
    assert [row["length"] for row in rows] == [16, 32, 64]
    assert all(row["tokens"] == 500 and row["passes"] == 63 for row in rows if "error" not in row)
    assert all(1 < row["perplexity"] < 600 for row in rows if "error" not in row)
    if positions == "learned":
        assert "learned 32 positions" in rows[2]["error"] and "learned 32 positions" in done.stdout
    else:
        assert "error" not in rows[2] and list((config.parent / "run").glob("*.png"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eval_tasks", "perplexities"], "unknown evaluation task 'perplexities'"),
        ([], "no evaluation task is named"),
        (["--eval_tasks", "perplexity", "--eval_lengths", "0"], "eval_lengths"),
        (["--eval_tasks", "perplexity", "--set", "save=null"], "no checkpoint is named"),
    ],
)
def test_mistakes_are_one_message(config: Path, words: list[str], said: str) -> None:
    done = command("eval.py", config, *words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
