"""One process, plain PyTorch: the default engine for one process, and the reference of every parallel result.

fp32 trains directly. bf16 and fp16 keep fp32 master weights and sum micro batch gradients in fp32; fp16 adds a
loss scale that halves on overflow and doubles after a quiet window. A step whose gradients are not finite is skipped
in every precision, as DeepSpeed does, and so is one above `Engine.limits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import (
    MOMENTS,
    Engine,
    EngineSettings,
    EvalResult,
    OptimizerSlice,
    StepResult,
    batch_flow,
    check_names,
    check_slice,
    copy_all,
)
from megatron.engine.loss_scale import LossScale
from megatron.engine.optim import build_optimizer, parameter_groups, set_learning_rate
from megatron.engine.output import local_loss
from megatron.engine.skip_step import should_skip
from megatron.engine.stages import build_local, run_stages
from megatron.model.accuracy import ANSWER_COUNTS
from megatron.model.config import ModelConfig
from megatron.model.objectives import LossParts, global_divisors
from megatron.parallel.mesh import Mesh

# DeepSpeed adds this to the norm before it divides; the two engines must clip alike.
CLIP_EPS = 1e-6
# Gradients cast to fp32 in one call: a few launches instead of one each, without a second copy of all gradients.
_TOGETHER = 64


def _gradients_of(tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[Tensor]:
    """The gradients of those of these tensors that have one."""
    return [grad for name in names if (grad := tensors[name].grad) is not None]


class SingleProcessEngine(Engine):
    """See the module and `Engine`."""

    kind: ClassVar[str] = "single"

    def __init__(self, config: ModelConfig, settings: EngineSettings, device: torch.device) -> None:
        self.mesh, self.settings, self.device = Mesh.single(), settings, device
        self.local = build_local(config, self.mesh, settings, device)
        self.specs = self.local.specs
        self._parameters = self.local.parameters
        self.dtype = next(iter(self._parameters.values())).dtype
        self.stages = nn.ModuleList(self.local.stages)
        self._low = self.dtype != torch.float32
        self._masters: dict[str, Tensor] = dict(self._parameters)
        if self._low:
            self._masters = {name: p.detach().float() for name, p in self._parameters.items()}
        groups = parameter_groups(self._masters, self.specs, settings.weight_decay, settings.weight_decay_rule)
        self.optimizer = build_optimizer(groups, settings)
        self._parts = LossParts()
        self.loss_scale = LossScale.from_settings(settings)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Logical name -> parameter."""
        return self._parameters

    def _loss(self, batch: MicroBatch, divisors: Tensor | None) -> Tensor:
        """Loss of one micro batch, with the divisors of the step."""
        activations = tuple(tensor.to(self.device) for tensor in batch_flow(batch, self.settings.inputs))
        labels, mask = batch.labels.to(self.device), batch.loss_mask.to(self.device)
        interval = self.settings.activation_checkpoint_interval
        logits = run_stages(self.local.stages, activations, interval, keep_rng=self.local.draws)
        assert isinstance(logits, Tensor)
        loss, parts = local_loss(self.settings, self.local, self.mesh, logits, labels, mask, divisors)
        self._parts.add(parts)
        return loss

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One optimizer step; see `Engine.train_step`."""
        self.check_step(micro_batches)
        count = len(micro_batches)
        self.phase("forward/backward")
        self.stages.train()
        total = torch.zeros((), device=self.device)
        self._parts.reset()
        divisors = global_divisors(self.settings.objective, micro_batches, self.mesh, self.device)
        for batch in micro_batches:
            loss = self._loss(batch, divisors)
            (loss * (self.loss_scale.value / count)).backward()
            total += loss.detach()
            if self._low:
                self._gather_gradients()
        self.phase("step")
        if names := self.settings.objective.parts:
            means = self._parts.sums(names, self.device) / count
            self.loss_parts = dict(zip(names, means.tolist(), strict=True))
        loss, norm = total / count, self._norm()
        skipped = bool(should_skip(loss, norm, self.limits))
        if not skipped:
            self._clip(float(norm))
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            self._copy_masters_down()
        overflow = skipped and not bool(torch.isfinite(norm))
        self.loss_scale.update(overflow)
        for tensor in (*self._masters.values(), *self._parameters.values()):
            tensor.grad = None
        return StepResult(loss, torch.full_like(norm, float("inf")) if overflow else norm, skipped)

    @torch.no_grad()
    def _gather_gradients(self) -> None:
        """Add the micro batch's low-precision gradients to the fp32 sums and drop them."""
        names = [name for name, param in self._parameters.items() if param.grad is not None]
        for chunk in (names[at : at + _TOGETHER] for at in range(0, len(names), _TOGETHER)):
            first = [name for name in chunk if self._masters[name].grad is None]
            later = [name for name in chunk if self._masters[name].grad is not None]
            for name in first:
                self._masters[name].grad = torch.empty_like(self._masters[name])
            if first:
                torch._foreach_copy_(_gradients_of(self._masters, first), _gradients_of(self._parameters, first))
            if later:
                torch._foreach_add_(_gradients_of(self._masters, later), _gradients_of(self._parameters, later))
            for name in chunk:
                self._parameters[name].grad = None

    def _gradients(self) -> list[Tensor]:
        return _gradients_of(self._masters, self._masters)

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """Global L2 norm of the gradients before clipping, without the loss scale."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._gradients()))) / self.loss_scale.value

    @torch.no_grad()
    def _clip(self, norm: float) -> None:
        """Unscale and clip all gradients."""
        factor = 1.0 / self.loss_scale.value
        limit = self.settings.gradient_clipping
        if limit > 0:
            factor = factor / max(1.0, (norm + CLIP_EPS) / limit)
        if factor != 1.0:
            torch._foreach_mul_(self._gradients(), factor)

    @torch.no_grad()
    def _copy_masters_down(self) -> None:
        if self._low:
            torch._foreach_copy_(list(self._parameters.values()), [self._masters[name] for name in self._parameters])

    @torch.no_grad()
    def eval_loss(self, micro_batches: Sequence[MicroBatch]) -> EvalResult:
        """Loss over the micro batches; see `Engine.eval_loss`."""
        self.stages.eval()
        self._parts.reset()
        divisors = global_divisors(self.settings.objective, micro_batches, self.mesh, self.device)
        total = sum(float(self._loss(batch, divisors)) for batch in micro_batches)
        self.stages.train()
        right, answers = self._parts.sums(ANSWER_COUNTS, self.device, torch.float64).tolist()
        return EvalResult(total / len(micro_batches), int(right), int(answers))

    def optimizer_slices(self) -> dict[str, OptimizerSlice]:
        """Every parameter as one slice."""
        return {name: self._slice(master) for name, master in self._masters.items()}

    def _slice(self, master: Tensor) -> OptimizerSlice:
        state, flat = self.optimizer.state_of(master), master.detach().view(-1)
        return OptimizerSlice(0, flat.numel(), flat, {m: state[m].view(-1) for m in MOMENTS}, int(state["step"]))

    def load_optimizer_slices(self, slices: Mapping[str, OptimizerSlice]) -> None:
        """Masters and moments; the compute weights follow from the masters."""
        check_names(set(self._masters), set(slices), "optimizer states")
        for name, master in self._masters.items():
            check_slice(name, (0, master.numel()), slices[name])
        pairs = []
        for name, master in self._masters.items():
            given, state = slices[name], self.optimizer.state_of(master)
            pairs += [(state[moment].view(-1), given.moments[moment]) for moment in MOMENTS]
            pairs.append((master.detach().view(-1), given.master))
            state["step"].fill_(given.step)
        copy_all(pairs)
        with torch.no_grad():
            self._copy_masters_down()

    @torch.no_grad()
    def refresh_master_from_weights(self) -> None:
        """Masters become the weights; moments start at zero."""
        for name, param in self._parameters.items():
            self._masters[name].copy_(param)
        self.optimizer.state.clear()

    def extra_state(self) -> dict[str, Any]:
        """The loss scale of fp16."""
        return self.loss_scale.state()

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """See `extra_state`."""
        self.loss_scale.load(state)

    def describe(self) -> str:
        """One line for the log."""
        return f"engine: plain PyTorch, one process on {self.device.type}, {self.settings.dtype}, fused AdamW"
