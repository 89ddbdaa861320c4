"""Weights of a GPT-NeoX checkpoint under our names: the stage and key of each parameter, and how tensor ranks are merged.

The tables cover blocks, embedding, norms and MLP, with old and new spellings. Note the gated MLP: NeoX's `w3` is our `l2`, its
`w2` is our `l3`, and its fused first matrix is (up, gate) on every rank. A mixer's parameters have the same names below
`attention.`, or those of NeoX's softmax attention.

Shards are merged by our own plan (`ParamSpec.cut`), with two exceptions: ranks of NeoX may hold copies of a norm with rounding
differences, which are averaged; and the bias of a row-parallel matrix is a partial sum in parallel blocks, a copy in sequential
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron.errors import CheckpointError
from megatron.interop.neox_files import ForeignFolder, layer_name, missing_files
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.parallel.shard_spec import ParamSpec, cut_dim

Pick = Callable[[Tensor], Tensor] | None
Candidates = Sequence[tuple[str, Pick]]
Specs = Mapping[str, ParamSpec]


def _half(number: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.chunk(2, dim=0)[number]


# Our name in the block -> keys in NeoX's stage; the first that exists is used.
_NORMS = {"token_norm": "input_layernorm", "channel_norm": "post_attention_layernorm"}
_SECOND: Candidates = (("mlp.w2", None), ("mlp.linear2", None), ("mlp.dense_4h_to_h", None))
_GATED: dict[str, Candidates] = {
    "l1": (("mlp.w1", None), ("mlp.linear1", _half(1)), ("mlp.dense_h_to_4h", _half(1))),
    "l2": (("mlp.w3", None), ("mlp.linear1", _half(0)), ("mlp.dense_h_to_4h", _half(0))),
    "l3": _SECOND,
}
_PLAIN: dict[str, Candidates] = {
    "l1": (("mlp.linear1", None), ("mlp.dense_h_to_4h", None)),
    "l3": _SECOND,
}
# Buffers of NeoX without learned values.
_BUFFERS = ("rotary_emb.inv_freq", "alibi_embed.slopes", "masked_bias", ".slopes", "attention.bias")


def _norm_keys(prefix: str, leaf: str) -> Candidates:
    """NeoX calls the weight of its RMSNorm `scale` and that of its LayerNorm `weight`."""
    return ((f"{prefix}.{leaf}", None), (f"{prefix}.scale", None)) if leaf == "weight" else ((f"{prefix}.{leaf}", None),)


def _third(number: int, heads: int, groups: int, width: int) -> Callable[[Tensor], Tensor]:
    """Selects queries (0), keys (1) or values (2) from a rank's fused matrix or bias.

    Without grouped-query attention the rows are q, k, v of one head after the other, else all q, all k, all v of the rank.
    """

    def select(tensor: Tensor) -> Tensor:
        if groups == heads:
            return tensor.unflatten(0, (-1, 3, width))[:, number].flatten(0, 1)
        ranks = (heads + 2 * groups) * width // tensor.shape[0]
        return tensor.split([n * width // ranks for n in (heads, groups, groups)])[number]

    return select


def _mixer_keys(config: ModelConfig, index: int, name: str, specs: Specs) -> Candidates:
    stem = f"model.layers.{index}.token_mixer"
    candidates: list[tuple[str, Pick]] = [(f"attention.{name}", None)]
    module, _, leaf = name.rpartition(".")
    if module == "out_proj":
        candidates.append((f"attention.dense.{leaf}", None))
    elif module in ("q_proj", "k_proj", "v_proj") and f"{stem}.k_proj.weight" in specs:
        width = config.hidden_size // config.num_heads
        groups = specs[f"{stem}.k_proj.weight"].shape[0] // width
        pick = _third("qkv".index(module[0]), config.num_heads, groups, width)
        candidates.append((f"attention.query_key_value.{leaf}", pick))
    return candidates


def keys_of(name: str, config: ModelConfig, specs: Specs) -> tuple[int, Candidates]:
    """(NeoX stage, candidate keys) of one of our parameters; no keys for a parameter that NeoX does not have."""
    last = config.num_layers + 4
    fixed: dict[str, tuple[int, Candidates]] = {
        "model.embed_tokens.weight": (0, (("word_embeddings.weight", None),)),
        "model.embed_tokens.positions": (0, (("position_embeddings.weight", None),)),
        "lm_head.weight": (last, (("final_linear.weight", None), ("word_embeddings.weight", None))),
    }
    if name in fixed:
        return fixed[name]
    parts = name.split(".")
    if parts[1] == "embed_tokens":
        return 0, ()
    if parts[1] == "final_norm":
        return last - 1, _norm_keys("norm", parts[-1])
    index, half, leaf = int(parts[2]), parts[3], parts[-1]
    if half in _NORMS:
        return index + 2, _norm_keys(_NORMS[half], leaf)
    if half == "channel_mixer":
        table = _GATED if config.mlp == "gated" else _PLAIN
        return index + 2, [(f"{key}.{leaf}", pick) for key, pick in table[parts[4]]]
    return index + 2, _mixer_keys(config, index, ".".join(parts[4:]), specs)


def _joined(name: str, spec: ParamSpec, shards: list[Tensor], path: Path, config: ModelConfig) -> Tensor:
    """Merge all ranks' tensors: they are copies of the full tensor, or shards of it."""
    dim, shapes = cut_dim(spec.cut), sorted({tuple(shard.shape) for shard in shards})
    if shapes == [tuple(spec.shape)]:
        if len(shards) > 1 and name.endswith((".out_proj.bias", ".l3.bias")) and config.parallel_residual:
            return torch.stack(shards).sum(0)
        if all(torch.equal(shards[0], shard) for shard in shards[1:]):
            return shards[0]
        if "norm." not in name and not name.endswith((".out_proj.bias", ".l3.bias")):
            reason = "each rank has the full size, but the values differ between the tensor ranks"
            hint = "take the YAML files that the checkpoint was trained with (in its folder configs/)"
            raise CheckpointError(f"'{name}' cannot be merged", where=str(path), why=reason, hint=hint)
        return torch.stack([shard.double() for shard in shards]).mean(0).to(shards[0].dtype)
    joined = torch.cat(shards, dim) if dim is not None and len(shapes) == 1 else shards[0]
    if tuple(joined.shape) != tuple(spec.shape):
        raise CheckpointError(
            f"'{name}' has another size than the config says",
            where=str(path),
            why=f"{len(shards)} shards of {shapes}, expected {list(spec.shape)}",
            hint="take the YAML files that the checkpoint was trained with (in its folder configs/)",
        )
    return joined


def vocabulary_rows(folder: ForeignFolder) -> int:
    """Padded vocabulary size: rows of the embedding."""
    shards = folder.stage(0) if 0 in folder.stages else []
    if not shards or any("word_embeddings.weight" not in shard for shard in shards):
        raise CheckpointError("the checkpoint has no word embedding", where=str(folder.path), why="stage 00 is missing")
    return sum(shard["word_embeddings.weight"].shape[0] for shard in shards)


def fitted(config: ModelConfig, folder: ForeignFolder) -> ModelConfig:
    """The config, without MLP biases if the checkpoint has none: NeoX's `llama` MLP never has them, whatever its
    `use_bias_in_mlp` (true by default) says.
    """
    keys = folder.stage(2)[0] if 2 in folder.stages else {}
    biased = any(key.startswith("mlp.") and key.endswith(".bias") for key in keys)
    return config if biased else replace(config, mlp_bias=False)


def read_neox(folder: ForeignFolder, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, full tensor) of every parameter of the model, stage by stage.

    Raises:
        CheckpointError: a parameter is missing or has another size, or a tensor in the folder is unknown.
    """
    specs = param_specs(config)
    keys_of_stage: dict[int, dict[str, Candidates]] = {}
    for name in specs:
        stage, keys = keys_of(name, config, specs)
        keys_of_stage.setdefault(stage, {})[name] = keys
    if config.tie_embeddings:
        keys_of_stage.setdefault(config.num_layers + 4, {})
    absent = [stage for stage, keys in sorted(keys_of_stage.items()) if stage not in folder.stages and any(keys.values())]
    if absent and folder.by_layer:
        error = missing_files(folder.path, [layer_name(stage, rank) for stage in absent for rank in range(folder.tp)])
        error.hint = f"{error.hint}; or num_layers of the config, {config.num_layers}, is not that of the checkpoint"
        raise error
    for stage in sorted({*keys_of_stage, *folder.stages}):
        ranks = folder.stage(stage) if stage in folder.stages else [{}]
        used: set[str] = {"word_embeddings.weight"} if config.tie_embeddings and stage else set()
        for name, keys in keys_of_stage.get(stage, {}).items():
            match = next(((key, pick) for key, pick in keys if all(key in rank for rank in ranks)), None)
            if match is None:
                raise _missing(name, stage, keys, ranks[0], folder.path)
            key, pick = match
            used.add(key)
            yield name, _joined(name, specs[name], _picked(name, key, pick, ranks, folder.path), folder.path, config)
        extra = [key for key in ranks[0] if key not in used and not key.endswith(_BUFFERS)]
        if extra:
            raise CheckpointError(
                f"stage {stage:02d} holds tensors that this model does not have",
                where=str(folder.path),
                why=", ".join(extra[:6]),
                hint="compare attention_config, norm and the bias keys of the config",
            )


def _picked(name: str, key: str, pick: Pick, ranks: Sequence[Mapping[str, Tensor]], path: Path) -> list[Tensor]:
    """Each rank's shard of a parameter."""
    try:
        return [rank[key] if pick is None else pick(rank[key]) for rank in ranks]
    except (RuntimeError, IndexError) as error:  # a fused matrix of other sizes
        shapes = sorted({tuple(rank[key].shape) for rank in ranks})
        raise CheckpointError(
            f"'{name}' cannot be selected from '{key}', shards of {shapes}",
            where=str(path),
            why=str(error).splitlines()[0],
            hint="take the YAML files that the checkpoint was trained with (in its folder configs/)",
        ) from None


def _missing(name: str, stage: int, keys: Candidates, rank: Mapping[str, Tensor], path: Path) -> CheckpointError:
    candidates = " or ".join(f"'{key}'" for key, _ in keys) or "a key, which GPT-NeoX has none for,"
    present = ", ".join(list(rank)[:8]) or "nothing"
    return CheckpointError(
        f"'{name}' is not in the checkpoint",
        where=str(path),
        why=f"looked for {candidates} in stage {stage:02d}, which holds {present}",
        hint="compare attention_config, norm and the bias keys of the config",
    )


def read_neox_weights(path: str | Path, config: ModelConfig) -> dict[str, Tensor]:
    """All weights of a GPT-NeoX `global_stepN` folder under our names; see `read_neox`."""
    return dict(read_neox(ForeignFolder(Path(path)), config))
