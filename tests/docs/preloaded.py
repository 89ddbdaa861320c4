"""A process with the project's imports behind it, of which each `python` command of a page is a forked copy.

    python -m tests.docs.preloaded SOCKET

A request names the command line, the folder and the environment, and brings three descriptors for the streams. The answer is
two lines: the copy's process id, then its exit code. A command that replaces its process by another one of our scripts
(`deepy.py` for a single process) continues in the same copy.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import socket
import sys
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

WARM = ("torch", "megatron.assemble", "megatron.export.hf", "megatron.generation.load", "megatron.evaluation.run_lm_eval")
WARM += ("linear_neox", "megatron.data.corpora", "matplotlib.pyplot", "transformers.modeling_utils")
WARM += ("torch._dynamo", "megatron.engine.deepspeed_pipeline", "megatron.engine.deepspeed_zero", "deepspeed.launcher.launch")
WARM += ("transformers.quantizers.auto", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto")


class _Replaced(BaseException):
    """The command replaces its process by another one: command line and environment of that."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self.words, self.environment = [word for word in words[1:] if word != "-u"], dict(environment)


def _execve(program: str, words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    if program == sys.executable and len(words) > 1 and not str(words[1]).startswith("-m"):
        raise _Replaced(words, environment)
    _true_execve(program, words, environment)


_true_execve = os.execve


def _run(words: list[str]) -> None:
    """Run one command line of an interpreter."""
    kind = words[0]
    if kind in ("-", "-c"):
        text = sys.stdin.read() if kind == "-" else words[1]
        sys.argv = [kind, *words[1 if kind == "-" else 2 :]]
        sys.path.insert(0, "")
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(text, "<stdin>" if kind == "-" else "<string>", "exec"), module.__dict__)
    elif kind == "-m":
        sys.argv = [words[1], *words[2:]]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")


def _life(words: list[str], folder: str, environment: Mapping[str, str], streams: Sequence[int]) -> int:
    """The life of a copy: its streams as an interpreter makes them, its folder, its command; returns the exit code."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
        text = io.TextIOWrapper(io.FileIO(number, "w" if number else "r", closefd=False), line_buffering=number == 2)  # type: ignore[type-var]
        setattr(sys, ("stdin", "stdout", "stderr")[number], text)
    os.execve = _execve
    os.chdir(folder)
    code = 0
    path = list(sys.path)
    while words:
        os.environ.clear()
        os.environ.update({**environment, "DOCS_SETTINGS": "[]"})  # the command line has them
        sys.executable = environment["DOCS_PYTHON"]  # what a launcher starts is a copy too
        sys.path[:] = path
        try:
            current, words = words, []
            _run(current)
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except _Replaced as other:
            words, environment = other.words, other.environment
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
            code = 1
    return code


def _leave(code: int) -> NoReturn:
    """End like an interpreter, without freeing what the imports made."""
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _serve(connection: socket.socket) -> None:
    """Answer one request."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    text, length = b"", int.from_bytes(size, "big")
    while len(text) < length:
        text += connection.recv(length - len(text))
    request = json.loads(text)
    child = os.fork()
    if not child:
        connection.close()
        _leave(_life(request["words"], request["folder"], request["environment"], streams))
    for descriptor in streams:
        os.close(descriptor)
    connection.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def main(path: str) -> None:
    """Import, then serve until the process is ended."""
    for name in WARM:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(16)
        while True:
            connection, _ = listener.accept()
            if not os.fork():  # waits for the command while this process accepts the next one
                listener.close()
                with contextlib.suppress(OSError):  # the shell is gone
                    _serve(connection)
                os._exit(0)
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


if __name__ == "__main__":
    main(sys.argv[1])
