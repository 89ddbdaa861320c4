"""Parts that go wrong, for the tests of the GPU kit: `python -m tests.tools.gpu_kit_parts NAME --output DIR --rehearse`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tools.bench.gpu_kit_parts.part import Part


def _raise() -> dict[str, Any]:
    raise RuntimeError("out of luck")


def _die() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def _hang() -> dict[str, Any]:
    time.sleep(600)
    return {}


if __name__ == "__main__":
    part = Part(sys.argv[1], Path(sys.argv[3]), True)
    part.row("first", lambda: {"value": 1, "process": os.getpid()})
    middle = {"smoke": _raise, "kernels": _die, "cuts": _hang}.get(part.name, dict)
    part.row("middle", middle)
    part.row("last", lambda: {"value": 3, "process": os.getpid()})
