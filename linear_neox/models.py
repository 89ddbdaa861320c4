"""Configurations, models and checkpoints: a `LanguageModel` from a YAML, a dictionary or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.find import find_checkpoint, newest_checkpoint, place_of
from megatron.config.load import load_config as read_config
from megatron.config.schema import RunConfig
from megatron.data.tokenizers import Tokenizer
from megatron.engine.base import DTYPES
from megatron.engine.build import local_device
from megatron.errors import ConfigError
from megatron.generation.load import load_model, stored_tokenizer
from megatron.model import cost
from megatron.model.build import build_model as build_uninitialised
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.model.init import init_weights
from megatron.model.lm import LanguageModel
from megatron.parallel.shard_spec import slice_of
from megatron.settings import model_config as model_config_of
from megatron.settings import tokenizer_of, vocabulary_rows

ConfigLike = RunConfig | str | Path | Mapping[str, Any]
"""A loaded configuration, the name of a YAML or JSON file, or a mapping of keys."""


def load_config(
    *files: str | Path | Mapping[str, Any], world_size: int | None = 1, check: bool = True, **overrides: Any
) -> RunConfig:
    """Read, merge and check a configuration, as `train.py` does.

    Args:
        *files: YAML or JSON files, merged in order; a mapping of keys counts as a file. A name such as `configs/metala.yml`
            that does not exist is looked up among the configurations shipped with linear-neox.
        world_size: number of processes; None if unknown.
        check: also check that it can be trained; False for a file that describes only a model.
        **overrides: keys that override the files (`train_iters=10`); `**{"optimizer.params.lr": 3e-4}` sets a nested one.

    Returns:
        The typed, frozen configuration. `.flat()` returns its keys, `.provenance` the source of each value.

    Raises:
        ConfigError: a key is unknown or a value is wrong; lists every problem with file and line.
    """
    return read_config(files, overrides=overrides, world_size=world_size, check=check)


def as_run(config: ConfigLike, *, world_size: int = 1, check: bool = True, **overrides: Any) -> RunConfig:
    """Load a configuration unless it is already loaded; only then overrides are allowed.

    Raises:
        ConfigError: as in `load_config`, or overrides for a loaded configuration.
    """
    if isinstance(config, RunConfig):
        if overrides:
            raise ConfigError(f"{', '.join(overrides)}: a loaded configuration is frozen", hint="pass the keys to load_config")
        return config
    return load_config(config, world_size=world_size, check=check, **overrides)


def model_config(config: ConfigLike, *, vocab_size: int | None = None, **overrides: Any) -> ModelConfig:
    """The model that a training configuration describes.

    Args:
        config: a loaded configuration, the name of a YAML, or a mapping of keys.
        vocab_size: rows of the embedding; None: `padded_vocab_size`, else the padded size of the tokenizer.
        **overrides: see `load_config`.

    Raises:
        ConfigError: the configuration is wrong.
        DataError: the vocabulary size is unknown and the tokenizer's file is missing.
    """
    run = as_run(config, check=False, **overrides)
    rows = vocab_size or run.tokenizer.padded_vocab_size
    return model_config_of(run, rows or vocabulary_rows(run, tokenizer_of(run)))


def build_model(
    config: ModelConfig | ConfigLike,
    *,
    seed: int | None = None,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    vocab_size: int | None = None,
) -> LanguageModel:
    """Build a model with initial weights, identical to those of training on any mesh.

    Args:
        config: a `ModelConfig`, or an argument of `model_config`.
        seed: seed of the initial weights; None: the configuration's `seed`, 1234 for a `ModelConfig`.
        dtype: dtype of the parameters: a torch dtype, or fp32, bf16, fp16.
        device: device of the parameters; None: the CPU.
        vocab_size: see `model_config`.

    Returns:
        The model, in training mode. `model(tokens [b, s])` returns `(logits [b, s, n], None)`.

    Raises:
        ConfigError: the configuration is wrong.
        DataError: see `model_config`.
    """
    if not isinstance(config, ModelConfig):
        run = as_run(config, check=False)
        seed = run.training.seed if seed is None else seed
        config = model_config(run, vocab_size=vocab_size)
    specs = param_specs(config)
    with torch.device("meta"):
        model = build_uninitialised(config)
    init_weights(
        model,
        {name: name for name, _ in model.named_parameters()},
        specs,
        config,
        1234 if seed is None else seed,
        slices=lambda spec: slice_of(spec.shape, spec.cut, 0, 1),
        device=device or "cpu",
        dtype=_dtype(dtype),
    )
    for block in model.model.blocks():
        block.pack_weights()
    return model


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype '{dtype}'", hint="a torch dtype, or one of " + ", ".join(DTYPES))
    return DTYPES[dtype]


def count_parameters(config: ModelConfig | ConfigLike, *, vocab_size: int | None = None) -> tuple[int, int]:
    """(all parameters, parameters without embedding and output projection), without allocating them."""
    return cost.count_parameters(config if isinstance(config, ModelConfig) else model_config(config, vocab_size=vocab_size))


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, for `generate`, `perplexity` and `export_hf`.

    Attributes:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer; None if the checkpoint has none.
        path: the `global_step<N>` folder.
        iteration: optimizer steps taken.
        seq_length: sequence length of the training; None if unknown.
    """

    model: LanguageModel
    tokenizer: Tokenizer | None
    path: Path
    iteration: int
    seq_length: int | None


def load_checkpoint(
    path: str | Path,
    *,
    iteration: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Checkpoint:
    """Load a checkpoint of any mesh into one process.

    Args:
        path: a `global_step<N>` folder, or a save folder or run folder.
        iteration: step to load from a save or run folder; None: the newest.
        dtype: dtype of the parameters. None: as stored on a GPU, fp32 on a CPU, where half precision is slower.
        device: device of the parameters; None: the GPU if there is one.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    folder = newest_checkpoint(path) if iteration is None else find_checkpoint(place_of(path), iteration)
    assert folder is not None  # None only for a fresh training run
    target = local_device(0) if device is None else torch.device(device)
    default_dtype = None if target.type == "cuda" else torch.float32
    model, manifest = load_model(folder, dtype=default_dtype if dtype is None else _dtype(dtype), device=target)
    tokenizer_type = (manifest.facts.get("tokenizer") or {}).get("type")
    tokenizer = stored_tokenizer(folder / "tokenizer", tokenizer_type)
    return Checkpoint(model, tokenizer, folder, manifest.iteration, manifest.facts.get("seq_length"))
