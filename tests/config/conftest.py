"""Golden numbers of the original config code, and small helpers to write YAML files and load them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.config.load import load_config
from megatron.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]

# A complete tiny run: what the tests change one key at a time.
BASE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 128,
    "attention_config": [[["metala"], 4]],
    "train_micro_batch_size_per_gpu": 1,
    "train_iters": 10,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
}


@pytest.fixture
def golden(golden_neox: Path) -> Callable[[str], Any]:
    """Load one JSON file of the golden folder."""
    return lambda name: json.loads((golden_neox / name).read_text(encoding="utf-8"))


@pytest.fixture
def load_values(tmp_path: Path) -> Callable[..., RunConfig]:
    """Write `BASE` with changes (None removes a key) as a YAML file and load it."""

    def load(changes: Mapping[str, Any] | None = None, *, base: bool = True, **options: Any) -> RunConfig:
        values = {**(BASE if base else {}), **(changes or {})}
        path = tmp_path / "run.yml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False))
        return load_config([path], **options)

    return load
