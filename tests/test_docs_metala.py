"""The Python of docs/metala.md runs as it stands: the classes with their defaults, and the generation example."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron.export.hf import export_checkpoint
from tests.evaluation.tiny import tiny_config, trained_checkpoint
from tests.export.modules_cache import use_private_modules_cache

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "metala.md").read_text(encoding="utf-8")
CLASSES, GENERATE = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def _run(code: str, name: str) -> dict[str, object]:
    space: dict[str, object] = {}
    compiled = compile(code, name, "exec")
    exec(compiled, space)
    return space


def test_the_classes_of_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        model = _run(CLASSES, "classes")["model"]
    assert isinstance(model, torch.nn.Module) and "MetaLAForCausalLM" in capsys.readouterr().out
    # 24 (4 d^2 + 5.5 d + 3 d f) + 32,000 d of the released defaults, tied
    d, f = 1024, 5632
    assert sum(p.numel() for p in model.parameters()) == 24 * (4 * d * d + 5 * d + d // 2 + 3 * d * f) + 32000 * d


def test_the_generation_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use_private_modules_cache()
    folder = tmp_path / "hf"
    export_checkpoint(trained_checkpoint(tmp_path / "runs", tiny_config("metala"), steps=1), folder)
    code = GENERATE.replace("your/path/to/hf/checkpoints", str(folder)).replace("max_new_tokens=256", "max_new_tokens=4")
    outputs = _run(code, "generate")["outputs"]
    assert isinstance(outputs, torch.Tensor) and len(outputs) == 2
    assert "=====Begin======" in capsys.readouterr().out


def test_commands_name_files_that_are_there() -> None:
    for word in re.findall(r"(?:tools/\w+\.py|configs/[\w-]+\.yml)", TEXT):
        assert (ROOT / word).is_file(), word
