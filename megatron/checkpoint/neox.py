"""Weights of a GPT-NeoX checkpoint under our names: which key of which stage each parameter comes from, and how ranks join.

Blocks, embedding, norms and MLP are named here, old and new spellings. Mind the gated MLP: NeoX's `w3` is our `l2` and its `w2`
our `l3`. A mixer's parameters have the same names below `attention.` unless its class says otherwise, with a static
method `neox_names(config) -> {our name: (key below the block, function of one rank's tensor)}`; the function gives the
part of our parameter that the rank held (a third of a fused projection), None takes it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.foreign import ForeignFolder
from megatron.errors import CheckpointError
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.parallel.plan import ParamSpec, cut_dim
from megatron.registry import layer_class

Pick = Callable[[Tensor], Tensor] | None
Candidates = Sequence[tuple[str, Pick]]


def _half(number: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.chunk(2, dim=0)[number]


# Our name in the block -> keys below NeoX's stage, the first that is there. A fused `linear1` of a gated MLP holds, on each
# rank, the linear branch in front of the activated one.
_NORMS = {"token_norm": "input_layernorm", "channel_norm": "post_attention_layernorm"}
_GATED: dict[str, Candidates] = {
    "l1": (("mlp.w1", None), ("mlp.linear1", _half(1))),
    "l2": (("mlp.w3", None), ("mlp.linear1", _half(0))),
    "l3": (("mlp.w2", None), ("mlp.linear2", None)),
}
_PLAIN: dict[str, Candidates] = {
    "l1": (("mlp.linear1", None), ("mlp.dense_h_to_4h", None)),
    "l3": (("mlp.linear2", None), ("mlp.dense_4h_to_h", None)),
}
# Buffers of NeoX that hold nothing learned.
_BUFFERS = ("rotary_emb.inv_freq", "alibi_embed.slopes", "masked_bias", ".slopes")


def _norm_keys(prefix: str, leaf: str) -> Candidates:
    """NeoX calls the gain of its RMSNorm `scale` and that of its LayerNorm `weight`."""
    return ((f"{prefix}.{leaf}", None), (f"{prefix}.scale", None)) if leaf == "weight" else ((f"{prefix}.{leaf}", None),)


def _mixer_key(config: ModelConfig, index: int, name: str) -> Candidates:
    layer = layer_class(config.layer_types[index])
    table = getattr(layer, "neox_names", None)
    own: Mapping[str, tuple[str, Pick]] = {} if table is None else table(config)
    return (own.get(name, (f"attention.{name}", None)),)


def keys_of(name: str, config: ModelConfig) -> tuple[int, Candidates]:
    """(NeoX stage, keys to look for) of one of our parameters."""
    last = config.num_layers + 4
    fixed: dict[str, tuple[int, Candidates]] = {
        "model.embed_tokens.weight": (0, (("word_embeddings.weight", None),)),
        "model.embed_positions.weight": (0, (("position_embeddings.weight", None),)),
        "lm_head.weight": (last, (("final_linear.weight", None), ("word_embeddings.weight", None))),
    }
    if name in fixed:
        return fixed[name]
    parts = name.split(".")
    if parts[1] == "final_norm":
        return last - 1, _norm_keys("norm", parts[-1])
    index, half, leaf = int(parts[2]), parts[3], parts[-1]
    if half in _NORMS:
        return index + 2, _norm_keys(_NORMS[half], leaf)
    if half == "channel_mixer":
        table = _GATED if config.mlp == "gated" else _PLAIN
        return index + 2, [(f"{key}.{leaf}", pick) for key, pick in table[parts[4]]]
    return index + 2, _mixer_key(config, index, ".".join(parts[4:]))


def _joined(name: str, spec: ParamSpec, parts: list[Tensor], path: Path) -> Tensor:
    """All ranks' parts as one tensor: equal copies of the whole, or pieces along the cut."""
    dim, shapes = cut_dim(spec.cut), sorted({tuple(part.shape) for part in parts})
    if shapes == [tuple(spec.shape)]:
        if any(not torch.equal(parts[0], part) for part in parts[1:]):
            why = "it is replicated, but its values differ between the tensor ranks"
            raise CheckpointError(f"'{name}' cannot be joined", where=str(path), why=why)
        return parts[0]
    joined = torch.cat(parts, dim) if dim is not None and len(shapes) == 1 else parts[0]
    if tuple(joined.shape) != tuple(spec.shape):
        raise CheckpointError(
            f"'{name}' has another size than the config says",
            where=str(path),
            why=f"{len(parts)} parts of {shapes}, wanted {list(spec.shape)}",
            hint="take the YAML files that the checkpoint was trained with (they lie in its configs/)",
        )
    return joined


def vocabulary_rows(folder: ForeignFolder) -> int:
    """Rows of the embedding, padding included."""
    parts = folder.stage(0) if 0 in folder.stages else []
    if not parts or any("word_embeddings.weight" not in part for part in parts):
        raise CheckpointError("the checkpoint has no word embedding", where=str(folder.path), why="stage 00 is missing")
    return sum(part["word_embeddings.weight"].shape[0] for part in parts)


def fitted(config: ModelConfig, folder: ForeignFolder) -> ModelConfig:
    """The model without MLP biases where the checkpoint has none: NeoX's `llama` MLP never had any, whatever its
    `use_bias_in_mlp` (true by default) says.
    """
    keys = folder.stage(2)[0] if 2 in folder.stages else {}
    biased = any(key.startswith("mlp.") and key.endswith(".bias") for key in keys)
    return config if biased else replace(config, mlp_bias=False)


def read_neox(folder: ForeignFolder, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, full tensor) of every parameter of the model, stage by stage.

    Raises:
        CheckpointError: a parameter is missing, has another size, or something in the folder was not used.
    """
    specs = param_specs(config)
    wanted: dict[int, dict[str, Candidates]] = {}
    for name in specs:
        stage, keys = keys_of(name, config)
        wanted.setdefault(stage, {})[name] = keys
    if config.tie_embeddings:
        wanted.setdefault(config.num_layers + 4, {})
    for stage in sorted({*wanted, *folder.stages}):
        parts = folder.stage(stage) if stage in folder.stages else [{}]
        used: set[str] = {"word_embeddings.weight"} if config.tie_embeddings and stage else set()
        for name, keys in wanted.get(stage, {}).items():
            found = next(((key, pick) for key, pick in keys if all(key in part for part in parts)), None)
            if found is None:
                raise _missing(name, stage, keys, parts[0], folder.path)
            key, pick = found
            used.add(key)
            yield (
                name,
                _joined(name, specs[name], [part[key] if pick is None else pick(part[key]) for part in parts], folder.path),
            )
        extra = [key for key in parts[0] if key not in used and not key.endswith(_BUFFERS)]
        if extra:
            raise CheckpointError(
                f"stage {stage:02d} holds tensors that this model has no place for",
                where=str(folder.path),
                why=", ".join(extra[:6]),
                hint="compare attention_config, norm and the bias keys of the config",
            )


def _missing(name: str, stage: int, keys: Candidates, part: Mapping[str, Tensor], path: Path) -> CheckpointError:
    looked = " or ".join(f"'{key}'" for key, _ in keys)
    there = ", ".join(list(part)[:8]) or "nothing"
    return CheckpointError(
        f"'{name}' is not in the checkpoint",
        where=str(path),
        why=f"looked for {looked} in stage {stage:02d}, which holds {there}",
        hint="compare attention_config, norm and the bias keys of the config",
    )


def read_neox_weights(path: str | Path, config: ModelConfig) -> dict[str, Tensor]:
    """All weights of a GPT-NeoX `global_stepN` folder under our names; see `read_neox`."""
    return dict(read_neox(ForeignFolder(Path(path)), config))
