"""An exported folder in a process where this project cannot be imported: torch, transformers and safetensors are enough."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.export.hf import export_checkpoint
from megatron.generation.load import load_model
from megatron.generation.sample import Sampling, generate

PROGRAM = """
import importlib.machinery, sys

class Hidden(importlib.machinery.PathFinder):
    # what is installed, but these, which look as if they were not: also to importlib.util.find_spec

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {"megatron", "linear_neox", "deepspeed"}:
            return None
        return super().find_spec(name, path, target)

finders = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]  # `pip install -e`
sys.meta_path[:] = [Hidden if finder is importlib.machinery.PathFinder else finder for finder in finders]
for name in ("megatron", "linear_neox", "deepspeed"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert not any(m.split(".")[0] == "megatron" for m in sys.modules)
inputs = tokenizer(["a longer prompt", "b"], return_tensors="pt", padding=True, return_token_type_ids=False)
out = model.generate(**inputs, max_new_tokens=10, do_sample=False)
print("IDS", out[:, inputs.input_ids.shape[1]:].tolist())
"""


@pytest.mark.slow
def test_without_the_project(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    facts = {"tokenizer": {"type": "CharLevelTokenizer", "vocab_size": 512, "eod": 0, "pad": 1}}
    checkpoint = make_checkpoint(facts=facts, vocab_size=640)
    folder = export_checkpoint(checkpoint, tmp_path / "hf").folder
    (tmp_path / "elsewhere").mkdir()
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(folder)],
        cwd=tmp_path / "elsewhere",
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = next(line for line in done.stdout.splitlines() if line.startswith("IDS"))
    prompts = [list(b"a longer prompt"), list(b"b")]
    model, _ = load_model(checkpoint, dtype=torch.float32)
    made = generate(model, prompts, Sampling(maximum_tokens=10), eod=0, vocab_size=512)
    rows = [row[: row.index(0)] if 0 in row else row for row in json.loads(said.removeprefix("IDS "))]
    assert rows == [result.tokens for result in made]
