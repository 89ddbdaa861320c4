"""The interface of an engine: one optimizer step, an evaluation loss, and its state as plain tensors.

The loop, the checkpoints and the export use `Engine` only. `single_process.py` is plain PyTorch and the reference;
`deepspeed_pipeline.py` runs pipelines and ZeRO-1, `deepspeed_zero.py` ZeRO-2 and 3. All return the same numbers for the same
settings.
"""

from __future__ import annotations

import math
import os
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron.data.micro_batch import MicroBatch
from megatron.engine.skip_step import StepLimits
from megatron.errors import CheckpointError, ConfigError, DataError
from megatron.model.objectives import Objective
from megatron.model.stages import Activations, input_tensors
from megatron.parallel.mesh import Mesh
from megatron.parallel.shard_spec import ParamSpec

# `bfloat16` is how GPT-NeoX's `precision` key spells it.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16}
MOMENTS = ("exp_avg", "exp_avg_sq")
_WORTH_THREADS = 1 << 22  # elements


def batch_flow(batch: MicroBatch, inputs: Sequence[str]) -> Activations:
    """The input of the first stage: tokens, the mixers' inputs that the run declares, document numbers."""
    own = input_tensors(batch.inputs, inputs)
    segments = () if batch.segment_ids is None else (batch.segment_ids.contiguous(),)
    return (batch.tokens.contiguous(), *own, *segments)


@dataclass(frozen=True)
class EngineSettings:
    """Settings of an engine besides the model and the mesh.

    Attributes:
        seed: seed of initial weights and dropout.
        dtype: a key of `DTYPES`.
        micro_batch: samples per rank and micro batch.
        gradient_accumulation: micro batches per step.
        seq_length: tokens per sample.
        optimizer_type: a name of Adam, see `engine/optim.py`.
        gradient_clipping: largest global L2 norm of the gradients, 0 for none.
        activation_checkpoint_interval: blocks per recomputed segment, 0 stores all activations.
        fp32_grad_accum: sum the gradients of micro batches in fp32.
        fp32_allreduce: form tensor-parallel sums in fp32 when the activations are narrower.
        sequence_parallel: shard the sequence between tensor-parallel regions, see `parallel/sequence.py`.
        fp16: `loss_scale` (0 = dynamic), `initial_scale_power`, `loss_scale_window`, `hysteresis`, `min_loss_scale`.
        kernel_backend: path of the operators, see `ops/dispatch.py`.
        context_parallel_exchange: how context-parallel ranks exchange states, see `parallel/context.py`.
        loss_chunk_tokens: tokens whose logits exist at a time, see `model/linear_loss.py`; 0 for all of a micro batch.
        timeout_s: timeout of every collective.
        partition_method: how blocks are assigned to pipeline stages, see `model/partition.py`.
        weight_decay_rule: which parameters decay, see `engine/optim.py`.
        objective: the loss, see `model/objectives.py`.
        inputs: names of the mixers' inputs (`Layer.Inputs`) that every micro batch contains as `batch.inputs[name]`.
    """

    seed: int = 1234
    dtype: str = "fp32"
    micro_batch: int = 1
    gradient_accumulation: int = 1
    seq_length: int = 128
    optimizer_type: str = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0
    zero_stage: int = 0
    activation_checkpoint_interval: int = 0
    fp32_grad_accum: bool = True
    fp32_allreduce: bool = False
    sequence_parallel: bool = False
    context_parallel_exchange: str = "all_gather"
    fp16: Mapping[str, Any] = field(default_factory=dict)
    kernel_backend: str = "auto"
    loss_chunk_tokens: int = 0
    timeout_s: float = 1800.0
    partition_method: str = "type:transformer|mlp"
    weight_decay_rule: str = "neox"
    objective: Objective = field(default_factory=Objective)
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown precision '{self.dtype}'", hint="one of " + ", ".join(DTYPES))
        if self.micro_batch < 1 or self.gradient_accumulation < 1:
            raise ConfigError("micro batch and gradient_accumulation_steps must be at least 1")


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Attributes:
        loss: loss of the global batch, see `model/objectives.py`.
        grad_norm: global L2 norm before clipping; inf if not finite.
        skipped: weights and optimizer are unchanged, because loss or norm were not finite or above the engine's limits.
    """

    loss: Tensor | float
    grad_norm: Tensor | float
    skipped: Tensor | bool = False

    def numbers(self) -> tuple[float, float, bool]:
        """Loss, norm and whether the step was skipped as plain numbers; waits for the device."""
        values = (self.loss, self.grad_norm, self.skipped)
        tensors = [value.detach().double().reshape(()) for value in values if isinstance(value, Tensor)]
        copied = iter(torch.stack(tensors).tolist() if tensors else ())
        loss, norm, skipped = (float(next(copied) if isinstance(value, Tensor) else value) for value in values)
        return loss, norm if norm >= 0 else math.inf, bool(skipped)


@dataclass(frozen=True)
class EvalResult:
    """A loss on held-out data, the same on every rank.

    Attributes:
        loss: mean over the micro batches of all data-parallel ranks, as in training.
        right_answers: number of right answers.
        answers: positions of all micro batches where the task expects an answer; 0 unless `Objective.count_answers`.
    """

    loss: float
    right_answers: int = 0
    answers: int = 0


@dataclass(frozen=True)
class OptimizerSlice:
    """One rank's slice of one parameter's optimizer state: [start, stop) of its flattened local shard.

    Attributes:
        start: first element.
        stop: the element after the last.
        master: fp32 [stop - start].
        moments: name -> fp32 [stop - start].
        step: optimizer steps taken.
    """

    start: int
    stop: int
    master: Tensor
    moments: Mapping[str, Tensor]
    step: int


class Engine(ABC):
    """An engine; dictionaries are keyed by logical parameter names (`model.layers.0.token_mixer.q_proj.weight`)."""

    kind: ClassVar[str]
    mesh: Mesh
    specs: Mapping[str, ParamSpec]
    settings: EngineSettings
    device: torch.device
    dtype: torch.dtype
    # Names this rank holds as a copy of a parameter that an earlier pipeline stage owns (the tied output projection).
    # `weights()` and `optimizer_slices()` contain them; a checkpoint or an export takes the owner's.
    replica_names: frozenset[str] = frozenset()
    # Above these a step is skipped; the loop sets them before each step, the same on every rank.
    limits: StepLimits = StepLimits()
    # Parts of the last training step's loss where the objective has some: unweighted means, the same on every rank.
    loss_parts: Mapping[str, float] = types.MappingProxyType({})
    # Called with the phase that begins ("forward/backward", "step"), for the watchdog.
    listener: Callable[[str], None] | None = None

    @property
    def gradient_accumulation(self) -> int:
        """Micro batches per optimizer step."""
        return self.settings.gradient_accumulation

    @property
    def num_local_params(self) -> int:
        """Number of parameters on this rank (its tensor-parallel shard of its pipeline stage)."""
        return sum(p.numel() for p in self.parameters().values())

    def phase(self, name: str) -> None:
        """Report the phase that begins."""
        if self.listener is not None:
            self.listener(name)

    @abstractmethod
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Logical name -> this rank's live parameter in the compute dtype."""

    @abstractmethod
    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Take one optimizer step.

        Args:
            micro_batches: this data-parallel rank's, `gradient_accumulation` of them, in whole rows; a middle pipeline stage
                gets them too.
            lr: learning rate of the step.

        Raises:
            DataError: their number is wrong.
        """

    @abstractmethod
    def eval_loss(self, micro_batches: Sequence[MicroBatch]) -> EvalResult:
        """The loss over the micro batches of every data-parallel rank, as in training, and its counts of answers.

        Args:
            micro_batches: this data-parallel rank's, in whole rows; the same number on every rank.
        """

    def shards(self, micro_batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """This context-parallel rank's shards of micro batches; the micro batches themselves without context parallelism."""
        if self.mesh.cp == 1:
            return micro_batches
        return [batch.shard(self.mesh.cp_rank, self.mesh.cp) for batch in micro_batches]

    def check_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Raise DataError unless these are the micro batches of one step."""
        if len(micro_batches) != self.gradient_accumulation:
            raise DataError(f"a step of {self.gradient_accumulation} micro batches was given {len(micro_batches)}")

    @abstractmethod
    def optimizer_slices(self) -> dict[str, OptimizerSlice]:
        """This data-parallel rank's slices: views of its live state; moments and step are 0 before the first step."""

    @abstractmethod
    def load_optimizer_slices(self, slices: Mapping[str, OptimizerSlice]) -> None:
        """Restore the state that `optimizer_slices` returned, for the same ranges.

        Raises:
            CheckpointError: a name or a range differs from what this rank owns.
        """

    @abstractmethod
    def refresh_master_from_weights(self) -> None:
        """After `load_weights` without an optimizer state: fp32 masters become the weights, moments start at zero."""

    def first_not_finite(self) -> str | None:
        """Name of the first parameter whose master weights or moments on this rank are not all finite; None if all are."""
        owned = [(name, t) for name, own in self.optimizer_slices().items() for t in (own.master, *own.moments.values())]
        finite = torch.stack([torch.isfinite(t).all() for _, t in owned]).tolist() if owned else []
        return next((name for (name, _), is_finite in zip(owned, finite, strict=True) if not is_finite), None)

    @abstractmethod
    def describe(self) -> str:
        """One line for the log: which engine runs, and why."""

    def extra_state(self) -> dict[str, Any]:
        """Small JSON-able state besides tensors (loss scale)."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore `extra_state`; unknown keys are ignored, so that a run may resume in another precision."""

    def weights(self) -> dict[str, Tensor]:
        """Logical name -> this rank's local shard, detached, in the compute dtype; only names of this rank's stage."""
        return {name: param.detach() for name, param in self.parameters().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrite this rank's shards; call `refresh_master_from_weights` or `load_optimizer_slices` after it.

        Raises:
            CheckpointError: a name is missing or unknown, or a shape differs; then nothing is changed.
        """
        own = self.parameters()
        check_weights({name: tuple(param.shape) for name, param in own.items()}, weights)
        copy_all([(param.detach(), weights[name]) for name, param in own.items()])

    def close(self) -> None:
        """Release resources outside Python's memory; the engine must not be used afterwards."""


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first, which needs no gradient; on a CPU by several threads.

    Copying releases the GIL, and for large states it takes much of the time of a resume. Pairs that share their memory are
    skipped.
    """
    distinct = [(target, source) for target, source in pairs if target.data_ptr() != source.data_ptr()]
    work = sorted(distinct, key=lambda pair: -pair[0].numel())
    if not work or work[0][0].device.type != "cpu" or sum(target.numel() for target, _ in work) < _WORTH_THREADS:
        for target, source in work:
            target.copy_(source)
        return
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))), "copy") as pool:
        list(pool.map(lambda pair: pair[0].copy_(pair[1]), work))


def check_names(own: set[str], given: set[str], kind: str) -> None:
    """Raise CheckpointError unless both sets are equal; the message names the first few on either side.

    Args:
        own: names on this rank.
        given: names in the checkpoint.
        kind: kind of the tensors, for the message: "weights".
    """
    if own == given:
        return
    missing, unknown = sorted(own - given), sorted(given - own)
    parts = [f"missing {missing[:3]}" if missing else "", f"unknown {unknown[:3]}" if unknown else ""]
    raise CheckpointError(
        f"{kind} do not fit this model: " + ", ".join(p for p in parts if p),
        why=f"{len(missing)} missing and {len(unknown)} unknown names",
        hint="compare the model section of the config with the one stored in the checkpoint",
    )


def check_weights(own: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `given` has exactly the names and shapes of this rank's parameters."""
    check_names(set(own), set(given), "weights")
    for name, shape in own.items():
        if tuple(given[name].shape) != shape:
            raise CheckpointError(
                f"'{name}' has shape {tuple(given[name].shape)} in the checkpoint, this rank holds {shape}",
                why="another model, or another tensor-parallel size",
            )


def check_slice(name: str, own: tuple[int, int], given: OptimizerSlice) -> None:
    """Raise CheckpointError unless `given` covers exactly the range `own` with Adam's moments."""
    length = own[1] - own[0]
    fits = (given.start, given.stop) == own and given.master.numel() == length
    if not fits or any(m not in given.moments or given.moments[m].numel() != length for m in MOMENTS):
        raise CheckpointError(
            f"optimizer state of '{name}' covers [{given.start}, {given.stop}), this rank owns [{own[0]}, {own[1]})",
            why="it was saved on another mesh, or by another optimizer",
        )
