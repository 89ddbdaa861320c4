"""The layouts of the released Based, JRT, Attention and Mamba models (hazyresearch/*, state-spaces/*) as ours.

Their config.json is a GPT2Config dump whose mixers are Hydra dictionaries, or Mamba's own dataclass; neither says a model type.
Transformers' `mamba` has the tensors of the latter under all but one of the same names, and says its type.
Tensors are believed before the config: which mixer a layer is, widths, biases, decay and the vocabulary's rows are read from
them. Three of their parameters hold two of ours, one above the other: `fc1` (up, gate), `in_proj` (convolution, gate)
and `Wqkv`. What was decided on the way is returned as notes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.errors import ExportError
from megatron.model.config import ModelConfig

_LAYER = re.compile(r"(?:transformer|backbone)\.layers\.(\d+)\.(.+)")
_MIXERS = {
    "BaseConv": "base_conv",
    "BaseConvWithSiLU4": "base_conv",
    "LinearAttention": "based",
    "PrefixLinearAttention": "jrt",
    "SlidingAttention": "sliding",
    "SlidingsMHA": "sliding",
}
"""Last part of a Hydra target -> our mixer; the module paths changed over the years and say nothing."""
_EMBEDDINGS = {
    "transformer": "transformer.embeddings.word_embeddings.weight",
    "backbone": "backbone.embedding.weight",
    "transformers": "backbone.embeddings.weight",
}
_INERT = "transformer.decay.decay"
"""Logarithms of the decay rates."""
_CHANGED_WINDOW = 4096


def is_released(settings: Mapping[str, Any]) -> bool:
    """Is this config.json one of those projects', or of transformers' Mamba?"""
    if settings.get("model_type") == "mamba":
        return True
    if settings.get("model_type") not in (None, "gpt2"):
        return False
    return "ssm_cfg" in settings or ("n_embd" in settings and ("rms_norm" in settings or "mixer" in settings))


@dataclass
class _Reading:
    """One folder on its way: its config, its cleaned tensors by layer, and what has been found."""

    settings: Mapping[str, Any]
    layers: list[dict[str, Tensor]]
    outer: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def hydra(self, mixer: str) -> Mapping[str, Any]:
        """The config's dictionary of a mixer of ours; empty when there is none."""
        for key in ("mixer", "alt_mixer", "alt_mixer_2"):
            entry = self.settings.get(key)
            if isinstance(entry, Mapping) and _MIXERS.get(str(entry.get("_target_", "")).rpartition(".")[2]) == mixer:
                return entry
        return {}

    def option(self, mixer: str, values: Mapping[str, Any]) -> None:
        """Set a mixer's options; all layers of a kind must have the same."""
        known = self.options.setdefault(mixer, dict(values))
        if known != values:
            raise ExportError(f"two {mixer} layers of this model differ", why=f"{known} and {dict(values)}")


def read_released(
    settings: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """(model, weights under our names, notes) of a released folder's config.json and tensors.

    Raises:
        ExportError: tensors that belong to no mixer we know, or that do not fit the config.
    """
    reading = _clean(settings, weights)
    mamba = any(name.startswith("backbone.") for name in reading.outer)
    found: dict[str, Tensor] = {}
    types = []
    for i, tensors in enumerate(reading.layers):
        kind = _kind(reading, i, tensors)
        types.append(kind)
        for name, tensor in tensors.items():
            for ours, part in _RENAME[kind](name, tensor):
                found[f"model.layers.{i}.{ours}"] = part
    stem = "backbone" if mamba else "transformer"
    embedding = _EMBEDDINGS["transformers" if settings.get("model_type") == "mamba" else stem]
    table = _need(reading.outer, embedding)
    found["model.embed_tokens.weight"] = table
    found["model.final_norm.weight"] = _need(reading.outer, f"{stem}.norm_f.weight" if mamba else f"{stem}.ln_f.weight")
    known = {embedding, f"{stem}.norm_f.weight", f"{stem}.ln_f.weight", "lm_head.weight", _INERT}
    if unknown := sorted(set(reading.outer) - known):
        raise ExportError("the weights hold more than this layout has", why=", ".join(unknown[:5]))
    head = reading.outer.get("lm_head.weight")
    tied = head is None or torch.equal(head, table)
    if not tied and head is not None:
        found["lm_head.weight"] = head
    _say_vocabulary(reading, len(table), tied)
    return _model(reading, tuple(types), table, tied, mamba), found, reading.notes


def _need(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ExportError(
            f"the weights hold no {name}", why="they are of none of the released layouts", hint="is the folder whole?"
        )
    return tensors[name]


def _clean(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> _Reading:
    """Drop Lightning's counters and prefix, put tensors to their layers."""
    reading = _Reading(settings, [], {})
    counters = [name for name in weights if "metrics" in name]
    if counters:
        reading.notes.append(f"{len(counters)} counters of the training framework dropped ({counters[0]})")
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if name in counters:
            continue
        name = name.removeprefix("model.")
        if match := _LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        else:
            reading.outer[name] = tensor
    if sorted(layers) != list(range(len(layers))):
        raise ExportError("layers are missing", why=f"the weights hold layers {sorted(layers)}")
    reading.layers = [layers[i] for i in range(len(layers))]
    if any("mixer.conv1.conv.weight" in tensors for tensors in reading.layers):
        reading.notes.append("convolutions have their old name conv1")
    return reading


def _kind(reading: _Reading, i: int, tensors: Mapping[str, Tensor]) -> str:
    """Our mixer of layer `i`, by its tensors; sets its options."""
    if "mixer.g_norm.weight" in tensors:
        raise ExportError(
            f"layer {i} is of the ThunderKittens demonstration",
            why="it has a norm per head in place of the denominator, which is another model",
        )
    if "mixer.A_log" in tensors:
        return _mamba(reading, tensors)
    if "mixer.proj_q.weight" in tensors:
        return _linear(reading, tensors)
    if "mixer.in_proj.weight" in tensors:
        inner = tensors["mixer.out_proj.weight"].shape[1]
        conv = tensors.get("mixer.conv.conv.weight", tensors.get("mixer.conv1.conv.weight"))
        if conv is None:
            raise ExportError(f"layer {i} has no convolution", why=", ".join(sorted(tensors)))
        values = {"conv_width": conv.shape[-1], "expand": inner // tensors["mixer.out_proj.weight"].shape[0]}
        reading.option("base_conv", {**values, "bias": "mixer.in_proj.bias" in tensors})
        return "base_conv"
    if "mixer.Wqkv.weight" in tensors:
        return _attention(reading, i)
    raise ExportError(f"layer {i} is no mixer we know", why=", ".join(sorted(tensors)))


def _linear(reading: _Reading, tensors: Mapping[str, Tensor]) -> str:
    kind = "jrt" if "mixer.proj_k_enc.weight" in tensors else "based"
    said, rows = reading.hydra(kind), tensors["mixer.proj_q.weight"].shape[0]
    width = said.get("feature_dim") or (said.get("feature_map") or {}).get("input_dim")
    heads = said.get("num_heads") or (rows // width if width else reading.settings["n_head"])
    if rows % heads or (width and rows != heads * width):
        raise ExportError(f"{rows} rows of proj_q do not make {heads} heads of {width or '?'}", where="config.json, alt_mixer")
    values = {"feature_width": rows // heads, "heads": heads}
    if kind == "jrt":
        length = said.get("enc_length") or reading.settings.get("enc_length") or 1024
        reading.option("jrt", {**values, "prefix_length": length})
    else:
        constant = float(reading.settings.get("decay_const", -3))
        decay = {"decay": True, "decay_const": constant} if "mixer.decay_proj.weight" in tensors else {}
        reading.option("based", {**values, **decay})
        _check_decay(reading, bool(decay), heads, constant)
    return kind


def _check_decay(reading: _Reading, decay: bool, heads: int, constant: float) -> None:
    """The stored rates must be those of the formula; without a gate in the layers they have no effect."""
    rates = reading.outer.get(_INERT)
    if not decay:
        if rates is not None and not any("decay buffer" in note for note in reading.notes):
            reading.notes.append("the decay buffer has no effect without decay_proj (as in the released code) and is dropped")
        return
    if reading.settings.get("decay_denom"):
        raise ExportError("decay_denom is not built", why="no released model has it", where="config.json")
    want = torch.log1p(-torch.exp2(constant - torch.arange(heads, dtype=torch.float64)))
    if rates is not None and (rates.shape != want.shape or not torch.allclose(rates.double(), want, atol=1e-5)):
        raise ExportError("the stored decay rates are not 1 - 2^(decay_const - head)", where=_INERT)


def _attention(reading: _Reading, i: int) -> str:
    fraction = float(reading.settings.get("rotary_emb_fraction", 0.0))
    said = reading.hydra("sliding")
    if not said:
        positions = "rotary" if fraction else "none"
        reading.option("global", {"positions": positions, "rotary_fraction": fraction or 1.0})
        return "global"
    window = int(said["window_size"])
    if window == _CHANGED_WINDOW and i in (7, 17) and reading.hydra("jrt"):
        raise ExportError(
            f"layer {i} of this model has a window of 256 although the config says {window}",
            why="the original changes it for layers 7 and 17, and one window per kind of layer is all that can be said here",
        )
    if "sliding" not in reading.options:
        reading.notes.append(
            f"window_size {window} is halved as in the original: {window // 2 + 1} tokens, the own one included"
        )
    reading.option("sliding", {"window": window // 2, "rotary_fraction": fraction})
    return "sliding"


def _mamba(reading: _Reading, tensors: Mapping[str, Tensor]) -> str:
    activation = reading.settings.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ExportError(f"Mamba with the activation '{activation}' is not built", where="config.json, hidden_act")
    inner, states = tensors["mixer.A_log"].shape
    values = {
        "state_size": states,
        "conv_width": tensors["mixer.conv1d.weight"].shape[-1],
        "expand": inner // tensors["mixer.out_proj.weight"].shape[0],
        "dt_rank": tensors["mixer.dt_proj.weight"].shape[1],
        "use_bias_in_conv": "mixer.conv1d.bias" in tensors,
        "use_bias_in_linears": "mixer.in_proj.bias" in tensors,
    }
    reading.option("mamba", values)
    return "mamba"


def _halves(first: str, second: str) -> Callable[[str, Tensor], list[tuple[str, Tensor]]]:
    """One tensor whose upper half is `first` and whose lower half is `second`."""

    def cut(leaf: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        upper, lower = tensor.chunk(2)
        return [(f"{first}.{leaf}", upper), (f"{second}.{leaf}", lower)]

    return cut


def _shared(name: str, tensor: Tensor) -> list[tuple[str, Tensor]] | None:
    """Names that all layers of the GPT family have."""
    module, _, leaf = name.rpartition(".")
    if module == "mlp.fc1":  # up above gate; our l1 is the gate
        return _halves("channel_mixer.l2", "channel_mixer.l1")(leaf, tensor)
    plain = {"norm1": "token_norm", "norm2": "channel_norm", "norm": "token_norm", "mlp.fc2": "channel_mixer.l3"}
    return [(f"{plain[module]}.{leaf}", tensor)] if module in plain else None


def _rename_conv(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    module, _, leaf = name.rpartition(".")
    if module == "mixer.in_proj":
        return _halves("token_mixer.conv_proj", "token_mixer.gate_proj")(leaf, tensor)
    if module in ("mixer.conv.conv", "mixer.conv1.conv"):
        return [(f"token_mixer.conv1d.{leaf}", tensor)]
    return _rename_plain(name, tensor)


def _rename_plain(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    return _shared(name, tensor) or [(re.sub(r"^mixer\.", "token_mixer.", name), tensor)]


def _rename_attention(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if name.startswith("mixer.Wqkv."):
        leaf = name.rpartition(".")[2]
        return [(f"token_mixer.{p}_proj.{leaf}", part) for p, part in zip("qkv", tensor.chunk(3), strict=True)]
    return _rename_plain(name, tensor)


def _rename_mamba(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if name.startswith("mixer.in_proj."):
        return _halves("token_mixer.in_proj", "token_mixer.gate_proj")(name.rpartition(".")[2], tensor)
    return _rename_plain(name, tensor)


_RENAME: dict[str, Callable[[str, Tensor], list[tuple[str, Tensor]]]] = {
    "base_conv": _rename_conv,
    "based": _rename_plain,
    "jrt": _rename_plain,
    "sliding": _rename_attention,
    "global": _rename_attention,
    "mamba": _rename_mamba,
}


def _say_vocabulary(reading: _Reading, rows: int, tied: bool) -> None:
    said = reading.settings.get("vocab_size")
    reading.notes.append(f"vocabulary of {rows} rows, padding kept (config.json says {said})")
    if not tied:
        reading.notes.append("untied output projection: lm_head.weight differs from the embedding")


def _model(reading: _Reading, types: tuple[str, ...], table: Tensor, tied: bool, mamba: bool) -> ModelConfig:
    settings, (rows, size) = reading.settings, table.shape
    first = reading.layers[0]
    width = 0 if mamba else _need(first, "mlp.fc2.weight").shape[1]
    kinds = ", ".join(f"{types.count(kind)} {kind}" for kind in dict.fromkeys(types))
    reading.notes.append(f"layers, read from the tensors: {kinds}" + (f"; MLP width {width}" if width else ""))
    for kind, values in reading.options.items():
        reading.notes.append(f"{kind}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    norm = "rmsnorm" if settings.get("rms_norm", True) else "layernorm"
    return ModelConfig(
        vocab_size=rows,
        hidden_size=size,
        num_layers=len(types),
        num_heads=1 if mamba else int(settings["n_head"]),
        mlp_width=width,
        layer_types=types,
        layer_options=reading.options,
        norm=norm,
        norm_eps=float(settings.get("layer_norm_epsilon", 1e-5)),
        mlp="none" if mamba else "gated",
        activation="silu",
        tie_embeddings=tied,
        residual_fp32=bool(settings.get("residual_in_fp32", True)),
    )
