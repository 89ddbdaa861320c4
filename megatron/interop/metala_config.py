"""Configuration class of exported MetaLA folders: the official fields, so that folders work both ways.

Packed as `configuration_metala.py`; imports transformers only. Two fields are ours; the official class keeps unknown fields
as plain attributes and ignores them.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PretrainedConfig

from megatron.interop.tested_versions import warn_if_unproved


class MetaLAConfig(PretrainedConfig):
    """Sizes and options of a MetaLA model, with the names of the released `config.json`.

    Args:
        decoder_embed_dim: hidden size d.
        decoder_layers: number of layers.
        decoder_attention_heads: number of heads.
        glu_dim: MLP width; -1 is d.
        glu_act: activation of the MLP.
        bias: the MLP has biases.
        norm_type: simplermsnorm or layernorm.
        no_scale_embedding: do not multiply the embedding by sqrt(d).
        causal: no effect, as in the released code.
        add_bos_token: no effect, as in the released code.
        norm_eps: ours; None is 1e-6 for simplermsnorm, 1e-5 for layernorm.
        gate_round: ours; none, bf16 or fp16: round gate and key as the released code does in half precision.
    """

    model_type = "metala"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - transformers adds to the list
    attribute_map = {  # noqa: RUF012 - transformers reads it as a plain dict
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        pad_token_id: int | None = 2,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        decoder_embed_dim: int = 1024,
        decoder_layers: int = 24,
        decoder_attention_heads: int = 8,
        glu_dim: int = 5632,
        glu_act: str = "silu",
        bias: bool = False,
        norm_type: str = "simplermsnorm",
        no_scale_embedding: bool = True,
        init_std: float = 0.02,
        use_cache: bool = True,
        causal: bool = True,
        add_bos_token: bool = False,
        tie_word_embeddings: bool = True,
        norm_eps: float | None = None,
        gate_round: str = "none",
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.decoder_embed_dim = decoder_embed_dim
        self.decoder_layers = decoder_layers
        self.decoder_attention_heads = decoder_attention_heads
        self.glu_dim = glu_dim
        self.glu_act = glu_act
        self.bias = bias
        self.norm_type = norm_type
        self.no_scale_embedding = no_scale_embedding
        self.init_std = init_std
        self.use_cache = use_cache
        self.causal = causal
        self.add_bos_token = add_bos_token
        self.norm_eps = norm_eps
        self.gate_round = gate_round
        kwargs |= {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        for usual, official in self.attribute_map.items():
            self._take(usual, official, kwargs.pop(usual, None))
        warn_if_unproved(kwargs.get("proved_transformers"))
        super().__init__(**kwargs)

    def _take(self, usual: str, official: str, value: Any) -> None:
        """Set a size that is given under its usual name; a value that contradicts the official name raises ValueError."""
        default = inspect.signature(MetaLAConfig.__init__).parameters[official].default
        if value is None or value == getattr(self, official):
            return
        if getattr(self, official) != default:
            raise ValueError(f"{official} is {getattr(self, official)} and {usual}, another name of it, is {value}")
        setattr(self, official, value)

    def to_dict(self) -> dict[str, Any]:
        """All fields; sizes also under their usual names, where tools such as PEFT look for them."""
        return {**super().to_dict(), **{usual: getattr(self, official) for usual, official in self.attribute_map.items()}}

    def model_fields(self) -> dict[str, Any]:
        """The equivalent fields of our `ModelConfig`."""
        simple = self.norm_type == "simplermsnorm"  # any other value is LayerNorm in the released code
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.decoder_embed_dim,
            "num_layers": self.decoder_layers,
            "num_heads": self.decoder_attention_heads,
            "mlp_width": self.decoder_embed_dim if self.glu_dim == -1 else self.glu_dim,
            "layer_types": ["metala"] * self.decoder_layers,
            "layer_options": {} if self.gate_round == "none" else {"metala": {"gate_round": self.gate_round}},
            "norm": "simplermsnorm" if simple else "layernorm",
            "norm_eps": self.norm_eps or (1e-6 if simple else 1e-5),
            "mlp": "gated",
            "activation": self.glu_act,
            "mlp_bias": self.bias,
            "tie_embeddings": self.tie_word_embeddings,
            "embedding_scale": not self.no_scale_embedding,
            "init_std": self.init_std,
        }
