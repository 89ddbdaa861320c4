"""DeepSpeed's pipeline engine as an `Engine`: pipeline, tensor, data parallelism with ZeRO-1. The only importer of deepspeed.

It is the pipeline engine for any number of stages, one included; ZeRO-2 and 3, which it cannot do, are in `deepspeed_zero.py`.
DeepSpeed's defects and delays are worked around here and in `deepspeed_config.py`; each point has a test:

* a shared-memory op that compiles C++ at start and is never used in training is switched off;
* the Muon modules, which every ZeRO optimizer imports for a type check, are replaced by stubs: they import torch._dynamo;
* groups that DeepSpeed creates without a timeout get ours, not torch's 30 minutes;
* stage 0 is run as ZeRO-1 (wrong clipping with pipelines); the optimizer is a torch object (no C++ build);
* the loss is reduced before the optimizer runs instead of after it, so that a bad loss skips the step (`engine/skip_step.py`);
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import EngineSettings, EvalResult, StepResult, batch_flow
from megatron.engine.deepspeed_base import DeepSpeedBase
from megatron.engine.deepspeed_config import deepspeed_config, zero_stage_note
from megatron.engine.optim import FusedAdamW, set_learning_rate
from megatron.engine.output import local_loss
from megatron.engine.stages import EMBEDDING, LocalModel, run_stages
from megatron.model.config import ModelConfig
from megatron.model.objectives import LossParts, global_divisors
from megatron.model.stages import Activations
from megatron.parallel.mesh import Mesh, rank_of, set_default_timeout

_MUON = "deepspeed.runtime.zero.muon"


def _prepare_import() -> None:
    """Name the accelerator and replace the Muon modules, before `import deepspeed`."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for module, name in (("muon_optimizer", "MuonWithAuxAdam"), ("original_muon", "muon_update")):
        if f"{_MUON}.{module}" not in sys.modules:
            stub = types.ModuleType(f"{_MUON}.{module}")
            setattr(stub, name, type(name, (), {}))  # nothing is an instance of it, and nothing calls it
            sys.modules[f"{_MUON}.{module}"] = stub
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*an autograd kernel was not registered.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")


_prepare_import()
with contextlib.redirect_stdout(io.StringIO()):
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Set, not looked up: the first look-up probes every op of DeepSpeed with a C compiler.
vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Capture DeepSpeed's output to stdout; it is printed if the body fails."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            yield
    except BaseException:
        sys.stderr.write(output.getvalue())
        raise


def _join_world(mesh: Mesh, timeout_s: float) -> None:
    """Make sure that DeepSpeed finds a process group; with a single process, create one."""
    set_default_timeout(timeout_s)
    os.environ.setdefault("LOCAL_RANK", "0")  # PipelineModule reads only this variable
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=mesh.rank, world_size=mesh.world_size)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)


@dataclass(frozen=True)
class _BeforeLoss:
    """Input of the loss on the last stage; of a type that DeepSpeed does not inspect."""

    activations: Activations


class _Pipeline(PipelineModule):
    """This rank's stages as a `PipelineModule`, with our partition, tied weights and recomputation.

    The output projection is part of the loss: DeepSpeed keeps the output of the last stage until its buffer is reused, possibly
    in the next step, and logits are large. DeepSpeed runs `begin_backward` when a gradient reaches the output of the last
    stage. By then the matrix already has its gradient, which DeepSpeed would drop (in bf16) as stale. Therefore it is called
    when the backward of the loss begins.
    """

    begin_backward: Callable[[], None]
    divisors: Tensor | None = None  # divisors of the step, see `global_divisors`

    def __init__(self, local: LocalModel, mesh: Mesh, settings: EngineSettings, parts: LossParts) -> None:
        self._local, self._mesh, self._settings, self._parts = local, mesh, settings, parts
        topology = PipeModelDataParallelTopology(num_pp=mesh.pp, num_mp=mesh.tp, num_dp=mesh.dp)
        super().__init__([s.module for s in local.all_stages], topology=topology, loss_fn=self._loss)

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = self._local.bounds
        self._set_bounds(start=self.parts[self._mesh.pp_rank], stop=self.parts[self._mesh.pp_rank + 1])

    def forward(self, forward_input: Activations) -> Activations | _BeforeLoss:
        """Tuple of tensors through this rank's stages; in the last one, up to the output projection."""
        interval, keep_rng = self._settings.activation_checkpoint_interval, self._local.draws
        last = self._mesh.pp_rank == self._mesh.pp - 1
        activations = run_stages(self.forward_funcs[: -1 if last else None], forward_input, interval, keep_rng)
        assert isinstance(activations, tuple)
        return _BeforeLoss(activations) if last else activations

    def _loss(self, hidden: _BeforeLoss, targets: tuple[Tensor, Tensor]) -> Tensor:
        output = self.forward_funcs[-1](hidden.activations)
        loss, parts = local_loss(self._settings, self._local, self._mesh, output, *targets, self.divisors)
        self._parts.add(parts)
        if loss.requires_grad:
            loss.register_hook(lambda _: self.begin_backward())
        return loss

    def _index_tied_modules(self) -> dict[str, Any]:
        """The group of first and last stage for a tied output projection; all ranks create the groups together."""
        mesh = self._mesh
        groups: dict[str, Any] = {}
        if mesh.pp == 1 or not self._local.config.tie_embeddings:
            return groups
        for d in range(mesh.dp):
            for t in range(mesh.tp):
                ranks = [rank_of(p, d, t, dp=mesh.dp, tp=mesh.tp) for p in (0, mesh.pp - 1)]
                group = dist.new_group(ranks)
                if mesh.rank in ranks:
                    module = self.forward_funcs[0 if mesh.pp_rank == 0 else -1]
                    groups["embed"] = {"ranks": ranks, "group": group, "module": module}
        if self._local.tied_copy:
            # The copy's gradient is complete on both stages; the norm must count it once.
            self._local.parameters[EMBEDDING].ds_pipe_replicated = True  # type: ignore[attr-defined]
        return groups

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """Weight and group whose gradients are summed before the data-parallel reduction."""
        return [(self._local.parameters[EMBEDDING], comm["group"]) for comm in self.tied_comms.values()]

    def _synchronize_tied_weights(self) -> None:
        """No communication: both copies start from the same function of (seed, name) and get the same updates."""


def start_deepspeed(module: nn.Module, engine: DeepSpeedBase, optimizer: FusedAdamW, grid: Any = None) -> tuple[Any, Any]:
    """DeepSpeed's engine and its ZeRO optimizer around a model.

    Args:
        module: a `PipelineModule` or a plain module.
        engine: our engine, whose parameters and settings are used.
        optimizer: the optimizer to be sharded.
        grid: from `one_stage_grid` for a plain module; a pipeline has its own.

    Returns:
        (DeepSpeed's engine, its ZeRO optimizer).
    """
    config = deepspeed_config(engine.settings, engine.mesh, engine.device.type != "cpu", engine.num_local_params)
    with _quiet():
        params = list(engine.parameters().values())
        started, zero, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=params, config=config, mpu=grid
        )
    return started, zero


def one_stage_grid(mesh: Mesh, timeout_s: float) -> Any:
    """The process groups of a mesh without a pipeline, as DeepSpeed's plain engine reads them; sets DeepSpeed up first."""
    _join_world(mesh, timeout_s)
    return PipelineParallelGrid(topology=PipeModelDataParallelTopology(num_pp=1, num_mp=mesh.tp, num_dp=mesh.dp))


class DeepSpeedPipelineEngine(DeepSpeedBase):
    """See the module and `Engine`."""

    kind: ClassVar[str] = "deepspeed"

    def __init__(self, config: ModelConfig, mesh: Mesh, settings: EngineSettings, device: torch.device) -> None:
        _join_world(mesh, settings.timeout_s)
        optimizer = self._build(config, mesh, settings, device)
        with _quiet():
            self._pipeline = _Pipeline(self.local, mesh, settings, self._parts)
        self._engine, self._zero = start_deepspeed(self._pipeline, self, optimizer)
        self._pipeline.begin_backward = self._engine._backward_prologue
        self._reduce_loss_before_step()

    def _reduce_loss_before_step(self) -> None:
        """Reduce the loss before the optimizer's step, with DeepSpeed's own collectives and no additional ones."""
        take_step, reduce_loss = self._engine._take_model_step, self._engine._aggregate_total_loss

        def step(lr_kwargs: Any) -> None:
            self.phase("step")
            with torch.no_grad():
                self._loss, self._decided = reduce_loss().detach(), False
            take_step(lr_kwargs)

        self._engine._take_model_step = step
        self._engine._aggregate_total_loss = lambda: self._loss
        self._zero.optimizer.skip = self._skip

    def _inputs_and_targets(self, micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[Activations, tuple[Tensor, Tensor]]]:
        """(inputs of the first stage, targets of the last) per micro batch, as DeepSpeed reads them."""
        micro_batches = self.shards(micro_batches)
        self._pipeline.divisors = global_divisors(self.settings.objective, micro_batches, self.mesh, self.device)
        names = self.settings.inputs
        return iter([(batch_flow(b, names), (b.labels.contiguous(), b.loss_mask.contiguous())) for b in micro_batches])

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One optimizer step; see `Engine.train_step`."""
        self.check_step(micro_batches)
        pairs = self._inputs_and_targets(micro_batches)
        set_learning_rate(self._zero, lr)
        self.phase("forward/backward")
        self._parts.reset()
        loss = self._engine.train_batch(data_iter=pairs)
        self._set_loss_parts()
        skipped = self._refused if self._engine.was_step_applied() else True
        return StepResult(loss.detach(), self._engine.get_global_grad_norm(), skipped)

    def eval_loss(self, micro_batches: Sequence[MicroBatch]) -> EvalResult:
        """Loss over the micro batches of every data-parallel rank; see `Engine.eval_loss`."""
        pairs = self._inputs_and_targets(micro_batches)
        self._parts.reset()
        loss = float(self._engine.eval_batch(pairs, num_micro_batches=len(micro_batches)))
        self._engine.module.train()
        return self._eval_result(loss)

    def describe(self) -> str:
        """One line for the log."""
        line = f"engine: DeepSpeed {deepspeed.__version__} pipeline, ZeRO-1, {self.mesh.describe()}, {self.settings.dtype}"
        note = zero_stage_note(self.settings)
        return f"{line} ({note})" if note else line

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers."""
        with _quiet():
            self._engine.destroy()
