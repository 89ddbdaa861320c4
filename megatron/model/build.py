"""Builds a model from a `ModelConfig`, and the table of its parameters that all other modules use."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron.errors import ConfigError
from megatron.layers.base import Layer, LayerConfig
from megatron.model.config import ModelConfig
from megatron.model.lm import LanguageModel
from megatron.parallel.context_lengths import check_context_length
from megatron.parallel.shard_spec import ParamSpec, ShardKind
from megatron.registry import context_parallel_names, layer_class, layer_info


def mixer_config(config: ModelConfig, name: str, index: int = 0) -> LayerConfig:
    """Options of the mixer called `name` for the layer of block `index`; an unknown option is a ConfigError."""
    cls = layer_class(name)
    written = config.layer_options.get(cls.names[0], {})
    try:
        options: LayerConfig = cls.Config(config.hidden_size, config.num_heads, index, **written)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"layers '{name}' cannot be built", why=str(error)) from None
    return options


def check_tensor_parallel(config: ModelConfig, size: int) -> None:
    """Reject a tensor-parallel size that does not divide `Config.tp_divisor()` of every mixer of the model.

    Raises:
        ConfigError: names the layers and their largest number of shards.
    """
    for name in dict.fromkeys(config.layer_types):
        parts = mixer_config(config, name).tp_divisor()
        if parts % size:
            unit = "heads" if layer_info(name).uses_heads else "channels"
            raise ConfigError(
                f"{parts} {unit} cannot be split over model_parallel_size {size}",
                where=f"layers '{name}'",
                why=f"tensor parallelism gives every rank the same number of whole {unit}",
                hint=f"choose a model_parallel_size that divides {parts}",
            )


def check_context_parallel(config: ModelConfig, size: int, tensor: int, seq_length: int) -> None:
    """Reject a context-parallel size with which a mixer of the model cannot read shards of a row.

    Args:
        config: the model.
        size: context-parallel size.
        tensor: tensor-parallel size.
        seq_length: tokens of a row.

    Raises:
        ConfigError: names the layers, the reason and the largest possible size.
    """
    if size == 1:
        return
    check_context_length(seq_length, size)
    for name in dict.fromkeys(config.layer_types):
        layer, options = layer_class(name), mixer_config(config, name)
        if not layer.context_parallel:
            raise ConfigError(
                f"layers '{name}' cannot read shards of a sequence",
                why=f"context_parallel_size {size} needs mixers that declare `context_parallel`",
                hint="context_parallel_size: 1, or mixers of " + ", ".join(context_parallel_names()),
            )
        heads, halo = options.cp_divisor(), options.cp_halo()
        if heads % (tensor * size):
            largest = max(n for n in range(1, size) if heads % (tensor * n) == 0)
            raise ConfigError(
                f"{heads} key/value heads cannot be divided among context_parallel_size {size} x model_parallel_size {tensor}",
                where=f"layers '{name}'",
                why="each context-parallel rank computes full attention for its share of the heads, over the whole sequence",
                hint=f"context_parallel_size: {largest}, or sliding-window layers",
            )
        if seq_length // size < halo:
            raise ConfigError(
                f"a shard of {seq_length // size} tokens is shorter than the {halo} that its neighbour reads of it",
                where=f"layers '{name}'",
                why="windows and short convolutions read the last tokens of the shard before theirs",
                hint=f"context_parallel_size: {_largest_size(seq_length, halo)} at most, or a longer seq_length",
            )


def _largest_size(seq_length: int, halo: int) -> int:
    """The largest divisor of the length with shards of at least `halo` tokens."""
    return next(n for n in range(seq_length // halo, 0, -1) if seq_length % n == 0) if seq_length >= halo else 1


def build_mixer(config: ModelConfig, index: int) -> Layer:
    """The token mixer of block `index`; a shape that the mixer rejects is a ConfigError."""
    cls = layer_class(config.layer_types[index])
    common = {"hidden_size": config.hidden_size, "num_heads": config.num_heads, "layer_index": index}
    try:
        return cls.build(common, config.layer_options.get(cls.names[0], {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"layer {index} ({config.layer_types[index]}) cannot be built", why=str(error)) from None


def build_model(config: ModelConfig) -> LanguageModel:
    """The full model on the current default device, or on `torch.device("meta")`; parameters are not initialised."""
    if len(config.layer_types) != config.num_layers:
        raise ConfigError(f"{len(config.layer_types)} layer types for {config.num_layers} layers", hint="see attention_config")
    return LanguageModel(config, [build_mixer(config, i) for i in range(config.num_layers)])


def _local_tables(module: Any) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """(shard kinds, roles, no-decay names) of a module's own parameters."""
    if isinstance(module, Layer):
        return dict(module.plan()), dict(module.init_rules()), tuple(module.no_decay())
    return module.plan(), module.init_rules(), ()


def _block_specs(block: nn.Module, prefix: str, stage: int) -> dict[str, ParamSpec]:
    specs: dict[str, ParamSpec] = {}
    for half in ("token_mixer", "channel_mixer"):
        module = getattr(block, half)
        if module is None:  # a model without MLPs
            continue
        kinds, roles, no_decay = _local_tables(module)
        for name, p in module.named_parameters():
            if name not in kinds or name not in roles:
                raise ValueError(f"{type(module).__name__} does not list its parameter {name} in plan() or init_rules()")
            decay = not name.endswith("bias") and name not in no_decay
            full = f"{prefix}.{half}.{name}"
            specs[full] = ParamSpec(full, tuple(p.shape), _shard_kind(kinds[name]), roles[name], decay, stage)
    for half in ("token_norm", "channel_norm"):
        if getattr(block, half) is not None:
            specs |= _norm_specs(getattr(block, half), f"{prefix}.{half}", stage)
    return specs


def _norm_specs(norm: nn.Module, prefix: str, stage: int) -> dict[str, ParamSpec]:
    specs = {}
    for name, p in norm.named_parameters():
        role = "ones" if name == "weight" else "zeros"
        specs[f"{prefix}.{name}"] = ParamSpec(f"{prefix}.{name}", tuple(p.shape), "replicated", role, False, stage)
    return specs


def _shard_kind(value: str) -> ShardKind:
    if value not in ("column", "row", "heads", "vocab", "replicated"):
        raise ValueError(f"unknown shard kind {value!r} in a plan; known: column, row, heads, vocab, replicated")
    return value  # type: ignore[return-value]


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Logical name -> ParamSpec for every parameter, in the order of the stages; a tied output projection has no entry.

    Stage numbers are GPT-NeoX's: 0 embedding, 2 .. L+1 blocks, L+3 final norm, L+4 output.
    """
    with torch.device("meta"):
        model = build_model(config)
    n, d, layers = config.vocab_size, config.hidden_size, config.num_layers
    specs = {"model.embed_tokens.weight": ParamSpec("model.embed_tokens.weight", (n, d), "vocab", "embedding", True, 0)}
    embedding = model.model.embed_tokens
    if embedding.positions is not None:
        name = "model.embed_tokens.positions"
        specs[name] = ParamSpec(name, tuple(embedding.positions.shape), "replicated", "embedding", True, 0)
    if embedding.norm is not None:
        specs |= _norm_specs(embedding.norm, "model.embed_tokens.norm", 0)
    for i, block in enumerate(model.model.layers):
        specs |= _block_specs(block, f"model.layers.{i}", i + 2)
    specs |= _norm_specs(model.model.final_norm, "model.final_norm", layers + 3)
    if not config.tie_embeddings:
        specs["lm_head.weight"] = ParamSpec("lm_head.weight", (n, d), "vocab", "input", True, layers + 4)
    names = {name for name, _ in model.named_parameters()}
    assert set(specs) == names, f"parameters without a spec: {sorted(names ^ set(specs))}"
    return specs
