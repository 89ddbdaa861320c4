"""Progress of a long command: one line that updates in place on a terminal, periodic lines in a log."""

from __future__ import annotations

import logging
import sys
import time

log = logging.getLogger(__name__)


class Progress:
    """Documents processed, share of the input, throughput and time left.

    Args:
        total_bytes: length of the input; 0 (unknown) shows neither share nor time left.
        interval: documents between two log lines.
    """

    def __init__(self, total_bytes: int, interval: int) -> None:
        self.total_bytes, self.interval = total_bytes, interval
        self._started = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._first_bytes: int | None = None
        self._next = interval

    def update(self, documents: int, text_bytes: int, tokens: int, done_bytes: int) -> None:
        """Show the state if it is due.

        Args:
            documents: processed by this process.
            text_bytes: bytes of these documents.
            tokens: tokens of these documents.
            done_bytes: bytes of the input read so far, those of an interrupted run included.
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
        fields = [
            f"{documents} documents, {text_bytes / 1e6:.1f} MB",
            f"{documents / seconds:.0f} documents/s, {tokens / seconds / 1e6:.2f} M tokens/s",
        ]
        if self.total_bytes:
            share = min(1.0, done_bytes / self.total_bytes)
            rate = (done_bytes - (self._first_bytes or 0)) / seconds
            remaining = f", {_clock((self.total_bytes - done_bytes) / rate)} left" if rate > 0 else ""
            fields.insert(0, f"{100 * share:.1f} %{remaining}")
        return " | ".join(fields)

    def close(self) -> None:
        """End the line on a terminal."""
        if self._terminal:
            print(file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    total = max(0, int(seconds))
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"
