"""Enters a model of an exported folder where transformers and PEFT look a causal language model up by name.

Both ask tables that list their own models only. Without an entry, Trainer does not shift labels under label smoothing and
trains every token to predict itself, and PEFT knows no default target of LoRA.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def register_causal_lm(model_type: str, class_name: str, linears: Iterable[str]) -> None:
    """Add a class to transformers' table of causal language models and, where PEFT is imported, its default LoRA targets.

    Args:
        model_type: of the configuration.
        class_name: of the language model; the class itself goes on being found through `auto_map`.
        linears: names of the mixers' projections; models of one type that are loaded together share their union.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(model_type, class_name)
    if "peft" in sys.modules:
        table = sys.modules["peft"].utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        table[model_type] = sorted({*table.get(model_type, ()), *linears})
