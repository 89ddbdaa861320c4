"""The limit of a spike, exactly: the mean and so many spreads of the last steps."""

from __future__ import annotations

import pytest

from megatron.reliability.guard import StepGuard
from megatron.reliability.guard_options import GuardOptions


def test_the_limit_is_the_mean_and_so_many_spreads() -> None:
    guard = StepGuard(GuardOptions(spike_sigma=5.0, spike_window=8))
    for step in range(8):
        guard.decide(step, 1.0 + 2.0 * (step % 2), 10.0 + 4.0 * (step % 2), False)
    limits = guard.limits()
    assert limits.loss == pytest.approx(2.0 + 5.0 * 1.0)
    assert limits.grad_norm == pytest.approx(12.0 + 5.0 * 2.0)
    flat = StepGuard(GuardOptions(spike_sigma=5.0, spike_window=8))
    for step in range(8):
        flat.decide(step, 4.0, 1.0, False)
    assert flat.limits().loss == pytest.approx(4.0 * (1 + 5 * 0.02))  # a curve without noise
