"""The sweep of long-context measures: what it refuses, the published scores, and a tiny model measured from its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.config.cli import config_from_args, make_parser
from tests.commands import run_here
from tests.evaluation.tiny import tiny_config, trained_checkpoint
from tools.long_context import published_scores, read_sweep

ROOT = Path(__file__).resolve().parents[2]


def sweep(folder: Path, **changes: object) -> Path:
    config = {"tokenizer_type": "CharLevelTokenizer", "num_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    (folder / "tiny.yml").write_text(json.dumps({**config, "seq_length": 64}))
    needles = {"tasks": ["niah_single_1"], "lengths": [400, 500], "depths": [0, 1], "examples": 1}
    values = {"config": str(folder / "tiny.yml"), "models": {"a": []}, "needles": needles, "longest": {"a": 400}}
    (folder / "sweep.yml").write_text(json.dumps({**values, **changes}))
    return folder / "sweep.yml"


@pytest.mark.slow
def test_a_checkpoint_is_measured_and_published_scores_stand_apart(tmp_path: Path) -> None:
    checkpoint = trained_checkpoint(tmp_path / "checkpoints", tiny_config("metala"), steps=1)
    words = ["--models", f"a={checkpoint.parent}", "--output", tmp_path / "out"]
    done = run_here("tools/long_context.py", sweep(tmp_path), *words)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["models"]["a"]["needles"]["scores"]) == ["niah_single_1@400"]  # 500 is beyond `longest`
    assert result["published"]["note"] == "not measured here" and all("arXiv" in s for s in result["published"]["sources"])
    (tmp_path / "out-needles.png").unlink()
    assert run_here("tools/long_context.py", tmp_path / "sweep.yml", "--redraw", *words[-2:]).returncode == 0
    assert (tmp_path / "out-needles.png").read_bytes().startswith(b"\x89PNG")


def test_published_scores_name_their_source() -> None:
    scores = published_scores()
    assert len(scores) == 9 and all(name.endswith("(Gated DeltaNet (arXiv 2412.06464) Table 2)") for name in scores)
    mamba = next(values for name, values in scores.items() if name.startswith("Mamba2") and "niah_single_1" in name)
    assert mamba == {1024: 99.2, 2048: 98.8, 4096: 65.4, 8192: 30.4}


@pytest.mark.parametrize("name", ["configs/long-context-cpu.yml", "configs/synthetics/needles-sweep.yml"])
def test_the_models_of_shipped_sweeps_are_configurations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the sweeps name their configuration from the root
    shipped = read_sweep(name)
    assert "needles" in shipped
    for settings in shipped["models"].values():
        words = [shipped["config"], *(word for setting in settings for word in ("--set", setting))]
        assert config_from_args(make_parser("").parse_args(words), check=False).training.train_iters in (300, 1500)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"lengths": [1]}, [], "a sweep has no 'lengths'"),
        ({"models": None}, [], "the sweep names no models"),
        ({}, ["--models", "b"], "the sweep has no model 'b'"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, object], words: list[str], message: str) -> None:
    done = run_here("tools/long_context.py", sweep(tmp_path, **changes), *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
