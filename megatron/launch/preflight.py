"""`--dry-run`: what a run needs, from the config alone; nothing is started and nothing is allocated.

The model is built on torch's meta device and cut by the same plans as in training, so parameters per rank are exact.
Activations are an estimate from what autograd keeps per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.errors import ConfigError
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.model.cost import count_parameters, forward_flops, train_flops
from megatron.observe.console import human
from megatron.parallel.plan import ParamSpec, slice_of

_GIB = 2**30
_BYTES = {"fp32": 4, "bfloat16": 2, "fp16": 2}


@dataclass(frozen=True)
class RunShape:
    """The numbers of a run that decide its size: mesh, precision, batch, length.

    checkpoint_interval: blocks per recomputed piece, 0 keeps all activations. vocabulary: where the row count comes from.
    """

    pp: int
    tp: int
    dp: int
    zero_stage: int
    dtype: str
    fp32_gradients: bool
    micro_batch: int
    global_batch: int
    seq_length: int
    train_iters: int
    checkpoint_interval: int
    vocabulary: str


@dataclass(frozen=True)
class RankMemory:
    """GiB on the fullest rank, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def _stage_parameters(specs: dict[str, ParamSpec], config: ModelConfig, pp: int, tp: int) -> list[int]:
    """Local parameters of each pipeline stage when blocks are spread evenly; a tied matrix is held at both ends."""
    per_block = math.ceil(config.num_layers / pp)
    counts = [0] * pp
    for spec in specs.values():
        block = spec.stage - 2
        stage = 0 if spec.stage == 0 else pp - 1 if block >= config.num_layers else block // per_block
        size = math.prod(slice_of(spec.shape, spec.cut, 0, tp).local_shape)
        counts[stage] += size
        if spec.stage == 0 and config.tie_embeddings and pp > 1:
            counts[-1] += size
    return counts


def rank_memory(run: RunShape, config: ModelConfig, specs: dict[str, ParamSpec]) -> RankMemory:
    """Memory of the fullest rank of this run's mesh."""
    held = max(_stage_parameters(specs, config, run.pp, run.tp))
    width = _BYTES[run.dtype]
    owned, weights, gradients = (held / run.dp if run.zero_stage >= stage else held for stage in (1, 3, 2))
    gradient = 4 if run.fp32_gradients else width
    master = 0 if width == 4 else 4
    tokens = run.micro_batch * run.seq_length
    blocks = math.ceil(config.num_layers / run.pp)
    in_flight = run.pp  # 1F1B keeps as many micro batches on the first stage as there are stages
    one_block = _block_activations(config, run.tp) * tokens * width
    if run.checkpoint_interval:
        kept = blocks * config.hidden_size * tokens * width * in_flight + one_block * run.checkpoint_interval
    else:
        kept = blocks * one_block * in_flight
    logits = tokens * config.vocab_size / run.tp * (width + 4 + 4)  # as computed, in fp32, and its gradient
    parts = (weights * width, gradients * gradient, owned * (8 + master), kept, logits)
    return RankMemory(*(x / _GIB for x in parts))


def _block_activations(config: ModelConfig, tp: int) -> float:
    """Elements per token that one block keeps for its backward: two norms and residuals whole, mixer and MLP cut by tp.

    The mixer is counted as ten widths, which is what MetaLA keeps (convolution, q, z, v, g and the normed output twice).
    """
    mlp = (3 if config.mlp == "gated" else 2) * config.mlp_width
    return 4 * config.hidden_size + (10 * config.hidden_size + mlp) / tp


def report(run: RunShape, config: ModelConfig) -> str:
    """What the run needs, as text.

    Raises:
        ConfigError: the model cannot be built, or its sizes do not divide over the mesh.
    """
    total, inner = count_parameters(config)
    try:
        memory = rank_memory(run, config, param_specs(config))
    except ValueError as error:
        raise ConfigError("the model cannot be cut over this mesh", why=str(error), hint="change model_parallel_size") from None
    step = run.global_batch * run.seq_length
    training = train_flops(config, run.seq_length)
    mixers = "+".join(dict.fromkeys(config.layer_types))
    forward = human(forward_flops(config, run.seq_length))
    rows = {
        "model": f"{mixers}, {config.num_layers} layers x {config.hidden_size}, "
        f"vocabulary {config.vocab_size} ({run.vocabulary})",
        "parameters": f"{total:,} in all, {inner:,} without embeddings",
        "FLOPs per token": f"{forward} forward, {human(training)} with backward, at {run.seq_length} tokens",
        "mesh": f"pipeline {run.pp} x data {run.dp} x tensor {run.tp}, ZeRO stage {run.zero_stage}, {run.dtype}",
        "batch": f"{run.global_batch} sequences = {human(step)} tokens per step, micro batch {run.micro_batch}",
        "training": f"{human(run.train_iters * step)} tokens in {run.train_iters} steps, "
        f"{run.train_iters * step * training:.3g} FLOPs",
        "memory per rank": f"{memory.total:.2f} GiB: weights {memory.weights:.2f}, gradients {memory.gradients:.2f}, optimizer "
        f"{memory.optimizer:.2f}, activations {memory.activations:.2f} (estimate), logits {memory.logits:.2f}",
    }
    return "\n".join(f"{name:17} {text}" for name, text in rows.items())
