"""Two descriptions of one model are equal once resolved, whatever was written or left out; two models never are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron.model.config import ModelConfig
from megatron.model.resolved import resolved, resolved_or_as_it_is
from megatron.registry import layer_options

BASE = ModelConfig(64, 32, 2, 4, 48, ("global", "global"), {"global": {"positions": "rotary"}}, norm="rmsnorm")


def model(mixer: str, **options: Any) -> ModelConfig:
    """Two layers of a mixer."""
    return replace(BASE, layer_types=(mixer, mixer), layer_options={mixer: options} if options else {})


@pytest.mark.parametrize("mixer", sorted(layer_options()))
def test_a_default_that_is_written_is_a_default(mixer: str) -> None:
    written = {name: option.default for name, option in layer_options()[mixer].items()}
    assert resolved(model(mixer, **written)) == resolved(model(mixer))


SAME = {
    "key heads": (model("global", kv_heads=4), model("global")),
    "positions of the embedding": (model("global", positions="learned"), model("global")),
    "rotary numbers without rotation": (model("global", rotary_base=5.0, rotary_fraction=0.5), model("global")),
    "alibi numbers without alibi": (model("global", bias_max=4.0, slope_factor=2.0), model("global")),
    "flash": (replace(BASE, layer_types=("flash", "flash")), BASE),
    "alibi by another name": (model("global", positions="alibi"), model("alibi")),
    "alibi among others": (
        replace(model("alibi"), layer_types=("alibi", "global"), layer_options={"global": {"positions": "alibi"}}),
        model("alibi"),
    ),
    "rank of the steps": (model("mamba", dt_rank=2), model("mamba")),
    "heads of based": (model("based", heads=4), model("based")),
    "decay that is not there": (model("based", decay_const=-4.0), model("based")),
    "heads of jrt": (model("jrt", heads=4), model("jrt")),
    "base of no rotation": (
        model("sliding", rotary_fraction=0.0, rotary_base=5.0),
        model("sliding", rotary_fraction=0.0),
    ),
    "options of a mixer that no layer is": (
        replace(BASE, layer_options={**BASE.layer_options, "metala": {"conv_width": 3}}),
        BASE,
    ),
    "heads where there are none": (replace(model("mamba"), num_heads=8), model("mamba")),
    "an MLP that is not there": (
        replace(BASE, mlp="none", mlp_width=0),
        replace(BASE, mlp="none", activation="gelu", mlp_bias=True),
    ),
    "swish": (replace(BASE, activation="swish"), BASE),
    "whole numbers": (model("global", positions="rotary", rotary_base=10000), BASE),
}


@pytest.mark.parametrize("name", SAME)
def test_one_model_written_twice(name: str) -> None:
    first, second = SAME[name]
    assert first != second and resolved(first) == resolved(second)


DIFFERENT = {
    "key heads": (model("global", kv_heads=2), model("global")),
    "positions": (model("global", positions="alibi"), model("global")),
    "slopes": (model("alibi", bias_max=4.0), model("alibi")),
    "rotary base": (model("global", positions="rotary", rotary_base=5.0), BASE),
    "rank of the steps": (model("mamba", dt_rank=3), model("mamba")),
    "mixers": (model("metala"), model("mamba")),
    "order": (replace(BASE, layer_types=("global", "metala")), replace(BASE, layer_types=("metala", "global"))),
    "two kinds of softmax": (replace(BASE, layer_types=("global", "alibi")), BASE),
    "tied": (replace(BASE, tie_embeddings=False), BASE),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_two_models(name: str) -> None:
    first, second = DIFFERENT[name]
    assert resolved(first) != resolved(second)


def test_what_another_release_wrote_stays_as_it_is() -> None:
    for change in ({"new_field": 1}, {"layer_types": ["later"]}, {"layer_options": {"global": {"new": 1}}}):
        values = BASE.to_dict() | change
        assert resolved_or_as_it_is(values) == values
