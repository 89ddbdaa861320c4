"""A tiny MetaLA model, its batches, and a training job that the parity tests run on any mesh."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import Engine, EngineSettings
from megatron.engine.build import build_engine
from megatron.engine.schedule import ScheduleConfig, learning_rate
from megatron.launch.environment import read_rank_environment
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh
from megatron.training.micro_batches import take_micro_batches

VOCAB, SEQ, GLOBAL = 64, 24, 4
CURVE = ScheduleConfig(lr=1e-2, horizon=20, style="cosine", warmup=0.1, min_lr=1e-3)


def model_config(tied: bool = True, **changes: Any) -> ModelConfig:
    """4 blocks, 4 heads; a norm with a gain, so that there are replicated parameters besides the convolution."""
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        mlp_width=48,
        layer_types=("metala",) * 4,
        norm="rmsnorm",
        tie_embeddings=tied,
    )
    return replace(config, **changes)


def documents() -> Tensor:
    """Segment ids [GLOBAL, SEQ] of rows that differ: one document; some across shards of a quarter row; borders between shards,
    with documents of one token on either side; and documents of two or three tokens."""
    starts = ([], [3, 17], [5, 6, 7, 12, 18], [*range(2, SEQ, 5), *range(5, SEQ, 5)])
    ids = torch.zeros(GLOBAL, SEQ, dtype=torch.int32)
    for row, places in enumerate(starts):
        ids[row, places] = 1
    return ids.cumsum(1).int()


def micro_batches(
    mesh: Mesh, segments: bool = False, start: int = 0, masks: str = "even", ids: str = ""
) -> Iterator[MicroBatch]:
    """Endless micro batches: GLOBAL samples each over all data ranks, learnable (every second token repeats).

    masks: even, as many counted tokens in every row; uneven, from none to all, prefix and rest alike.
    ids: documents, those of `documents` instead of two halves of a row.
    """
    size = GLOBAL // mesh.data_size
    number = start
    while True:
        g = torch.Generator().manual_seed(number)
        x = torch.randint(0, VOCAB, (GLOBAL, SEQ + 1), generator=g)
        x[:, 1::2] = x[:, :-1:2]
        mask = torch.ones(GLOBAL, SEQ)
        if masks == "even":
            mask[:, number % SEQ] = 0.0
        else:
            share = torch.tensor([0.0, 0.1, 0.5, 1.0]).roll(number)[:, None]
            mask = (torch.rand(GLOBAL, SEQ, generator=g) < share).float()
        seg = (torch.arange(SEQ) >= SEQ // 2).int().expand(GLOBAL, SEQ) if segments else None
        if ids:
            seg = documents().roll(number, 0)
        rows = slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
        yield MicroBatch(x[rows, :-1], x[rows, 1:], mask[rows], None if seg is None else seg[rows])
        number += 1


def for_step(engine: Engine, batches: Iterator[MicroBatch]) -> list[MicroBatch]:
    """The micro batches of the engine's next step."""
    return take_micro_batches(batches, engine.gradient_accumulation)


def make_engine(pp: int, tp: int, kind: str, settings: EngineSettings, config: ModelConfig) -> Engine:
    """The engine of this rank, for the world that the environment describes."""
    env = read_rank_environment(os.environ)
    mesh = Mesh.create(pp, tp, env.world_size, env.rank)
    settings = replace(settings, micro_batch=GLOBAL // mesh.dp, seq_length=SEQ)
    return build_engine(kind, config, mesh, settings, env.local_rank)


def train(
    pp: int, tp: int, kind: str, settings: EngineSettings, config: ModelConfig, steps: int = 20, segments: bool = False
) -> dict[str, Any]:
    """Train and report: losses, gradient norms, evaluation loss, local weights."""
    engine = make_engine(pp, tp, kind, settings, config)
    batches = micro_batches(engine.mesh, segments)
    losses, norms = [], []
    for step in range(steps):
        result = engine.train_step(for_step(engine, batches), learning_rate(step, CURVE))
        assert not result.skipped
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
    return {
        "losses": losses,
        "norms": norms,
        "eval": engine.eval_loss(take_micro_batches(micro_batches(engine.mesh, segments, start=1000), 3)).loss,
        "weights": {name: w.float().clone() for name, w in engine.weights().items()},
        "replicas": engine.replica_names,
        "coordinates": (engine.mesh.pp_rank, engine.mesh.dp_rank, engine.mesh.tp_rank),
        "cuts": {name: engine.specs[name].cut for name in engine.weights()},
        "describe": engine.describe(),
        "kept": sum(p.numel() for p in engine.parameters().values()),
    }


def join(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Whole weights from the ranks' parts (data rank 0; the owner's copy of a tied matrix)."""
    parts: dict[str, dict[int, Tensor]] = {}
    cuts: dict[str, str] = {}
    for result in results:
        _, d, t = result["coordinates"]
        for name, weight in result["weights"].items():
            if d == 0 and name not in result["replicas"]:
                parts.setdefault(name, {})[t] = weight
                cuts[name] = result["cuts"][name]
    dims = {"column": 0, "heads": 0, "vocab": 0, "row": 1}
    return {
        name: torch.cat([by[t] for t in sorted(by)], dims[cuts[name]]) if cuts[name] in dims else by[0]
        for name, by in parts.items()
    }
