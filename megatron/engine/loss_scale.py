"""The loss scale of fp16: fixed, or halved after overflows and doubled after a quiet window (GPT-NeoX's `fp16` keys)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.engine.base import EngineSettings


class LossScale:
    """`value` multiplies the loss; `update` is called once per step. A window of 0 never changes the value."""

    def __init__(self, value: float = 1.0, window: int = 0, hysteresis: int = 1, minimum: float = 1.0) -> None:
        self.value, self.window, self.hysteresis, self.minimum = value, window, hysteresis, minimum
        self._quiet, self._left = 0, hysteresis

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> LossScale:
        """1 and constant unless the precision is fp16; `loss_scale` 0 there means dynamic."""
        keys = settings.fp16
        if settings.dtype != "fp16":
            return cls()
        if keys.get("loss_scale", 0):
            return cls(float(keys["loss_scale"]))
        return cls(
            2.0 ** int(keys.get("initial_scale_power", 16)),
            int(keys.get("loss_scale_window", 1000)),
            int(keys.get("hysteresis", 2)),
            float(keys.get("min_loss_scale", 1)),
        )

    def update(self, overflow: bool) -> None:
        """Call after each step; `overflow`: it was skipped because gradients were not finite."""
        if not self.window:
            return
        if overflow:
            self._quiet, self._left = 0, self._left - 1
            if self._left <= 0:
                self.value, self._left = max(self.value / 2, self.minimum), 1
            return
        self._quiet += 1
        if self._quiet % self.window == 0:
            self.value, self._left = self.value * 2, self.hysteresis

    def state(self) -> dict[str, Any]:
        """JSON-able; empty when the value never changes."""
        if not self.window:
            return {}
        return {"loss_scale": {"value": self.value, "quiet": self._quiet, "left": self._left}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state`; does nothing if it is missing or the scale is fixed."""
        saved = state.get("loss_scale")
        if saved and self.window:
            self.value, self._quiet, self._left = float(saved["value"]), int(saved["quiet"]), int(saved["left"])
