"""The `model` section: sizes, mixers, norms, MLP and initialization.

Keys are fields, and values derived from them (layer types, MLP width) are properties, so that each rule stands once.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

from pydantic import Field

from megatron.config import pattern
from megatron.config.frozen import Section, own

GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "bilinear": "identity", "glu": "sigmoid"}
_LLAMA_MULTIPLE = 256
# Far above every model, so that a typo is reported here and not as a lack of memory.
_LONGEST, _WIDEST = 1 << 24, 1 << 22

Norm = Literal["layernorm", "rmsnorm", "non_parametric_layernorm", "simplermsnorm", "scalenorm", "te_rmsnorm", "te_layernorm"]
Activation = Literal[
    "gelu", "geglu", "relu", "softsign", "swish", "mish", "silu", "reglu", "swiglu", "bilinear", "glu",
    "elu", "sigmoid", "leak", "1+elu", "2+elu", "sine", "identity",
]  # fmt: skip
Init = Literal[
    "normal", "scaled_normal", "orthogonal", "scaled_orthogonal", "xavier_uniform", "xavier_normal", "wang_init", "small_init",
    "single_residual_scaled_normal",
]  # fmt: skip
Positions = Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"]


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return multiple * math.ceil(value / multiple)


class ModelSection(Section):
    """Shape and mathematics of the model. A size of 0 means "not given", which no run may have."""

    num_layers: int = Field(default=0, ge=0, le=10_000)
    hidden_size: int = Field(default=0, ge=0, le=1 << 20)
    num_attention_heads: int = Field(default=0, ge=0, le=1 << 16)
    num_kv_heads: int | None = Field(default=None, gt=0, le=1 << 16)
    seq_length: int = Field(default=0, ge=0, le=_LONGEST)
    max_position_embeddings: int = Field(default=0, ge=0, le=_LONGEST)
    intermediate_size: int | None = Field(default=None, gt=0, le=_WIDEST)
    mlp_multiple_of: int = Field(default=1, gt=0, le=1 << 20)
    mlp_branch_size: int | None = own(None, "Width of one MLP branch; overrides every other width rule.", gt=0, le=_WIDEST)
    expansion_factor: float | None = Field(default=None, gt=0, le=1024)
    mlp_type: Literal["regular", "llama", "none"] = own(
        "regular",
        "`regular`: NeoX's MLP, gated if the activation is; `llama`: act(x W1) * (x W3) W2 whose width is intermediate_size,"
        " else 8/3 of hidden_size rounded up to 256; `none`: blocks are a mixer alone. Unset, metala layers with activation "
        "silu take llama, mamba layers none.",
    )
    activation: Activation = "gelu"
    norm: Norm = "layernorm"
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    rms_norm_epsilon: float = Field(default=1e-8, gt=0)
    simplermsnorm_epsilon: float = own(1e-6, "Epsilon of `norm: simplermsnorm`, MetaLA's RMSNorm without a gain.", gt=0)
    bias_gelu_fusion: bool = False
    use_bias_in_mlp: bool = True
    use_bias_in_attn_linear: bool = True
    use_bias_in_norms: bool = True
    use_qk_layernorm: bool = False
    pos_emb: Positions = "learned"
    rotary_pct: float = Field(default=1.0, ge=0, le=1)
    rotary_emb_base: int = Field(default=10000, gt=0)
    sliding_window_width: int | None = Field(default=None, gt=0)
    no_weight_tying: bool = False
    attention_config: tuple[Any, ...] | None = None
    init_method: Init = "normal"
    output_layer_init_method: Init = "scaled_normal"
    init_method_std: float = Field(default=0.02, ge=0)
    mixer_init: Literal["own", "methods"] = own(
        "own",
        "Initialization of mixers that have a rule of their own (mamba: PyTorch's uniform rule): `own`, by that rule; "
        "`methods`, by init_method and output_layer_init_method as in GPT-NeoX. Unset: methods if one of those two is given.",
    )
    embedding_scale: bool = own(False, "Multiply embeddings by the square root of hidden_size.")
    embedding_norm: bool = own(False, "A norm of the type `norm` after the embedding, as in Bloom.")
    residual_fp32: bool = own(False, "Keep the residual stream between blocks in fp32, whatever the dtype of the weights.")
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    make_vocab_size_divisible_by: int = Field(default=128, gt=0, le=1 << 20)
    gpt_j_residual: bool = False
    gpt_j_tied: bool = False
    use_cpu_initialization: bool = False

    @functools.cached_property
    def layer_types(self) -> tuple[str, ...]:
        """The token mixer of each of the `num_layers` layers."""
        return pattern.expand(self.attention_config, self.num_layers)

    @property
    def head_dim(self) -> int:
        """`hidden_size / num_attention_heads` (the value width of a head)."""
        return self.hidden_size // max(1, self.num_attention_heads)

    @property
    def norm_eps(self) -> float:
        """The epsilon of `norm`."""
        if self.norm == "simplermsnorm":
            return self.simplermsnorm_epsilon
        return self.rms_norm_epsilon if self.norm == "rmsnorm" else self.layernorm_epsilon

    @property
    def mlp_gated(self) -> bool:
        """Does the MLP multiply two branches (`act(x W1) * (x W3)`) instead of having one?"""
        return self.mlp_type == "llama" or (self.mlp_type != "none" and self.activation in GATED)

    @property
    def mlp_form(self) -> str:
        """gated, plain or none."""
        return "none" if self.mlp_type == "none" else "gated" if self.mlp_gated else "plain"

    @property
    def mlp_activation(self) -> str:
        """The pointwise function inside the MLP: `silu` for `swiglu`, `gelu` for `geglu`, ..."""
        if self.activation == "gelu" and self.bias_gelu_fusion:
            return "gelu_tanh"
        name = GATED.get(self.activation, self.activation)
        return "silu" if name == "swish" else name

    @property
    def mlp_width(self) -> int:
        """Width of one MLP branch.

        `mlp_branch_size` is the width itself. `mlp_type: llama` takes `intermediate_size` unchanged, else 8/3 of the hidden
        size rounded up to 256 (or `mlp_multiple_of`). NeoX's gated activations take a third of `intermediate_size` (so that 3 x
        the branch is the key), its plain ones all of it, default 4 x hidden.
        """
        if self.mlp_type == "none":
            return 0
        if self.mlp_branch_size:
            return self.mlp_branch_size
        multiple = self.mlp_multiple_of
        if self.mlp_type == "llama":
            rounding = multiple if multiple > 1 else _LLAMA_MULTIPLE
            return self.intermediate_size or round_up(8 * self.hidden_size // 3, rounding)
        full = self.intermediate_size or int((self.expansion_factor or 4) * self.hidden_size)
        if self.mlp_gated:
            return round_up(int(2 * full / 3), 2 * multiple) // 2
        return round_up(full, multiple)
