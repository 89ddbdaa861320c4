"""The GPU kit: no part takes another one down, a stopped run goes on, and it runs on a CPU without our other packages."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools.bench import gpu_kit
from tools.bench.gpu_report import collect, page

pytest.importorskip("triton", reason="the kit is about Triton kernels")

ROOT = Path(__file__).resolve().parents[2]
KIT = str(ROOT / "tools" / "bench" / "gpu_kit.py")
# What a GPU machine with torch, Triton, transformers and pytest lacks of our requirements.
ABSENT = ("pydantic", "deepspeed", "datasets", "zstandard", "lm_eval", "wandb", "matplotlib", "fla", "causal_conv1d", "mpi4py")


def rows(folder: Path, part: str) -> dict[str, dict[str, Any]]:
    return {str(row["key"]): row for row in gpu_kit.stored(folder / f"{part}.jsonl")}


@pytest.mark.slow
def test_a_part_that_raises_dies_or_hangs_loses_only_the_row_it_was_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kit, "PARTS", {"smoke": 90, "kernels": 90, "cuts": 12, "decode": 90})
    kit = gpu_kit.Kit(tmp_path, list(gpu_kit.PARTS), True, time.monotonic() + 200, "tests.tools.gpu_kit_parts")
    outcomes = {part: row["outcome"] for part, row in kit.run().items()}
    assert outcomes == {"smoke": "done", "kernels": "done", "cuts": outcomes["cuts"], "decode": "done"}
    assert str(outcomes["cuts"]).startswith("ended after")
    assert rows(tmp_path, "smoke")["middle"]["error"] == "RuntimeError: out of luck"
    died = rows(tmp_path, "kernels")
    assert "the process ended" in died["middle"]["error"] and died["last"]["value"] == 3
    assert died["first"]["process"] != died["last"]["process"]  # started again, behind the row that killed it
    assert list(rows(tmp_path, "cuts")) == ["first"]
    assert list(rows(tmp_path, "decode")) == ["first", "middle", "last"]
    assert json.loads((tmp_path / "parts.json").read_text())["decode"]["outcome"] == "done"

    # the same command again: nothing is measured twice, and the row that hung is passed over
    before = rows(tmp_path, "decode")["first"]["process"]
    kit = gpu_kit.Kit(tmp_path, ["cuts", "decode"], True, time.monotonic() + 100, "tests.tools.gpu_kit_parts")
    assert all(row["outcome"] == "done" for row in kit.run().values())
    assert "error" in rows(tmp_path, "cuts")["middle"] and rows(tmp_path, "cuts")["last"]["value"] == 3
    assert rows(tmp_path, "decode")["first"]["process"] == before


def test_parts_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_kit.chosen("cuts,facts", "") == ["facts", "cuts"]
    assert "peers" not in gpu_kit.chosen("", "peers")
    with pytest.raises(SystemExit) as stopped:
        gpu_kit.chosen("operator", "")
    assert "no part 'operator'" in str(stopped.value) and "operators" in str(stopped.value)


def kit(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, KIT, *words], capture_output=True, text=True, check=False)


def test_rehearsals_and_measurements_do_not_mix(tmp_path: Path) -> None:
    """Rows are known by their names, which both have."""
    assert kit("--output", str(tmp_path), "--minutes", "0", "--only", "facts").returncode == 1
    refused = kit("--output", str(tmp_path), "--rehearse")
    assert refused.returncode == 1 and "has rows of a measurement" in refused.stderr
    (tmp_path / "file").touch()
    refused = kit("--output", str(tmp_path / "file"))
    assert refused.returncode == 1 and refused.stderr.startswith("error: cannot write to")


def processes_that_name(folder: Path) -> list[str]:
    """Processes with this folder in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # others come and go meanwhile
            if str(folder).encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_a_signal_ends_the_parts_too(tmp_path: Path) -> None:
    """Parts have sessions of their own; one that ran on would share the GPU with the next run."""
    driver = subprocess.Popen([sys.executable, KIT, "--output", str(tmp_path), "--rehearse", "--only", "facts"])
    while not (tmp_path / "facts.log").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    driver.terminate()
    assert driver.wait(timeout=20) == 143
    deadline = time.monotonic() + 10  # the kernel ends a killed process a moment later
    while left := processes_that_name(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_no_part_starts_without_time(tmp_path: Path) -> None:
    kit = gpu_kit.Kit(tmp_path, ["facts"], True, time.monotonic() + 1)
    assert kit.run()["facts"]["outcome"] == "left out: no time"


@pytest.mark.slow
def test_rehearsal_without_the_packages_that_a_gpu_machine_lacks(tmp_path: Path) -> None:
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {ABSENT!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "if os.environ.get('TRITON_INTERPRET') == '1':\n"
        "    from tests.ops.quick_interpreter import quicken\n"
        "    quicken()\n"
    )
    output = tmp_path / "kit"
    # `peers` and `tests` have rehearsals of their own; `training` and `prefill` share their models with `smoke` and `decode`
    command = [
        sys.executable, "tools/bench/gpu_kit.py", "--output", str(output), "--rehearse",
        "--only", "facts,smoke,correctness-fp32,operators,kernels,cuts,decode",
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(blocker), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = collect([output])
    failed = {f"{part}: {key}": row["error"] for part, found in parts.items() for key, row in found.items() if "error" in row}
    assert not failed
    assert all(row["finite"] for row in parts["smoke"].values())
    text = page([{"parts": parts, "file": "x.json"}])
    assert "## Operators" in text and "| metala triton 1 x 40 x 1 x 16 x 32 |" in text and "## MetaLA against" in text
