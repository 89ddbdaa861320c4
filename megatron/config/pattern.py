"""NeoX's `attention_config` grammar: the token mixer of every layer.

Accepted are a flat list of names (`[metala, metala]`), groups (`[[["metala", "sliding"], 12], [["metala"], 2]]`: each
pattern repeated N times, groups joined) and `"all"` as the count of a single group. Where NeoX silently drops
groups (another group besides "all") or splits a word into letters, this reader reports an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# The softmax (and MLP) mixers of NeoX: with them an unset `pos_emb` keeps NeoX's default, `learned`.
POSITION_TYPES = frozenset(
    ["global", "local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer", "gmlp", "amlp", "flash"]
)
NEOX_TYPES = POSITION_TYPES | {"rwkv", "mamba"}


class PatternError(ValueError):
    """An `attention_config` that does not describe `num_layers` layers; the message says why."""


def expand(config: Any, num_layers: int) -> tuple[str, ...]:
    """The mixer name of every layer; None means NeoX's default, `global` everywhere."""
    if config is None:
        return ("global",) * num_layers
    if not isinstance(config, (list, tuple)):
        raise PatternError(f'attention_config must be a list, got {config!r}; write [[[{config!r}], "all"]]')
    flat = all(isinstance(item, str) for item in config)
    names = tuple(config) if flat else _expand_groups(config, num_layers)
    if len(names) != num_layers:
        raise PatternError(f"attention_config describes {len(names)} layers, but num_layers is {num_layers}")
    return names


def _expand_groups(groups: Sequence[Any], num_layers: int) -> tuple[str, ...]:
    names: list[str] = []
    for group in groups:
        pattern, count = _parts(group)
        if count == "all":
            if len(groups) > 1:
                raise PatternError('"all" fills the whole model and cannot be combined with other groups; write counts')
            if num_layers % len(pattern):
                raise PatternError(f"num_layers {num_layers} is not a multiple of the length of the pattern {list(pattern)}")
            count = num_layers // len(pattern)
        if len(pattern) * count > num_layers - len(names):
            total = len(names) + len(pattern) * count
            raise PatternError(f"attention_config describes {total} layers or more, but num_layers is {num_layers}")
        names += pattern * max(0, count)
    return tuple(names)


def _parts(group: Any) -> tuple[list[str], Any]:
    """Pattern and count of one `[[names...], count]`."""
    if not isinstance(group, (list, tuple)) or len(group) != 2:
        raise PatternError(f"each group must be [[names...], count], got {group!r}")
    pattern, count = group
    if not isinstance(pattern, (list, tuple)) or not pattern or not all(isinstance(n, str) for n in pattern):
        raise PatternError(f"the first part of a group must be a list of names, got {pattern!r}")
    if count != "all" and (isinstance(count, bool) or not isinstance(count, int)):
        raise PatternError(f'the count of a group must be a whole number or "all", got {count!r}')
    return list(pattern), count
