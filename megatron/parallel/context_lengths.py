"""Which sequence lengths context parallelism can split: one rule, for configurations and for built models; without torch."""

from __future__ import annotations

from megatron.errors import ConfigError


def check_context_length(seq_length: int, context: int, tensor: int = 1) -> None:
    """Reject a sequence length that cannot be split into equal shards.

    Args:
        seq_length: tokens of a row.
        context: context-parallel size; 1 takes every length.
        tensor: tensor-parallel size under sequence parallelism, which splits a shard again; otherwise 1.

    Raises:
        ConfigError: names the nearest lengths that can be split, and the next smaller size that splits this one.
    """
    unit = context * tensor
    if context == 1 or seq_length % unit == 0:
        return
    below = seq_length - seq_length % unit
    smaller = max(n for n in range(1, min(context, seq_length + 1)) if seq_length % (n * tensor) == 0 or n == 1)
    sizes = f"context_parallel_size {context}" + (f" x model_parallel_size {tensor} (sequence_parallel)" if tensor > 1 else "")
    raise ConfigError(
        f"seq_length {seq_length} is not a multiple of {sizes}",
        hint=f"seq_length: {below + unit}" + (f" or {below}" if below else "") + f"; or context_parallel_size: {smaller}",
    )
