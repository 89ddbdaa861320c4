"""tools/layer.py: the mixer that `new` writes passes, `check` names the failing check, invalid names are rejected."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from tools.layer import TARGETS, Check, Recorder, check_name, table, write_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["Gla", "2gla", "my-gla", "class", "base", ""])
def test_a_name_that_is_no_module_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a mixer"):
        check_name(name, tmp_path)


def test_names_and_files_that_are_there_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is a mixer called 'flash'"):
        check_name("flash", tmp_path)
    for target in TARGETS.values():
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    files = write_files("my_gla", tmp_path)
    assert [path.name for path in files] == ["my_gla.py", "test_my_gla.py", "my_gla.yml"]
    text = files[0].read_text()
    assert "class MyGlaMixer(Layer)" in text and "$" not in "".join(path.read_text() for path in files).replace("$schema", "")
    with pytest.raises(ConfigError, match="in the way"):
        write_files("my_gla", tmp_path)
    assert files[0].read_text() == text


def test_the_table_says_what_failed_and_how_often() -> None:
    recorder = Recorder(["x"], "test_x.py")
    recorder.checks = {"a": Check("Causal.", passed=2), "b": Check("Padding.", passed=1, failures=["[left] assert 3 <= 1"])}
    lines = table(recorder).splitlines()
    assert lines[0].split() == ["Causal.", "2", "passed"] and lines[1].split() == ["Padding.", "2", "FAILED"]
    assert lines[2].strip() == "[left] assert 3 <= 1" and lines[-1].startswith("1 of 2 checks")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The part of the repository that a new mixer needs."""
    leave = shutil.ignore_patterns("__pycache__", "golden", "faults", "engine", "data", "launch", "export", "checkpoint")
    for name in ("megatron", "linear_neox"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave)
    for name in ("configs", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "train.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_new_mixer_passes_ruff_and_a_broken_one_not_its_checks(copy: Path) -> None:
    """Padding forgotten, then a file that cannot be imported.

    That the template passes all checks, trains, and plans a dry run is for the blocks of README.md and
    docs/guides/add-a-mixer.md, which `tests/docs/test_blocks.py` runs.
    """
    assert run(copy, "tools/layer.py", "new", "my_gla")[0] == 0
    assert "| `my_gla` |" in (copy / "docs/reference/api/mixers.md").read_text()
    files = [target.format("my_gla") for target in TARGETS.values() if target.endswith(".py")]
    assert run(copy, "-m", "ruff", "check", *files)[0] == 0 and run(copy, "-m", "ruff", "format", "--check", *files)[0] == 0
    path = copy / files[0]
    text = path.read_text()
    path.write_text(text.replace("            mask=ctx.mask,\n", ""))
    code, out = run(copy, "tools/layer.py", "check", "my_gla")
    broken = [line for line in out.splitlines() if line.endswith("FAILED")]
    assert code == 1 and len(broken) == 1 and broken[0].startswith("4. Padding on either side"), out
    assert "test_my_gla.py: refusal" in out
    path.write_text(text.replace("import empty_scan_state,", "import no_such_scan,"))
    code, out = run(copy, "tools/layer.py", "check", "my_gla")
    assert code == 1 and "no_such_scan" in out and "Traceback" not in out, out
