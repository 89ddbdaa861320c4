"""Runs a command up to the point where it parses its command line, and no further.

The pages of commands read its parser this way (`commands.py`), and the checks of documented command lines its parsed arguments
(`tests/docs/command_lines.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
_METHODS = ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args")


@dataclass
class StoppedCommand:
    """Where a command stopped.

    Attributes:
        parser: the first one that was asked to parse; None if none was.
        arguments: what it parsed; None if it did not.
        refusal: why the command ended before its arguments were parsed; empty for `--help`.
    """

    parser: argparse.ArgumentParser | None = None
    arguments: argparse.Namespace | None = None
    refusal: str = ""


class _Parsed(BaseException):
    """A command has reached the end of its parsing and must not start to work."""


def _leave(code: int) -> NoReturn:
    """For `process_exit.leave`, which ends a process."""
    raise SystemExit(code)


def stopped(words: Sequence[str], *, parse: bool) -> StoppedCommand:
    """Run a command until it parses its command line.

    Args:
        words: a script's path from the root, or `-m` and a module, then the arguments.
        parse: stop behind the parsing of the arguments; otherwise before it.
    """
    outcome, depth, errors = StoppedCommand(), 0, io.StringIO()

    def stopping(method: Callable[..., Any]) -> Callable[..., Any]:
        def parse_and_stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            outcome.parser = outcome.parser or parser
            if not parse:
                raise _Parsed
            depth += 1
            try:
                result = method(parser, *args, **kwargs)
            finally:
                depth -= 1
            if depth:  # these methods call each other
                return result
            outcome.arguments = result[0] if isinstance(result, tuple) else result
            raise _Parsed

        return parse_and_stop

    is_module = words[0] == "-m"
    path = sys.path if is_module else [str((ROOT / words[0]).parent), *sys.path]
    with contextlib.ExitStack() as stack:
        for method in _METHODS:
            original = getattr(argparse.ArgumentParser, method)
            stack.enter_context(mock.patch.object(argparse.ArgumentParser, method, stopping(original)))
        stack.enter_context(mock.patch("megatron.launch.process_exit.leave", _leave))
        stack.enter_context(mock.patch.object(sys, "argv", [str(ROOT / words[0]), *words[2 if is_module else 1 :]]))
        stack.enter_context(mock.patch.object(sys, "path", list(path)))
        stack.enter_context(contextlib.chdir(ROOT) if hasattr(contextlib, "chdir") else contextlib.nullcontext())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(errors))
        try:
            if is_module:
                runpy.run_module(words[1], run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except _Parsed:
            return outcome
        except SystemExit as end:
            code = str(end.code or "")
            outcome.refusal = (errors.getvalue().strip().splitlines() or [code])[-1] if code else ""
        else:
            outcome.refusal = (errors.getvalue().strip().splitlines() or ["the script parses no arguments"])[-1]
    return outcome
