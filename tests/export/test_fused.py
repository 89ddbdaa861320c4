"""A folder says what the trainer says with its fused kernels: prompts, token steps, padded batches.

Kernels run in Triton's interpreter, fp32. ALiBi has no kernel of this project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")

from megatron.generation.sample import Sampling, generate
from megatron.model.build import build_model
from tests.export.families import BATCH, FAMILIES, MASK, family_weights

STEPS = 6
TRIED = [pytest.param(name, marks=() if name == "metala" else pytest.mark.slow) for name in ("metala", "based", "jrt", "mamba")]


@pytest.mark.parametrize("family", TRIED)
def test_greedy_tokens_are_those_of_the_fused_kernels(family: str, load_family: Callable[..., Any]) -> None:
    exported = load_family(family).generate(
        BATCH, attention_mask=MASK, max_new_tokens=STEPS, do_sample=False, eos_token_id=None
    )
    model = build_model(FAMILIES[family]).eval()
    model.load_state_dict(family_weights(FAMILIES[family]), strict=False)  # a tied head has no weights of its own
    prompts = [row[mask.bool()].tolist() for row, mask in zip(BATCH, MASK, strict=True)]
    unused = next(token for token in range(64) if token not in exported)
    fused = generate(model, prompts, Sampling(maximum_tokens=STEPS, backend="triton"), eod=unused)
    assert [result.tokens for result in fused] == exported[:, BATCH.shape[1] :].tolist()
