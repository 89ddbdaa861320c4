"""Commands of this repository without a new interpreter, which spends two to five seconds of CPU on its imports.

`run_here` runs a script in the test process, `run_forked` in a copy of a process that has the imports behind it and streams of
its own. That every command starts by itself is for `test_help_that_nobody_reads`; signals and launchers need true processes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


class _Replaced(Exception):
    """The command replaces its process by another one (`os.execve`): arguments and environment of that."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.arguments, self.environment = arguments, environment


def _execve(program: str, arguments: list[str], environment: Mapping[str, str]) -> NoReturn:
    assert program == sys.executable, f"{program} is no script of ours"
    raise _Replaced([word for word in arguments[1:] if word != "-u"], environment)


def _leave(code: int) -> NoReturn:
    """For `launch.ending.leave`, which ends a process without unwinding it."""
    raise SystemExit(code)


@contextlib.contextmanager
def _as_a_process(arguments: list[str], folder: Path, text: str, environment: Mapping[str, str]) -> Iterator[None]:
    path, here, stdin, root = list(sys.path), os.getcwd(), sys.stdin, logging.getLogger()
    handlers, level = root.handlers[:], root.level
    patches = [mock.patch("os.execve", _execve), mock.patch("megatron.launch.process_exit.leave", _leave)]
    patches += [mock.patch.dict(os.environ, environment, clear=True), mock.patch.object(sys, "argv", arguments)]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        os.chdir(folder)
        sys.path.insert(0, str(Path(arguments[0]).parent))
        sys.stdin = io.StringIO(text)
        root.handlers = []  # a command's own basicConfig does nothing beside pytest's handlers
        root.setLevel(logging.WARNING)
        try:
            yield
        finally:
            root.handlers = handlers
            root.setLevel(level)
            os.chdir(here)
            sys.path[:], sys.stdin = path, stdin


def run_here(
    script: str | Path, *words: object, cwd: Path = ROOT, text: str = "", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end.

    Args:
        script: its file, from this checkout's root. words: its arguments.
        cwd: the folder to run it in. text: its standard input.
        env: all variables; by default those of this process. Libraries that are loaded have read theirs already.

    Returns:
        Exit code and output; an exception that leaves the script is a traceback and code 1, as for an interpreter.
    """
    arguments, environment = [str(ROOT / script), *map(str, words)], dict(os.environ if env is None else env)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        while arguments:
            start, arguments = arguments, []
            try:
                with _as_a_process(start, cwd, text, environment):
                    runpy.run_path(str(ROOT / start[0]), run_name="__main__")
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code, file=err)
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except _Replaced as other:
                arguments, environment = other.arguments, dict(other.environment)
            except BaseException:
                traceback.print_exc()
                code = 1
    return subprocess.CompletedProcess([str(script), *map(str, words)], code, out.getvalue(), err.getvalue())


_WARM = ["torch", "megatron.assemble", "megatron.export.hf", "megatron.generation.load", "megatron.evaluation.run_lm_eval"]


def run_forked(
    words: Sequence[str], folder: Path, out: str = "kept", err: str = "kept", stdin: str = "empty"
) -> tuple[int, str]:
    """Run a script of this checkout in a process of its own, from the checkout's root.

    Args:
        words: the script and its arguments. folder: for what it writes to a stream that is kept.
        out, err: `kept`, `closed`, `gone` (a pipe that nobody reads) or `full` (a disk). stdin: `empty` or `closed`.

    Returns:
        Exit code and what was written to stderr.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_WARM)
    log = folder / "stderr.txt"
    child = context.Process(target=_forked, args=(list(words), {1: out, 2: err}, stdin, str(log)))
    child.start()
    child.join(600)
    code = child.exitcode
    assert code is not None, "it does not end"
    return code, log.read_text() if err == "kept" else ""


def _forked(words: list[str], streams: Mapping[int, str], stdin: str, log: str) -> None:
    """The life of the copy: its descriptors, its streams as an interpreter makes them, the script."""
    os.chdir(ROOT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, kind in streams.items():
        os.dup2(_target(kind, log if number == 2 else os.devnull), number)
    for number, kind in ((0, stdin), *streams.items()):
        if kind == "closed":
            os.close(number)
        file = None if kind == "closed" else io.FileIO(number, "w" if number else "r", closefd=False)
        setattr(sys, ("stdin", "stdout", "stderr")[number], io.TextIOWrapper(file) if file else None)  # type: ignore[type-var]
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _target(kind: str, kept: str) -> int:
    """A descriptor for a stream of this kind."""
    if kind == "gone":
        read, write = os.pipe()
        os.close(read)
        return write
    return os.open("/dev/full" if kind == "full" else kept, os.O_WRONLY | os.O_CREAT, 0o600)
