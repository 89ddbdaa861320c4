"""One token of whole models, recorded as a CUDA graph: milliseconds and tokens per second at several batches."""

from __future__ import annotations

from typing import Any

from tools.bench.gpu_kit_parts.models import decoding, model_config
from tools.bench.gpu_kit_parts.part import Part


def _row(part: Part, mixer: str, size: str, batch: int) -> dict[str, Any]:
    row = decoding(part, model_config(mixer, size, part.rehearse), batch)
    return row | {"batch": batch, "tokens_per_s": batch / row["ms"] * 1e3}


def run(part: Part) -> None:
    """Rows `mixer size batch`."""
    for mixer, size, batches in (("metala", "1.3B", (1, 64, 128)), ("metala", "380M", (64,)), ("hybrid", "1.3B", (64, 128))):
        for batch in (2,) if part.rehearse else batches:
            part.row(f"{mixer} {size} {batch}", _row, part, mixer, size, batch)
