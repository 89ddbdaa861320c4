"""A 12-layer Based and a JRT model as a user runs them: train through deepy.py, resume bitwise, export, generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.export.modules_cache import use_private_modules_cache
from tests.test_main_job import corpus, losses, run

__all__ = ["corpus"]
ROOT = Path(__file__).resolve().parents[1]


def config_of(kind: str, corpus: Path, place: Path) -> Path:
    """The quickstart of this kind, narrow, on the byte corpus."""
    values = yaml.safe_load((ROOT / "configs" / f"{kind}-quickstart.yml").read_text())
    values |= {
        "data_path": str(corpus / "text_document"),
        "tokenizer_type": "CharLevelTokenizer",
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "seq_length": 64,
        "train_micro_batch_size_per_gpu": 2,
        "train_iters": 8,
        "eval_interval": 4,
        "eval_iters": 1,
        "checkpoint_factor": 4,
        "log_interval": 1,
    }
    del values["vocab_file"]
    if kind == "jrt":
        values["jrt_prefix_length"] = 32
    for key, folder in (("run_dir", "run"), ("save", "run/checkpoints"), ("load", "run/checkpoints")):
        values[key] = str(place / folder)
    path = place / f"{kind}.yml"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["based", "jrt"])
def test_train_resume_export_generate(kind: str, corpus: Path, tmp_path: Path) -> None:
    config, whole = config_of(kind, corpus, tmp_path), tmp_path / "whole"
    place = ("--set", f"run_dir={whole}", "--set", f"save={whole}/checkpoints", "--set", f"load={whole}/checkpoints")
    run("deepy.py", "train.py", config, *place, here=True)
    expected = losses(whole)
    assert len(expected) == 8
    run("deepy.py", "train.py", config, "--set", "exit_interval=5", here=True)
    run("deepy.py", "train.py", config, here=True)
    assert losses(tmp_path / "run") == expected, "resumed bitwise, hidden tokens included"
    if kind == "jrt":
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        for row in (r for r in rows if "train/ntp_loss" in r):
            assert abs(row["train/ntp_loss"] + 0.25 * row["train/mlm_loss"] - row["train/lm_loss"]) < 1e-4
        assert sum("train/mlm_loss" in r for r in rows) == 8
    checkpoint = tmp_path / "run" / "checkpoints" / "global_step8"
    run("tools/convert_to_hf.py", "--checkpoint", checkpoint, "--output", tmp_path / "hf", here=True)
    (tmp_path / "prompts.txt").write_text("the cat sat\n")
    run("generate.py", config, "-i", tmp_path / "prompts.txt", here=True)
    made = [json.loads(line) for line in (tmp_path / "prompts.txt.output.jsonl").read_text().splitlines()]
    assert len(made) == 1 and made[0]["length"] > 0
    from transformers import AutoModelForCausalLM

    use_private_modules_cache()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokens = torch.tensor([list(b"the cat sat")])
    assert model.generate(tokens, max_new_tokens=5, do_sample=False).shape == (1, 16)
