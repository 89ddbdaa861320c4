"""From a model config to this rank's stages: sharded, partitioned over the pipeline, initialised.

All engines build their model here, so a parameter has the same initial value on every mesh. The complete model is built on the
meta device; only this rank's tensor-parallel shard of its stages is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.engine.base import DTYPES, EngineSettings
from megatron.errors import ConfigError
from megatron.model.block import Block
from megatron.model.build import build_model, check_context_parallel, check_tensor_parallel, param_specs
from megatron.model.config import ModelConfig
from megatron.model.init import init_weights
from megatron.model.partition import balanced_bounds, stage_costs
from megatron.model.stages import Activations, BlockStage, LastStage, Stage, StageModule, stages_of
from megatron.ops.modules import has_hooks
from megatron.parallel.context_shards import ContextShards
from megatron.parallel.mesh import Mesh
from megatron.parallel.sequence import check_sequence_parallel, sum_replicated_gradients
from megatron.parallel.shard_spec import ParamSpec
from megatron.parallel.tensor import local_slice, shard_model

EMBEDDING = "model.embed_tokens.weight"


def _passes_parts(stage: nn.Module) -> bool:
    """Whether a stage is a block without hooks: hooks expect a single tensor, which they may replace."""
    return isinstance(stage, BlockStage) and not (has_hooks(stage) or has_hooks(stage.body))


def _run_chain(stages: Sequence[nn.Module], activations: Activations | Tensor) -> Activations | Tensor:
    for i, stage in enumerate(stages):
        in_parts = i + 1 < len(stages) and all(_passes_parts(one) for one in stages[i : i + 2])
        activations = stage(activations, True) if in_parts else stage(activations)
    return activations


def run_stages(
    stages: Sequence[nn.Module], activations: Activations, interval: int = 0, keep_rng: bool = False
) -> Activations | Tensor:
    """Pass `activations` through the stages; with `interval` n, segments of n blocks store their input only and recompute.

    The non-reentrant form is used: the reentrant one (DeepSpeed's default) loses the gradient of a segment whose inputs need
    none. Between two blocks of a chain the residual stream is in two parts (`Block.forward`); what a segment stores and
    what is sent to another rank is one tensor.

    Args:
        stages: in order.
        activations: input of the first.
        interval: blocks per recomputed segment; 0 stores all activations.
        keep_rng: a recomputed segment draws the same random numbers (dropout) as its first pass.
    """
    if not interval or not torch.is_grad_enabled():
        return _run_chain(stages, activations)
    out: Activations | Tensor = activations
    at = 0
    while at < len(stages):
        segment = [stages[at]]
        while len(segment) < interval and at + len(segment) < len(stages) and isinstance(stages[at + len(segment)], BlockStage):
            segment.append(stages[at + len(segment)])
        at += len(segment) if isinstance(segment[0], BlockStage) else 1
        if isinstance(segment[0], BlockStage):
            out = checkpoint(_run_chain, segment, out, use_reentrant=False, preserve_rng_state=keep_rng)
        else:
            out = segment[0](out)
    return out


@dataclass
class LocalModel:
    """This rank's part of the model.

    Attributes:
        config: the complete model.
        specs: logical name -> spec, of all parameters.
        all_stages: the complete model's, in order, on the meta device except for this rank's.
        bounds: pipeline bounds of `all_stages`.
        stages: this rank's stage modules, in order.
        parameters: logical name -> this rank's parameter.
        tied_copy: the last stage has a copy of the embedding that another rank owns.
    """

    config: ModelConfig
    specs: Mapping[str, ParamSpec]
    all_stages: list[Stage]
    bounds: list[int]
    stages: list[nn.Module]
    parameters: dict[str, nn.Parameter]
    tied_copy: bool

    @property
    def draws(self) -> bool:
        """Whether a forward pass in training draws random numbers, which a recomputed one must repeat."""
        blocks = [stage.body for stage in self.stages if isinstance(stage, BlockStage)]
        return any(b.dropout or b.token_mixer.draws_random() for b in blocks)  # type: ignore[union-attr,operator]

    def output_matrix(self) -> Tensor:
        """This rank's rows of the output projection [n, d]; only the last pipeline stage has one."""
        last = self.stages[-1]
        assert isinstance(last, LastStage) and isinstance(last.body.weight, Tensor)
        return last.body.weight


def check_mesh(config: ModelConfig, mesh: Mesh, seq_length: int = 0) -> None:
    """Raise ConfigError when the model, or rows of `seq_length` tokens, cannot be sharded over the mesh; builds nothing."""
    check_tensor_parallel(config, mesh.tp)
    check_context_parallel(config, mesh.cp, mesh.tp, seq_length)
    if config.num_layers < mesh.pp:
        raise ConfigError(
            f"{config.num_layers} layers cannot fill {mesh.pp} pipeline stages",
            hint="lower pipe_parallel_size or raise num_layers",
        )


def build_local(config: ModelConfig, mesh: Mesh, settings: EngineSettings, device: torch.device) -> LocalModel:
    """Build, shard and initialize this rank's stages.

    Raises:
        ConfigError: heads, widths or layers cannot be divided over the mesh.
    """
    check_mesh(config, mesh, settings.seq_length)
    specs = param_specs(config)
    with torch.device("meta"):
        model = build_model(config)
    shards = None if mesh.cp == 1 else ContextShards(mesh, settings.seq_length, settings.context_parallel_exchange)
    all_stages = stages_of(model, settings.kernel_backend, not settings.loss_chunk_tokens, settings.inputs, shards)
    costs = stage_costs(settings.partition_method, all_stages, config)
    bounds = balanced_bounds(costs, mesh.pp)
    if settings.sequence_parallel:
        check_sequence_parallel(model, specs, mesh.tp, settings.seq_length // mesh.cp, config.hidden_dropout)
    shard_model(model, specs, mesh, settings.fp32_allreduce, settings.sequence_parallel)
    start, stop = bounds[mesh.pp_rank], bounds[mesh.pp_rank + 1]
    local = nn.ModuleList(stage.module for stage in all_stages[start:stop])
    logical = _logical_names(local, specs)
    init_weights(
        local,
        logical,
        specs,
        config,
        settings.seed,
        slices=lambda spec: local_slice(spec, mesh),
        device=device,
        dtype=DTYPES[settings.dtype],
    )
    for module in local.modules():
        if isinstance(module, Block):
            module.pack_weights()
    parameters = {logical[name]: p for name, p in local.named_parameters()}
    if settings.sequence_parallel and mesh.tp_group is not None:
        sum_replicated_gradients(parameters, specs, mesh.tp_group)
    tied_copy = EMBEDDING in parameters and start > 0
    return LocalModel(config, specs, all_stages, bounds, list(local), parameters, tied_copy)


def _logical_names(local: nn.ModuleList, specs: Mapping[str, ParamSpec]) -> dict[str, str]:
    """`<position>.<name in the stage>` -> logical name; a tied output projection has the embedding's name."""
    names: dict[str, str] = {}
    for i, stage in enumerate(local):
        assert isinstance(stage, StageModule)
        for inner, logical in stage.logical.items():
            names[f"{i}.{inner}"] = logical if logical in specs else EMBEDDING
    return names
