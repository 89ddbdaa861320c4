"""DeepSpeed's plain engine as an `Engine`: ZeRO-2 and ZeRO-3 with tensor parallelism, for one pipeline stage.

ZeRO-2 shards gradients over the data-parallel ranks, ZeRO-3 the weights too, each flattened and split into equal shards. The
model, the loss, skipped steps and the optimizer's arithmetic are those of the pipeline engine. With ZeRO-3 a layer's weights
are complete only while it computes; `weights` gathers them and is therefore a collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import (
    EngineSettings,
    EvalResult,
    StepResult,
    batch_flow,
    check_weights,
)
from megatron.engine.deepspeed_base import DeepSpeedBase, OwnedSlice
from megatron.engine.deepspeed_pipeline import one_stage_grid, start_deepspeed
from megatron.engine.optim import set_learning_rate
from megatron.engine.output import local_loss
from megatron.engine.stages import LocalModel, run_stages
from megatron.model.config import ModelConfig
from megatron.model.objectives import LossParts, global_divisors
from megatron.parallel.collectives import all_reduce
from megatron.parallel.mesh import Mesh


class _ModelAndLoss(nn.Module):
    """All stages, then the loss."""

    def __init__(self, local: LocalModel, mesh: Mesh, settings: EngineSettings, parts: LossParts) -> None:
        super().__init__()
        self.stages = nn.ModuleList(local.stages)
        self._local, self._mesh, self._settings, self._parts = local, mesh, settings, parts
        self.divisors: Tensor | None = None  # divisors of the step

    def forward(self, labels: Tensor, mask: Tensor, *activations: Tensor) -> Tensor:
        """Loss of a micro batch.

        Args:
            labels: [b, s].
            mask: [b, s].
            *activations: input of the first stage.
        """
        interval, keep_rng = self._settings.activation_checkpoint_interval, self._local.draws
        logits = run_stages(list(self.stages), activations, interval, keep_rng)
        assert isinstance(logits, Tensor)
        loss, parts = local_loss(self._settings, self._local, self._mesh, logits, labels, mask, self.divisors)
        self._parts.add(parts)
        return loss


class DeepSpeedZeROEngine(DeepSpeedBase):
    """See the module and `Engine`."""

    kind: ClassVar[str] = "deepspeed"

    def __init__(self, config: ModelConfig, mesh: Mesh, settings: EngineSettings, device: torch.device) -> None:
        grid = one_stage_grid(mesh, settings.timeout_s)
        optimizer = self._build(config, mesh, settings, device)
        self._shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        self._model = _ModelAndLoss(self.local, mesh, settings, self._parts)
        self._engine, self._zero = start_deepspeed(self._model, self, optimizer, grid)
        self._zero.optimizer.skip = self._skip

    @property
    def num_local_params(self) -> int:
        """Parameters of this rank's tensor-parallel shard, before ZeRO shards them."""
        return sum(int(getattr(p, "ds_numel", p.numel())) for p in self._parameters.values())

    def _run(self, batch: MicroBatch) -> Tensor:
        """The loss of one micro batch."""
        tensors = (batch.labels.contiguous(), batch.loss_mask.contiguous(), *batch_flow(batch, self.settings.inputs))
        loss = self._engine(*(tensor.to(self.device) for tensor in tensors))
        assert isinstance(loss, Tensor)
        return loss

    def _mean(self, total: Tensor, count: int) -> Tensor:
        """The mean over `count` micro batches of every data-parallel rank."""
        return all_reduce(total / count, self.mesh.dp_group) / self.mesh.dp

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One optimizer step; see `Engine.train_step`."""
        self.check_step(micro_batches)
        count, micro_batches = len(micro_batches), self.shards(micro_batches)
        self._model.divisors = global_divisors(self.settings.objective, micro_batches, self.mesh, self.device)
        set_learning_rate(self._zero, lr)
        self.phase("forward/backward")
        self._engine.train()
        self._parts.reset()
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches):
            loss = self._run(batch)
            self._engine.backward(loss)
            total += loss.detach()
            if number == count - 1:  # reduced before the optimizer runs, so that a bad loss skips the step
                self.phase("step")
                self._loss, self._decided = self._mean(total, count), False
            self._engine.step()
        self._set_loss_parts()
        skipped = self._refused if self._engine.was_step_applied() else True
        return StepResult(self._loss, self._zero._global_grad_norm, skipped)

    @torch.no_grad()
    def eval_loss(self, micro_batches: Sequence[MicroBatch]) -> EvalResult:
        """Loss over the micro batches of every data-parallel rank; see `Engine.eval_loss`."""
        self._engine.eval()
        self._parts.reset()
        micro_batches = self.shards(micro_batches)
        self._model.divisors = global_divisors(self.settings.objective, micro_batches, self.mesh, self.device)
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            total += self._run(batch).detach()
        self._engine.train()
        return self._eval_result(float(self._mean(total, len(micro_batches))))

    def _flat_partitions(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat) if self._three else super()._flat_partitions()

    @property
    def _three(self) -> bool:
        return self.settings.zero_stage == 3

    def _owned(self) -> dict[str, OwnedSlice]:
        """As in ZeRO-1, except that ZeRO-3 shards every parameter separately, with a shorter last shard."""
        if not self._three:
            return super()._owned()
        flats, owned = self._flat_partitions(), {}
        for name, param in self._parameters.items():
            group, at, size = self._zero.grad_position[self._zero.get_param_id(param)]
            start = min(size * self.mesh.dp_rank, param.ds_numel)  # type: ignore[attr-defined]
            stop = min(start + size, param.ds_numel)  # type: ignore[attr-defined]
            if start < stop:
                owned[name] = OwnedSlice(flats[group], at, start, stop - start)
        return owned

    def weights(self) -> dict[str, Tensor]:
        """As `Engine.weights`; with ZeRO-3 every rank must call it."""
        if not self._three:
            return super().weights()
        return {name: self._gathered(param).view(self._shapes[name]) for name, param in self._parameters.items()}

    def _gathered(self, param: nn.Parameter) -> Tensor:
        shard: Tensor = param.ds_tensor.detach()  # type: ignore[attr-defined]
        full = shard.new_empty(shard.numel() * self.mesh.dp)
        if self.mesh.dp_group is None:
            full.copy_(shard)
        else:
            dist.all_gather_into_tensor(full, shard.contiguous(), group=self.mesh.dp_group)
        return full[: param.ds_numel]  # type: ignore[attr-defined]

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """As `Engine.load_weights`: each rank keeps its shard."""
        if not self._three:
            super().load_weights(weights)
            return
        check_weights(self._shapes, weights)
        for name, param in self._parameters.items():
            shard, given = param.ds_tensor.detach(), weights[name].reshape(-1)  # type: ignore[attr-defined]
            own = given[shard.numel() * self.mesh.dp_rank :][: shard.numel()]
            shard[: own.numel()].copy_(own)
            if param.numel() == given.numel():  # DeepSpeed keeps small parameters complete, in addition to their shard
                param.detach().view(-1).copy_(given)

    @torch.no_grad()
    def refresh_master_from_weights(self) -> None:
        """Masters become the weights; moments start at zero."""
        if not self._three:
            super().refresh_master_from_weights()
            return
        for flat, low in zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_partitioned_groups_flat, strict=True):
            flat.copy_(low)
        self._zero_moments()

    def describe(self) -> str:
        """One line for the log."""
        return f"engine: DeepSpeed, ZeRO-{self.settings.zero_stage}, {self.mesh.describe()}, {self.settings.dtype}"

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers."""
        self._engine.destroy()
