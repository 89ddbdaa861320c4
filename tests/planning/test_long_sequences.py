"""Long sequences: loops over blocks of tokens are run in part (`ops/opaque.py`), and the estimate is that of all of them."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.engine.base import EngineSettings
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh
from megatron.planning.memory import MemoryEstimate, rank_memory
from megatron.planning.segment_memory import _Live

BLOCKS = {
    "megatron.ops.metala.chunk._CPU_TOKENS": 16,
    "megatron.ops.summary.gated._BLOCK_TOKENS": {"cpu": 16},
    "megatron.ops.scan.chunk.CHUNK": 2,
    "megatron.ops.taylor.operator.TAYLOR_CHUNK": 16,
    "megatron.ops.taylor.prefix.TAYLOR_CHUNK": 16,
    "megatron.ops.taylor.operator._ROWS": 16,
    "megatron.ops.selective_scan.operator.SSM_CHUNK": 16,
    "megatron.ops.cross_entropy.operator._CPU_ROWS": 3,
    "megatron.model.loss._CPU_ROWS": 16,
}
"""Short blocks, so that a short sequence has many of them."""


def estimate(mixer: str, tokens: int, *, context: int = 1, tensor: int = 1, **settings: Any) -> MemoryEstimate:
    """Of one rank with `tokens` tokens of each row."""
    options = {"jrt": {"prefix_length": tokens}, "sliding": {"window": 8}}
    model = ModelConfig(256, 64, 1, 4, 128, layer_types=(mixer,), layer_options={mixer: options.get(mixer, {})})
    settings = {"micro_batch": 1, "dtype": "bf16", **settings}
    mesh = Mesh.shape_only(1, tensor, tensor * context, 0, context)
    return rank_memory(model, mesh, EngineSettings(seq_length=tokens * context, **settings), deepspeed=True, within=1e15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "tokens", "options"),
    [
        ("metala", 101, {"context": 2, "activation_checkpoint_interval": 1, "loss_chunk_tokens": 16}),
        ("metala", 96, {"tensor": 2, "micro_batch": 2, "dtype": "fp32"}),
        ("based", 99, {"context": 2, "tensor": 2, "loss_chunk_tokens": 16}),
        ("based", 130, {"micro_batch": 2, "activation_checkpoint_interval": 1}),
        ("jrt", 101, {"micro_batch": 2, "activation_checkpoint_interval": 1}),
        ("jrt", 96, {"context": 2}),
        ("mamba", 97, {"context": 2, "activation_checkpoint_interval": 1}),
        ("mamba", 89, {"tensor": 2, "micro_batch": 2}),
        ("base_conv", 101, {"context": 2, "loss_chunk_tokens": 90}),
        ("sliding", 101, {"context": 2, "tensor": 2, "activation_checkpoint_interval": 1}),
        ("global", 101, {"context": 2}),
    ],
)
def test_blocks_that_are_not_visited_take_the_same_memory(
    mixer: str, tokens: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All categories to the byte, and the traffic of context parallelism, at lengths with and without a shorter last block."""
    for name, size in BLOCKS.items():
        monkeypatch.setattr(name, size)
    in_part = estimate(mixer, tokens, **options)
    for module in ("opaque", "selective_scan.operator", "taylor.prefix"):
        monkeypatch.setattr(f"megatron.ops.{module}.has_numbers", lambda x: True)
    assert estimate(mixer, tokens, **options) == in_part


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["metala", "based", "jrt", "mamba"])
def test_the_work_of_an_estimate_does_not_grow_with_the_sequence(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many operations for a million tokens as for 65,536."""
    counts, dispatch = [0], _Live.__torch_dispatch__

    def counted(self: _Live, *call: Any) -> Any:
        counts[-1] += 1
        return dispatch(self, *call)

    options = {"loss_chunk_tokens": 1024, "activation_checkpoint_interval": 1}
    monkeypatch.setattr(_Live, "__torch_dispatch__", counted)
    short = estimate(mixer, 2**13, context=8, **options)
    counts.append(0)
    long = estimate(mixer, 2**17, context=8, **options)
    assert long.activations == 16 * short.activations
    assert counts[0] == counts[1] > 0
