"""Reads the next batches on one thread, so that the training thread can look up while it waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Prefetcher:
    """One reading at a time: `start`, `wait` until it is done, `result`. The thread lives as long as the process."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._done = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def thread_id(self) -> int | None:
        """The reading thread's, None before the first `start`."""
        return None if self._thread is None else self._thread.ident

    @property
    def failed(self) -> bool:
        """Whether the reading that is done raised."""
        return self._error is not None

    def start(self, read: Callable[[], Any]) -> None:
        """Begin; the one before must be done."""
        if self._thread is None:
            # Not joined at the end of the process: a read that hangs must not keep a run that was told to leave.
            self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)
            self._thread.start()
        self._done.clear()
        self._jobs.put(read)

    def wait(self, seconds: float) -> bool:
        """Whether the reading is done, after at most `seconds`."""
        return self._done.wait(seconds)

    def result(self) -> Any:
        """What it gave or raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        value, self._value = self._value, None
        return value

    def _run(self) -> None:
        while True:
            read = self._jobs.get()
            try:
                self._value, self._error = read(), None
            except BaseException as error:
                self._value, self._error = None, error
            self._done.set()
