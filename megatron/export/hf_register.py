"""Registers an exported model in the tables in which transformers and PEFT look up causal language models.

The tables list built-in models only. Without an entry, Trainer does not shift labels under label smoothing and
trains every token to predict itself, and PEFT has no default LoRA targets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def register_causal_lm(model_type: str, class_name: str, linears: Iterable[str]) -> None:
    """Add a class to transformers' table of causal language models and, where PEFT is imported, its default LoRA targets.

    Args:
        model_type: model type of the configuration.
        class_name: name of the language model's class; transformers still loads the class through `auto_map`.
        linears: names of the mixers' projections; loaded models of one type share their union.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(model_type, class_name)
    if "peft" in sys.modules:
        table = sys.modules["peft"].utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        table[model_type] = sorted({*table.get(model_type, ()), *linears})
