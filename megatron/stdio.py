"""Robust standard streams: a command survives closed or broken stdin, stdout and stderr.

`eval.py ... | head` closes its output in the middle of an evaluation, a batch system may start a command without streams, the
disk of a log may be full. Then any print can raise, or a newly opened file gets the descriptor of stdout and C libraries write
into it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Screen:
    """A text stream for console output. After the first failing write it discards all text.

    Attributes:
        lost: the error of the first failing write, None before.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """As in any text stream."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """As in any text stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """Redirect the descriptor to /dev/null, so that buffered text and writes of C libraries do not fail again."""
        self.lost = self.lost or error
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    @property
    def unwritable(self) -> OSError | None:
        """The error if output was lost against the user's will (a full disk), None for a reader that closed the pipe."""
        return self.lost if self.lost is not None and self.lost.errno != errno.EPIPE else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def fill_descriptors() -> None:
    """Open closed descriptors among 0, 1 and 2 on /dev/null, so that no later file gets one of these numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(opened, True)


@contextlib.contextmanager
def steady_streams() -> Iterator[Screen]:
    """Inside the context stdin, stdout and stderr exist, and a lost output raises nothing; yields stdout."""
    original = sys.stdin, sys.stdout, sys.stderr
    fill_descriptors()
    with contextlib.ExitStack() as stack:
        if sys.stdin is None:
            sys.stdin = stack.enter_context(open(os.devnull, encoding="utf-8"))
        screens = [Screen(stream or stack.enter_context(open(os.devnull, "w", encoding="utf-8"))) for stream in original[1:]]
        sys.stdout, sys.stderr = screens  # type: ignore[assignment]
        try:
            yield screens[0]
        finally:
            for screen in screens:
                screen.flush()
            sys.stdin, sys.stdout, sys.stderr = original
