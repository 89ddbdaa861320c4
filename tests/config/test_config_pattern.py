"""`attention_config`: the original's expansion, and an error where the original drops layers or splits words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.pattern import PatternError, expand

# Inputs the original accepts and we refuse: (attention_config, num_layers) -> why.
STRICTER = {
    '[[["global"], 2], [["flash"], "all"]]/4': "the original silently drops the groups beside all",
    '[[["global", "flash"], "all"], [["mamba"], 2]]/4': "the original silently drops the groups beside all",
}


def _key(case: dict[str, Any]) -> str:
    import json

    return f"{json.dumps(case['attention_config'])}/{case['num_layers']}"


def test_same_layers_as_the_original(golden: Callable[[str], Any]) -> None:
    accepted = refused = 0
    for case in golden("attention_config.json")["cases"]:
        config, layers = case["attention_config"], case["num_layers"]
        # `expanded` is checked for length and names by the original only later; `full_config` is the final word.
        fits = isinstance(case.get("expanded"), list) and len(case["expanded"]) == layers
        if config is None:
            assert expand(None, layers) == tuple(case["full_config"])
        elif fits and _key(case) not in STRICTER:
            assert expand(config, layers) == tuple(case["expanded"]), case
            accepted += 1
        else:
            with pytest.raises(PatternError):
                expand(config, layers)
            refused += 1
    assert accepted + refused == 28 and accepted >= 13


@given(st.lists(st.tuples(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), st.integers(0, 4)), max_size=5))
def test_groups_join_in_order(groups: list[tuple[list[str], int]]) -> None:
    flat = [name for pattern, count in groups for name in pattern * count]
    config = [[pattern, count] for pattern, count in groups]
    if groups:
        assert list(expand(config, len(flat))) == flat
    assert list(expand(flat, len(flat))) == flat


def test_messages_name_the_numbers() -> None:
    with pytest.raises(PatternError, match="describes 3 layers, but num_layers is 4"):
        expand([[["metala"], 3]], 4)
    with pytest.raises(PatternError, match="7 is not a multiple"):
        expand([[["a", "b", "c"], "all"]], 7)
