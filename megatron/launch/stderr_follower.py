"""Listens to what a job writes to stderr, passes it on, and remembers its first error so that it can be said last.

Of a failed job of many ranks the screen shows the cause first and its consequences for pages after it: other ranks that lost
their connection, launchers that report exit codes. Here the cause is kept, and hosts that have ended are noticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

# `hostb: ` of pdsh, `[rank1]: ` of torch, `0: ` of srun -l, in any order; but not `ValueError: `.
_NO_HOST = r"(?!error|pdsh@|[\w.]*(?:Error|Exception|Interrupt|Exit|Warning|Traceback)\b)"
_PREFIX = re.compile(rf"(?:{_NO_HOST}[\w.-]+: |\[rank\d+\]: ?)*")
_STARTS = ("error (rank", "error: ", "Traceback (most recent call last)", "watchdog of rank")
# Consequences: said by a rank that suffers from another one, or by a launcher.
_SECONDARY = ("is lost, this one cannot go on", "watchdog of rank", "did not connect", "the job ended", "the job left")
_HOST_END = re.compile(r"pdsh@\S+?: (\S+): (?:ssh exited with exit code (\d+)|(.*))")
_LONGEST = 60  # lines of one error that are kept


@dataclass
class _Block:
    prefix: str
    lines: list[str]
    open: bool = True

    def takes(self, body: str) -> bool:
        """Whether `body` still belongs to this error; closes it when it was the last line."""
        head = self.lines[0]
        if body.startswith("watchdog of rank") != head.startswith("watchdog of rank") and body.startswith(_STARTS):
            self.open = False
            return False
        if head.startswith("error"):
            self.open = body.startswith("  ")
            return self.open
        if head.startswith("watchdog"):
            self.open = not body.startswith("leaving with code")
            return True
        self.open = body.startswith((" ", "Traceback")) or not body  # a traceback ends with the line that names the exception
        return True


@dataclass
class FirstError:
    """The errors of a job in the order in which they began. on_host_end: told (host, exit code) when pdsh reports an end."""

    on_host_end: Callable[[str, int], None] | None = None
    _blocks: list[_Block] = field(default_factory=list)

    def hear(self, line: str) -> None:
        """One line of stderr, without its line end."""
        if match := _HOST_END.match(line):
            if self.on_host_end:
                self.on_host_end(match.group(1), int(match.group(2) or 255))
            return
        found = _PREFIX.match(line)
        prefix = found.group() if found else ""
        body = line[len(prefix) :]
        for block in self._blocks:
            if block.open and block.prefix == prefix and block.takes(body):
                if len(block.lines) < _LONGEST:
                    block.lines.append(body)
                return
        if body.startswith(_STARTS) and len(self._blocks) < 1000:
            self._blocks.append(_Block(prefix, [body]))

    def text(self) -> str:
        """The first error that is no consequence of another, else the first of all; empty when none was heard."""
        first = [b for b in self._blocks if not any(word in "\n".join(b.lines) for word in _SECONDARY)]
        for block in (first or self._blocks)[:1]:
            return block.prefix + "\n".join(block.lines)
        return ""
