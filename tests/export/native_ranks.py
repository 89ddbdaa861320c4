"""One tensor-parallel rank of a checkpoint's model, run on given tokens: its logits, gathered over the vocabulary."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.load import read_full_weights
from megatron.checkpoint.manifest import read_manifest
from megatron.generation.load import filled_model, model_config_of
from megatron.model.build import param_specs
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
