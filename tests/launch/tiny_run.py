"""A tiny training run on disk that every launcher can start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny_run

STEPS = 10


def write_run(folder: Path, **changes: Any) -> Path:
    """Corpus and config in `folder`; the config's path. One MetaLA layer per pipeline stage of two."""
    launched = {
        "zero_optimization": {"stage": 1},
        "train_batch_size": 4,
        "train_iters": STEPS,
        "lr_decay_iters": 2 * STEPS,
    }
    return tiny_run.write_run(folder, **launched | changes)
