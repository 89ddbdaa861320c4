"""Reads the next batches on one thread, so that the training thread stays responsive (signals, watchdog) while it waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Prefetcher:
    """One read at a time: `start`, `wait` until it is done, `result`. The thread lives as long as the process."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._done = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def thread_id(self) -> int | None:
        """Id of the reading thread, None before the first `start`."""
        return None if self._thread is None else self._thread.ident

    @property
    def failed(self) -> bool:
        """Whether the finished read raised."""
        return self._error is not None

    def start(self, read: Callable[[], Any]) -> None:
        """Start a read; the previous one must be done."""
        if self._thread is None:
            # Not joined at the end of the process: a read that hangs must not block a run that was asked to exit.
            self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)
            self._thread.start()
        self._done.clear()
        self._jobs.put(read)

    def wait(self, seconds: float) -> bool:
        """Whether the read is done, after at most `seconds`."""
        return self._done.wait(seconds)

    def result(self) -> Any:
        """The value that the read returned; raises what it raised."""
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
