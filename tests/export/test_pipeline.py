"""The text-generation pipeline on folders of every family, with a tiny tokenizer beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

PROMPTS = ["a b c d e f g h i j", "k l m n o p q r s t u v w"]


@pytest.fixture
def tokenizer() -> Any:
    """Letters as tokens, `<pad>` and `<end>` before them, padding on the left."""
    letters = [chr(ord("a") + i) for i in range(26)] + [f"w{i}" for i in range(36)]
    words = {word: i for i, word in enumerate(["<pad>", "<end>", *letters])}
    made = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def test_pipeline(folder: Path, tokenizer: Any) -> None:
    """Texts of a batch are those of the prompts one by one, by folder and by model; scores can be asked for."""
    by_folder = pipeline("text-generation", model=str(folder), tokenizer=tokenizer, trust_remote_code=True, dtype=torch.float64)
    options = {"max_new_tokens": 6, "do_sample": False}
    together = by_folder(PROMPTS, batch_size=2, **options)
    by_model = pipeline("text-generation", model=by_folder.model, tokenizer=tokenizer)
    for prompt, said in zip(PROMPTS, together, strict=True):
        text = said[0]["generated_text"]
        assert text.startswith(prompt) and len(text) > len(prompt)
        assert by_model(prompt, **options)[0]["generated_text"] == text
    several = by_folder(PROMPTS[0], max_new_tokens=6, num_beams=3, num_return_sequences=2, return_full_text=False)
    assert len(several) == 2
