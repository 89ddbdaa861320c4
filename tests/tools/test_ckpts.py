"""GPT-NeoX's commands under tools/ckpts lead to ours, or say in one line what does their work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from tests.commands import run_here
from tests.evaluation.tiny import tiny_config, trained_checkpoint
from tools.ckpts import pointers

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tools" / "ckpts"


def command(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    return run_here(FOLDER / f"{name}.py", *words)


def test_every_command_of_neox_is_there_and_leads_somewhere() -> None:
    known = {"convert_hf_llama_to_neox", "convert_hf_to_sequential", "convert_neox_to_hf", "convert_neox_to_mamba_ssm"}
    known |= {"convert_raw_llama_weights_to_neox", "inspect_checkpoints", "merge20b", "upload"}
    assert {path.stem for path in FOLDER.glob("*.py")} - {"pointers"} == known == set(pointers.LEADS) | set(pointers.POINTERS)
    for name in known:
        assert f'lead("{name}")' in (FOLDER / f"{name}.py").read_text()


@pytest.mark.parametrize("name", sorted(pointers.POINTERS))
def test_pointers_are_one_line_and_an_exit_code(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--input_dir", "x"])
    with pytest.raises(SystemExit) as ended:
        pointers.lead(name)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"{name}.py is not offered here" in said and "Traceback" not in said
    for word in pointers.POINTERS[name].split():
        if word.startswith("tools/"):
            assert (ROOT / word).is_file()


def test_arguments_become_ours(tmp_path: Path) -> None:
    assert pointers.LEADS["upload"](["f", "me/m", "main"])[1:] == [
        "--folder",
        "f",
        "--push-to-hub",
        "me/m",
        "--revision",
        "main",
    ]
    assert pointers.LEADS["inspect_checkpoints"](["a", "-c", "b", "-d"]) == ["checkpoint.py", "diff", "a", "b"]
    words = ["--model", str(tmp_path), "--model_path", "out", "--tp", "2"]
    assert pointers.LEADS["convert_hf_llama_to_neox"](words) == [
        "convert_from_hf.py",
        "--input",
        str(tmp_path),
        "--output",
        "out",
    ]
    with pytest.raises(ConfigError, match="there is no folder"):
        pointers.LEADS["convert_hf_llama_to_neox"](["--model", "a/b", "--model_path", "out"])
    (tmp_path / "layer_00-model_00-model_states.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="no checkpoint of ours") as caught:
        pointers.LEADS["convert_neox_to_hf"](["--input_dir", str(tmp_path), "--config_file", "20B.yml", "--output_dir", "o"])
    assert "20B.yml" in str(caught.value.hint) and "tools/convert_to_hf.py --checkpoint" in str(caught.value.hint)


@pytest.mark.slow
def test_neox_commands_export_and_inspect_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = trained_checkpoint(tmp_path / "runs", tiny_config("metala"), steps=1)
    done = command("convert_neox_to_hf", "--input_dir", checkpoint, "--output_dir", tmp_path / "hf", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf" / "config.json").is_file() and "runs: python tools/convert_to_hf.py" in done.stderr
    done = command("inspect_checkpoints", checkpoint)
    assert done.returncode == 0 and "metala" in done.stdout, done.stderr
    done = command("convert_neox_to_hf", "--input_dir", tmp_path / "none", "--output_dir", tmp_path / "o")
    assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
