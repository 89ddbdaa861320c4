"""The classes of an exported folder of any other model of ours; packed as `modeling_linear_lm.py`."""

from __future__ import annotations

from megatron.export.hf_backbone import DecoderModel
from megatron.export.hf_model import DecoderForCausalLM
from megatron.interop.linear_config import LinearLMConfig


class LinearLMModel(DecoderModel):
    """Any stack of token mixers, without its output projection."""

    config_class = LinearLMConfig


class LinearLMForCausalLM(DecoderForCausalLM):
    """Language model over any stack of token mixers."""

    config_class = LinearLMConfig
    backbone_class = LinearLMModel
