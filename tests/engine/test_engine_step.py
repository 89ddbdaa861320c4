"""One step of the plain engine: what clipping leaves alone, the mean over micro batches, the norm without the loss scale."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron.data.micro_batch import MicroBatch
from megatron.engine import single_process
from megatron.engine.base import EngineSettings, StepResult
from megatron.engine.loss_scale import LossScale
from megatron.engine.single_process import SingleProcessEngine
from megatron.model.config import ModelConfig

CONFIG = ModelConfig(32, 16, 1, 2, 24, ("metala",))
SETTINGS = EngineSettings(micro_batch=2, seq_length=12, gradient_clipping=0.0)


def _engine(settings: EngineSettings) -> SingleProcessEngine:
    return SingleProcessEngine(CONFIG, settings, torch.device("cpu"))


def _batch(seed: int) -> SimpleNamespace:
    text = torch.randint(0, 32, (2, 13), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(text[:, :-1], text[:, 1:], torch.ones(2, 12))


def _step(settings: EngineSettings, *seeds: int) -> tuple[SingleProcessEngine, StepResult]:
    engine = _engine(settings)
    return engine, engine.train_step([_batch(seed) for seed in seeds], 1e-2)


def _weights(engine: SingleProcessEngine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in engine.parameters().values()])


@pytest.mark.parametrize(("limit", "left"), [(0.0, 1.0), (100.0, 1.0), (0.5, None)])
def test_only_gradients_above_the_limit_are_made_smaller(limit: float, left: float | None) -> None:
    engine = _engine(replace(SETTINGS, gradient_clipping=limit))
    for tensor in engine.parameters().values():
        tensor.grad = torch.ones_like(tensor)
    norm = float(engine._norm())
    engine._clip(norm)
    after = float(next(iter(engine.parameters().values())).grad.flatten()[0])  # type: ignore[union-attr]
    assert after == pytest.approx(left if left is not None else limit / norm, rel=1e-5)


def test_micro_batches_are_averaged() -> None:
    """The same micro batch twice is that batch; two different ones give the mean of their losses, and neither's gradient."""
    once, twice = _step(SETTINGS, 1), _step(replace(SETTINGS, gradient_accumulation=2), 1, 1)
    assert float(twice[1].loss) == pytest.approx(float(once[1].loss), rel=1e-6)
    assert float(twice[1].grad_norm) == pytest.approx(float(once[1].grad_norm), rel=1e-5)
    assert torch.allclose(_weights(once[0]), _weights(twice[0]), atol=1e-6)
    other, both = _step(SETTINGS, 2), _step(replace(SETTINGS, gradient_accumulation=2), 1, 2)
    assert float(both[1].loss) == pytest.approx((float(once[1].loss) + float(other[1].loss)) / 2, rel=1e-6)


def test_the_norm_knows_nothing_of_the_loss_scale() -> None:
    half = replace(SETTINGS, dtype="fp16", gradient_clipping=0.5)
    plain, scaled = (_step(replace(half, fp16={"loss_scale": scale}), 1) for scale in (1, 256))
    assert float(scaled[1].grad_norm) == pytest.approx(float(plain[1].grad_norm), rel=0.01)
    assert all(master.dtype == torch.float32 for engine, _ in (plain, scaled) for master in engine._masters.values())


def test_gradients_of_16_bits_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tensors at a time; one without a gradient in the first micro batch, one in the second."""
    monkeypatch.setattr(single_process, "_TOGETHER", 3)
    engine, exact = _engine(replace(SETTINGS, dtype="bf16")), {}
    names = list(engine.parameters())
    for skipped in (names[1], names[4]):
        for name, p in engine.parameters().items():
            p.grad = None if name == skipped else torch.randn_like(p)
            if p.grad is not None:
                exact[name] = exact.get(name, 0) + p.grad.float()
        engine._gather_gradients()
        assert all(p.grad is None for p in engine.parameters().values())
    for name, master in engine._masters.items():
        assert master.grad is not None and master.grad.dtype == torch.float32 and torch.equal(master.grad, exact[name])
        master.detach().copy_(torch.randn_like(master))
    engine._copy_masters_down()
    assert all(torch.equal(p, engine._masters[name].bfloat16()) for name, p in engine.parameters().items())


def test_the_loss_scale_has_a_floor_and_patience() -> None:
    """Halved at the second overflow in a row (hysteresis 2), then at each, never below the minimum; doubled after a window."""
    scale = LossScale(8.0, window=2, hysteresis=2, minimum=3.0)
    seen = []
    for overflow in (True, True, True, True, False, False, True, True):
        scale.update(overflow)
        seen.append(scale.value)
    assert seen == [8.0, 4.0, 3.0, 3.0, 3.0, 6.0, 6.0, 3.0]
