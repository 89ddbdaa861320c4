"""The configuration class of exported MetaLA folders: the official fields, so that folders are exchangeable both ways.

Packed as `configuration_metala.py`; imports transformers only. Two fields are ours; the official class keeps unknown fields
as plain attributes and is not disturbed by them.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PretrainedConfig

from megatron.interop.tested_versions import warn_if_unproved


class MetaLAConfig(PretrainedConfig):
    """Sizes and choices of a MetaLA model, by the names of the released `config.json`.

    decoder_embed_dim d, decoder_layers L, decoder_attention_heads H, glu_dim the MLP width (-1 = d), glu_act its activation,
    bias its biases, norm_type simplermsnorm | layernorm, no_scale_embedding turns off the factor sqrt(d). causal and
    add_bos_token have no effect, as in the released code. Ours: norm_eps (None = 1e-6 for simplermsnorm, 1e-5 for layernorm)
    and gate_round (none | bf16 | fp16, rounds gate and key as the released code does in half precision).
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
        for usual, own in self.attribute_map.items():
            self._take(usual, own, kwargs.pop(usual, None))
        warn_if_unproved(kwargs.get("proved_transformers"))
        super().__init__(**kwargs)

    def _take(self, usual: str, own: str, value: Any) -> None:
        """A size under its usual name; one that contradicts the official name is refused."""
        default = inspect.signature(type(self).__init__).parameters[own].default
        if value is None or value == getattr(self, own):
            return
        if getattr(self, own) != default:
            raise ValueError(f"{own} is {getattr(self, own)} and {usual}, another name of it, is {value}")
        setattr(self, own, value)

    def to_dict(self) -> dict[str, Any]:
        """All fields; sizes also under their usual names, where tools such as PEFT look for them."""
        return {**super().to_dict(), **{usual: getattr(self, own) for usual, own in self.attribute_map.items()}}

    def model_fields(self) -> dict[str, Any]:
        """The fields of our `ModelConfig` that say the same."""
        simple = self.norm_type == "simplermsnorm"  # any other word is LayerNorm in the released code
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
