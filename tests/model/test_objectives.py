"""Objectives: which positions count, with which weight. The originals' numbers: tests/golden/test_based_models.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.errors import ConfigError
from megatron.model.loss import token_loss
from megatron.model.objectives import Objective, objective_loss


def test_each_objective_is_its_formula() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 10, 7, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 7, (3, 10), generator=g)
    mask = (torch.rand(3, 10, generator=g) < 0.6).double()
    each = F.cross_entropy(logits.reshape(-1, 7), labels.reshape(-1), reduction="none").view(3, 10)

    def mean(at: slice) -> torch.Tensor:
        return (each * mask)[:, at].sum() / mask[:, at].sum()

    for objective, want in (
        (Objective(), mean(slice(None))),
        (Objective("prefix", 4), mean(slice(4, None))),
        (Objective("jrt", 4, 0.5), mean(slice(4, None)) + 0.5 * mean(slice(0, 4))),
    ):
        loss, parts = objective_loss(objective, logits, labels, mask, token_loss)
        assert abs(float(loss - want)) < 1e-12
        assert set(parts) == set(objective.parts)
    assert abs(float(parts["mlm_loss"] - mean(slice(0, 4)))) < 1e-12 and not parts["mlm_loss"].requires_grad


def test_a_prefix_without_hidden_tokens_costs_nothing() -> None:
    logits, labels = torch.randn(1, 6, 5), torch.zeros(1, 6, dtype=torch.long)
    mask = torch.tensor([[0.0, 0, 0, 1, 1, 1]])
    loss, parts = objective_loss(Objective("jrt", 3), logits, labels, mask, token_loss)
    assert float(parts["mlm_loss"]) == 0 and float(loss) == float(parts["ntp_loss"])


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="unknown objective"):
        Objective("masked")
    with pytest.raises(ConfigError, match="needs a prefix"):
        Objective("jrt")
