"""A tiny training run for the checkpoint harnesses: everything that can differ after a resume, as one digest per rank.

Dropout is on, so that a wrong random state changes the next loss; the matrix is tied, so that a pipeline holds two copies.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.load import LoadOptions
from megatron.checkpoint.resume import resume
from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import Engine, EngineSettings
from megatron.engine.build import build_engine
from megatron.engine.schedule import ScheduleConfig, learning_rate
from megatron.launch.environment import read_rank_environment
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Mesh
from megatron.parallel.random import capture_rng, seed_all

VOCAB, SEQ, BATCH = 64, 16, 4  # BATCH samples make one micro batch of the whole data-parallel group
CURVE = ScheduleConfig(lr=1e-2, horizon=60, style="cosine", warmup=0.1, min_lr=1e-3)


def model_of(layers: int = 4, mixer: str = "metala", dropout: float = 0.1) -> ModelConfig:
    """The model; four layers fill four pipeline stages."""
    return ModelConfig(VOCAB, 32, layers, 4, 48, (mixer,) * layers, norm="rmsnorm", hidden_dropout=dropout)


def sample(number: int) -> Tensor:
    """Sample `number`, [SEQ + 1]: every second token repeats."""
    tokens = torch.randint(0, VOCAB, (SEQ + 1,), generator=torch.Generator().manual_seed(number))
    tokens[1::2] = tokens[:-1:2]
    return tokens


class Run:
    """An engine, its data cursor and its step count on one rank."""

    def __init__(self, kind: str, config: ModelConfig, pp: int = 1, tp: int = 1, seed: int = 1234, **settings: Any) -> None:
        env = read_rank_environment(os.environ)
        self.mesh = Mesh.single() if kind == "single" else Mesh.create(pp, tp, env.world_size, env.rank)
        made = replace(
            EngineSettings(seed=seed, gradient_accumulation=1, seq_length=SEQ, **settings), micro_batch=BATCH // self.mesh.dp
        )
        seed_all(seed, self.mesh)
        self.config = config
        self.engine: Engine = build_engine(kind, config, self.mesh, made, env.local_rank)
        self.iteration, self.cursor, self.ids = 0, 0, list[int]()

    def _micros(self) -> Iterator[MicroBatch]:
        size = BATCH // self.mesh.dp
        first = self.cursor + self.mesh.dp_rank * size
        self.ids = list(range(first, first + size))
        text = torch.stack([sample(i) for i in self.ids])
        yield MicroBatch(text[:, :-1], text[:, 1:], torch.ones(size, SEQ), None, self.ids)

    def step(self) -> tuple[str, str]:
        """One step; loss and gradient norm as exact texts."""
        result = self.engine.train_step(list(self._micros()), learning_rate(self.iteration, CURVE))
        self.iteration += 1
        self.cursor += BATCH
        return float(result.loss).hex(), float(result.grad_norm).hex()

    @property
    def state(self) -> dict[str, int]:
        """What a checkpoint stores besides tensors."""
        return {"iteration": self.iteration, "consumed_samples": self.cursor}

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every save."""
        return {"model_config": self.config.to_dict(), "config_texts": {"a.yml": "x: 1\n"}}

    def resume(self, folder: Path, iteration: int | None = None) -> tuple[str, ...]:
        """Resume from the folder as a run does when it starts; the checkpoints that were skipped."""
        options = LoadOptions(model_config=self.config.to_dict(), in_place=True)
        resumed = resume(folder, self.engine, options, iteration=iteration, save_dir=folder)
        self.iteration = resumed.state.get("iteration", 0)
        self.cursor = resumed.state.get("consumed_samples", 0)
        return resumed.skipped

    def digest(self) -> str:
        """SHA-256 of this rank's weights, masters, moments, steps, random states, cursor."""
        total = hashlib.sha256(f"{self.iteration} {self.cursor}".encode())
        tensors = dict(self.engine.weights())
        for name, part in self.engine.optimizer_slices().items():
            total.update(f"{name} {part.start} {part.stop} {part.step}".encode())
            tensors |= {f"{name} {kind}": t for kind, t in {"master": part.master, **part.moments}.items()}
        tensors |= {f"rng {kind}": t for kind, t in capture_rng().items()}
        for name in sorted(tensors):
            total.update(name.encode())
            total.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()
