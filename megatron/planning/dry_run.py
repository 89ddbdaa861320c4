"""`--dry-run`: what a run needs and whether it fits, from the config alone; nothing is started and nothing is allocated.

Parameters per rank are exact: the model is cut by the same plans as in training. Memory comes from running its stages on fake
tensors (`planning/memory.py`); `tools/bench/dry_run.py` compares it with measured peaks. When the run does not fit, one change
that makes it fit is named: the first of a list that costs more the further down it stands.
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
from megatron.planning.memory import Known, MemoryEstimate, rank_footprint

DOES_NOT_FIT = 8  # exit code of a dry run whose limit was given, or is that of this machine's accelerators
_GIB, _MIB = 2**30, 2**20
# Room for what no tensor of ours takes: the CUDA context and NCCL, or the interpreter and its libraries.
_RESERVE = 1.0
_STATE_TOKENS = 4096


@dataclass(frozen=True)
class RunShape:
    """The numbers of a run that decide its size.

    settings: as the engine gets them. deepspeed: which engine. vocabulary: where the row count comes from. keep: checkpoints
    that stay, None for all; saves: how many are written.
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

    @property
    def world(self) -> int:
        """Processes."""
        return self.pp * self.tp * self.dp


@dataclass(frozen=True)
class DeviceLimits:
    """What there is. memory_gib: of one rank; said: where that number comes from; binding: whether not to fit is an error.

    tflops: peak of one device, None where unknown; mfu: share of it that is reached.
    """

    memory_gib: float
    said: str
    binding: bool
    tflops: float | None = None
    mfu: float = 0.4


@dataclass(frozen=True)
class Report:
    """Text of the dry run; fits: whether the fullest rank stays within the limit; binding: whether that limit was meant."""

    text: str
    fits: bool
    binding: bool


def peak(run: RunShape, config: ModelConfig, known: Known, within: float | None = None) -> MemoryEstimate:
    """The rank that takes most; ranks differ by pipeline stage: the first, one between and the last are looked at.

    known, within: see `rank_footprint`.

    Raises:
        ConfigError: the model cannot be cut over the mesh.
    """
    stages = sorted({0, run.pp // 2, run.pp - 1})
    meshes = [Mesh.shape_only(run.pp, run.tp, run.world, stage * run.dp * run.tp) for stage in stages]
    found = [rank_footprint(config, mesh, run.settings, run.deepspeed, known=known, within=within) for mesh in meshes]
    return max(found, key=lambda f: f.total)


def _changes(run: RunShape, config: ModelConfig) -> Iterator[tuple[str, RunShape]]:
    """(what to write, the run with it), the cheapest first."""
    s = run.settings
    if not s.activation_checkpoint_interval:
        yield "checkpoint_activations: true", replace(run, settings=replace(s, activation_checkpoint_interval=1))
    if not s.loss_chunk_tokens:
        yield "loss_chunk_tokens: 1024", replace(run, settings=replace(s, loss_chunk_tokens=1024))
    for part in (2, 4, 8):
        if s.micro_batch % part == 0:
            smaller = replace(s, micro_batch=s.micro_batch // part, gradient_accumulation=s.gradient_accumulation * part)
            text = f"train_micro_batch_size_per_gpu: {smaller.micro_batch}, gradient_accumulation_steps: "
            yield text + str(smaller.gradient_accumulation), replace(run, settings=smaller)
    for stage in (1, 2, 3):
        if run.dp > 1 and run.pp == 1 and stage > max(s.zero_stage, 1):
            yield f'zero_optimization: {{"stage": {stage}}}', replace(run, settings=replace(s, zero_stage=stage))
    for size in (2, 4, 8):  # whether heads or widths divide is for `check_mesh` to say: Mamba has no heads
        wide = replace(run, tp=run.tp * size, deepspeed=True)
        yield f"model_parallel_size: {wide.tp} ({wide.world} processes)", wide
    for size in (2, 4, 8):
        if config.num_layers >= run.pp * size and s.zero_stage < 2:
            long = replace(run, pp=run.pp * size, deepspeed=True)
            yield f"pipe_parallel_size: {long.pp} ({long.world} processes)", long


def advice(run: RunShape, config: ModelConfig, room: float, known: Known, total: float = 0) -> str:
    """One change after which the fullest rank takes at most `room` bytes; empty when none of the known ones does.

    Args:
        run, config: the run. room: bytes. known: see `rank_footprint`.
        total: bytes of the fullest rank of `run`. Tensor parallelism divides no tensor by more than the number of its ranks, so
            that some sizes need not be measured.
    """
    for text, changed in _changes(run, config):
        if changed.tp > run.tp and total * run.tp > room * changed.tp:
            continue
        try:
            took = peak(changed, config, known, within=room).total
        except ConfigError:
            continue  # not possible for this model
        if took <= room:
            return f"{text} takes {took / _GIB:.2f} GiB"
    return ""


def _duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _disk(run: RunShape, total: int) -> str:
    """Weights as they are computed with, and per parameter an fp32 master and two moments."""
    one = total * (DTYPES[run.settings.dtype].itemsize + 12)
    kept = run.saves if run.keep is None else min(run.keep, run.saves)
    return f"{one / _GIB:.2f} GiB per checkpoint, {kept} kept of {run.saves} written: {kept * one / _GIB:.2f} GiB"


def _time(run: RunShape, flops: float, limits: DeviceLimits) -> str:
    if not limits.tflops:
        return "unknown: give the device's peak with peak_theoretical_tflops"
    seconds = flops / (run.world * limits.tflops * 1e12 * limits.mfu)
    return f"{_duration(seconds)} at {limits.mfu:.0%} of {limits.tflops:g} TFLOP/s on each of {run.world} devices"


def _memory_rows(found: MemoryEstimate, run: RunShape) -> dict[str, str]:
    note = f"{found.recomputed / _MIB:,.0f} if every block is recomputed"
    if run.settings.activation_checkpoint_interval:
        note = "as configured, blocks are recomputed"
    return {
        "memory per rank": f"{found.total / _GIB:.2f} GiB at the fullest moment of a step",
        "  of it, in MiB": f"weights {found.weights / _MIB:,.0f}, gradients {found.gradients / _MIB:,.0f}, optimizer "
        f"{found.optimizer / _MIB:,.0f}, activations {found.activations / _MIB:,.0f} ({note}), logits and loss "
        f"{found.logits / _MIB:,.0f}, workspace {found.workspace / _MIB:,.0f}; each at its own largest",
    }


def report(run: RunShape, config: ModelConfig, limits: DeviceLimits) -> Report:
    """What the run needs, and whether it fits.

    Raises:
        ConfigError: the model cannot be built, or its sizes do not divide over the mesh.
    """
    total, inner = count_parameters(config)
    known: Known = {}
    found, s = peak(run, config, known), run.settings
    step, training = run.global_batch * s.seq_length, train_flops(config, s.seq_length)
    flops = run.train_iters * step * training
    forward = human(forward_flops(config, s.seq_length))
    state = sum(sum(of.values()) for of in state_bytes(config, _STATE_TOKENS).values())
    room = (limits.memory_gib - _RESERVE) * _GIB
    fits = found.total <= room
    verdict = f"{'fits' if fits else 'does not fit'} into {limits.memory_gib:.1f} GiB less {_RESERVE:g} ({limits.said})"
    rows = {
        "model": f"{'+'.join(dict.fromkeys(config.layer_types))}, {config.num_layers} layers x {config.hidden_size}, "
        f"vocabulary {config.vocab_size} ({run.vocabulary})",
        "parameters": f"{total:,} in all, {inner:,} without embeddings; {found.parameters:,} on the fullest rank",
        "FLOPs per token": f"{forward} forward, {human(training)} with backward, at {s.seq_length} tokens",
        "mesh": f"pipeline {run.pp} x data {run.dp} x tensor {run.tp}, ZeRO stage {s.zero_stage}, {s.dtype}",
        "batch": f"{run.global_batch} sequences = {human(step)} tokens per step, micro batch {s.micro_batch}",
        "training": f"{human(run.train_iters * step)} tokens in {run.train_iters} steps, {flops:.3g} FLOPs",
        "time": _time(run, flops, limits),
        "disk": _disk(run, total),
        **_memory_rows(found, run),
        "generation state": f"{state / _MIB:.2f} MiB per sequence of {_STATE_TOKENS} tokens",
        "verdict": verdict,
    }
    if not fits:
        rows["one change"] = (
            advice(run, config, room, known, found.total) or "none of those known here: a smaller model, or more devices"
        )
    return Report("\n".join(f"{name:17} {text}" for name, text in rows.items()), fits, limits.binding)
