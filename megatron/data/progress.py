"""Says how far a long command is: one line that moves on a terminal, lines now and then in a log."""

from __future__ import annotations

import logging
import sys
import time

log = logging.getLogger(__name__)


class Progress:
    """Documents done, share of the input, rate and time left.

    Args:
        total_bytes: length of the input; 0: not known, then there is no share and no time left.
        interval: documents between lines in a log.
    """

    def __init__(self, total_bytes: int, interval: int) -> None:
        self.total_bytes, self.interval = total_bytes, interval
        self._started = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._first_bytes: int | None = None
        self._next = interval

    def update(self, documents: int, text_bytes: int, tokens: int, done_bytes: int) -> None:
        """Show the state if it is time to.

        Args:
            documents: done by this process.
            text_bytes: of these documents.
            tokens: made of them.
            done_bytes: of the input that were read, those of an interrupted run included.
        """
        if self._first_bytes is None:
            self._first_bytes = done_bytes
        now = time.monotonic()
        if self._terminal:
            if now - self._shown < 0.2:
                return
        elif documents < self._next:
            return
        self._shown, self._next = now, (documents // self.interval + 1) * self.interval
        line = self._line(documents, text_bytes, tokens, done_bytes, max(now - self._started, 1e-9))
        if self._terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            log.info("%s", line)

    def _line(self, documents: int, text_bytes: int, tokens: int, done_bytes: int, seconds: float) -> str:
        parts = [
            f"{documents} documents, {text_bytes / 1e6:.1f} MB",
            f"{documents / seconds:.0f} documents/s, {tokens / seconds / 1e6:.2f} M tokens/s",
        ]
        if self.total_bytes:
            share = min(1.0, done_bytes / self.total_bytes)
            rate = (done_bytes - (self._first_bytes or 0)) / seconds
            left = f", {_clock((self.total_bytes - done_bytes) / rate)} left" if rate > 0 else ""
            parts.insert(0, f"{100 * share:.1f} %{left}")
        return " | ".join(parts)

    def close(self) -> None:
        """End the line on a terminal."""
        if self._terminal:
            print(file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
