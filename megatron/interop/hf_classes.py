"""Which Hugging Face classes a model is exported with: an official family where its config can say everything, else our own.

A family is data: module names of its classes, and one function each way between our `ModelConfig` and its config fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.interop.hf_families import native_for
from megatron.interop.hf_models import Native
from megatron.interop.linear_config import LinearLMConfig
from megatron.interop.metala_config import MetaLAConfig
from megatron.model.config import ModelConfig

# activations that the released MetaLA code knows; its "exp" is left out, whose normalisation is not documented
METALA_ACTIVATIONS = ("silu", "swish", "gelu", "relu", "elu", "sigmoid", "leak", "1+elu", "2+elu", "sine", "identity")
_METALA_EPS = {"simplermsnorm": 1e-6, "layernorm": 1e-5}


@dataclass(frozen=True)
class Family:
    """Names of one family's classes and files.

    name: ending of the packed files (`modeling_<name>.py`). prefix: of the class names. shell, config: modules that hold them.
    fields: ModelConfig -> keyword arguments of the config class. config_class: that class.
    native: set when the classes are transformers' own; then nothing is packed and `shell` and `config` are empty.
    """

    name: str
    prefix: str
    shell: str
    config: str
    config_class: type[Any]
    fields: Callable[[ModelConfig], dict[str, Any]]
    native: Native | None = None

    @property
    def auto_map(self) -> dict[str, str]:
        """What config.json tells the Auto classes; nothing where they know the family already."""
        if self.native is not None:
            return {}
        return {
            "AutoConfig": f"configuration_{self.name}.{self.prefix}Config",
            "AutoModel": f"modeling_{self.name}.{self.prefix}Model",
            "AutoModelForCausalLM": f"modeling_{self.name}.{self.prefix}ForCausalLM",
        }


def metala_obstacle(config: ModelConfig) -> str | None:
    """Why the official MetaLA classes would compute something else, None when they compute the same."""
    options: Mapping[str, Any] = config.layer_options.get("metala", {})
    others = sorted(set(config.layer_types) - {"metala"})
    if others:
        return f"it has {', '.join(others)} layers"
    if config.parallel_residual or config.embedding_norm or config.learned_positions or config.residual_fp32:
        return "its blocks or its embedding have another form"
    if config.norm not in _METALA_EPS:
        return f"its norm is {config.norm}"
    if config.mlp != "gated":
        return f"its MLP is {config.mlp}"
    if config.activation not in METALA_ACTIVATIONS:
        return f"its activation is {config.activation}"
    changed = sorted(k for k, v in options.items() if k != "gate_round" and v != {"conv_width": 4}.get(k))
    return f"its mixer sets {', '.join(changed)}" if changed else None


def _metala_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "decoder_embed_dim": config.hidden_size,
        "decoder_layers": config.num_layers,
        "decoder_attention_heads": config.num_heads,
        "glu_dim": config.mlp_width,
        "glu_act": config.activation,
        "bias": config.mlp_bias,
        "norm_type": config.norm,
        "no_scale_embedding": not config.embedding_scale,
        "init_std": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "norm_eps": None if config.norm_eps == _METALA_EPS[config.norm] else config.norm_eps,
        "gate_round": config.layer_options.get("metala", {}).get("gate_round", "none"),
    }


def _linear_fields(config: ModelConfig) -> dict[str, Any]:
    return {"architecture": {**config.to_dict(), "hidden_dropout": 0.0}}


METALA = Family("metala", "MetaLA", "megatron.export.hf_metala", "megatron.interop.metala_config", MetaLAConfig, _metala_fields)
LINEAR = Family(
    "linear_lm", "LinearLM", "megatron.export.hf_linear", "megatron.interop.linear_config", LinearLMConfig, _linear_fields
)


def family_of(config: ModelConfig) -> tuple[Family, str]:
    """The family a model is exported as, and a sentence that says why."""
    native = native_for(config)
    if native is not None:
        prefix = native.architecture.removesuffix("ForCausalLM")
        family = Family(native.model_type, prefix, "", "", native.config_class, native.fields, native)
        return family, f"{native.architecture} of transformers itself: no remote code is needed"
    obstacle = metala_obstacle(config)
    if obstacle is None:
        return METALA, "official MetaLA layout"
    return LINEAR, f"our own classes, because MetaLA's cannot express this model: {obstacle}"
