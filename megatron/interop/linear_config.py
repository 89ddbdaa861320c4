"""The configuration class of exported folders that no official class can express: hybrids, norms with a gain, plain MLPs.

Packed as `configuration_linear_lm.py`; imports transformers only. It carries our own `ModelConfig` as one dictionary.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron.interop.tested_versions import warn_if_unproved


class LinearLMConfig(PretrainedConfig):
    """Any model of ours: `architecture` holds the fields of its `ModelConfig`; sizes are also given under their usual names."""

    model_type = "linear_lm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - transformers adds to the list

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ) -> None:
        fields = dict(architecture or {"vocab_size": 256, "hidden_size": 64, "num_layers": 1, "num_heads": 1, "mlp_width": 64})
        fields.setdefault("layer_types", ["metala"] * fields["num_layers"])
        fields["vocab_size"] = vocab_size or fields["vocab_size"]
        if tie_word_embeddings is not None:
            fields["tie_embeddings"] = tie_word_embeddings
        self.architecture = fields
        self.vocab_size = fields["vocab_size"]
        self.hidden_size = fields["hidden_size"]
        self.num_hidden_layers = fields["num_layers"]
        self.num_attention_heads = fields["num_heads"]
        self.use_cache = use_cache
        for name in _SIZES:
            if (value := kwargs.pop(name, None)) is not None:
                _check_size(name, value, getattr(self, name))
        kwargs["tie_word_embeddings"] = fields.get("tie_embeddings", True)
        warn_if_unproved(kwargs.get("proved_transformers"))
        super().__init__(**kwargs)

    def model_fields(self) -> dict[str, Any]:
        """The fields of our `ModelConfig`.

        Raises:
            ValueError: a size was changed beside `architecture`.
        """
        for name, own in _SIZES.items():
            _check_size(name, getattr(self, name), self.architecture[own])
        return {**self.architecture, "vocab_size": self.vocab_size, "tie_embeddings": self.tie_word_embeddings}


_SIZES = {"hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
"""Usual name of a size -> its name in `architecture`, which decides."""


def _check_size(name: str, value: Any, own: Any) -> None:
    if value != own:
        raise ValueError(f"{name} {value} is not what `architecture` says, {own}: change the field there")
