"""The classes of an exported MetaLA folder, under the official names; packed as `modeling_metala.py`."""

from __future__ import annotations

from megatron.export.hf_backbone import DecoderModel
from megatron.export.hf_model import DecoderForCausalLM
from megatron.interop.metala_config import MetaLAConfig


class MetaLAModel(DecoderModel):
    """MetaLA without its output projection."""

    config_class = MetaLAConfig


class MetaLAForCausalLM(DecoderForCausalLM):
    """MetaLA language model."""

    config_class = MetaLAConfig
    backbone_class = MetaLAModel
