"""`--dry-run`: what a run needs and whether it fits, from the config alone; nothing is started or allocated.

Parameters per rank are exact: the model is sharded by the same plans as in training. Memory comes from running its stages on
fake tensors (`planning/memory.py`); `tools/bench/dry_run.py` compares it with measured peaks. If the run does not fit, the
report names one change that makes it fit: the first of a list ordered by cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron.engine.base import DTYPES, EngineSettings
from megatron.errors import ConfigError
from megatron.model.config import ModelConfig
from megatron.model.cost import count_parameters, forward_flops, train_flops
from megatron.model.state_size import state_bytes
from megatron.observe.console import human
from megatron.parallel.mesh import Mesh
from megatron.planning.memory import MemoryEstimate, rank_memory
from megatron.planning.segment_memory import Cache

DOES_NOT_FIT = 8  # exit code of a dry run whose limit was given, or is that of this machine's accelerators
_GIB, _MIB = 2**30, 2**20
# GiB for what our tensors do not take: the CUDA context and NCCL, or the interpreter and its libraries.
_RESERVE = 1.0
_STATE_TOKENS = 4096
_LONG_SHARD = 16_384  # tokens; with shorter ones context parallelism is not proposed


@dataclass(frozen=True)
class RunShape:
    """The numbers of a run that determine its size.

    Attributes:
        pp: pipeline-parallel size.
        tp: tensor-parallel size.
        dp: data-parallel size: replicas of the model, context-parallel ones included.
        settings: of the engine.
        deepspeed: a DeepSpeed engine runs it.
        global_batch: sequences per step.
        train_iters: steps.
        vocabulary: where the vocabulary size comes from, for the report.
        keep: checkpoints that are retained; None is all.
        saves: checkpoints that are written.
        cp: context-parallel size.
    """

    pp: int
    tp: int
    dp: int
    settings: EngineSettings
    deepspeed: bool
    global_batch: int
    train_iters: int
    vocabulary: str
    keep: int | None = None
    saves: int = 0
    cp: int = 1

    @property
    def world(self) -> int:
        """Processes."""
        return self.pp * self.tp * self.dp


@dataclass(frozen=True)
class DeviceLimits:
    """The capacity of a device.

    Attributes:
        memory_gib: of one rank.
        source: where that number comes from.
        binding: not to fit is an error.
        tflops: peak of one device; None if unknown.
        mfu: model FLOPs utilization that is reached.
    """

    memory_gib: float
    source: str
    binding: bool
    tflops: float | None = None
    mfu: float = 0.4


@dataclass(frozen=True)
class Report:
    """The dry run's result.

    Attributes:
        text: the report.
        fits: the rank with the highest peak stays within the limit.
        binding: the limit was given, or is that of this machine's accelerator.
    """

    text: str
    fits: bool
    binding: bool


def peak(run: RunShape, config: ModelConfig, cache: Cache, within: float | None = None) -> MemoryEstimate:
    """The estimate of the rank with the highest peak, of the first, a middle and the last pipeline stage.

    Args:
        run: the run's sizes.
        config: the model.
        cache: see `rank_memory`.
        within: see `rank_memory`.

    Raises:
        ConfigError: the model cannot be sharded over the mesh.
    """
    stages = sorted({0, run.pp // 2, run.pp - 1})
    meshes = [Mesh.shape_only(run.pp, run.tp, run.world, stage * run.dp * run.tp, run.cp) for stage in stages]
    estimates = [rank_memory(config, mesh, run.settings, run.deepspeed, cache=cache, within=within) for mesh in meshes]
    return max(estimates, key=lambda e: e.total)


def _changes(run: RunShape, config: ModelConfig) -> Iterator[tuple[str, RunShape]]:
    """(config keys to set, the run with them), cheapest first."""
    s = run.settings
    if not s.activation_checkpoint_interval:
        yield "checkpoint_activations: true", replace(run, settings=replace(s, activation_checkpoint_interval=1))
    if not s.loss_chunk_tokens:
        yield "loss_chunk_tokens: 1024", replace(run, settings=replace(s, loss_chunk_tokens=1024))
    for factor in (2, 4, 8):
        if s.micro_batch % factor == 0:
            smaller = replace(s, micro_batch=s.micro_batch // factor, gradient_accumulation=s.gradient_accumulation * factor)
            text = f"train_micro_batch_size_per_gpu: {smaller.micro_batch}, gradient_accumulation_steps: "
            yield text + str(smaller.gradient_accumulation), replace(run, settings=smaller)
    for stage in (1, 2, 3):
        if run.dp > 1 and run.pp == 1 and stage > max(s.zero_stage, 1):
            yield f'zero_optimization: {{"stage": {stage}}}', replace(run, settings=replace(s, zero_stage=stage))
    for size in (2, 4, 8):
        longer = replace(run, dp=run.dp * size, cp=run.cp * size, deepspeed=True)
        if s.seq_length // longer.cp >= _LONG_SHARD:
            yield f"context_parallel_size: {longer.cp} ({longer.world} processes)", longer
    for size in (2, 4, 8):  # whether heads or widths divide is for `check_mesh` to say: Mamba has no heads
        wider = replace(run, tp=run.tp * size, deepspeed=True)
        yield f"model_parallel_size: {wider.tp} ({wider.world} processes)", wider
    for size in (2, 4, 8):
        if config.num_layers >= run.pp * size and s.zero_stage < 2:
            deeper = replace(run, pp=run.pp * size, deepspeed=True)
            yield f"pipe_parallel_size: {deeper.pp} ({deeper.world} processes)", deeper


def advice(run: RunShape, config: ModelConfig, available: float, cache: Cache, peak_bytes: float = 0) -> str:
    """One change after which every rank takes at most `available` bytes; empty if none of `_changes` is enough.

    Args:
        run: the run.
        config: its model.
        available: bytes of one rank.
        cache: see `rank_memory`.
        peak_bytes: of the rank of `run` with the highest peak. Tensor parallelism divides no tensor by more than the number
            of its ranks, so some sizes need no measurement.
    """
    for text, changed in _changes(run, config):
        if changed.tp > run.tp and peak_bytes * run.tp > available * changed.tp:
            continue
        try:
            total = peak(changed, config, cache, within=available).total
        except ConfigError:
            continue  # not possible for this model
        if total <= available:
            return f"{text} takes {total / _GIB:.2f} GiB"
    return ""


def _duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _disk(run: RunShape, total: int) -> str:
    """Bytes of checkpoints: weights in the training dtype, and per parameter an fp32 master and two moments."""
    bytes_each = total * (DTYPES[run.settings.dtype].itemsize + 12)
    retained = run.saves if run.keep is None else min(run.keep, run.saves)
    gib = bytes_each / _GIB
    return f"{gib:.2f} GiB per checkpoint, {retained} kept of {run.saves} written: {retained * gib:.2f} GiB"


def _time(run: RunShape, flops: float, limits: DeviceLimits) -> str:
    if not limits.tflops:
        return "unknown: give the device's peak with peak_theoretical_tflops"
    seconds = flops / (run.world * limits.tflops * 1e12 * limits.mfu)
    return f"{_duration(seconds)} at {limits.mfu:.0%} of {limits.tflops:g} TFLOP/s on each of {run.world} devices"


def _mesh_row(run: RunShape) -> str:
    data = f"data {run.dp}" if run.cp == 1 else f"data {run.dp // run.cp} x context {run.cp}"
    return f"pipeline {run.pp} x {data} x tensor {run.tp}, ZeRO stage {run.settings.zero_stage}, {run.settings.dtype}"


def _context_rows(estimate: MemoryEstimate, run: RunShape) -> dict[str, str]:
    if run.cp == 1:
        return {}
    text = f"{run.settings.seq_length // run.cp:,} tokens of a sequence per rank; states and halos: "
    text += f"{estimate.context_sent / _MIB:,.1f} MiB sent per rank and step, forward and backward"
    return {"context": f"{text} ({run.settings.context_parallel_exchange})"}


def _memory_rows(estimate: MemoryEstimate, run: RunShape) -> dict[str, str]:
    note = f"{estimate.recomputed / _MIB:,.0f} if every block is recomputed"
    if run.settings.activation_checkpoint_interval:
        note = "as configured, blocks are recomputed"
    return {
        "memory per rank": f"{estimate.total / _GIB:.2f} GiB at the peak of a step",
        "  of it, in MiB": f"weights {estimate.weights / _MIB:,.0f}, gradients {estimate.gradients / _MIB:,.0f}, optimizer "
        f"{estimate.optimizer / _MIB:,.0f}, activations {estimate.activations / _MIB:,.0f} ({note}), logits and loss "
        f"{estimate.logits / _MIB:,.0f}, workspace {estimate.workspace / _MIB:,.0f}; each at its own largest",
    }


def report(run: RunShape, config: ModelConfig, limits: DeviceLimits) -> Report:
    """What the run needs, and whether it fits.

    Raises:
        ConfigError: the model cannot be built, or its sizes do not divide over the mesh.
    """
    total, inner = count_parameters(config)
    cache: Cache = {}
    estimate, s = peak(run, config, cache), run.settings
    step, training = run.global_batch * s.seq_length, train_flops(config, s.seq_length)
    flops = run.train_iters * step * training
    forward = human(forward_flops(config, s.seq_length))
    state = sum(sum(of.values()) for of in state_bytes(config, _STATE_TOKENS).values())
    available = (limits.memory_gib - _RESERVE) * _GIB
    fits = estimate.total <= available
    verdict = f"{'fits' if fits else 'does not fit'} into {limits.memory_gib:.1f} GiB less {_RESERVE:g} ({limits.source})"
    rows = {
        "model": f"{'+'.join(dict.fromkeys(config.layer_types))}, {config.num_layers} layers x {config.hidden_size}, "
        f"vocabulary {config.vocab_size} ({run.vocabulary})",
        "parameters": f"{total:,} in all, {inner:,} without embeddings; {estimate.parameters:,} on the largest rank",
        "FLOPs per token": f"{forward} forward, {human(training)} with backward, at {s.seq_length} tokens",
        "mesh": _mesh_row(run),
        **_context_rows(estimate, run),
        "batch": f"{run.global_batch} sequences = {human(step)} tokens per step, micro batch {s.micro_batch}",
        "training": f"{human(run.train_iters * step)} tokens in {run.train_iters} steps, {flops:.3g} FLOPs",
        "time": _time(run, flops, limits),
        "disk": _disk(run, total),
        **_memory_rows(estimate, run),
        "generation state": f"{state / _MIB:.2f} MiB per sequence of {_STATE_TOKENS} tokens",
        "verdict": verdict,
    }
    if not fits:
        change = advice(run, config, available, cache, estimate.total)
        rows["one change"] = change or "none is enough: use a smaller model, or more devices"
    return Report("\n".join(f"{name:17} {text}" for name, text in rows.items()), fits, limits.binding)
