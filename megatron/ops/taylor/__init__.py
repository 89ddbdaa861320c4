"""Taylor linear attention (Based) and its form with a prefix (JRT)."""

from megatron.ops.taylor.features import feature_count, taylor_features
from megatron.ops.taylor.operator import TAYLOR_CHUNK, TAYLOR_EPS, empty_taylor_state, taylor
from megatron.ops.taylor.prefix import prefix_taylor
from megatron.ops.taylor.step import taylor_step, taylor_step_

__all__ = [
    "TAYLOR_CHUNK",
    "TAYLOR_EPS",
    "empty_taylor_state",
    "feature_count",
    "prefix_taylor",
    "taylor",
    "taylor_features",
    "taylor_step",
    "taylor_step_",
]
