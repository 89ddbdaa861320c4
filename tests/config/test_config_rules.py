"""Every cross rule has a configuration that breaks it, and its message names the place."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from megatron.config.rules import RULES
from megatron.config.schema import RunConfig
from megatron.errors import ConfigError

ADAM = {"type": "Adam", "params": {"lr": 1e-3}}
PREFIX = {"attention_config": [[["jrt"], 4]], "jrt_prefix_length": 64, "objective": "jrt"}
SEQUENCE = {"sequence_parallel": True, "model_parallel_size": 2, "hidden_dropout": 0, "world": 2}

# changes to the tiny base run -> words of the message; world size 1 unless "world" is given.
CASES: list[tuple[dict[str, Any], str]] = [
    ({"num_layers": None, "attention_config": None}, "num_layers is not given"),
    ({"hidden_size": None}, "hidden_size is not given"),
    ({"num_attention_heads": None}, "num_attention_heads is not given"),
    ({"seq_length": None}, "seq_length is not given"),
    ({"train_iters": None}, "train_iters is not given"),
    ({"keep_last_n_checkpoints": 1}, "keep_last_n_checkpoints is 1"),
    ({"train_micro_batch_size_per_gpu": None}, "neither train_micro_batch_size_per_gpu nor"),
    ({"hidden_size": 65}, "hidden_size 65 is not a multiple of num_attention_heads 4"),
    ({"model_parallel_size": 3, "world": 3}, "num_attention_heads 4 is not a multiple of model_parallel_size 3"),
    ({"model_parallel_size": 2, "mlp_branch_size": 77, "world": 2}, "the MLP width 77 is not a multiple"),
    ({"pipe_parallel_size": 5, "world": 5}, "num_layers 4 is less than pipe_parallel_size 5"),
    ({"pipe_parallel_size": 2, "world": 3}, "3 processes cannot be divided"),
    ({"engine": "single", "world": 2}, "engine: single runs one process"),
    ({"max_position_embeddings": 64}, "max_position_embeddings 64 is less than seq_length 128"),
    ({"intermediate_size": 128, "expansion_factor": 2.0}, "intermediate_size and expansion_factor"),
    ({"intermediate_size": 128, "mlp_branch_size": 128}, "mlp_branch_size sets the MLP width"),
    ({"mlp_type": "llama", "activation": "swiglu"}, "takes a pointwise activation"),
    ({"pos_emb": "rotary"}, "pos_emb: rotary: no layer of attention_config reads this"),
    ({"num_kv_heads": 2}, "num_kv_heads: 2: no layer"),
    ({"num_kv_heads": 3, "attention_config": None}, "num_attention_heads 4 is not a multiple of num_kv_heads 3"),
    (
        {"num_kv_heads": 2, "attention_config": None, "model_parallel_size": 4, "world": 4},
        "num_kv_heads 2 is not a multiple of model_parallel_size 4",
    ),
    ({"gpt_j_tied": True}, "gpt_j_tied has no meaning"),
    ({"bias_gelu_fusion": True, "activation": "relu"}, "bias_gelu_fusion goes with"),
    ({"reset_attention_at_eod": True, "reset_state_at_eod": False}, "reset_attention_at_eod is true and"),
    (
        {"alibi_train_length": 64, "attention_config": [[["alibi"], 4]], "reset_state_at_eod": True},
        "alibi_train_length: slopes that shrink",
    ),
    (
        {"global_train_length": 64, "attention_config": None, "pos_emb": "alibi", "reset_state_at_eod": True},
        "global_train_length: slopes that shrink",
    ),
    ({"padded_vocab_size": 255, "model_parallel_size": 2, "world": 2}, "padded_vocab_size 255 is not a multiple"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4"),
    ({"zero_optimization": {"stage": 2}, "pipe_parallel_size": 2}, "zero_optimization.stage 2 does not go together"),
    ({"zero_optimization": {}}, "zero_optimization.stage is None"),
    ({"zero_optimization": {"stage": 1, "cpu_offload": True}}, "offloading"),
    ({"optimizer": {"type": "lion", "params": {"lr": 1e-3}}}, "optimizer.type 'lion' is not built"),
    ({"optimizer": {"params": {"lr": 1e-3}}}, "optimizer has no type"),
    ({"optimizer": {"type": "Adam"}}, "learning rate is not given"),
    ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.1}}}, "refuses weight_decay inside"),
    ({"fp16": {"loss_scale": 0}}, "fp16 has no enabled"),
    ({"bf16": {"loss_scale": 0}}, "bf16 has no enabled"),
    ({"synthetic": {"task": "mqar", "lenght": 64, "train": [{"examples": 9}]}}, "mqar has no parameter 'lenght'"),
    ({"min_lr": 0.1}, "min_lr 0.1 is above the learning rate 0.001"),
    ({"warmup": 1.0}, "warmup 1.0 leaves no steps"),
    ({"override_lr_scheduler": True, "use_checkpoint_lr_scheduler": True}, "contradict each other"),
    ({"train_epochs": 1}, "train_iters and train_epochs are both given"),
    ({"lr_decay_iters": 0}, "lr_decay_iters is 0"),
    ({"save": "x"}, "neither checkpoint_factor nor extra_save_iters"),
    ({"save": "x", "checkpoint_scale": "log", "checkpoint_factor": 1}, "log needs checkpoint_factor above 1"),
    ({"save": "x", "checkpoint_factor": 1.5}, "checkpoint_factor 1.5 is not a whole number"),
    ({"iteration": 5}, "there is no load"),
    (
        {"data_path": "a", "train_data_paths": ["a"], "valid_data_paths": ["a"], "test_data_paths": ["a"]},
        "data_path and .*_data_paths are both given",
    ),
    ({"train_data_paths": ["a"]}, "must be given together"),
    (
        {
            "train_data_paths": ["a", "b"],
            "valid_data_paths": ["a"],
            "test_data_paths": ["a"],
            "train_data_weights": [1.0],
        },
        "train_data_weights has 1 entries for 2",
    ),
    ({"profile": True, "profile_step_start": 5, "profile_step_stop": 5}, "profile_step_stop must be above"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16 and bf16 are both enabled"),
    ({"bf16": {"enabled": True}, "precision": "fp32"}, "precision is fp32, but the section bf16"),
    ({"train_batch_size": 7, "world": 2}, "train_batch_size 7 is not a multiple of 2"),
    ({"attention_config": [[["metala"], 3]]}, "describes 3 layers, but num_layers is 4"),
    ({"attention_config": [[["metala"], 3], [["rwkv"], 1]]}, "token mixer 'rwkv' is not built"),
    ({"time_limit": "soon"}, "time_limit 'soon' is not a time"),
    ({"exit_signals": ["SIGKILL"]}, "exit_signals names 'SIGKILL'"),
    ({"on_skip_budget": "rewind"}, "rewind has no checkpoint to go back to"),
    ({"split": "a, b, c"}, "split 'a, b, c' cannot be read: it needs one to three numbers"),
    ({"split": "0, 0, 0"}, "split '0, 0, 0' cannot be read"),
    ({"pipe_partition_method": "by_hand"}, "unknown pipe_partition_method 'by_hand'"),
    ({"pipe_partition_method": "type:("}, r"pipe_partition_method 'type:\(' is not a regular expression"),
    ({"pipe_partition_method": "type:mamba"}, "pipe_partition_method 'type:mamba' matches no layer"),
    ({"loss_chunk_tokens": 64, "zero_optimization": {"stage": 3}}, "loss_chunk_tokens cannot be used here: ZeRO-3"),
    ({"loss_chunk_tokens": 64, "synthetic": {"task": "mqar"}}, "loss_chunk_tokens cannot be used here: a synthetic task"),
    ({**SEQUENCE, "seq_length": 127}, "sequence_parallel cannot be exact here: seq_length 127"),
    ({**SEQUENCE, "hidden_dropout": 0.1}, "sequence_parallel cannot be exact here: hidden_dropout"),
    ({**SEQUENCE, "attention_config": None, "pos_emb": "learned"}, "sequence_parallel cannot be exact here: learned"),
    ({**PREFIX, "objective": "causal"}, "objective causal with jrt layers that see the first 64 tokens"),
    ({**PREFIX, "objective_prefix_length": 32}, "objective_prefix_length 32 is not jrt_prefix_length 64"),
    ({"objective": "prefix"}, "objective 'prefix' needs a prefix"),
    ({"objective": "prefix", "objective_prefix_length": 128}, "a prefix of 128 tokens leaves nothing of seq_length 128"),
    ({**PREFIX, "objective_mask_token": 256, "padded_vocab_size": 256}, "objective_mask_token 256 is outside"),
    ({"dropout_hidden": 1}, "unknown key dropout_hidden"),
]


@pytest.mark.parametrize(("changes", "words"), CASES, ids=[words[:40] for _, words in CASES])
def test_message_and_place(load_values: Callable[..., RunConfig], changes: dict[str, Any], words: str) -> None:
    values = {k: v for k, v in changes.items() if k != "world"}
    with pytest.raises(ConfigError, match=words) as caught:
        load_values(values, world_size=changes.get("world", 1))
    if any(value is not None for value in values.values()):
        assert "run.yml:" in str(caught.value)


def _yields(rule: Callable[..., Any]) -> set[tuple[str, int]]:
    """(name of the rule, line within it) of each of its `yield`s."""
    tree = ast.parse(inspect.getsource(rule))
    return {(rule.__name__, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Yield)}


def _reached(rule: Callable[..., Any], run: RunConfig) -> set[tuple[str, int]]:
    """Those at which the rule stops for a run."""
    generator = rule(run)
    first = inspect.getsourcelines(rule)[1]
    return {(rule.__name__, generator.gi_frame.f_lineno - first + 1) for _ in generator}


def test_every_rule_is_broken_by_some_case(load_values: Callable[..., RunConfig]) -> None:
    reached: set[tuple[str, int]] = set()
    for changes, _ in CASES:
        values = {k: v for k, v in changes.items() if k != "world"}
        try:
            run = load_values(values, check=False, world_size=changes.get("world", 1))
        except ConfigError:
            continue
        reached |= {line for rule in RULES for line in _reached(rule, run)}
    assert set().union(*map(_yields, RULES)) == reached


def test_options_of_an_unused_mixer(load_values: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="no layer is metala"):
        load_values({"attention_config": [[["rwkv"], 4]], "metala_conv_width": 3})
