"""Estimates the memory of a training step on one rank by running its stages on fake tensors: shapes without values.

Each kind of block runs forward and backward once under a counter of live storage, and the peak of many blocks is assembled
from that. So the estimate follows whatever a mixer saves for its backward and needs no formula per mixer. Weights, masters
and moments are counted from the sharded parameters. The plain PyTorch path is counted; fused kernels save less.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.engine.base import DTYPES, EngineSettings
from megatron.engine.stages import check_mesh, run_stages
from megatron.model.build import build_model, param_specs
from megatron.model.config import ModelConfig
from megatron.model.linear_loss import linear_token_loss
from megatron.model.loss import token_loss
from megatron.model.objectives import objective_loss
from megatron.model.partition import balanced_bounds, stage_costs
from megatron.model.stages import BlockStage, stages_of
from megatron.ops.rotary import _table as table
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor import shard_model
from megatron.planning.context_traffic import PlannedShards
from megatron.planning.fixed_memory import Buffers, deepspeed_buffers, plain_buffers, share
from megatron.planning.segment_memory import Cache, Segment, measure


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank. Each part is at its own maximum, not all at the same time.

    Attributes:
        weights: parameters.
        gradients: gradients and their sums.
        optimizer: masters and moments.
        activations: saved for the backward by blocks and embedding.
        logits: the output layer and the loss.
        workspace: other memory that is live at the peak (a block's own backward, DeepSpeed's buckets, inputs).
        total: peak memory of a step.
        parameters: number of parameters, not bytes.
        recomputed: activations if every block were recomputed.
        context_sent: bytes, not memory, that context parallelism sends in a step.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    total: int
    parameters: int
    recomputed: int
    context_sent: int = 0


@dataclass(frozen=True)
class _Local:
    """This rank's stages on the meta device."""

    stages: list[nn.Module]
    first: bool
    last: bool
    parameters: list[nn.Parameter]
    shards: PlannedShards | None


def _local(config: ModelConfig, mesh: Mesh, settings: EngineSettings) -> _Local:
    """Like `stages.build_local`, without values; fake tensors are made of what is measured (`measure`)."""
    check_mesh(config, mesh, settings.seq_length)
    with torch.device("meta"):
        model = build_model(config)
    shards = None if mesh.cp == 1 else PlannedShards(mesh, settings.seq_length, settings.context_parallel_exchange)
    stages = stages_of(model, settings.kernel_backend, logits=not settings.loss_chunk_tokens, shards=shards)
    bounds = balanced_bounds(stage_costs(settings.partition_method, stages, config), mesh.pp)
    if mesh.tp > 1:
        shard_model(model, param_specs(config), mesh)
    local = [s.module for s in stages[bounds[mesh.pp_rank] : bounds[mesh.pp_rank + 1]]]
    parameters = {id(p): p for stage in local for p in stage.parameters()}
    for param in parameters.values():
        param.data = param.data.to(DTYPES[settings.dtype])
    return _Local(list(local), mesh.pp_rank == 0, mesh.pp_rank == mesh.pp - 1, list(parameters.values()), shards)


def _head(settings: EngineSettings, mesh: Mesh, tail: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Norm, output projection and loss."""
    logits_or_hidden = run_stages(list(tail), (x,))
    assert isinstance(logits_or_hidden, Tensor)
    labels = torch.zeros(x.shape[:2], dtype=torch.long)
    mask = torch.ones(x.shape[:2])

    def mean(logits: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
        if settings.loss_chunk_tokens:
            matrix = next(p for p in tail[-1].parameters())
            return linear_token_loss(
                logits, matrix, y, w, None, block=settings.loss_chunk_tokens, backend=settings.kernel_backend
            )
        return token_loss(logits, y, w)

    return objective_loss(settings.objective, logits_or_hidden, labels, mask, mean)[0]


@dataclass(frozen=True)
class _Chain:
    """The segments of one micro batch in order; with `has_head` the last one is the head.

    Attributes:
        tokens: bytes of one micro batch of data.
    """

    segments: list[Segment]
    has_head: bool
    tokens: int


def _chain(config: ModelConfig, mesh: Mesh, settings: EngineSettings, local: _Local, cache: Cache) -> _Chain:
    """Measure each kind of block once, the embedding and the head."""
    b, s = settings.micro_batch, settings.seq_length // mesh.cp
    dtype, interval = DTYPES[settings.dtype], settings.activation_checkpoint_interval
    blocks = [stage for stage in local.stages if isinstance(stage, BlockStage)]
    segments: list[Segment] = []
    if local.first:
        size = b * s * config.hidden_size * dtype.itemsize
        table = sum(p.numel() * dtype.itemsize for p in local.stages[0].parameters())
        segments.append(Segment(size, size, size * 2 + table, table))
    segments += _block_segments(config, settings, blocks, interval, cache, local.shards)
    if local.last:
        tail = [stage for stage in local.stages[len(local.stages) - 2 :] if not isinstance(stage, BlockStage)]
        x = torch.empty(b, s, config.hidden_size, dtype=dtype, requires_grad=True)
        segments.append(measure(lambda x: _head(settings, mesh, tail, x), tail, x))
    return _Chain(segments, local.last, b * s * (8 + 8 + 4))


def _block_segments(
    config: ModelConfig,
    settings: EngineSettings,
    blocks: Sequence[BlockStage],
    interval: int,
    cache: Cache,
    shards: PlannedShards | None,
) -> list[Segment]:
    """Runs of `interval` blocks (1 without recomputation); equal ones are measured once."""
    size = 1 if shards is None else shards.mesh.cp
    shape = (settings.micro_batch, settings.seq_length // size, config.hidden_size)
    segments = []
    for at in range(0, len(blocks), interval or 1):
        run = blocks[at : at + (interval or 1)]
        key = (
            *shape,
            size,
            settings.context_parallel_exchange,
            settings.dtype,
            interval,
            settings.kernel_backend,
            *(_kind(block) for block in run),
        )
        if key not in cache:
            x = torch.empty(*shape, dtype=DTYPES[settings.dtype], requires_grad=True)
            before = 0.0 if shards is None else shards.traffic.sent
            segment = measure(lambda x, run=run: _forward(run, x, interval), run, x)  # type: ignore[misc]
            cache[key] = segment if shards is None else replace(segment, sent=int(shards.traffic.sent - before))
        segments.append(cache[key])
    return segments


def _forward(run: Sequence[nn.Module], x: Tensor, interval: int) -> Tensor:
    activations = run_stages(list(run), (x,), interval)
    return activations[0]


def _kind(block: BlockStage) -> str:
    """Equal for blocks that take the same memory: the same mixer class with parameters of the same shapes."""
    shapes = ",".join(str(tuple(p.shape)) for p in block.parameters())
    return f"{type(block.body.token_mixer).__name__} {shapes}"  # type: ignore[union-attr]


def rank_memory(
    config: ModelConfig,
    mesh: Mesh,
    settings: EngineSettings,
    deepspeed: bool,
    *,
    resident: bool = False,
    cache: Cache | None = None,
    within: float | None = None,
) -> MemoryEstimate:
    """Estimate the memory of the rank `mesh.rank`.

    Args:
        config: the model.
        mesh: sizes only (`Mesh.shape_only`).
        settings: of the engine.
        deepspeed: which engine's buffers are counted.
        resident: count DeepSpeed's bucket only as far as it is filled, as the resident set of a CPU process does. An
            accelerator allocates all of it.
        cache: segments measured for other meshes and settings of the same `config`; extended here.
        within: bytes. A rank whose weights and optimizer alone take more is not measured further (`total` is those alone),
            and `recomputed` is not computed.

    Raises:
        ConfigError: the model cannot be sharded over the mesh.
    """
    cache = {} if cache is None else cache
    table.cache_clear()  # tables are cached: fake ones must not mix with real ones
    local = _local(config, mesh, settings)
    count, width = sum(p.numel() for p in local.parameters), DTYPES[settings.dtype].itemsize
    if deepspeed:
        buffers = deepspeed_buffers(count, mesh, settings, resident)
    else:
        buffers = plain_buffers(count, width, settings.gradient_accumulation > 1)
    weights = (share(count, mesh) if deepspeed and settings.zero_stage == 3 else count) * width
    least = weights + buffers.optimizer + buffers.standing
    if within is not None and least > within:
        return MemoryEstimate(weights, buffers.gradients, buffers.optimizer, 0, 0, 0, least, count, 0)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about data pointers of fake tensors
        chain = _chain(config, mesh, settings, local, cache)
        recomputed = 0
        if within is None:
            blocks = [stage for stage in local.stages if isinstance(stage, BlockStage)]
            recomputed = sum(segment.saved for segment in _block_segments(config, settings, blocks, 1, cache, local.shards))
            recomputed += chain.segments[0].saved if local.first else 0
    table.cache_clear()
    return _assemble(chain, weights, buffers, recomputed, count, mesh, settings)


def _assemble(
    chain: _Chain, weights: int, buffers: Buffers, recomputed: int, count: int, mesh: Mesh, settings: EngineSettings
) -> MemoryEstimate:
    """The peak of a step: resident memory, plus the largest dynamic memory over the backward of all segments.

    While segment i runs its backward, the dynamic memory is

        saved[0:i]                  activations of the segments before it, in this micro batch
        + (in_flight - 1) * saved   activations of the other micro batches that the 1F1B schedule holds
        + max(forward, backward)    its own peak, which includes what it saved and the gradients it makes
        + grads_so_far              gradients of the segments after it, whose backward is done

    and with accumulation in place also the gradient sums of earlier micro batches of the segments not yet done.
    """
    segments = chain.segments
    accumulates = settings.gradient_accumulation > 1
    in_flight = min(mesh.pp - mesh.pp_rank, settings.gradient_accumulation)
    saved = [segment.saved for segment in segments]
    activations = sum(saved[:-1] if chain.has_head else saved) + (in_flight - 1) * sum(saved)
    total_gradients = sum(segment.gradients for segment in segments)
    resident = weights + buffers.optimizer + buffers.standing + settings.gradient_accumulation * chain.tokens
    peak_dynamic, saved_at_peak = 0, 0
    grads_so_far = 0  # fp32 sums of 16-bit weights are in `buffers.standing`, not here
    for i in reversed(range(len(segments))):
        segment, saved_before = segments[i], sum(saved[:i]) + (in_flight - 1) * sum(saved)
        dynamic = saved_before + max(segment.forward, segment.backward) + grads_so_far
        if accumulates and buffers.in_place:  # the sums of earlier micro batches exist next to this segment's new gradients
            dynamic += total_gradients - grads_so_far
        if dynamic > peak_dynamic:
            peak_dynamic, saved_at_peak = dynamic, saved_before + segment.saved
        grads_so_far += 0 if buffers.bucket_takes else segment.gradients
    peak = resident + max(peak_dynamic, buffers.step)
    logits = segments[-1].backward - segments[-1].gradients if chain.has_head else 0
    workspace = max(0, peak - resident - saved_at_peak - total_gradients) + buffers.standing
    sent = settings.gradient_accumulation * sum(segment.sent for segment in segments)
    return MemoryEstimate(
        weights, buffers.gradients, buffers.optimizer, activations, logits, workspace, peak, count, recomputed, sent
    )
