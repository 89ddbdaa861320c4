"""Errors that a person can act on: what went wrong, where, why, and what to try next.

Every mistake of a user (config, data, checkpoint, command line) is raised as a subclass of `UserError`, printed once without
a traceback by `exit_on_error`, and ends the process with the exit code of its class. Anything else is a defect of ours and
keeps its traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from megatron.stdio import steady_streams


class UserError(Exception):
    """A mistake with one clear message.

    Args:
        what: one sentence, what is wrong.
        where: the place, such as `configs/a.yml:12`, a path, `rank 3`, `step 200`.
        why: the rule that was broken or the cause that was found.
        hint: what to try next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        for label, text in (("where", self.where), ("why", self.why), ("try", self.hint)):
            if text:
                parts.append(f"  {label}: {text}")
        return "\n".join(parts)


class ConfigError(UserError):
    """A value, key or combination in the configuration."""

    exit_code = 2


class DataError(UserError):
    """A corpus, index, tokenizer or text file."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged, does not fit, or cannot be written."""

    exit_code = 4


class LaunchError(UserError):
    """Processes that cannot be started or that ended early."""

    exit_code = 5


class ExportError(UserError):
    """A conversion to or from another format that would be wrong."""

    exit_code = 6


class TrainingError(UserError):
    """A run that cannot go on, such as a loss that is not finite."""

    exit_code = 7


@contextlib.contextmanager
def exit_on_error(screen_is_result: bool = True) -> Iterator[None]:
    """Around a command's body: print a `UserError` once and exit with its code, no traceback.

    Streams that are closed or lost end nothing (`stdio.py`).

    Args:
        screen_is_result: somebody wants what the command prints, so that a full disk under it is an error at the end.
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
