"""The three commands as a person types them: export, import, generate; and what they say when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"tokenizer": {"type": "CharLevelTokenizer", "vocab_size": 512, "eod": 0, "pad": 1}, "seq_length": 64}

pytestmark = pytest.mark.slow


def run(*words: object, cwd: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "home")}
    command = [sys.executable, str(ROOT / str(words[0])), *map(str, words[1:])]
    return subprocess.run(
        command, cwd=cwd, env=environment, input=text, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(facts=FACTS, vocab_size=640)


def test_there_and_back(checkpoint: Path, tmp_path: Path) -> None:
    out = run("tools/convert_to_hf.py", "--checkpoint", checkpoint, "--output", tmp_path / "hf", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "128 rows that padded the table" in out.stdout and "from_pretrained" in out.stdout
    back = run("tools/convert_from_hf.py", "--input", tmp_path / "hf", "--output", tmp_path / "ck", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    assert "2 layers, hidden size 32, 2 heads, MLP 48, vocabulary 512" in back.stdout
    assert (tmp_path / "ck" / "latest").read_text().strip() == "global_step0"


def test_mistakes_are_one_message_and_exit_codes(checkpoint: Path, tmp_path: Path) -> None:
    lost = run("tools/convert_to_hf.py", "--checkpoint", tmp_path / "x", "--output", tmp_path / "hf", cwd=tmp_path)
    assert lost.returncode == 4 and "not a checkpoint" in lost.stderr and "Traceback" not in lost.stderr
    lost = run("tools/convert_from_hf.py", "--input", checkpoint, "--output", tmp_path / "ck", cwd=tmp_path)
    assert lost.returncode == 6 and "checkpoint of ours" in lost.stderr and "Traceback" not in lost.stderr


def config(tmp_path: Path, **more: object) -> Path:
    values = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_config": [[["metala"], 2]],
        "seq_length": 64,
        "max_position_embeddings": 64,
        "tokenizer_type": "CharLevelTokenizer",
        "train_micro_batch_size_per_gpu": 1,
        "train_iters": 1,
        "load": str(tmp_path / "run"),
        "maximum_tokens": 9,
    }
    path = tmp_path / "tiny.yml"
    path.write_text(yaml.safe_dump(values | more))
    return path


def test_generate_from_a_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\nanother one\n")
    done = run("generate.py", config(tmp_path), "-i", "prompts.txt", "-o", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["context"] for r in records] == ["one", "another one"]
    assert all(r["length"] == 9 or r["finished"] for r in records)
    again = run("generate.py", config(tmp_path, recompute=True), "-i", "prompts.txt", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    other = [json.loads(line) for line in (tmp_path / "prompts.txt.output.jsonl").read_text().splitlines()]
    assert [r["text"] for r in other] == [r["text"] for r in records]


def test_generate_from_nothing_and_by_hand(checkpoint: Path, tmp_path: Path) -> None:
    done = run("generate.py", config(tmp_path, num_samples=3, temperature=1.0), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "samples.txt").read_text().splitlines()) == 3
    talk = run("generate.py", config(tmp_path, text_gen_type="interactive"), cwd=tmp_path, text="hello\n")
    assert talk.returncode == 0 and talk.stdout.count("Context >>>") == 2, talk.stderr
    lost = run("generate.py", config(tmp_path, load=str(tmp_path / "none")), cwd=tmp_path)
    assert lost.returncode == 4 and "Traceback" not in lost.stderr
