"""Short causal depthwise convolution along the sequence."""

from megatron.ops.conv.operator import causal_conv, conv_reference, conv_step_, conv_step_torch, next_history

__all__ = [
    "causal_conv",
    "conv_reference",
    "conv_step_",
    "conv_step_torch",
    "next_history",
]
