"""The model card of an exported folder (README.md), made of facts that stand in the checkpoint, not of claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.manifest import Manifest
from megatron.model.config import ModelConfig


def _rows(values: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in values.items() if value not in (None, "", {}))


def _number(value: Any) -> Any:
    return f"{value:,}" if isinstance(value, int) else value


def _listed(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _shape(config: ModelConfig, parameters: int, dtype: str) -> dict[str, Any]:
    kinds = {kind: config.layer_types.count(kind) for kind in dict.fromkeys(config.layer_types)}
    return {
        "parameters": f"{parameters:,}",
        "layers": ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        "hidden size": config.hidden_size,
        "heads": config.num_heads,
        "MLP": f"{config.mlp}, width {config.mlp_width}, {config.activation}",
        "norm": config.norm,
        "vocabulary": f"{config.vocab_size:,}",
        "output matrix": "tied to the embedding" if config.tie_embeddings else "its own",
        "dtype of the weights": dtype,
    }


def _training(manifest: Manifest) -> dict[str, Any]:
    state, facts = manifest.state, manifest.facts
    rows: dict[str, Any] = {
        "optimizer steps": _number(manifest.iteration),
        "tokens": _number(state.get("consumed_tokens")),
        "samples": _number(state.get("consumed_samples")),
        "sequence length": _number(facts.get("seq_length")),
        "data": _listed(facts.get("data")),
        "imported from": facts.get("imported_from"),
    }
    return rows | dict(facts.get("run") or {})


def model_card(
    title: str, config: ModelConfig, parameters: int, manifest: Manifest, dtype: str, notes: list[str], tokenizer: bool
) -> str:
    """The text of README.md."""
    read = "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n" if tokenizer else ""
    inputs = 'tokenizer("Once upon a time", return_tensors="pt")' if tokenizer else '{"input_ids": torch.tensor([[1, 2, 3]])}'
    show = "print(tokenizer.decode(output[0]))" if tokenizer else "print(output)"
    auto = "AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM"
    head = "" if tokenizer else "import torch\n"
    listed = "\n".join(f"* {note}" for note in notes)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {title}

A language model with a recurrent state of fixed size, exported from the checkpoint of step {manifest.iteration:,}.

## Use

Needs `torch`, `transformers` (5.x) and `safetensors`, nothing else.

```python
{head}from transformers import {auto}

folder = "."
{read}model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
output = model.generate(**{inputs}, max_new_tokens=64)
{show}
```

Prompts of different lengths go into one batch by padding on the left with an `attention_mask`; each row then says what it
says alone.

## Model

| | |
|---|---|
{_rows(_shape(config, parameters, dtype))}

## Training

| | |
|---|---|
{_rows(_training(manifest))}

## Export

{listed}
"""
