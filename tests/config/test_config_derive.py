"""What follows from what was written: positions, MLPs and document boundaries that go with the mixers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron.config.schema import RunConfig


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"attention_config": None}, "pos_emb", "learned"),
        ({"attention_config": [[["global", "metala"], 2]]}, "pos_emb", "learned"),
        ({}, "pos_emb", "none"),
        ({"attention_config": [[["mamba"], 4]]}, "mlp_type", "none"),
        ({"attention_config": [[["mamba", "metala"], 2]]}, "mlp_type", "regular"),
        ({"attention_config": [[["mamba"], 4]], "mlp_type": "llama", "activation": "silu"}, "mlp_type", "llama"),
        ({"activation": "silu"}, "mlp_type", "llama"),
        ({}, "mlp_type", "regular"),
        ({"activation": "silu"}, "use_bias_in_mlp", False),
        ({}, "use_bias_in_mlp", True),
        ({"activation": "silu", "use_bias_in_mlp": True}, "use_bias_in_mlp", True),
        ({}, "reset_state_at_eod", False),
        ({"reset_attention_at_eod": True}, "reset_state_at_eod", True),
        ({"attention_config": [[["mamba"], 4]], "num_attention_heads": None}, "num_attention_heads", 1),
        ({"attention_config": [[["mamba"], 4]], "init_method": "small_init"}, "mixer_init", "methods"),
        ({"attention_config": [[["mamba"], 4]]}, "mixer_init", "own"),
    ],
)
def test_what_goes_with_the_mixers(
    load_values: Callable[..., RunConfig], changes: dict[str, Any], key: str, value: Any
) -> None:
    assert load_values(changes).get(key) == value


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"activation": "silu"}, 256),  # 8/3 of 64, rounded up to 256
        ({"activation": "silu", "mlp_multiple_of": 16}, 176),
        ({"activation": "silu", "intermediate_size": 200}, 200),
        ({}, 256),  # 4 x 64
        ({"activation": "geglu"}, 85),  # a third of 256 each
        ({"activation": "geglu", "mlp_multiple_of": 8}, 88),
        ({"expansion_factor": 2.5}, 160),
        ({"mlp_branch_size": 72}, 72),
        ({"mlp_type": "none"}, 0),
    ],
)
def test_the_width_of_the_mlp(load_values: Callable[..., RunConfig], changes: dict[str, Any], width: int) -> None:
    assert load_values(changes).model.mlp_width == width
