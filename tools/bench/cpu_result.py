"""How the CPU benchmarks leave what they measured: one JSON object with the device, torch and the command that printed it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.files import write_json


def save_result(benchmark: str, output: Path | None, rows: Sequence[Any], **facts: Any) -> None:
    """Write the result of `tools/bench/<benchmark>.py`, and print its path.

    Args:
        benchmark: name of the file, without the ending.
        output: where to; None writes nothing.
        rows: what was measured.
        facts: more keys, in front of the rows.
    """
    if output is None:
        return
    result = {
        "benchmark": benchmark,
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "command": " ".join(["python", f"tools/bench/{benchmark}.py", *sys.argv[1:]]),
        **facts,
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    print(f"written: {output}")
