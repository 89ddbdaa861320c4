"""A tiny MetaLA run on disk for tests of whole commands: its corpus, its configuration and its losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.data.indexed import IndexedWriter, dtype_for_vocab


def write_run(folder: Path, **changes: Any) -> Path:
    """Corpus and config in `folder`; the config's path. Two layers, no dropout, no evaluation, a save at the end at most."""
    folder.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(str(folder / "text_document"), dtype_for_vocab(512)) as writer:
        for i in range(40):
            writer.add_document([*f"{i} the cat sat on the mat. ".encode() * 4, 0])
    values = {
        "data_path": str(folder / "text_document"),
        "tokenizer_type": "CharLevelTokenizer",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "seq_length": 32,
        "attention_config": [[["metala"], 2]],
        "optimizer": {"type": "Adam", "params": {"lr": 0.003}},
        "train_micro_batch_size_per_gpu": 2,
        "eval_iters": 0,
        "log_interval": 1,
        "checkpoint_factor": 100_000,
        "hidden_dropout": 0.0,
        **changes,
    }
    path = folder / "tiny.yml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss of a run's metrics."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row["train/lm_loss"] for row in rows if "train/lm_loss" in row}
