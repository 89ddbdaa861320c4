"""The architecture of a language model, independent of how it is trained or sharded.

The same fields are in a checkpoint's manifest and, under other names, in an exported folder's config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# Upper limits: far above every existing model, and small enough that a list or table of this size can be allocated.
_LARGEST = {
    "num_layers": 10_000,
    "hidden_size": 1 << 20,
    "vocab_size": 1 << 26,
    "num_heads": 1 << 20,
    "mlp_width": 1 << 22,
    "learned_positions": 1 << 24,
}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only language model.

    Attributes:
        vocab_size: rows of the embedding, padding included.
        layer_types: the mixer of each block.
        layer_options: mixer name -> options that differ from that mixer's defaults.
        norm: layernorm, layernorm_no_bias, rmsnorm, simplermsnorm (no gain) or non_parametric_layernorm.
        mlp: gated (l3(act(l1 x) * l2 x)), plain (l3 act(l1 x)) or none (a block has only a mixer, as in Mamba).
        tie_embeddings: the LM head is the embedding.
        embedding_scale: multiply embeddings by sqrt(hidden_size).
        residual_fp32: keep the residual stream in fp32, independent of the dtype of the weights.
        learned_positions: rows of the position table, 0 for none.
        embedding_norm: a norm after the embedding.
        parallel_residual: mixer and MLP read the same input, as in GPT-J.
        shared_norm: one norm feeds both.
        mixer_init: `own` (mixers with an initialisation rule, such as Mamba, use it) or `methods` (the init methods apply).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_width: int
    layer_types: tuple[str, ...]
    layer_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    norm: str = "simplermsnorm"
    norm_eps: float = 1e-6
    mlp: str = "gated"
    activation: str = "silu"
    mlp_bias: bool = False
    tie_embeddings: bool = True
    embedding_scale: bool = False
    hidden_dropout: float = 0.0
    init_method: str = "normal"
    output_init_method: str = "scaled_normal"
    init_std: float = 0.02
    residual_fp32: bool = False
    learned_positions: int = 0
    embedding_norm: bool = False
    parallel_residual: bool = False
    shared_norm: bool = False
    mixer_init: str = "own"

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "vocab_size", "num_heads", "mlp_width", "learned_positions"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= _LARGEST[name]:
                raise ValueError(f"{name} is {value!r:.60}: a whole number up to {_LARGEST[name]:,} is expected")
        if self.shared_norm and not self.parallel_residual:
            raise ValueError("shared_norm needs parallel_residual: in a sequential block the MLP reads what the mixer wrote")

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "layer_types": list(self.layer_types)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; an unknown field raises ValueError, since ignoring it would change the model."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown fields of a model: {', '.join(unknown)}")
        return cls(**{**values, "layer_types": tuple(values["layer_types"])})
