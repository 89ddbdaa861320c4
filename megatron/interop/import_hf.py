"""Hugging Face folders -> checkpoints of ours: released MetaLA models, and everything that this project exported.

Sizes are read from the tensors; config.json says what tensors cannot (heads, activation, embedding scale). Where the two
disagree the tensors are right and a note says so. What was inferred is returned, printed and kept in the manifest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.find import refuse_to_mix
from megatron.checkpoint.save import save_weights
from megatron.errors import ExportError, UserError
from megatron.interop.hf_classes import LINEAR, METALA, METALA_ACTIVATIONS, Family, family_of
from megatron.interop.hf_families import NATIVES, native_by_type
from megatron.interop.hf_models import read_native
from megatron.interop.released import is_released, read_released
from megatron.interop.weight_files import foreign_settings, inner_file, read_json, read_weights
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers")
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Imported:
    """The checkpoint that was written, the model in it, and what was inferred on the way."""

    checkpoint: Path
    config: ModelConfig
    notes: tuple[str, ...]


def import_folder(source: str | Path, output: str | Path, *, tokenizer: Path | None = None) -> Imported:
    """Write the save folder `output` (`global_step0`, `latest`; weights, no optimizer) from a Hugging Face folder.

    Args:
        source: the Hugging Face folder.
        output: the save folder.
        tokenizer: a folder that holds the tokenizer's files, None when `source` does.

    Raises:
        ExportError: not such a folder, a model type that is not known, weights that do not make up that model, or a pickle
            that holds more than tensors.
        CheckpointError: the checkpoint cannot be written, or would stand among those of a run.
    """
    source, output, tokenizer = Path(source), Path(output), Path(tokenizer or source)
    refuse_to_mix(output, 0)
    settings = _read_settings(source)
    native = native_by_type(settings.get("model_type"))
    if native is not None and not is_released(settings):
        config, weights, found = read_native(native, settings, read_weights(source))
        return _write(source, output, tokenizer, family_of(config)[0], settings, config, weights, found)
    if is_released(settings):
        config, weights, found = read_released(settings, read_weights(source))
        return _write(source, output, tokenizer, LINEAR, settings, config, weights, found)
    family = next((f for f in (METALA, LINEAR) if f.config_class.model_type == settings.get("model_type")), None)
    if family is None:
        raise ExportError(
            f"model_type '{settings.get('model_type')}' cannot be imported",
            where=str(source / "config.json"),
            hint=f"known: {METALA.config_class.model_type}, {LINEAR.config_class.model_type}, released Based, JRT and Mamba, "
            + ", ".join(family.model_type for family in NATIVES),
        )
    weights, notes = read_weights(source), list[str]()
    weights, tied = _tie(weights, settings, notes)
    config = _model_config(family, settings, weights, notes)
    return _write(source, output, tokenizer, family, settings, replace(config, tie_embeddings=tied), weights, notes)


def _write(
    source: Path,
    output: Path,
    tokenizer: Path,
    family: Family,
    settings: Mapping[str, Any],
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    notes: list[str],
) -> Imported:
    """Check the weights against the model and save both."""
    _check(config, weights, source)
    files, facts = _tokenizer_files(tokenizer), _facts(source, family, settings, config, notes)
    if "tokenizer.json" in files:
        facts["tokenizer"]["type"] = "HFGPT2Tokenizer"
    checkpoint = save_weights(
        output,
        {name: t.contiguous() for name, t in weights.items()},
        param_specs(config),
        model_config=config.to_dict(),
        config_texts={name: (source / name).read_text("utf-8") for name in ("config.json",)},
        tokenizer=files,
        facts=facts,
    )
    return Imported(checkpoint, config, tuple(notes))


def _read_settings(source: Path) -> dict[str, Any]:
    if not source.is_dir():
        raise ExportError("no such folder", where=str(source))
    if (source / "manifest.json").is_file():
        raise ExportError("this is a checkpoint of ours already", where=str(source), hint="use it as `load`")
    if not (source / "config.json").is_file():
        inside = ", ".join(sorted(p.name for p in source.iterdir())[:8]) or "nothing"
        raise ExportError("not a Hugging Face folder: config.json is missing", where=str(source), why=f"it holds: {inside}")
    settings = read_json(inner_file(source, "config.json"))
    for name, value in settings.items():
        layers = name in _LAYERS and value is not None and (type(value) is not int or not 0 < value <= _MOST_LAYERS)
        if layers or (isinstance(value, int) and abs(value) > 1 << 53):
            raise ExportError(f"{name} is {value!r:.60}", where=str(source / "config.json"), why="no model has such a size")
    return settings


def _tie(weights: dict[str, Tensor], settings: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, Tensor], bool]:
    """Whether the output projection is the embedding; a stored copy of it is dropped."""
    if _HEAD not in weights:
        if settings.get("tie_word_embeddings") is False:
            notes.append("tied output projection: the file holds none, although config.json says untied")
        else:
            notes.append("tied output projection: the file holds no lm_head.weight")
        return weights, True
    embedding, head = weights.get(_EMBEDDING), weights[_HEAD]
    same = embedding is not None and embedding.shape == head.shape and torch.equal(embedding, head)
    if settings.get("tie_word_embeddings", True) and same:
        notes.append("tied output projection: lm_head.weight is a copy of the embedding")
        return {name: t for name, t in weights.items() if name != _HEAD}, True
    if settings.get("tie_word_embeddings", True):
        notes.append("untied output projection: lm_head.weight differs from the embedding, although config.json says tied")
    return weights, False


def _model_config(family: Family, settings: Mapping[str, Any], weights: Mapping[str, Tensor], notes: list[str]) -> ModelConfig:
    try:
        usual = family.config_class.attribute_map  # our exports repeat sizes under these; the official names decide
        repeated = {name for name, official in usual.items() if official in settings}
        said = {name: value for name, value in settings.items() if name not in {"model_type", "auto_map", *repeated}}
        fields = foreign_settings(family.config_class, said).model_fields()
        if family is METALA:
            fields |= _metala_fields(settings, weights, notes)
        return ModelConfig.from_dict(fields)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ExportError("config.json does not describe a model", why=str(error)) from None


def _metala_fields(settings: Mapping[str, Any], weights: Mapping[str, Tensor], notes: list[str]) -> dict[str, Any]:
    """What the tensors say about a released MetaLA folder; differences from config.json become notes."""
    rows, size = _shape(weights, _EMBEDDING)
    layers = 1 + max((int(m[1]) for m in map(_LAYER.match, weights) if m), default=-1)
    width = _shape(weights, "model.layers.0.channel_mixer.l1.weight")[0]
    kernel_size = _shape(weights, "model.layers.0.token_mixer.conv1d.weight")[-1]
    said = {"vocab_size": rows, "decoder_embed_dim": size, "decoder_layers": layers, "glu_dim": width}
    for name, number in said.items():
        if name not in settings:
            notes.append(f"{name} = {number}, read from the tensors (config.json does not say)")
        elif settings[name] != number:
            notes.append(f"{name} = {number}, read from the tensors (config.json says {settings[name]})")
    if "decoder_attention_heads" not in settings:
        raise ValueError("decoder_attention_heads is missing, and tensors do not show the number of heads")
    layernorm = "model.layers.0.token_norm.weight" in weights
    found: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": size,
        "num_layers": layers,
        "layer_types": ["metala"] * layers,
        "mlp_width": width,
        "mlp_bias": "model.layers.0.channel_mixer.l1.bias" in weights,
        "norm": "layernorm" if layernorm else "simplermsnorm",
        "norm_eps": settings.get("norm_eps") or (1e-5 if layernorm else 1e-6),
        "activation": _activation(str(settings.get("glu_act", "silu")), notes),
    }
    if kernel_size != 4:
        options = {"gate_round": settings.get("gate_round", "none"), "conv_width": kernel_size}
        found["layer_options"] = {"metala": options}
        notes.append(f"convolution of {kernel_size} taps, read from the tensors")
    return found


def _activation(name: str, notes: list[str]) -> str:
    if name == "exp":
        raise ValueError("glu_act 'exp' is normalised in a way the released description does not state")
    if name not in METALA_ACTIVATIONS:
        notes.append(f"glu_act '{name}' is the identity, as in the released code")
        return "identity"
    return name


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in weights:
        raise ExportError(f"the weights hold no {name}", why="they are not of a MetaLA model", hint="is the folder complete?")
    return tuple(weights[name].shape)


def _check(config: ModelConfig, weights: Mapping[str, Tensor], source: Path) -> None:
    """Every parameter of the model is there, in its shape, and nothing else."""
    try:
        specs = param_specs(config)
    except UserError as error:
        raise ExportError("config.json and the weights do not make a model", where=str(source), why=str(error)) from None
    missing, extra = sorted(set(specs) - set(weights)), sorted(set(weights) - set(specs))
    odd = [f"{n} is {tuple(weights[n].shape)}" for n in specs if n in weights and tuple(weights[n].shape) != specs[n].shape]
    problems = [f"missing: {', '.join(missing[:3])}"] * bool(missing)
    problems += [f"unknown: {', '.join(extra[:3])}"] * bool(extra) + odd[:3]
    if problems:
        count = len(missing) + len(extra) + len(odd)
        raise ExportError(f"{count} weights do not fit the model", where=str(source), why="; ".join(problems))


def _tokenizer_files(source: Path) -> dict[str, Path]:
    names = [*_TOKENIZER_FILES, *(p.name for p in sorted(source.glob("*.tiktoken")))]
    return {name: inner_file(source, name) for name in names if (source / name).is_file()}


def _facts(source: Path, family: Family, settings: Mapping[str, Any], config: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """What an export needs again: ids of special tokens and where the model came from."""
    tokenizer: dict[str, Any] = {"vocab_size": config.vocab_size}
    for key, field in (("eod", "eos_token_id"), ("pad", "pad_token_id"), ("bos", "bos_token_id")):
        number = settings.get(field)
        if isinstance(number, int) and 0 <= number < config.vocab_size:
            tokenizer[key] = number
        elif isinstance(number, int):
            notes.append(f"{field} of config.json is {number}, which the vocabulary of {config.vocab_size} does not have")
    facts = {"imported_from": source.resolve().name, "family": family.name, "tokenizer": tokenizer, "inferred": list(notes)}
    for key in ("max_position_embeddings", "max_seq_len", "seq_length"):
        if family.native is not None and isinstance(settings.get(key), int):
            facts["seq_length"] = settings[key]
    return facts
