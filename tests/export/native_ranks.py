"""What a rank of a native model does for the tests of exported folders; kept apart from the imports of transformers.

`logits_on_ranks`: one tensor-parallel rank of a checkpoint's model, run on given tokens: its logits, gathered over the
vocabulary. `save_run`: one rank of a mesh that saves a checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.load import read_full_weights
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.save import SaveOptions, save_checkpoint
from megatron.engine.base import EngineSettings
from megatron.engine.build import build_engine
from megatron.generation.load import filled_model, model_config_of
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor import shard_model


def logits_on_ranks(checkpoint: str, tokens: Tensor) -> Tensor:
    """Logits [b, s, n] of the whole model, on every rank."""
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    mesh = Mesh.create(1, size, size, rank)
    config = model_config_of(read_manifest(Path(checkpoint)), checkpoint)
    model = filled_model(config, read_full_weights(Path(checkpoint)))
    shard_model(model, param_specs(config), mesh)
    with torch.inference_mode():
        local, _ = model(tokens)
    parts = [torch.empty_like(local) for _ in range(size)]
    torch.distributed.all_gather(parts, local.contiguous(), group=mesh.tp_group)
    return torch.cat(parts, -1)


def save_run(folder: str, kind: str, pp: int, tp: int, config: ModelConfig) -> str:
    """Build an engine on this rank (weights do not depend on the mesh) and save it; the checkpoint's folder."""
    mesh = Mesh.create(pp, tp, pp * tp, int(os.environ["RANK"])) if pp * tp > 1 else Mesh.single()
    engine = build_engine(kind, config, mesh, EngineSettings(seq_length=16, zero_stage=1), 0)
    facts = {"tokenizer": {"vocab_size": 60, "eod": 0, "pad": 0}}
    try:
        return str(save_checkpoint(folder, engine, {"iteration": 3}, SaveOptions(model_config=config.to_dict(), facts=facts)))
    finally:
        engine.close()
