"""What GPT-NeoX's published YAMLs count on: keys of its past, nested keys, mixers without heads, initial values, biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config.schema import RunConfig
from megatron.engine.optim import decays
from megatron.engine.stages import check_mesh
from megatron.errors import ConfigError
from megatron.model.build import param_specs
from megatron.parallel.mesh import Mesh
from megatron.settings import model_config

MAMBA: dict[str, Any] = {"attention_config": [[["mamba"], 4]], "num_attention_heads": 12}
Load = Callable[..., RunConfig]


def test_gas_is_the_old_name_of_gradient_accumulation_steps(load_values: Load) -> None:
    assert load_values({"gas": 3}, world_size=2).batch.train_batch_size == 6
    assert load_values({"gas": 3, "gradient_accumulation_steps": 3}, world_size=1).batch.gradient_accumulation_steps == 3
    with pytest.raises(ConfigError, match="gas is 2 but gradient_accumulation_steps is 3"):
        load_values({"gas": 2, "gradient_accumulation_steps": 3})
    assert load_values(overrides={"gas": "2"}, world_size=1).batch.gradient_accumulation_steps == 2


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({"save_interval": 7, "save": "x"}, "checkpoint_factor", 7),
        ({"decay_lr_to": 0.25}, "min_lr", 0.00025),
        ({"warmup_iters": 5, "lr_decay_iters": 20}, "warmup", 0.25),
        ({"warmup_iters": 5}, "warmup", 0.5),
        ({"attention_config": None, "num_kv_heads": 2, "attention_type": "groupedquery"}, "num_kv_heads", 2),
        ({"attention_config": None, "attention_type": "multihead"}, "num_kv_heads", None),
        ({"attention_config": None, "attention_type": "multiquery"}, "num_kv_heads", 1),
    ],
)
def test_keys_that_neox_dropped_mean_what_they_meant(
    load_values: Load, changes: dict[str, Any], key: str, expected: Any
) -> None:
    run = load_values(changes)
    assert run.get(key) == expected and run.warnings == ()
    assert run.provenance[key].partition(":")[0].endswith("run.yml") or expected is None


@pytest.mark.parametrize(
    "changes",
    [
        {"decay_lr_to": 0.25, "min_lr": 0.0},
        {"warmup_iters": 5, "warmup": 0.1},
        {"attention_config": None, "attention_type": "groupedquery"},
        {"attention_config": None, "attention_type": "sparse"},
        {"attention_config": None, "attention_type": "multihead", "num_kv_heads": 2},
    ],
)
def test_keys_that_neox_dropped_are_refused_where_they_cannot_be_read(load_values: Load, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"is not supported"):
        load_values(changes)


def test_known_keys_inside_deepspeed_extra_args_act_as_at_the_top_level(load_values: Load) -> None:
    run = load_values({"deepspeed_extra_args": {"comms_logger": {"enabled": True}, "gradient_clipping": 0.5}})
    assert run.optimizer.gradient_clipping == 0.5
    assert any(line.startswith("comms_logger is ignored") for line in run.warnings)
    path, _, line = run.provenance["gradient_clipping"].rpartition(":")
    assert "gradient_clipping: 0.5" in Path(path).read_text().splitlines()[int(line) - 1]
    same = {"deepspeed_extra_args": {"gradient_clipping": 0.5}, "gradient_clipping": 0.5}
    assert load_values(same).optimizer.gradient_clipping == 0.5
    with pytest.raises(ConfigError, match=r"gradient_clipping is 1.0 and 0.5 in deepspeed_extra_args"):
        load_values({**same, "gradient_clipping": 1.0})
    run = load_values(overrides={"deepspeed_extra_args.gradient_clipping": "0.25"})
    assert run.optimizer.gradient_clipping == 0.25


def test_what_is_refused_at_the_top_level_is_refused_inside_too(load_values: Load) -> None:
    with pytest.raises(ConfigError, match="sparse_gradients: True is not supported"):
        load_values({"deepspeed_extra_args": {"sparse_gradients": True}})
    with pytest.raises(ConfigError, match="deepspeed_extra_args: {'hybrid_engine': 1} is not supported"):
        load_values({"deepspeed_extra_args": {"hybrid_engine": 1, "comms_logger": {}}})
    assert load_values({"deepspeed_extra_args": {"hybrid_engine": 1}}, check=False).unused
    with pytest.raises(ConfigError, match="deepspeed_extra_args must be a dictionary"):
        load_values({"deepspeed_extra_args": [1]})


def test_mamba_models_have_no_heads(load_values: Load) -> None:
    """12 heads of 64 channels, and on 8 ranks: channels are cut, heads do not count; none need be given."""
    run = load_values({**MAMBA, "model_parallel_size": 8})
    check_mesh(model_config(run, 64), Mesh.shape_only(1, 8, 8, 0))
    assert load_values({**MAMBA, "num_attention_heads": None}).model.num_attention_heads == 1
    for mixer, heads in (("global", 12), ("metala", 12), ("based", 5)):
        with pytest.raises(ConfigError, match="is not a multiple of num_attention_heads"):
            load_values({"attention_config": [[["mamba"], 3], [[mixer], 1]], "num_attention_heads": heads})
    with pytest.raises(ConfigError, match="num_attention_heads is not given"):
        load_values({"attention_config": [[["mamba"], 3], [["global"], 1]], "num_attention_heads": None})
    own = {"attention_config": [[["based"], 4]], "num_attention_heads": 3, "model_parallel_size": 4}
    with pytest.raises(ConfigError, match="is not a multiple of model_parallel_size"):
        load_values(own)
    load_values({**own, "based_heads": 4})
    run = load_values({"num_attention_heads": 4})
    with pytest.raises(ConfigError, match="4 heads cannot be split"):
        check_mesh(model_config(run, 64), Mesh.shape_only(1, 8, 8, 0))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "own"),
        ({"init_method": "normal"}, "methods"),
        ({"output_layer_init_method": "single_residual_scaled_normal"}, "methods"),
        ({"init_method": "small_init", "mixer_init": "own"}, "own"),
        ({"mixer_init": "methods"}, "methods"),
    ],
)
def test_mamba_obeys_the_init_methods_that_are_given(load_values: Load, changes: dict[str, Any], expected: str) -> None:
    assert model_config(load_values({**MAMBA, **changes}), 64).mixer_init == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"activation": "silu"}, False),  # which makes the MLP llama
        ({"mlp_type": "llama", "activation": "silu", "use_bias_in_mlp": True}, True),
        ({"mlp_type": "llama", "activation": "silu", "use_bias_in_mlp": False}, False),
        ({"attention_config": None, "mlp_type": "llama", "activation": "silu"}, False),
        ({"activation": "gelu"}, True),  # NeoX's own MLP
        ({"attention_config": None, "activation": "swiglu"}, True),
    ],
)
def test_a_llama_mlp_has_biases_only_where_they_are_asked_for(
    load_values: Load, changes: dict[str, Any], expected: bool
) -> None:
    assert model_config(load_values(changes), 64).mlp_bias is expected


@pytest.mark.parametrize(("rule", "expected"), [(None, False), ("neox", False), ("metala", True), ("based", False)])
def test_aug_balance_decays_where_the_released_code_is_asked_for(load_values: Load, rule: str | None, expected: bool) -> None:
    run = load_values({"weight_decay_rule": rule, "use_bias_in_mlp": True})
    specs = param_specs(model_config(run, 64))
    name = run.optimizer.weight_decay_rule
    decaying = {s.name.rpartition("layers.0.")[2]: decays(s, name) for s in specs.values() if "layers.0." in s.name}
    assert decaying["token_mixer.aug_balance"] is expected
    assert (
        decaying["token_mixer.q_proj.weight"]
        and not decaying["token_mixer.g_proj.bias"]
        and not decaying["channel_mixer.l1.bias"]
    )
