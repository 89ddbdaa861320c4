"""Keys of files in GPT-NeoX's repository that NeoX itself no longer knows, read as what they said.

`gas` and `save_interval` are plain renamings (aliases in `neox_keys.tsv`). Those here need another key's value: a share of the
learning rate becomes a rate, a number of steps a share of the schedule. Where that value is missing they are refused.
"""

from __future__ import annotations

from typing import Any

from megatron.config.yaml_reader import Source


def translate_old_keys(source: Source) -> None:
    """Put what old keys say into the keys that took their place, unless those are given too; the old ones are then dropped."""
    values = source.values
    optimizer = values.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    lr = params.get("lr") if isinstance(params, dict) else values.get("lr")
    steps = values.get("lr_decay_iters") or values.get("train_iters")
    if _numbers(values.get("decay_lr_to"), lr) and "min_lr" not in values:
        _replace(source, "decay_lr_to", "min_lr", values["decay_lr_to"] * lr)
    if _numbers(values.get("warmup_iters"), steps) and steps and "warmup" not in values:
        _replace(source, "warmup_iters", "warmup", values["warmup_iters"] / steps)
    # "groupedquery" says nothing beside num_kv_heads, nor "multihead" without it; "multiquery" alone is one key head.
    kind, grouped = values.get("attention_type"), bool(values.get("num_kv_heads"))
    if (kind, grouped) in (("groupedquery", True), ("multihead", False)):
        del values["attention_type"], source.places["attention_type"]
    elif (kind, grouped) == ("multiquery", False):
        _replace(source, "attention_type", "num_kv_heads", 1)


def _numbers(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _replace(source: Source, old: str, new: str, value: Any) -> None:
    del source.values[old]
    source.values[new], source.places[new] = value, source.places.pop(old)
