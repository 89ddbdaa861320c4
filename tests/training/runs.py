"""A tiny MetaLA run on one process or many, put together from the same parts as `assemble.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.load import LoadOptions, load_checkpoint
from megatron.checkpoint.save import SaveOptions, save_checkpoint
from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import Engine, EngineSettings
from megatron.engine.build import build_engine
from megatron.engine.schedule import ScheduleConfig, learning_rate
from megatron.launch.environment import read_rank_environment
from megatron.model.config import ModelConfig
from megatron.observe.console import Console
from megatron.observe.metrics import CostModel
from megatron.observe.sinks import SinkOptions, Sinks
from megatron.parallel.mesh import Mesh
from megatron.reliability.stop import Control
from megatron.training.evaluate import Evaluator
from megatron.training.hooks import Hook, Run, Skip, Step
from megatron.training.intervals import SaveRule
from megatron.training.loop import Actions, fit
from megatron.training.options import FitOptions
from megatron.training.reporting import Reporting
from megatron.training.state import TrainState

VOCAB, SEQ, MICRO_TOTAL, ACCUMULATION = 64, 16, 4, 2
CURVE = ScheduleConfig(lr=1e-2, horizon=20, style="cosine", warmup=0.1, min_lr=1e-3)
MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    mlp_width=48,
    layer_types=("metala", "metala"),
    norm="rmsnorm",
)


def sample(number: int) -> Tensor:
    """Sample `number`, [SEQ + 1]: every second token repeats, so that there is something to learn."""
    tokens = torch.randint(0, VOCAB, (SEQ + 1,), generator=torch.Generator().manual_seed(number))
    tokens[1::2] = tokens[:-1:2]
    return tokens


def micros(mesh: Mesh, start: int) -> Iterator[MicroBatch]:
    """Endless micro batches of this rank from the global sample `start` on."""
    size = MICRO_TOTAL // mesh.dp
    while True:
        ids = list(range(start + mesh.dp_rank * size, start + (mesh.dp_rank + 1) * size))
        text = torch.stack([sample(i) for i in ids])
        yield MicroBatch(text[:, :-1], text[:, 1:], torch.ones(size, SEQ), None, ids)
        start += MICRO_TOTAL


class Recorder(Hook):
    """Keeps every step, exactly."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.skips: list[Skip] = []
        self.heard: list[str] = []

    def on_start(self, run: Run) -> None:
        self.heard.append("start")

    def on_step(self, run: Run, step: Step) -> None:
        self.steps.append(step)
        self.heard.append(f"step {step.iteration}")

    def on_skip(self, run: Run, skip: Skip) -> None:
        self.skips.append(skip)
        self.heard.append(f"skip {skip.iteration}")

    def on_rewind(self, run: Run, iteration: int) -> None:
        self.heard.append(f"rewind {iteration}")

    def on_save(self, run: Run, path: Path, seconds: float) -> None:
        self.heard.append(f"save {path.name}")

    def on_evaluation(self, run: Run, evaluation: Any) -> None:
        self.heard.append(f"{evaluation.split} {run.state.iteration}")

    def on_end(self, run: Run, outcome: str) -> None:
        self.heard.append(outcome)


def make_engine(pp: int = 1, tp: int = 1, kind: str = "single", model: ModelConfig = MODEL, **settings: Any) -> Engine:
    """This rank's engine; the world is what the environment describes (one process without it)."""
    if kind == "single":
        mesh = Mesh.single()
        local = 0
    else:
        env = read_rank_environment(os.environ)
        mesh, local = Mesh.create(pp, tp, env.world_size, env.rank), env.local_rank
    defaults: dict[str, Any] = {"gradient_accumulation": ACCUMULATION, "seq_length": SEQ}
    made = replace(EngineSettings(**{**defaults, **settings}), micro_batch=MICRO_TOTAL // mesh.dp)
    return build_engine(kind, model, mesh, made, local)


def options(train_iters: int = 20, **changes: Any) -> FitOptions:
    """Fit options of the tiny run; saves at the end unless told otherwise."""
    defaults: dict[str, Any] = {"save_rule": SaveRule(train_iters=train_iters)}
    return FitOptions(
        train_iters=train_iters,
        samples_per_step=MICRO_TOTAL * ACCUMULATION,
        seq_length=SEQ,
        **{**defaults, **changes},
    )


def train(
    engine: Engine,
    folder: Path | None,
    fit_options: FitOptions,
    *,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    metrics: Path | None = None,
    log_interval: int = 1,
    keep_last: int | None = None,
    control: Control | None = None,
    data: Callable[[Mesh, int], Iterator[MicroBatch]] = micros,
) -> tuple[Run, Recorder]:
    """Run `fit` as `assemble.py` does: resume, data at the cursor, saving, validation, reporting on rank 0."""
    state = TrainState()
    path = find_checkpoint(folder, None, folder) if resume and folder else None
    if path is not None:
        state = TrainState.from_dict(load_checkpoint(path, engine, LoadOptions(model_config=MODEL.to_dict())))
    recorder = Recorder()
    own: list[Hook] = [recorder, *hooks]
    if metrics is not None and engine.mesh.rank == 0:
        sinks = Sinks.open(SinkOptions(metrics, resume_from=state.iteration))
        own.append(Reporting(sinks, Console(), CostModel(1e6, 1, 1.0), log_interval))

    def save(now: TrainState) -> Path:
        assert folder is not None
        return save_checkpoint(folder, engine, now.to_dict(), SaveOptions(model_config=MODEL.to_dict(), keep_last=keep_last))

    def rewind() -> Mapping[str, Any]:
        newest = find_checkpoint(folder, None, folder) if folder else None
        assert newest is not None
        return load_checkpoint(newest, engine, LoadOptions(model_config=MODEL.to_dict()))

    asked = None if control is None else control.stop_asked
    validate = Evaluator(engine, lambda: data(engine.mesh, 10_000), 2, stop_asked=asked)
    actions = Actions(save if folder else None, validate, rewind=rewind if folder else None)
    batches = data(engine.mesh, state.consumed_samples)
    run = fit(engine, batches, lambda n: learning_rate(n, CURVE), state, fit_options, actions, own, control)
    return run, recorder
