"""Values inside dictionaries are held to their names, types and bounds, with the line they stand on, as flat keys are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config.catalog import catalog
from megatron.config.explain import explain
from megatron.config.load import load_config
from megatron.config.neox_keys import nested_keys, open_dictionaries
from megatron.config.nested import nested_catalog
from megatron.config.pages import arguments_page, schema
from megatron.config.schema import RunConfig
from megatron.errors import ConfigError

HEAD = """num_layers: 2
hidden_size: 16
num_attention_heads: 2
seq_length: 8
train_iters: 2
train_micro_batch_size_per_gpu: 1
"""
PARAMS = "optimizer:\n  type: Adam\n  params: "
ADAM = "optimizer: {type: Adam, params: {lr: 0.001}}\n"

# text after HEAD -> (line of the mistake, what is wrong, what to try)
MISTAKES: list[tuple[str, int, str, str]] = [
    ("optimizer:\n  type: Adam\n  params:\n    lr: .nan\n", 10, "optimizer.params.lr is nan, which is not a finite number", ""),
    (PARAMS + "{lr: .inf}\n", 9, "optimizer.params.lr is inf", ""),
    (PARAMS + "{lr: -1}\n", 9, "optimizer.params.lr is -1", "greater than or equal to 0"),
    (PARAMS + "{lr: nonsense}\n", 9, "optimizer.params.lr must be a number, got 'nonsense'", ""),
    (PARAMS + "{lr: [1], eps: 1e-8}\n", 9, "optimizer.params.lr must be a number, got [1]", ""),
    (PARAMS + "{lr: 1e-3, betas: [0.9, 1.5]}\n", 9, "optimizer.params.betas[1] is 1.5", "less than 1"),
    (PARAMS + "{lr: 1e-3, betas: [0.9]}\n", 9, "params.betas must be a list of two numbers, got [0.9]", ""),
    (PARAMS + "{lr: 1e-3, betas: 0.9}\n", 9, "params.betas must be a list of two numbers, got 0.9", ""),
    (PARAMS + "{lr: 1e-3, beta: 0.9}\n", 9, "unknown key optimizer.params.beta", "'betas'"),
    ("optimizer:\n  type: Adam\n  parms: {lr: 1e-3}\n", 9, "unknown key optimizer.parms", "did you mean 'params'?"),
    (PARAMS + "[1e-3]\n", 9, "optimizer.params must be a dictionary, got [0.001]", ""),
    ("optimizer:\n  type: 3\n  params: {lr: 1e-3}\n", 8, "optimizer.type must be text, got 3", ""),
    (ADAM + "zero_optimization:\n  stag: 1\n", 9, "unknown key zero_optimization.stag", "did you mean 'stage'?"),
    (ADAM + "zero_optimization:\n  stage: one\n", 9, "zero_optimization.stage must be", "zero_optimization.stage: "),
    (ADAM + "zero_optimization:\n  stage: '1'\n", 9, "zero_optimization.stage must be", "write it without quotes"),
    (PARAMS + "{lr: 1e-3, betas: [fast, 0.95]}\n", 9, "betas[0] is 'fast': should be a valid number", ""),
    ("optimizer: Adam\n", 7, "optimizer must be a dictionary, got 'Adam'", "optimizer: "),
    (ADAM + "precision: float16\n", 8, "precision is 'float16', which is not one of", "did you mean 'fp16'?"),
    (ADAM + "zero_optimization: {offload_optimizer: {device: cpu}}\n", 8, "offloading optimizer state", "remove the offload"),
    (ADAM + "zero_optimization:\n  stage: 1\n  overlap_comm: 3\n", 10, "overlap_comm must be true or false, got 3", ""),
    (ADAM + "fp16:\n  enabled: true\n  loss_scale: big\n", 10, "fp16.loss_scale must be a number, got 'big'", ""),
    (ADAM + "fp16:\n  enabled: true\n  hysteresis: 0\n", 10, "fp16.hysteresis is 0", "greater than or equal to 1"),
    (ADAM + "fp16:\n  enabled: true\n  initial_scale_power: 1000000\n", 10, "initial_scale_power is 1000000", "equal to 127"),
    (ADAM + "fp16:\n  enabled: true\n  loss_scale: 1e39\n", 10, "fp16.loss_scale is 1e+39", "or equal to 170141183460469"),
    (ADAM + "fp16:\n  enabled: true\n  min_loss_scale: 1e39\n", 10, "fp16.min_loss_scale is 1e+39", "less than or equal to"),
    (ADAM + "fp16:\n  enabled: true\n  loss_scal: 9\n", 10, "unknown key fp16.loss_scal", "'loss_scale'"),
    (ADAM + "bf16:\n  enable: true\n", 9, "unknown key bf16.enable", "did you mean 'enabled'"),
    (ADAM + "data_types:\n  grad_accum_dtype: fp33\n", 9, "grad_accum_dtype is 'fp33', which is not one of fp32", "'fp32'"),
    (ADAM + "data_types:\n  grad_acum_dtype: fp32\n", 9, "unknown key data_types.grad_acum_dtype", "'grad_accum_dtype'"),
    (ADAM + "scheduler:\n  typ: WarmupLR\n", 9, "unknown key scheduler.typ", "'type'"),
    (ADAM + "activation_checkpointing:\n  number_checkpoints: many\n", 9, "number_checkpoints must be a whole number", ""),
    (ADAM + "comms_logger:\n  enabled: 1\n", 9, "comms_logger.enabled must be true or false, got 1", ""),
    (ADAM + "flops_profiler:\n  profil_step: 1\n", 9, "unknown key flops_profiler.profil_step", "'profile_step'"),
    (ADAM + "autotuning:\n  mp_size: two\n", 9, "autotuning.mp_size must be a whole number, got 'two'", ""),
    (ADAM + "deepspeed_extra_args:\n  comms_loger: {}\n", 9, "unknown key deepspeed_extra_args.comms_loger", "'comms_logger'"),
    (ADAM + "deepspeed_extra_args:\n  bf16:\n    enable: true\n", 10, "unknown key bf16.enable", "'enabled'"),
    (ADAM + "synthetic:\n  task: 3\n", 9, "synthetic.task must be text, got 3", ""),
    (ADAM + "synthetic:\n  task: mqar\n  train: [{examples: .nan}]\n", 10, "synthetic.train[0].examples is nan", ""),
    (ADAM + "train_data_weights: [1, .nan]\n", 8, "train_data_weights[1] is nan", ""),
    (ADAM + "weighted_sampler_alpha: .inf\n", 8, "weighted_sampler_alpha is inf", ""),
    (ADAM + f"log_interval: {'9' * 400}\n", 8, "log_interval is a number of 400 digits", ""),
    (ADAM + "wandb:\n  enabeld: true\n", 9, "unknown key wandb.enabeld", "'enabled'"),
    (ADAM + "attention_config: ''\n", 8, "attention_config must be a list, got ''", "write null to leave it unset"),
]  # fmt: skip


@pytest.mark.parametrize(
    "value", ["@a", "`a", "%a", "a: b: c", "[a", "{a", "*a", "!a b", "a\tb: c\n\td", '"a', "a" * 2000 + ":\t"]
)
def test_text_that_is_no_yaml_without_its_quotes_is_of_the_wrong_type(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.yml"
    path.write_text(HEAD + ADAM + f"attention_config: {json.dumps(value)}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    assert "attention_config must be" in str(caught.value) and "without quotes" not in str(caught.value)


@pytest.mark.parametrize(("text", "line", "what", "hint"), MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_a_mistake_inside_a_dictionary_names_its_line(tmp_path: Path, text: str, line: int, what: str, hint: str) -> None:
    path = tmp_path / "run.yml"
    path.write_text(HEAD + text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    message = str(caught.value)
    assert what in message and hint in message and f"run.yml:{line}" in message, message


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("optimizer.params.lr", "nonsense", "optimizer.params.lr must be a number, got 'nonsense'"),
        ("optimizer.parms.lr", "1e-3", "unknown key optimizer.parms"),
        ("lr", "nonsense", "optimizer.params.lr must be a number"),
        ("lr", ".nan", "optimizer.params.lr is nan"),
        ("optimizer.params.lr.x", "3", "optimizer.params.lr must be a number, got {'x': 3}"),
        ("zero_stage", "two", "zero_optimization.stage must be"),
        ("fp16.enabled", "maybe", "fp16.enabled must be true or false, got 'maybe'"),
        ("bf16", "true", "bf16 must be a dictionary, got True"),
        ("data_types.grad_accum_dtype", "int8", "data_types.grad_accum_dtype is 'int8'"),
        ("deepspeed_extra_args.optimizer.params.lr", "x", "optimizer.params.lr must be a number"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_alike(
    load_values: Callable[..., RunConfig], key: str, value: str, what: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_values(overrides={key: value})
    assert what in str(caught.value) and "--set" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("[a", "expected ',' or ']', but got '<stream end>'"),
        ("!!bool maybe", "a value that its tag does not allow"),
        ("2024-99-99", "month must be in 1..12"),
        ("a: b: c", "mapping values are not allowed here"),
    ],
)
def test_the_cause_of_bad_yaml_is_no_advice(load_values: Callable[..., RunConfig], value: str, cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_values(overrides={"vocab_file": value})
    error = caught.value
    assert error.what == f"the value of vocab_file is not valid YAML: {value!r}" and error.where == "--set"
    assert error.why == cause and error.hint is not None and "--set 'vocab_file=" in error.hint
    with pytest.raises(ConfigError) as caught:
        load_values(overrides={"vocab_file": value, "split": "x"})
    assert f"     why: {cause}\n     try: " in caught.value.what


def test_why_a_key_is_refused_is_no_advice(load_values: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_values({"moe_num_experts": 8})
    assert (caught.value.why, caught.value.hint) == ("mixture of experts is not built", None)
    with pytest.raises(ConfigError) as caught:
        load_values({"moe_num_experts": 8, "pos_emb": "sinusoidal"})
    assert caught.value.what.count("     why: ") == 2 and "     try: " not in caught.value.what


def test_numbers_are_fitted_inside_dictionaries_too(load_values: Callable[..., RunConfig]) -> None:
    """A whole number for a float and the reverse, the letter case of a choice, NeoX's exponent with an underscore."""
    params = {"lr": 1, "betas": [0, 0.95], "eps": "1.0e_8"}
    run = load_values({"optimizer": {"type": "Adam", "params": params}, "data_types": {"grad_accum_dtype": "BF16"}})
    assert run.optimizer.params == {"lr": 1.0, "betas": (0.0, 0.95), "eps": 1e-8} and run.optimizer.eps == 1e-8
    assert run.precision.grad_accum_dtype == "bfloat16"
    assert load_values({"fp16": {"enabled": True, "hysteresis": 2.0}}).precision.fp16 == {"enabled": True, "hysteresis": 2}


def test_every_dictionary_is_described_or_open() -> None:
    dictionaries = {name for name, info in catalog().items() if "dict" in str(info.annotation)}
    inner = {name for name, info in nested_catalog().items() if info.annotation == dict[str, Any]}
    described = {entry.key for entry in nested_keys()} | {
        name for name in inner if any(other.startswith(f"{name}.") for other in nested_catalog())
    }
    assert dictionaries | inner == described | open_dictionaries()


def test_entries_are_explained_listed_and_in_the_schema(load_values: Callable[..., RunConfig]) -> None:
    text = explain("optimizer.params.lr", load_values({}))
    assert "peak learning rate" in text and "0.001" in text and "run.yml" in text
    with pytest.raises(ConfigError, match=r"there is no key optimizer\.params\.lrs") as caught:
        explain("optimizer.params.lrs")
    assert "'lr'" in str(caught.value)
    assert "| `optimizer.params.betas` | a list of two numbers |" in arguments_page()
    inside = schema()["properties"]["optimizer"]
    params = inside["properties"]["params"]
    assert inside["additionalProperties"] is False and params["additionalProperties"] is False
    assert {"type": "number", "minimum": 0} in params["properties"]["lr"]["anyOf"]
    assert schema()["properties"]["synthetic"]["additionalProperties"] is True
    assert json.dumps(schema())


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("sliding_dropout", 1.0, "less than 1"),
        ("global_dropout", -0.5, "greater than or equal to 0"),
        ("sliding_rotary_fraction", 1.5, "less than or equal to 1"),
        ("global_rotary_base", 0.0, "greater than 0"),
        ("alibi_slope_factor", 0.0, "greater than 0"),
        ("alibi_bias_max", -3.0, "greater than 0"),
        ("metala_conv_width", 0, "greater than or equal to 1"),
        ("mamba_state_size", 0, "greater than or equal to 1"),
        ("mamba_dt_rank", -1, "greater than or equal to 0"),
        ("based_feature_width", 0, "greater than or equal to 1"),
        ("global_kv_heads", 0, "greater than or equal to 1"),
        ("base_conv_expand", 0, "greater than or equal to 1"),
    ],
)
def test_options_of_mixers_have_bounds(load_values: Callable[..., RunConfig], key: str, value: float, bound: str) -> None:
    mixer = catalog()[key].section_layer
    with pytest.raises(ConfigError) as caught:
        load_values({"attention_config": [[[mixer], 4]], "pos_emb": "none", key: value})
    assert f"{key} is {value}" in str(caught.value) and bound in str(caught.value) and "run.yml" in str(caught.value)


def test_offloading_that_is_off_is_no_offloading(load_values: Callable[..., RunConfig]) -> None:
    """DeepSpeed's way to say that nothing is offloaded."""
    stage = {"stage": 1, "offload_optimizer": {"device": "none"}, "offload_param": {}, "cpu_offload": False}
    assert load_values({"zero_optimization": stage}).parallel.zero_stage == 1
