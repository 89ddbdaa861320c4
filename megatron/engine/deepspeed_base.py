"""Base of the two DeepSpeed engines: flags for its gradient norm, skipped steps, the state of a ZeRO optimizer as slices.

Nothing here imports DeepSpeed; `deepspeed_pipeline.py` (pipelines, ZeRO-1) and `deepspeed_zero.py` (one stage, ZeRO-2 and 3)
start DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.engine.base import (
    MOMENTS,
    Engine,
    EngineSettings,
    EvalResult,
    OptimizerSlice,
    check_names,
    check_slice,
    copy_all,
)
from megatron.engine.optim import FusedAdamW, build_optimizer, parameter_groups
from megatron.engine.skip_step import should_skip
from megatron.engine.stages import EMBEDDING, LocalModel, build_local
from megatron.model.accuracy import ANSWER_COUNTS
from megatron.model.config import ModelConfig
from megatron.model.objectives import LossParts
from megatron.parallel.collectives import all_reduce
from megatron.parallel.mesh import Mesh


@dataclass(frozen=True)
class OwnedSlice:
    """Location of this data-parallel rank's slice of a flattened parameter.

    Attributes:
        flat: the fp32 partition that contains it.
        at: offset in `flat`.
        start: offset in the parameter.
        numel: number of elements.
    """

    flat: Tensor
    at: int
    start: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """The slice, as a view, of a tensor with the layout of `flat`."""
        return tensor.narrow(0, self.at, self.numel)


class DeepSpeedBase(Engine):
    """An engine over a DeepSpeed ZeRO optimizer, which a subclass stores in `_zero`, and DeepSpeed's engine in `_engine`."""

    _engine: Any
    _zero: Any

    def _build(self, config: ModelConfig, mesh: Mesh, settings: EngineSettings, device: torch.device) -> FusedAdamW:
        """This rank's model and the optimizer to be sharded."""
        self.mesh, self.settings, self.device = mesh, settings, device
        self.local: LocalModel = build_local(config, mesh, settings, device)
        self.specs, self._parameters = self.local.specs, self.local.parameters
        self.dtype = next(iter(self._parameters.values())).dtype
        self.replica_names = frozenset({EMBEDDING} if self.local.tied_copy else ())
        for name, param in self._parameters.items():
            # Both spellings: the gradient norm counts unflagged parameters on tensor rank 0 only.
            param.model_parallel = param.tensor_model_parallel = self.specs[name].cut != "replicated"  # type: ignore[attr-defined]
        self._loss = self._refused = torch.zeros((), device=device)
        self._decided = False
        self._parts = LossParts()
        # The tied matrix is first in its group on both stages, so that the same SIMD lanes process its two copies.
        decay = (settings.weight_decay, settings.weight_decay_rule)
        return build_optimizer(parameter_groups(self._parameters, self.specs, *decay, first=(EMBEDDING,)), settings)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Logical name -> this rank's parameter."""
        return self._parameters

    def _skip(self) -> Tensor:
        """Called by the optimizer once per parameter group: 1.0 if this step must be skipped."""
        if not self._decided:
            norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self._loss.device)
            self._refused, self._decided = should_skip(self._loss, norm, self.limits), True
        return self._refused

    def _total_parts(self, names: Sequence[str], dtype: torch.dtype = torch.float32) -> Tensor:
        """Sums of parts over the micro batches of all ranks [k]; each of the last stage's tensor ranks has added the same."""
        group = dist.group.WORLD if self.mesh.world_size > 1 else None
        return all_reduce(self._parts.sums(names, self.device, dtype), group)

    def _set_loss_parts(self) -> None:
        """Make `loss_parts` the means over the step's micro batches."""
        if names := self.settings.objective.parts:
            means = self._total_parts(names) / (self.gradient_accumulation * self.mesh.dp * self.mesh.tp)
            self.loss_parts = dict(zip(names, means.tolist(), strict=True))

    def _eval_result(self, loss: float) -> EvalResult:
        """A loss with the counts of answers that its micro batches added."""
        if not self.settings.objective.count_answers:
            return EvalResult(loss)
        right, answers = (self._total_parts(ANSWER_COUNTS, torch.float64) / self.mesh.tp).tolist()
        return EvalResult(loss, int(right), int(answers))

    def _flat_partitions(self) -> list[Tensor]:
        """The fp32 partitions, one per parameter group, that this data-parallel rank updates."""
        if hasattr(self._zero, "fp32_groups_flat_partition"):
            return list(self._zero.fp32_groups_flat_partition)
        return list(self._zero.single_partition_of_fp32_groups)

    def _owned(self) -> dict[str, OwnedSlice]:
        """Name -> this rank's slice, for the parameters of which it owns a slice."""
        flats, owned = self._flat_partitions(), {}
        for name, param in self._parameters.items():
            mapping = getattr(param, "_hp_mapping", None)
            if mapping is not None:
                place, low = mapping.hp_fragment_address, mapping.lp_fragment_address
                owned[name] = OwnedSlice(flats[mapping.param_group_index], place.start, low.start, low.numel)
        return owned

    def optimizer_slices(self) -> dict[str, OptimizerSlice]:
        """This data-parallel rank's slices; see `Engine`."""
        slices = {}
        for name, own in self._owned().items():
            state = self._zero.optimizer.state_of(own.flat)
            moments = {m: own.of(state[m]) for m in MOMENTS}
            master = own.of(own.flat.detach())
            slices[name] = OptimizerSlice(own.start, own.start + own.numel, master, moments, int(state["step"]))
        return slices

    def load_optimizer_slices(self, slices: Mapping[str, OptimizerSlice]) -> None:
        """Masters and moments; the compute weights come from `load_weights`."""
        owned = self._owned()
        check_names(set(owned), set(slices), "optimizer states")
        for name, own in owned.items():
            check_slice(name, (own.start, own.start + own.numel), slices[name])
        pairs = []
        for name, own in owned.items():
            given, state = slices[name], self._zero.optimizer.state_of(own.flat)
            pairs += [(own.of(state[moment]), given.moments[moment]) for moment in MOMENTS]
            state["step"].fill_(given.step)
            pairs.append((own.of(own.flat.detach()), given.master))
        copy_all(pairs)

    @torch.no_grad()
    def refresh_master_from_weights(self) -> None:
        """Masters become the weights; moments start at zero."""
        self._zero.refresh_fp32_params()
        self._zero_moments()

    def _zero_moments(self) -> None:
        for flat in self._flat_partitions():
            state = self._zero.optimizer.state.get(flat, {})
            for key in (*MOMENTS, "step"):
                if key in state:
                    state[key].zero_()

    def _scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler; None in other precisions or with a fixed scale."""
        scaler = getattr(self._zero, "loss_scaler", None)
        return scaler if self.settings.dtype == "fp16" and getattr(scaler, "dynamic", False) else None

    def extra_state(self) -> dict[str, Any]:
        """The loss scale of fp16, in the form of `loss_scale.py`."""
        s = self._scaler()
        if s is None:
            return {}
        quiet = s.cur_iter - 1 - s.last_overflow_iter
        return {"loss_scale": {"value": float(s.cur_scale), "quiet": quiet, "left": s.cur_hysteresis}}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """See `extra_state`."""
        s, saved = self._scaler(), state.get("loss_scale")
        if s is not None and saved:
            s.cur_scale, s.cur_hysteresis = float(saved["value"]), int(saved["left"])
            s.last_overflow_iter = s.cur_iter - 1 - int(saved["quiet"])
