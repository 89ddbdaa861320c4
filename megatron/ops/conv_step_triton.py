"""The fused decode step of the short convolution as a path; the kernel is launched by `conv_triton.py`."""

from __future__ import annotations

from megatron.ops.conv_triton import conv_step_in_place
from megatron.ops.dispatch import path

path("conv_step", "triton")(conv_step_in_place)
