"""Standard streams that do not fail a command: closed ones lead nowhere, and a screen that is lost does not end the work.

`eval.py ... | head` closes its output in the middle of an evaluation, a batch system may start a command without any stream, a
disk under a log may be full. Printing then raises, at any line of the command, or a file that is opened takes the place of
stdout and C libraries write into it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Screen:
    """A text stream for people. What cannot be written is lost, and from then on everything; whatever else is the stream's own.

    lost: why, None while it is heard.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """As of any text stream."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """As of any text stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """Lead the descriptor to nowhere, so that what is still buffered, and what C libraries write, does not fail again."""
        self.lost = self.lost or error
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    @property
    def unwritable(self) -> OSError | None:
        """Why what it said was wanted and is lost: a full disk, but not a reader that has heard enough."""
        return self.lost if self.lost is not None and self.lost.errno != errno.EPIPE else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def fill_descriptors() -> None:
    """Open what of 0, 1 and 2 is closed onto nowhere: no file that is opened later gets one of these numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(opened, True)


@contextlib.contextmanager
def steady_streams() -> Iterator[Screen]:
    """Inside, stdin, stdout and stderr exist, and losing one of the latter raises nothing; gives stdout."""
    kept = sys.stdin, sys.stdout, sys.stderr
    fill_descriptors()
    with contextlib.ExitStack() as stack:
        if sys.stdin is None:
            sys.stdin = stack.enter_context(open(os.devnull, encoding="utf-8"))
        screens = [Screen(stream or stack.enter_context(open(os.devnull, "w", encoding="utf-8"))) for stream in kept[1:]]
        sys.stdout, sys.stderr = screens  # type: ignore[assignment]
        try:
            yield screens[0]
        finally:
            for screen in screens:
                screen.flush()
            sys.stdin, sys.stdout, sys.stderr = kept
