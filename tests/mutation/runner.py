"""Runs the tests of a mutation on a copy of the tree, in a forked process that has the slow imports behind it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.mutation.table import ROOT, Mutation

# Exit codes: pytest's for success and for nothing to run, and ours of a child that could not start. Any other says that the
# tests noticed, be it by an import that fails.
_PASSED, _NOTHING, _BROKEN = 0, 5, 99


@contextlib.contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of all files that git knows or would add, beside a link to ../shared where that is there; removed at the end."""
    with TemporaryDirectory(prefix="mutation-") as folder:
        root = Path(folder, "main")
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        if (ROOT.parent / "shared").is_dir():
            Path(folder, "shared").symlink_to(ROOT.parent / "shared")
        yield root


def import_slow_packages() -> None:
    """What every test process imports before it comes to our own code; done once, before the forks."""
    import hypothesis
    import numpy
    import pydantic
    import pytest
    import safetensors.torch
    import torch.distributed
    import torch.utils.flop_counter
    import yaml

    del hypothesis, numpy, pydantic, pytest, safetensors, torch, yaml


def _child(root: Path, tests: Iterable[str], log: Path, write_bytecode: bool) -> None:
    """The forked process: pytest on the copy; never returns."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(root)
    sys.dont_write_bytecode = not write_bytecode
    sys.path[:] = [str(root), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "megatron")]:
        del sys.modules[name]
    import pytest

    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", *tests]))
    sys.stdout.flush()
    os._exit(code)


def run_tests(root: Path, tests: Iterable[str], timeout_s: float, log: Path, write_bytecode: bool = False) -> int | None:
    """pytest's exit code; None when it took longer than `timeout_s` and was ended."""
    pid = os.fork()
    if pid == 0:
        try:
            _child(root, tests, log, write_bytecode)
        finally:
            os._exit(_BROKEN)
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def try_mutation(root: Path, mutation: Mutation, timeout_s: float) -> tuple[str, float]:
    """(caught, survived or timeout; seconds). The copy is as it was afterwards."""
    file, begun = root / mutation.file, time.monotonic()
    before = file.read_bytes()
    for stale in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        stale.unlink()
    try:
        file.write_text(mutation.applied(root), encoding="utf-8")
        code = run_tests(root, mutation.tests, timeout_s, root.parent / "log")
    finally:
        file.write_bytes(before)
    outcome = {None: "timeout", _PASSED: "survived", _NOTHING: "not run", _BROKEN: "not run"}.get(code, "caught")
    return outcome, round(time.monotonic() - begun, 2)
