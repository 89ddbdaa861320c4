"""DeepSpeed's pipeline engine behind `Engine`: pipeline, tensor, data parallelism with ZeRO-1. The only importer of deepspeed.

It is the pipeline engine for any number of stages, one included, so that there is one path. What DeepSpeed would get
wrong or do slowly (spec/environment.md 2) is held here and in `deepspeed_config.py`; each point has a test:

* a shared-memory op that compiles C++ at start and is never used in training is switched off;
* the Muon modules, which every ZeRO optimizer imports to ask "is it Muon?", are replaced by an answer: they cost torch._dynamo;
* groups that DeepSpeed makes without a time-out get ours, not torch's 30 minutes;
* stage 0 is run as ZeRO-1 (wrong clipping with pipelines); the optimizer is a torch object (no C++ build);
* the loss is reduced before the optimizer runs instead of after it, so that it can veto the step (`engine/veto.py`);
* tied weights, partition and recomputation are ours (`engine/stages.py`), and tensor-parallel parameters are flagged,
  so that the gradient norm counts every number once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.engine.base import (
    MOMENTS,
    Engine,
    EngineSettings,
    MicroBatch,
    OptimizerSlice,
    StepResult,
    check_names,
    check_slice,
    take_micro_batches,
)
from megatron.engine.deepspeed_config import deepspeed_config, zero_stage_note
from megatron.engine.optim import build_optimizer, parameter_groups, set_learning_rate
from megatron.engine.stages import EMBEDDING, LocalModel, build_local, run_stages
from megatron.engine.veto import veto
from megatron.model.config import ModelConfig
from megatron.model.loss import token_loss
from megatron.model.stages import Flow
from megatron.parallel.collectives import all_reduce
from megatron.parallel.loss import check_labels, vocab_parallel_token_loss
from megatron.parallel.mesh import Mesh, rank_of, set_default_timeout
from megatron.training.objectives import LossParts, objective_loss

_MUON = "deepspeed.runtime.zero.muon"


def _prepare_import() -> None:
    """What must be true before `import deepspeed`: the accelerator is known, the Muon module is answered."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for module, name in (("muon_optimizer", "MuonWithAuxAdam"), ("original_muon", "muon_update")):
        if f"{_MUON}.{module}" not in sys.modules:
            answer = types.ModuleType(f"{_MUON}.{module}")
            setattr(answer, name, type(name, (), {}))  # nothing is an instance of it, and nobody calls it
            sys.modules[f"{_MUON}.{module}"] = answer
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*an autograd kernel was not registered.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")


_prepare_import()
with contextlib.redirect_stdout(io.StringIO()):
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Set, not looked up: the first look-up probes every op of DeepSpeed with a C compiler.
vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what DeepSpeed prints to stdout; it is shown if the body fails."""
    held = io.StringIO()
    try:
        with contextlib.redirect_stdout(held):
            yield
    except BaseException:
        sys.stderr.write(held.getvalue())
        raise


def _join_world(mesh: Mesh, timeout_s: float) -> None:
    """Let DeepSpeed find a process group; several processes have one already, a single one gets its own."""
    set_default_timeout(timeout_s)
    os.environ.setdefault("LOCAL_RANK", "0")  # PipelineModule reads it and nothing else
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=mesh.rank, world_size=mesh.world_size)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)


class _Pipeline(PipelineModule):
    """This rank's stages as DeepSpeed wants them, with our partition, our tied weights and our recomputation."""

    def __init__(self, local: LocalModel, mesh: Mesh, settings: EngineSettings) -> None:
        self._local, self._mesh, self._settings = local, mesh, settings
        self.loss_parts = LossParts(settings.objective.parts)
        topology = PipeModelDataParallelTopology(num_pp=mesh.pp, num_mp=mesh.tp, num_dp=mesh.dp)
        super().__init__([s.module for s in local.all_stages], topology=topology, loss_fn=self._loss)

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = self._local.bounds
        self._set_bounds(start=self.parts[self._mesh.pp_rank], stop=self.parts[self._mesh.pp_rank + 1])

    def forward(self, forward_input: Flow) -> Flow | Tensor:
        """Tuple of tensors through this rank's stages; the last stage gives logits."""
        interval, keep_rng = self._settings.activation_checkpoint_interval, self._local.config.hidden_dropout > 0
        return run_stages(self.forward_funcs, forward_input, interval, keep_rng)

    def _loss(self, logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        labels, mask = targets
        group = self._mesh.tp_group
        if group is None:
            check_labels(labels, mask, self._local.config.vocab_size)

        def mean(x: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
            return token_loss(x, y, w) if group is None or w is None else vocab_parallel_token_loss(x, y, w, group)

        loss, parts = objective_loss(self._settings.objective, logits, labels, mask, mean)
        self.loss_parts.add(parts)
        return loss

    def _index_tied_modules(self) -> dict[str, Any]:
        """The group of first and last stage for a tied output matrix; every rank takes part in making the groups."""
        mesh = self._mesh
        found: dict[str, Any] = {}
        if mesh.pp == 1 or not self._local.config.tie_embeddings:
            return found
        for d in range(mesh.dp):
            for t in range(mesh.tp):
                ranks = [rank_of(p, d, t, dp=mesh.dp, tp=mesh.tp) for p in (0, mesh.pp - 1)]
                group = dist.new_group(ranks)
                if mesh.rank in ranks:
                    module = self.forward_funcs[0 if mesh.pp_rank == 0 else -1]
                    found["embed"] = {"ranks": ranks, "group": group, "module": module}
        if self._local.tied_copy:
            # The copy's gradient is complete on both stages; the norm must count it once.
            self._local.parameters[EMBEDDING].ds_pipe_replicated = True  # type: ignore[attr-defined]
        return found

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """Weight and group whose gradients are summed before the data-parallel reduction."""
        return [(self._local.parameters[EMBEDDING], comm["group"]) for comm in self.tied_comms.values()]

    def _synchronize_tied_weights(self) -> None:
        """Nothing to send: both copies start from the same function of (seed, name) and take the same steps."""


class DeepSpeedEngine(Engine):
    """See the module and `Engine`."""

    kind: ClassVar[str] = "deepspeed"

    def __init__(self, config: ModelConfig, mesh: Mesh, settings: EngineSettings, device: torch.device) -> None:
        self.mesh, self.settings, self.device = mesh, settings, device
        _join_world(mesh, settings.timeout_s)
        self.local = build_local(config, mesh, settings, device)
        self.specs, self._parameters = self.local.specs, self.local.parameters
        self.dtype = next(iter(self._parameters.values())).dtype
        self.replica_names = frozenset({EMBEDDING} if self.local.tied_copy else ())
        for name, param in self._parameters.items():
            # Both spellings: the gradient norm counts unflagged parameters on tensor rank 0 only.
            param.model_parallel = param.tensor_model_parallel = self.specs[name].cut != "replicated"  # type: ignore[attr-defined]
        ds_config = deepspeed_config(settings, mesh.dp, device.type != "cpu", self.num_local_params)
        # The tied matrix leads its group on both stages, so that its two copies go through the same vector lanes.
        decay = (settings.weight_decay, settings.weight_decay_rule)
        groups = parameter_groups(self._parameters, self.specs, *decay, first=(EMBEDDING,))
        with _quiet():
            pipeline = _Pipeline(self.local, mesh, settings)
            self._parts = pipeline.loss_parts
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=pipeline,
                optimizer=build_optimizer(groups, settings),
                model_parameters=list(self._parameters.values()),
                config=ds_config,
            )
        self._loss = self._refused = torch.zeros((), device=device)
        self._decided = False
        self._let_the_loss_veto()

    def _let_the_loss_veto(self) -> None:
        """Reduce the loss before the optimizer's step, with DeepSpeed's own collectives and no more of them."""
        take_step, reduce_loss = self._engine._take_model_step, self._engine._aggregate_total_loss

        def step(lr_kwargs: Any) -> None:
            self.phase("step")
            with torch.no_grad():
                self._loss, self._decided = reduce_loss().detach(), False
            take_step(lr_kwargs)

        self._engine._take_model_step = step
        self._engine._aggregate_total_loss = lambda: self._loss
        self._zero.optimizer.skip = self._skip

    def _skip(self) -> Tensor:
        """Asked by the optimizer once per parameter group: 1.0 when this step must change nothing."""
        if not self._decided:
            norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self._loss.device)
            self._refused, self._decided = veto(self._loss, norm, self.limits), True
        return self._refused

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Logical name -> this rank's parameter."""
        return self._parameters

    def _feed(self, batches: Iterator[MicroBatch], count: int) -> Iterator[tuple[Flow, tuple[Tensor, Tensor]]]:
        """(inputs of the first stage, targets of the last) per micro batch."""
        for batch in take_micro_batches(batches, count):
            segments = () if batch.segment_ids is None else (batch.segment_ids.contiguous(),)
            yield (batch.tokens.contiguous(), *segments), (batch.labels.contiguous(), batch.loss_mask.contiguous())

    def train_step(self, batches: Iterator[MicroBatch], lr: float) -> StepResult:
        """One optimizer step; see `Engine.train_step`."""
        feed = iter(list(self._feed(batches, self.gradient_accumulation)))
        set_learning_rate(self._zero, lr)
        self.phase("forward/backward")
        self._parts.reset()
        loss = self._engine.train_batch(data_iter=feed)
        if self._parts.names:
            self.loss_parts = self._mean_parts()
        skipped = self._refused if self._engine.was_step_applied() else True
        return StepResult(loss.detach(), self._engine.get_global_grad_norm(), skipped)

    def _mean_parts(self) -> dict[str, float]:
        """Means over the step's micro batches of all data-parallel ranks; only ranks of the last stage have added something."""
        group = dist.group.WORLD if self.mesh.world_size > 1 else None
        total = all_reduce(self._parts.sums(self.device), group)
        means = total / (self.gradient_accumulation * self.mesh.dp * self.mesh.tp)
        return dict(zip(self._parts.names, means.tolist(), strict=True))

    def eval_loss(self, batches: Iterator[MicroBatch], count: int) -> float:
        """Mean loss over `count` micro batches of every data-parallel rank."""
        feed = iter(list(self._feed(batches, count)))
        loss = float(self._engine.eval_batch(feed, num_micro_batches=count))
        self._engine.module.train()
        return loss

    def _flat_partitions(self) -> list[Tensor]:
        """The fp32 partitions, one per parameter group, that this data-parallel rank updates."""
        if hasattr(self._zero, "fp32_groups_flat_partition"):
            return list(self._zero.fp32_groups_flat_partition)
        return list(self._zero.single_partition_of_fp32_groups)

    def _owned(self) -> dict[str, tuple[Any, Tensor]]:
        """Name -> (DeepSpeed's fragment mapping, the flat partition it lies in), for what this rank owns a part of."""
        flats = self._flat_partitions()
        maps = {name: getattr(p, "_hp_mapping", None) for name, p in self._parameters.items()}
        return {name: (m, flats[m.param_group_index]) for name, m in maps.items() if m is not None}

    def optimizer_slices(self) -> dict[str, OptimizerSlice]:
        """This data-parallel rank's pieces; see `Engine`."""
        slices = {}
        for name, (mapping, flat) in self._owned().items():
            place, low = mapping.hp_fragment_address, mapping.lp_fragment_address
            state = self._zero.optimizer.state.get(flat, {})
            master = flat.detach().narrow(0, place.start, place.numel).clone()
            moments = {
                m: state[m].narrow(0, place.start, place.numel).clone() if m in state else torch.zeros_like(master)
                for m in MOMENTS
            }
            step = int(state["step"]) if "step" in state else 0
            slices[name] = OptimizerSlice(low.start, low.start + low.numel, master, moments, step)
        return slices

    @torch.no_grad()
    def load_optimizer_slices(self, slices: Mapping[str, OptimizerSlice]) -> None:
        """Masters and moments; the compute weights come from `load_weights`."""
        owned = self._owned()
        check_names(set(owned), set(slices), "optimizer states")
        for name, (mapping, _) in owned.items():
            low = mapping.lp_fragment_address
            check_slice(name, (low.start, low.start + low.numel), slices[name])
        for name, (mapping, flat) in owned.items():
            place, part = mapping.hp_fragment_address, slices[name]
            state = self._zero.optimizer.state[flat]
            for moment in MOMENTS:
                target = state.setdefault(moment, torch.zeros_like(flat))
                target.narrow(0, place.start, place.numel).copy_(part.moments[moment])
            state["step"] = torch.tensor(float(part.step), device=flat.device)
            flat.narrow(0, place.start, place.numel).copy_(part.master)

    @torch.no_grad()
    def refresh_master_from_weights(self) -> None:
        """Masters become the weights; moments are forgotten."""
        self._zero.refresh_fp32_params()
        for flat in self._flat_partitions():
            for moment in MOMENTS:
                self._zero.optimizer.state.get(flat, {}).get(moment, flat.new_zeros(1)).zero_()
            if "step" in self._zero.optimizer.state.get(flat, {}):
                self._zero.optimizer.state[flat]["step"].zero_()

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

    def describe(self) -> str:
        """One line for the log."""
        line = f"engine: DeepSpeed {deepspeed.__version__} pipeline, ZeRO-1, {self.mesh.describe()}, {self.settings.dtype}"
        note = zero_stage_note(self.settings)
        return f"{line} ({note})" if note else line

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers."""
        with _quiet():
            self._engine.destroy()
