"""The token loss against torch's cross entropy: values, gradients, weights, ignored labels, blocks, half precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.model.loss import token_loss


def draw(t: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(t)
    logits = (torch.randn(2, t, 23, generator=g, dtype=torch.float64) * 5).to(dtype).requires_grad_()
    return logits, torch.randint(0, 23, (2, t), generator=g), torch.rand(2, t, generator=g)


@pytest.mark.parametrize("t", [1, 7, 300])
def test_equals_cross_entropy_with_gradients(t: int) -> None:
    logits, labels, mask = draw(t)
    labels[0, 0] = -100
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    counted = (labels != -100) * mask.double()
    expected = (each * counted).sum() / counted.sum()
    (want,) = torch.autograd.grad(expected * 3, logits)
    got = token_loss(logits, labels, mask)
    (have,) = torch.autograd.grad(got * 3, logits)
    assert (got - expected).abs() < 1e-12 and (have - want).abs().max() < 1e-12


def test_without_a_mask_it_is_the_plain_mean() -> None:
    logits, labels, _ = draw(9)
    labels[1, 3:6] = -100
    assert torch.allclose(token_loss(logits, labels), F.cross_entropy(logits.reshape(-1, 23), labels.reshape(-1)))


def test_nothing_to_count_is_zero_and_finite() -> None:
    logits, labels, _ = draw(4)
    loss = token_loss(logits, torch.full_like(labels, -100))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))


def test_half_precision_logits_are_summed_in_fp32() -> None:
    """bf16 logits carry an error of their own; the loss adds less than 1e-6 to it."""
    logits, labels, mask = draw(50, torch.bfloat16)
    exact = token_loss(logits.detach().double(), labels, mask)
    loss = token_loss(logits, labels, mask)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert abs(loss.item() - exact.item()) < 1e-5 * exact.item()


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    loss = token_loss(logits, torch.tensor([[1]]))
    assert loss.item() == pytest.approx(2e4)
