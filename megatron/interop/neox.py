"""Weights of a GPT-NeoX checkpoint under our names: which key of which stage each parameter comes from, and how ranks join.

Blocks, embedding, norms and MLP are named here, old and new spellings. Mind the gated MLP: NeoX's `w3` is our `l2` and its `w2`
our `l3`, and its fused first matrix is (up, gate) on every rank. A mixer's parameters have the same names below `attention.`,
or those of NeoX's softmax attention.

How a parameter is joined follows from our own plan (`ParamSpec.cut`). Two kinds differ: ranks of NeoX may hold copies of a norm
with rounding differences, whose mean is taken; and a bias behind a row-parallel matrix is a part of a sum in parallel blocks, a
copy in sequential ones.
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


# Our name in the block -> keys below NeoX's stage, the first that is there.
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
# Buffers of NeoX that hold nothing learned.
_BUFFERS = ("rotary_emb.inv_freq", "alibi_embed.slopes", "masked_bias", ".slopes", "attention.bias")


def _norm_keys(prefix: str, leaf: str) -> Candidates:
    """NeoX calls the gain of its RMSNorm `scale` and that of its LayerNorm `weight`."""
    return ((f"{prefix}.{leaf}", None), (f"{prefix}.scale", None)) if leaf == "weight" else ((f"{prefix}.{leaf}", None),)


def _third(number: int, heads: int, groups: int, width: int) -> Callable[[Tensor], Tensor]:
    """Queries (0), keys (1) or values (2) out of a rank's fused matrix or bias.

    With as many key heads as heads its rows are q, k, v of one head after the other, else all q, all k, all v of the rank.
    """

    def part(tensor: Tensor) -> Tensor:
        if groups == heads:
            return tensor.unflatten(0, (-1, 3, width))[:, number].flatten(0, 1)
        ranks = (heads + 2 * groups) * width // tensor.shape[0]
        return tensor.split([n * width // ranks for n in (heads, groups, groups)])[number]

    return part


def _mixer_keys(config: ModelConfig, index: int, name: str, specs: Specs) -> Candidates:
    stem = f"model.layers.{index}.token_mixer"
    found: list[tuple[str, Pick]] = [(f"attention.{name}", None)]
    module, _, leaf = name.rpartition(".")
    if module == "out_proj":
        found.append((f"attention.dense.{leaf}", None))
    elif module in ("q_proj", "k_proj", "v_proj") and f"{stem}.k_proj.weight" in specs:
        width = config.hidden_size // config.num_heads
        groups = specs[f"{stem}.k_proj.weight"].shape[0] // width
        pick = _third("qkv".index(module[0]), config.num_heads, groups, width)
        found.append((f"attention.query_key_value.{leaf}", pick))
    return found


def keys_of(name: str, config: ModelConfig, specs: Specs) -> tuple[int, Candidates]:
    """(NeoX stage, keys to look for) of one of our parameters; no keys for one that NeoX does not have."""
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


def _joined(name: str, spec: ParamSpec, parts: list[Tensor], path: Path, config: ModelConfig) -> Tensor:
    """All ranks' parts as one tensor: equal copies of the whole, or pieces along the cut."""
    dim, shapes = cut_dim(spec.cut), sorted({tuple(part.shape) for part in parts})
    if shapes == [tuple(spec.shape)]:
        if len(parts) > 1 and name.endswith((".out_proj.bias", ".l3.bias")) and config.parallel_residual:
            return torch.stack(parts).sum(0)
        if all(torch.equal(parts[0], part) for part in parts[1:]):
            return parts[0]
        if "norm." not in name and not name.endswith((".out_proj.bias", ".l3.bias")):
            why = "each has the size of the whole, but the values differ between the tensor ranks"
            hint = "take the YAML files that the checkpoint was trained with (they lie in its configs/)"
            raise CheckpointError(f"'{name}' cannot be joined", where=str(path), why=why, hint=hint)
        return torch.stack([part.double() for part in parts]).mean(0).to(parts[0].dtype)
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
        stage, keys = keys_of(name, config, specs)
        wanted.setdefault(stage, {})[name] = keys
    if config.tie_embeddings:
        wanted.setdefault(config.num_layers + 4, {})
    absent = [stage for stage in sorted(wanted) if stage not in folder.stages and any(wanted[stage].values())]
    if absent and folder.by_layer:
        error = missing_files(folder.path, [layer_name(stage, rank) for stage in absent for rank in range(folder.tp)])
        error.hint = f"{error.hint}; or num_layers of the config, {config.num_layers}, is not that of the checkpoint"
        raise error
    for stage in sorted({*wanted, *folder.stages}):
        parts = folder.stage(stage) if stage in folder.stages else [{}]
        used: set[str] = {"word_embeddings.weight"} if config.tie_embeddings and stage else set()
        for name, keys in wanted.get(stage, {}).items():
            found = next(((key, pick) for key, pick in keys if all(key in part for part in parts)), None)
            if found is None:
                raise _missing(name, stage, keys, parts[0], folder.path)
            key, pick = found
            used.add(key)
            yield name, _joined(name, specs[name], _picked(name, key, pick, parts, folder.path), folder.path, config)
        extra = [key for key in parts[0] if key not in used and not key.endswith(_BUFFERS)]
        if extra:
            raise CheckpointError(
                f"stage {stage:02d} holds tensors that this model has no place for",
                where=str(folder.path),
                why=", ".join(extra[:6]),
                hint="compare attention_config, norm and the bias keys of the config",
            )


def _picked(name: str, key: str, pick: Pick, parts: Sequence[Mapping[str, Tensor]], path: Path) -> list[Tensor]:
    """What each rank holds of a parameter."""
    try:
        return [part[key] if pick is None else pick(part[key]) for part in parts]
    except (RuntimeError, IndexError) as error:  # a fused matrix of other sizes
        shapes = sorted({tuple(part[key].shape) for part in parts})
        raise CheckpointError(
            f"'{name}' cannot be taken out of '{key}', parts of {shapes}",
            where=str(path),
            why=str(error).splitlines()[0],
            hint="take the YAML files that the checkpoint was trained with (they lie in its configs/)",
        ) from None


def _missing(name: str, stage: int, keys: Candidates, part: Mapping[str, Tensor], path: Path) -> CheckpointError:
    looked = " or ".join(f"'{key}'" for key, _ in keys) or "a key, which GPT-NeoX has none for,"
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
