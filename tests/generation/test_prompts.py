"""How prompts are filled up for a prefix model, and that rows of different lengths say what they say alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron.errors import ConfigError
from megatron.generation.prompts import fill_prompt, filler_mask, left_pad
from megatron.generation.sample import Sampling, generate
from megatron.model.build import build_model
from megatron.model.config import ModelConfig


def test_filling() -> None:
    assert fill_prompt([1, 2, 3], "plain", 8) == ([1, 2, 3], 0)
    assert fill_prompt([1, 2, 3], "left_pad", 8) == ([220] * 5 + [1, 2, 3], 5)
    assert fill_prompt([1, 2, 3], "read_twice", 8) == ([2, 3, 1, 2, 3, 1, 2, 3], 0)
    assert fill_prompt([1, 2, 3], "read_twice", 6) == ([1, 2, 3, 1, 2, 3], 0)
    for mode in ("left_pad", "read_twice"):
        assert fill_prompt(list(range(9)), mode, 8) == (list(range(9)), 0), "long enough already"


def test_masks_of_rows() -> None:
    tokens, mask = left_pad([[1, 2], [3, 4, 5, 6]], 0, "cpu")
    assert tokens.tolist() == [[0, 0, 1, 2], [3, 4, 5, 6]] and mask is not None and mask.tolist()[0] == [0, 0, 1, 1]
    hidden = filler_mask([0, 3], [2, 4], "cpu")
    assert hidden is not None and hidden.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    assert filler_mask([0, 0], [2, 4], "cpu") is None


@pytest.mark.parametrize("mode", ["plain", "left_pad", "read_twice"])
def test_rows_alone_together_and_recomputed(mode: str) -> None:
    """Prompts shorter and longer than the prefix in one batch; by the state, and by running the whole text again."""
    torch.manual_seed(0)
    kinds = ("base_conv", "jrt", "sliding", "jrt")
    model = build_model(ModelConfig(256, 32, 4, 2, 48, kinds, {"jrt": {"prefix_length": 12}}, norm="rmsnorm")).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.4)
    prompts = [[5, 6, 7], list(range(30, 48)), [9] * 11]
    sampling = Sampling(maximum_tokens=6, prompt_mode=mode, prefix_length=12)
    together = [r.tokens for r in generate(model, prompts, sampling, eod=255)]
    assert together == [generate(model, [p], sampling, eod=255)[0].tokens for p in prompts]
    if mode != "plain":  # a plain short prompt is all prefix, and what is written after it would join the prefix
        again = generate(model, prompts, replace(sampling, recompute=True), eod=255)
        assert together == [r.tokens for r in again]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="prompt_mode"):
        Sampling(prompt_mode="left_pad")
    with pytest.raises(ConfigError, match="prompt_mode"):
        Sampling(prompt_mode="twice", prefix_length=4)
