"""Training in this process: `Trainer` for a few steps at a time, `train` for a complete run."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from linear_neox.models import ConfigLike, as_run
from megatron import assemble
from megatron.checkpoint.background import Saver
from megatron.config.checks import require_data
from megatron.config.schema import RunConfig
from megatron.data.tokenizers import Tokenizer
from megatron.engine.base import Engine
from megatron.errors import ConfigError
from megatron.generation.load import filled_model
from megatron.launch.environment import RankEnvironment, read_rank_environment
from megatron.model.config import ModelConfig
from megatron.model.lm import LanguageModel
from megatron.settings import fit_options
from megatron.training.evaluate import Evaluation
from megatron.training.hooks import Hook, Run, Step
from megatron.training.loop import fit
from megatron.training.state import TrainState


class _UpTo(Hook):
    """Records every step, and stops the loop at step `last`."""

    def __init__(self, history: list[Step], last: int) -> None:
        self.history, self.last = history, last

    def on_step(self, run: Run, step: Step) -> None:
        self.history.append(step)
        if step.iteration >= self.last:
            run.request_stop(f"step {self.last}")


class Trainer:
    """Interactive training in one process.

    It uses the components of `train.py` and takes the same steps: same initial weights, data order, schedule and losses. It
    writes nothing unless `save` is called: no run folder, no metrics file, no checkpoint.

        trainer = Trainer("configs/metala-quickstart.yml", train_iters=100)
        trainer.train(10)
        print([step.loss for step in trainer.history])

    Args:
        config: a loaded configuration, the name of a YAML, or a mapping of keys. If its `load` folder holds a checkpoint,
            training resumes from it, as the command does; `load=None` starts a new run.
        hooks: objects with methods of `megatron.training.hooks.Hook`.
        **overrides: keys that override the configuration, see `load_config`.

    Attributes:
        run: the configuration.
        history: a `Step` (iteration, loss, grad_norm, learning_rate, skipped, seconds, ...) per step of this trainer.

    Raises:
        ConfigError: the configuration is wrong, or needs several processes.
        DataError: the data are missing or were made with another tokenizer.
        CheckpointError: the checkpoint does not match.
    """

    def __init__(self, config: ConfigLike, *, hooks: Sequence[Hook] = (), **overrides: Any) -> None:
        run = as_run(config, **overrides)
        require_data(run)
        ranks = run.parallel.model_processes
        if ranks > 1:
            raise ConfigError(
                f"the configuration needs {ranks} processes, a Trainer has one",
                hint="model_parallel_size=1, pipe_parallel_size=0, context_parallel_size=1, or the command:"
                " linear-neox train CONFIG",
            )
        self._components = assemble.build(run, RankEnvironment(), lambda: None)
        resumed = assemble.restore(run, self.engine, self.config)
        self._state = TrainState.from_dict(resumed.state)
        self.run: RunConfig = self._components.data_pipeline.build(resumed.state.get("data", {}))
        self._continued = assemble.continued(self.run, resumed, self._state)
        consumed = self._state.consumed_samples, self._state.consumed_tokens
        self._batches = self._components.data_pipeline.training(self._components.mesh, *consumed)
        close = getattr(self._batches, "close", None)  # a prefetch thread must end before the interpreter
        self._stop_prefetch = weakref.finalize(self, close) if close is not None else None
        self._hooks = list(hooks)
        self.history: list[Step] = []

    @property
    def engine(self) -> Engine:
        """The engine, with weights and optimizer."""
        return self._components.engine

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._components.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data."""
        return self._components.tokenizer

    @property
    def seq_length(self) -> int:
        """Sequence length of the training."""
        return self.run.model.seq_length

    @property
    def iteration(self) -> int:
        """Steps taken so far, including earlier runs."""
        return self._state.iteration

    @property
    def model(self) -> LanguageModel:
        """A copy of the model with the current weights, in evaluation mode."""
        return filled_model(self.config, self.engine.weights())

    def train(self, steps: int | None = None) -> list[Step]:
        """Take `steps` optimizer steps, but at most the remaining ones of `train_iters`; None: all of them.

        Returns:
            The new steps, which are also appended to `history`.

        Raises:
            TrainingError: the budget of skipped steps is exhausted.
        """
        remaining = self.run.training.train_iters - self.iteration
        count = remaining if steps is None else min(steps, remaining)
        begin = len(self.history)
        if count > 0:
            options = replace(fit_options(self.run), eval_interval=None, exit_interval=None)
            hooks = [*self._hooks, _UpTo(self.history, self.iteration + count)]
            fit(self.engine, self._batches, self._continued.schedule, self._state, options, hooks=hooks)
        return self.history[begin:]

    def evaluate(self, name: str = "valid") -> Evaluation:
        """Loss over the run's `eval_iters` batches of `valid` or `test`.

        Returns:
            `.loss` in nats per token, `.perplexity`, and `.accuracy` for tasks with answers.

        Raises:
            ConfigError: the run has no data of that name.
        """
        evaluator = assemble.build_evaluator(self.run, self._components, name, {"valid": "validation"}.get(name, name))
        evaluation = None if evaluator is None else evaluator()
        if evaluation is None:
            raise ConfigError(
                f"the run has no data to evaluate under '{name}'", hint="set split (or valid_data_paths) and eval_iters"
            )
        return evaluation

    def save(self, folder: str | Path | None = None) -> Path:
        """Write a checkpoint with weights, optimizer, data cursor and tokenizer; `train.py` can resume from it.

        Args:
            folder: the save folder; None: the configuration's `save`.

        Returns:
            The `global_step<N>` folder, for `load_checkpoint` and `export_hf`.

        Raises:
            ConfigError: there is no folder.
            CheckpointError: the checkpoint cannot be written.
        """
        folder = folder or self.run.checkpoint.save
        if folder is None:
            raise ConfigError("there is no folder to save to", hint='trainer.save("runs/mine/checkpoints"), or the key save')
        saver = Saver(background=False)
        return assemble.write_checkpoint(self.run, self._components, saver, folder, self._state, self._continued.facts)

    def close(self) -> None:
        """Stop prefetching and release the engine's resources."""
        if self._stop_prefetch is not None:
            self._stop_prefetch()
        self.engine.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def train(config: ConfigLike, **overrides: Any) -> Run:
    """A complete run in this process, as with `train.py`: run folder, metrics, evaluations, checkpoints, plot.

    Args:
        config: a loaded configuration, the name of a YAML, or a mapping of keys.
        **overrides: keys that override the configuration, see `load_config`.

    Returns:
        `.state.iteration`, `.stop` (reason of an early stop, else None), `.evaluations`, `.exit_code`.

    Raises:
        UserError: a mistake in configuration, data or checkpoint, or a run that cannot continue.
    """
    env = read_rank_environment()
    run = as_run(config, world_size=env.world_size, **overrides)
    require_data(run)
    return assemble.train(run, env, ("linear_neox.train", run.name))
