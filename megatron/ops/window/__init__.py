"""Softmax attention of one token over a ring of the last keys and values."""

from megatron.ops.window.operator import window_step_

__all__ = [
    "window_step_",
]
