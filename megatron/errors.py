"""Actionable errors: what went wrong, where, why, and what to try.

Every user's mistake (config, data, checkpoint, command line) is raised as a subclass of `UserError`, printed once without
a traceback by `exit_on_error`, and ends the process with the exit code of its class. Any other exception is a bug and
keeps its traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from megatron.stdio import steady_streams


class UserError(Exception):
    """A user's mistake with one clear message.

    Args:
        what: one sentence, what is wrong.
        where: the location, such as `configs/a.yml:12`, a path, `rank 3`, `step 200`.
        why: the broken rule or the cause.
        hint: what to try.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("where", self.where), ("why", self.why), ("try", self.hint)):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)


class ConfigError(UserError):
    """A wrong value, key or combination in the configuration."""

    exit_code = 2


class DataError(UserError):
    """A missing, damaged or unsuitable corpus, index, tokenizer or text file."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged, does not match, or cannot be written."""

    exit_code = 4


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, altered, unreadable or of another save: a resume tries an older checkpoint."""


class LaunchError(UserError):
    """Processes that cannot be started or that ended early."""

    exit_code = 5


class ExportError(UserError):
    """A conversion to or from another format that fails or would be wrong."""

    exit_code = 6


class TrainingError(UserError):
    """A run that cannot continue, for example because of a non-finite loss."""

    exit_code = 7


@contextlib.contextmanager
def exit_on_error(screen_is_result: bool = True) -> Iterator[None]:
    """Run a command's body: print a `UserError` once, without traceback, and exit with its code.

    Closed or broken streams do not end the command (`stdio.py`).

    Args:
        screen_is_result: stdout is the command's result, so a full disk of stdout is an error at the end.
    """
    with steady_streams() as screen:
        try:
            yield
            screen.flush()
        except SystemExit as end:
            screen.flush()
            if end.code or not screen_is_result or screen.unwritable is None:
                raise
        except UserError as error:
            rank = os.environ.get("RANK")
            head = f"error (rank {rank})" if rank and int(os.environ.get("WORLD_SIZE", "1")) > 1 else "error"
            print(f"{head}: {error}", file=sys.stderr, flush=True)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            raise SystemExit(130) from None
        if screen.unwritable is not None:
            print(
                f"{'error' if screen_is_result else 'warning'}: stdout was lost: {screen.unwritable.strerror}", file=sys.stderr
            )
            if screen_is_result:
                raise SystemExit(DataError.exit_code)
