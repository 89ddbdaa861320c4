"""Selects and builds the engine; DeepSpeed is imported only if its engine is selected."""

from __future__ import annotations

import os

import torch

from megatron.engine.base import Engine, EngineSettings
from megatron.engine.deepspeed_config import check_zero_stage
from megatron.engine.output import check_output
from megatron.engine.single_process import SingleProcessEngine
from megatron.engine.startup import prepare_process
from megatron.errors import ConfigError
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh
from megatron.parallel.random import seed_all

KINDS = ("auto", "single", "deepspeed")


def choose_kind(kind: str, mesh: Mesh) -> str:
    """`auto` is plain PyTorch for one process and DeepSpeed for more.

    Raises:
        ConfigError: unknown name, or `single` for several processes.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown engine '{kind}'", hint="one of " + ", ".join(KINDS))
    if kind == "single" and mesh.world_size > 1:
        raise ConfigError(f"engine 'single' runs one process, this job has {mesh.world_size}", hint="engine: deepspeed")
    if kind == "auto":
        return "single" if mesh.world_size == 1 else "deepspeed"
    return kind


def local_device(local_rank: int) -> torch.device:
    """The accelerator of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _check_memory(config: ModelConfig, mesh: Mesh, device: torch.device) -> None:
    """Reject a model whose matrices alone exceed this machine's memory, before the first of them is allocated."""
    widths = config.hidden_size * (config.vocab_size + config.num_layers * (config.mlp_width + config.hidden_size))
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    need = 2 * widths // (mesh.pp * mesh.tp)  # two bytes per element, one matrix of each kind
    if need > available:
        raise ConfigError(
            f"the model does not fit: its matrices alone take {need / 2**30:,.0f} GiB on each rank",
            why=f"this {'device' if device.type == 'cuda' else 'machine'} has {available / 2**30:,.0f} GiB",
            hint="lower hidden_size, num_layers or intermediate_size, or shard the model over more ranks; --dry-run plans it",
        )


def build_engine(kind: str, config: ModelConfig, mesh: Mesh, settings: EngineSettings, local_rank: int = 0) -> Engine:
    """Build the engine of this rank: model, optimizer, seeds.

    Args:
        kind: auto | single | deepspeed.
        config: the model.
        mesh: with process groups if it has more than one process.
        settings: settings of the engine.
        local_rank: index of this process on its machine, which is also its accelerator's.

    Raises:
        ConfigError: the model, mesh and settings do not fit together.
    """
    kind = choose_kind(kind, mesh)
    check_output(settings)
    prepare_process()
    device = local_device(local_rank)
    _check_memory(config, mesh, device)
    seed_all(settings.seed, mesh)
    if kind == "single":
        return SingleProcessEngine(config, settings, device)
    check_zero_stage(settings.zero_stage, mesh.pp)
    if settings.zero_stage > 1:
        from megatron.engine.deepspeed_zero import DeepSpeedZeROEngine

        return DeepSpeedZeROEngine(config, mesh, settings, device)
    from megatron.engine.deepspeed_pipeline import DeepSpeedPipelineEngine

    return DeepSpeedPipelineEngine(config, mesh, settings, device)
