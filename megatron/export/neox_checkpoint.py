"""Checkpoint folders of GPT-NeoX: its pickled layer files of any tensor-parallel size as full weights under our names.

A layer file (`layer_NN-model_RR-model_states.pt`) is a plain state dict and is read with torch's restricted loader. The flat
`mp_rank_RR_model_states.pt` of a run without pipeline is read the same way, and refused where it holds more than tensors.
How a parameter is joined follows from our own plan (`ParamSpec.cut`); what only NeoX does is here:

* queries, keys and values are one matrix: q, k, v of head 0, then of head 1, ...; with grouped queries all q, all k, all v of a
  rank, rank after rank;
* the first matrix of a gated MLP is (up, gate) on every rank;
* biases after a row-parallel matrix are parts whose sum is meant in parallel blocks, and copies in sequential ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron.errors import ExportError
from megatron.export.foreign import load_foreign_pickle
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.parallel.plan import ParamSpec, cut_dim

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_SEQUENTIAL = re.compile(r"(?:module\.)?sequential\.(\d+)\.(.+)")
_MODULES = {
    "input_layernorm": "token_norm",
    "post_attention_layernorm": "channel_norm",
    "attention.dense": "token_mixer.out_proj",
    "attention": "token_mixer",
    "mlp.linear2": "channel_mixer.l3",
    "mlp.dense_4h_to_h": "channel_mixer.l3",
    "mlp.w1": "channel_mixer.l1",
    "mlp.w2": "channel_mixer.l3",
    "mlp.w3": "channel_mixer.l2",
}
"""NeoX's module -> ours, within a block; longer names are tried first. w1, w2, w3 are those of its older gated MLP."""
_FIRST_MLP = ("mlp.linear1", "mlp.dense_h_to_4h")
_TABLES = ("inv_freq", "slopes", "attention.bias", "masked_bias")
Specs = Mapping[str, ParamSpec]


def read_neox_folder(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Full weights of the model `config` from a `global_stepN` folder of NeoX.

    Raises:
        ExportError: no such files, ranks are missing, or a tensor fits no parameter of the model.
    """
    modules = _modules(folder)
    specs, made = param_specs(config), dict[str, Tensor]()
    for index, ranks in sorted(modules.items()):
        for name, parts in _by_name(ranks, folder, index).items():
            if not name.endswith(_TABLES):
                made |= _parameter(index, name, parts, config, specs)
    if config.tie_embeddings:
        made.pop("lm_head.weight", None)
    missing, extra = sorted(set(specs) - set(made)), sorted(set(made) - set(specs))
    odd = [
        f"{n} is {tuple(made[n].shape)} instead of {s.shape}"
        for n, s in specs.items()
        if n in made and made[n].shape != s.shape
    ]
    if missing or extra or odd:
        problems = [f"missing: {', '.join(missing[:3])}"] * bool(missing) + [f"unknown: {', '.join(extra[:3])}"] * bool(extra)
        raise ExportError(
            "the folder does not hold this model", where=str(folder), why="; ".join(problems + odd[:3]),
            hint="give the YAML files that the model was trained with",
        )  # fmt: skip
    return made


def _modules(folder: Path) -> dict[int, dict[int, dict[str, Tensor]]]:
    """Stage number -> tensor-parallel rank -> state dict."""
    found: dict[int, dict[int, dict[str, Tensor]]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        layer, flat = _LAYER_FILE.fullmatch(path.name), _RANK_FILE.fullmatch(path.name)
        if layer:
            found.setdefault(int(layer[1]), {})[int(layer[2])] = load_foreign_pickle(path)
        elif flat and not any(folder.glob("layer_*")):
            for name, value in load_foreign_pickle(path).items():
                place = _SEQUENTIAL.fullmatch(name)
                if place:
                    found.setdefault(int(place[1]), {}).setdefault(int(flat[1]), {})[place[2]] = value
    if not found:
        hint = "give the folder that holds layer_00-model_00-model_states.pt"
        raise ExportError("this is no checkpoint of GPT-NeoX", where=str(folder), hint=hint)
    sizes = {index: len(ranks) for index, ranks in found.items()}
    if len(set(sizes.values())) > 1 or any(set(ranks) != set(range(len(ranks))) for ranks in found.values()):
        raise ExportError("files of some tensor-parallel ranks are missing", where=str(folder), why=f"files per layer: {sizes}")
    return found


def _by_name(ranks: Mapping[int, dict[str, Tensor]], folder: Path, index: int) -> dict[str, list[Tensor]]:
    ordered = [ranks[rank] for rank in sorted(ranks)]
    if any(set(part) != set(ordered[0]) for part in ordered):
        raise ExportError(f"the ranks' files of layer {index} hold different parameters", where=str(folder))
    return {name: [part[name] for part in ordered] for name in ordered[0]}


def _parameter(index: int, name: str, parts: Sequence[Tensor], config: ModelConfig, specs: Specs) -> dict[str, Tensor]:
    """What one NeoX parameter is among ours, joined over its ranks."""
    name = name.removesuffix("scale") + "weight" if name.endswith(".scale") or name == "scale" else name
    module, _, leaf = name.rpartition(".")
    if not 2 <= index <= config.num_layers + 1:
        return _outer(index, name, parts)
    block = f"model.layers.{index - 2}"
    if module == "attention.query_key_value":
        return {f"{block}.token_mixer.{n}.{leaf}": t for n, t in _qkv(parts, config, specs, index - 2).items()}
    if module in _FIRST_MLP:
        if config.mlp != "gated":
            return {f"{block}.channel_mixer.l1.{leaf}": torch.cat(list(parts))}
        up, gate = (torch.cat([part.chunk(2)[i] for part in parts]) for i in (0, 1))
        return {f"{block}.channel_mixer.l1.{leaf}": gate, f"{block}.channel_mixer.l2.{leaf}": up}
    for theirs in sorted(_MODULES, key=len, reverse=True):
        if name.startswith(theirs + "."):
            ours = f"{block}.{_MODULES[theirs]}{name[len(theirs) :]}"
            return {ours: _joined(ours, parts, config, specs)}
    return {f"layer {index}: {name}": parts[0]}


def _outer(index: int, name: str, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    if name.endswith("word_embeddings.weight"):
        return {"model.embed_tokens.weight" if index == 0 else "lm_head.weight": torch.cat(list(parts))}
    if name == "position_embeddings.weight" and index == 0:
        return {"model.embed_tokens.positions": parts[0]}
    if name.startswith("norm."):
        return {f"model.final_norm.{name.removeprefix('norm.')}": _mean(parts)}
    if name == "final_linear.weight":
        return {"lm_head.weight": torch.cat(list(parts))}
    return {f"layer {index}: {name}": parts[0]}


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """Copies of one parameter, which NeoX's ranks may hold with rounding differences."""
    return torch.stack([part.double() for part in parts]).mean(0).to(parts[0].dtype)


def _joined(ours: str, parts: Sequence[Tensor], config: ModelConfig, specs: Specs) -> Tensor:
    spec = specs.get(ours)
    if spec is None or len(parts) == 1:
        return parts[0]
    if ours.endswith((".out_proj.bias", ".l3.bias")):
        return torch.stack(list(parts)).sum(0) if config.parallel_residual else _mean(parts)
    dim = cut_dim(spec.cut)
    return _mean(parts) if dim is None else torch.cat(list(parts), dim=dim)


def _qkv(parts: Sequence[Tensor], config: ModelConfig, specs: Specs, layer: int) -> dict[str, Tensor]:
    """q_proj, k_proj and v_proj out of the ranks' fused matrices."""
    width = config.hidden_size // config.num_heads
    groups = specs[f"model.layers.{layer}.token_mixer.k_proj.weight"].shape[0] // width
    if groups == config.num_heads:
        three = torch.cat(list(parts)).unflatten(0, (config.num_heads, 3, width)).unbind(1)
        return {f"{part}_proj": t.flatten(0, 1) for part, t in zip("qkv", three, strict=True)}
    sizes = [n * width // len(parts) for n in (config.num_heads, groups, groups)]
    pieces = [part.split(sizes) for part in parts]
    return {f"{part}_proj": torch.cat([piece[i] for piece in pieces]) for i, part in enumerate("qkv")}
