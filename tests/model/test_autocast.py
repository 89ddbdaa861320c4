"""A training step of every kind of model in fp32 under bf16 and fp16 autocast, as a Hugging Face Trainer takes it.

The loss keeps two digits in bf16 and three in fp16. Gradients are within 20 % (bf16) and 2 % (fp16) of those in fp32: attention
shows 5 % here and Mamba, whose step sizes are exponents summed over the length, 15 %. Where the backward stands makes no
difference.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tools.bench.compile_cpu import KINDS, gradients, step_of, toy

LOSS = {torch.bfloat16: 1e-2, torch.float16: 1e-3}
GRADIENT = {torch.bfloat16: 0.2, torch.float16: 0.02}


def flat(gradient: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradient])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("s", [1, 37])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_under_autocast(kind: str, s: int, half: torch.dtype) -> None:
    model = toy(kind)
    step, tokens = step_of(model), torch.randint(0, 64, (2, s + 1), generator=torch.Generator().manual_seed(s))
    exact = step(tokens)
    wanted = flat(gradients(model, exact))
    with torch.autocast("cpu", half):
        loss = step(tokens)
    after = flat(gradients(model, loss))
    assert loss.dtype == torch.float32 and abs(loss - exact) < LOSS[half] * exact
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert (after - wanted).norm() < GRADIENT[half] * wanted.norm()
    with torch.autocast("cpu", half):
        inside = flat(gradients(model, step(tokens)))
    assert torch.equal(inside, after)
    if half == torch.float16:  # with a loss scale, as GradScaler has it
        with torch.autocast("cpu", half):
            loss = step(tokens)
        scaled = flat(gradients(model, loss * 1024)) / 1024
        assert bool(scaled.isfinite().all()) and (scaled - wanted).norm() < GRADIENT[half] * wanted.norm()
