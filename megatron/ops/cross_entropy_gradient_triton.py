"""The fused path of the second half; see `cross_entropy_triton.py`, which registers it."""

from __future__ import annotations

import megatron.ops.cross_entropy_triton  # noqa: F401
